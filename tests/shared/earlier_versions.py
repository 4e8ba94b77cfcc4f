"""Run folders as earlier versions have written them."""

from __future__ import annotations

from pathlib import Path

import torch


def remove_digests(run: Path | str) -> None:
    """Remove the digest of the data, which was added later, from the checkpoints of a run."""
    files = list((Path(run) / "checkpoints").glob("*.ckpt"))
    assert files
    for file in files:
        content = torch.load(file, weights_only=True)
        del content["data"]["digest"]
        torch.save(content, file)
