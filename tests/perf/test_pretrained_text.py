"""Vectors embedded once are those that the encoder gives, and strategies run on them."""

from __future__ import annotations

import numpy as np
import pretrained_text
import pytest
import torch

from clframe.nn import BACKBONES

pytest.importorskip("transformers", exc_type=ImportError)


def test_texts_of_like_length_are_embedded_together_and_come_back_in_order():
    torch.manual_seed(0)
    backbone = BACKBONES.get("bert")((9,), vocabulary=50, width=8, depth=1, heads=2, pooling="mean").eval()
    ids_NT = torch.zeros(7, 9, dtype=torch.int32)
    for row, length in enumerate((3, 9, 1, 5, 3, 8, 2)):
        ids_NT[row, :length] = torch.randint(1, 50, (length,))
    with torch.inference_mode():
        alone = torch.cat([backbone(ids_NT[row : row + 1]) for row in range(7)])
    torch.testing.assert_close(pretrained_text.embedded(ids_NT, backbone, size=3), alone)


def test_a_row_is_run_on_vectors(tmp_path):
    generator = np.random.default_rng(0)
    centers, y = generator.normal(size=(20, 6)), np.repeat(np.arange(20), 8)
    vectors = {
        f"x_{part}": (centers[y] + 0.05 * generator.normal(size=(160, 6))).astype(np.float32)
        for part in ("train", "test")
    }
    path = tmp_path / "vectors.npz"
    np.savez(path, **vectors, y_train=y, y_test=y)
    results = [pretrained_text.run(path, tmp_path, "simplecil", seed) for seed in (0, 1)]
    assert all(len(result.accuracy_matrix) == 10 and result.final_average_accuracy > 0.95 for result in results)
    line = pretrained_text.line("simplecil", results)
    assert line.startswith("| simplecil | ") and line.endswith(" | 0.0 |")
