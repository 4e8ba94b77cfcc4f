"""Runs of language models that were stopped inside an experience, and runs on a GPU."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from language_runs import WORDS, options_of, write_domains
from power_cuts import assert_same_run, cut_run, without_pictures

import clframe
from clframe.errors import RunFolderError
from clframe.training import capture


@pytest.fixture
def early(monkeypatch):
    """Record in short experiences too."""
    monkeypatch.setattr(capture, "WARM", 2)
    monkeypatch.setattr(capture, "FEWEST", 2)


CUTS = {
    "er + exits + lwf": (["strategy=er(memory=10) + exits(at=[block1]) + lwf"], 1),
    "lora": (["strategy=lora", "trainer.engine=trainer"], 1),
    "adapters for each domain": (["strategy=lora(merge=apart)"], 2),
    "lasting adapters": (["strategy=lora(merge=never)"], 2),
    "derpp": (["strategy=derpp(memory=10)"], 2),
    "reservoir": (["strategy=er(memory=10, update=step, selection=reservoir)", "trainer.accumulate=2"], 2),
    "ewc, average of the weights": (["strategy=ewc(samples=8)", "trainer.ema=0.9", "backbone.dropout=0.1"], 2),
    "online": (["strategy=er(memory=10)", "benchmark.online=40"], 2),
}  # fmt: skip
DEFAULT = ("er + exits + lwf",)


def check_resumption(case, folder, *more, sizes=True):
    options, cuts = CUTS[case]
    inside = ["trainer.checkpoint.every=2", "trainer.log_every=2"]
    given = options_of(write_domains(folder / "texts"), *options, *inside, *more)
    patch = without_pictures()
    try:
        whole, copies = cut_run(given, folder, cuts=cuts, seed=case, config="language_model")
        assert len(copies) == cuts
        for _, copy in copies:
            clframe.run(resume=copy)
            assert_same_run(whole, copy, sizes=sizes)
    finally:
        patch.undo()


@pytest.mark.parametrize("case", [pytest.param(c, marks=[] if c in DEFAULT else [pytest.mark.slow]) for c in CUTS])
def test_a_run_stopped_at_any_instant_ends_as_if_it_had_not_been(case, tmp_path):
    check_resumption(case, tmp_path)


@pytest.mark.slow
def test_a_run_is_not_resumed_with_another_tokenizer(tmp_path):
    texts = write_domains(tmp_path / "texts")
    result = clframe.run("language_model", options_of(texts, "strategy=naive"), output=tmp_path)
    assert clframe.run(resume=result.run_folder).nll_matrix == result.nll_matrix
    (texts / "prose_train.txt").write_text(WORDS["prose"] * 39 + WORDS["zahlen"])
    with pytest.raises(RunFolderError, match="the text has changed since the run began"):
        clframe.run(resume=result.run_folder)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("case", CUTS)
def test_so_it_does_on_a_gpu_with_deterministic_operations(case, tmp_path):
    check_resumption(case, tmp_path, "trainer.accelerator=cuda", "trainer.deterministic=true", sizes=False)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
@pytest.mark.parametrize("strategy", ["naive", "er(memory=10) + exits(at=[block1]) + lwf", "derpp(memory=10)", "lora",
                                      "lora(merge=apart)"])  # fmt: skip
def test_a_run_on_a_gpu_records_its_steps_and_agrees_with_eager_ones(strategy, precision, tmp_path, early):
    texts, found = write_domains(tmp_path / "texts"), {}
    for mode in ("auto", "false"):
        given = options_of(
            texts, f"strategy='{strategy}'", "trainer.accelerator=cuda", "trainer.deterministic=true",
            f"trainer.precision={precision}", f"trainer.capture={mode}", "trainer.epochs=3",
        )  # fmt: skip
        result = clframe.run("language_model", given, output=tmp_path / mode)
        figures = [row for row in recorded(result) if row["name"] == "captured_graphs"]
        assert bool(figures) == (mode == "auto")
        found[mode] = result
    for one, other in zip(found["auto"].nll_matrix, found["false"].nll_matrix, strict=True):
        assert one == pytest.approx(other, rel=1e-5)
    weights = [clframe.load(result.run_folder).network.state_dict() for result in found.values()]
    for name, value in weights[0].items():
        torch.testing.assert_close(value, weights[1][name], rtol=1e-4, atol=1e-5)


def recorded(result):
    return json.loads(Path(result.run_folder, "ledger.json").read_text())["ledger"]["figures"]
