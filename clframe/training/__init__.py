"""Training: the Lightning module, Avalanche's loop on Lightning, checkpoints and TensorBoard.

Avalanche is imported here, before any module below needs it, because then it can be done quietly.
"""

from clframe.data.avalanche import import_avalanche

import_avalanche()
