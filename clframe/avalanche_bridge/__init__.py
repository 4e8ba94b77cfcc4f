"""Avalanche: its strategies on Lightning Fabric, its plugins by name, and repairs of what is broken upstream.

Avalanche is imported here, before any module below needs it, because then it can be done quietly.
"""

from clframe.data.avalanche import import_avalanche

import_avalanche()
