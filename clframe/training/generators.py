"""States of the global random generators: torch on every device, numpy and Python."""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor


def generator_states() -> dict[str, Any]:
    """Return the states of all global generators as tensors and numbers.

    >>> states = generator_states()
    >>> first = torch.rand(3), np.random.rand(), random.random()
    >>> set_generator_states(states)
    >>> bool((torch.rand(3) == first[0]).all()), np.random.rand() == first[1], random.random() == first[2]
    (True, True, True)
    """
    _, keys, position, has_gauss, cached = np.random.get_state()
    version, words, gauss = random.getstate()
    states: dict[str, Any] = {
        "torch": torch.get_rng_state(),
        "numpy": {
            "keys": torch.from_numpy(np.asarray(keys).astype(np.int64)),
            "position": int(position),
            "has_gauss": int(has_gauss),
            "cached": float(cached),
        },
        "python": {"version": version, "words": torch.tensor(words, dtype=torch.int64), "gauss": gauss},
    }
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        states["cuda"] = torch.cuda.get_rng_state_all()
    if torch.backends.mps.is_available():
        states["mps"] = torch.mps.get_rng_state()
    return states


def set_generator_states(states: Mapping[str, Any]) -> None:
    """Set what :func:`generator_states` returned; generators of devices that this machine lacks are left out."""
    torch.set_rng_state(_on_host(states["torch"]))
    numpy, python = states["numpy"], states["python"]
    keys = numpy["keys"].numpy().astype(np.uint32)
    np.random.set_state(("MT19937", keys, numpy["position"], numpy["has_gauss"], numpy["cached"]))
    random.setstate((python["version"], tuple(python["words"].tolist()), python["gauss"]))
    if "cuda" in states and torch.cuda.is_available():
        for device, state in enumerate(states["cuda"][: torch.cuda.device_count()]):
            torch.cuda.set_rng_state(_on_host(state), device)
    if "mps" in states and torch.backends.mps.is_available():
        torch.mps.set_rng_state(_on_host(states["mps"]))


def _on_host(state: Tensor) -> Tensor:
    return state.cpu()
