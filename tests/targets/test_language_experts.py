"""Conversion of causal language models to experts: perplexity against cost, generation, and the folder."""

from __future__ import annotations

import csv
import json

import pytest
import torch
from torch.nn import functional as F

from clframe.cli import main
from clframe.data.target import IGNORED
from clframe.errors import DataError, RunFolderError
from clframe.moe import DynamicK, TopK, routed_layers, set_gate, to_experts
from clframe.moe.conversion.options import Options
from clframe.moe.conversion.study import measure_conversion, moefy_target, record
from clframe.moe.router import ALL
from clframe.targets import open_target
from clframe.targets.converted import load_language_model
from tests.targets.test_language_models import LINES, family, learned, make_tokenizer


@pytest.fixture(scope="module")
def lines(tmp_path_factory):
    file = tmp_path_factory.mktemp("lines") / "lines.txt"
    file.write_text("\n".join((*LINES, "where is the rent", "pay my card now")) + "\n")
    return file


def greedy(model, ids, *, cache=True, tokens=8):
    mask = torch.ones_like(ids)
    return model.generate(ids, attention_mask=mask, max_new_tokens=tokens, do_sample=False, use_cache=cache,
                          pad_token_id=0, eos_token_id=None)  # fmt: skip


def perplexity(target, part, gate):
    set_gate(target.model, gate)
    nats = []
    for batch in target.batches(part, size=3):
        valid = batch.targets != IGNORED
        with torch.no_grad():
            logits = target.predict(target.model, batch.inputs)
        nats.append(F.cross_entropy(logits[valid], batch.targets[valid], reduction="none"))
    return torch.cat(nats).double().mean().exp().item()


@pytest.mark.slow
def test_perplexity_against_cost(llama, lines):
    target = learned(open_target(str(llama), data=str(lines), divide=True), steps=30)
    sizes = [len(part) for part in (target.splits.fit, target.splits.validation, target.splits.test)]
    assert sizes == [4, 1, 1]
    dense = perplexity(target, "test", ALL)
    study = moefy_target(target, Options(sparsify=0, epochs=1, experts=4, router_width=4, tau=0.9))
    tree = record(study)
    assert tree["perplexity"] == {"dense": pytest.approx(dense)}
    by_tau = {row["tau"]: row["test"] for row in tree["curve"]}
    assert by_tau[1.0]["perplexity"] == pytest.approx(dense)
    assert by_tau[0.4]["perplexity"] == pytest.approx(perplexity(target, "test", DynamicK(tau=0.4)), rel=1e-5)
    by_k = {row["k"]: row["test"] for row in tree["top_k"]}
    assert list(by_k) == [1, 2, 3, 4] and by_k[4]["perplexity"] == pytest.approx(dense)
    assert by_k[2]["perplexity"] == pytest.approx(perplexity(target, "test", TopK(k=2)), rel=1e-5)
    phases = {(one.phase, one.batch) for times in study.times.values() for one in times}
    assert phases == {("prefill", 1), ("decode", 1)}  # one test text, so that no larger batch exists
    assert all(one.dense > 0 and one.converted > 0 for times in study.times.values() for one in times)
    (batch,) = target.batches("test")
    length = batch.targets.shape[1]
    assert by_tau[1.0]["macs_per_token"] == pytest.approx(tree["dense_macs"] / length)
    # Two layers lose two of four experts, each with 24 / 4 neurons of three weight rows, and gain their routers.
    saved = 2 * (2 * 6 * 3 * 16 - 4 * (16 + 4))
    assert by_k[2]["macs_per_token"] == pytest.approx(tree["dense_macs"] / length - saved)
    untimed = measure_conversion(study.converted, sizes=())
    assert untimed.points == study.points and untimed.times.keys() == study.times.keys()
    assert not any(untimed.times.values())


def test_generation_with_a_cache(llama):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(llama).eval()
    for weight in model.parameters():
        weight.data *= 6  # far from uniform logits, so that a wrong position would change tokens
    ids = torch.tensor([[2, 5, 6, 7], [2, 9, 4, 8]])
    dense = greedy(model, ids)
    to_experts(model, experts=4, router_width=4)
    assert torch.equal(greedy(model, ids), dense) and dense.shape == (2, 12)
    set_gate(model, DynamicK(tau=0.3))
    assert torch.equal(greedy(model, ids), greedy(model, ids, cache=False))


@pytest.mark.slow
def test_the_command_and_its_folder(llama, lines, tmp_path, capsys):
    out = tmp_path / "out"
    words = ["--sparsify", "1", "--epochs", "1", "--experts", "4", "--router-width", "4", "--tau", "0.5", "--length", "6"]
    assert main(["moefy", str(llama), "--data", str(lines), *words, "--stride", "2", "--output", str(out)]) == 0
    printed = capsys.readouterr().out
    assert "perplexity on test data: dense" in printed and "note: the dense model has perplexity" in printed
    tree = json.loads((out / "moefy.json").read_text())
    rows = list(csv.DictReader((out / "curve.csv").read_text().splitlines()))
    assert [float(row["test_perplexity"]) for row in rows] == [row["test"]["perplexity"] for row in tree["curve"]]
    assert "Perplexity against cost" in (out / "moefy.md").read_text() and (out / "figures/perplexity_cost.svg").is_file()
    assert "Perplexity within a budget" in printed and "decoding, batch 1" in (out / "moefy.md").read_text()
    model, tokenizer = load_language_model(out)
    assert {layer.gate for layer in routed_layers(model).values()} == {DynamicK(tau=0.5)}
    ids = torch.tensor(tokenizer([LINES[0]])["input_ids"])
    state = torch.load(out / "weights.pt", weights_only=True)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert greedy(model, ids).shape == (1, ids.shape[1] + 8) and not model.training
    row = next(row["test"] for row in tree["curve"] if row["tau"] == 0.5)
    target = open_target(str(llama), data=str(lines), divide=True, max_length=6, stride=2)
    object.__setattr__(target, "model", model)
    assert perplexity(target, "test", DynamicK(tau=0.5)) == pytest.approx(row["perplexity"], rel=1e-5)
    (out / "dense" / "config.json").unlink()
    with pytest.raises(RunFolderError, match=r"found no dense/config.json; give the folder"):
        load_language_model(out)


def test_too_few_texts(llama, tmp_path):
    (tmp_path / "one.txt").write_text("pay my\nbill\n")
    with pytest.raises(DataError, match="one: found 2 texts, too few to divide into training and test data"):
        open_target(str(llama), data=str(tmp_path / "one.txt"), divide=True)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llama_tied", "llama_bf16", "qwen3", "gemma2", "gemma3", "gpt2", "opt"])
def test_families(name, tmp_path):
    pytest.importorskip("transformers")
    torch.manual_seed(3)
    make_tokenizer(tmp_path)
    model = family(name).eval()
    ids = torch.tensor([[2, 5, 6, 7]])
    dense = greedy(model, ids)
    layers = to_experts(model, experts=4, router_width=4)
    assert len(layers) == 2
    with torch.no_grad():
        converted = greedy(model, ids)
    assert converted.shape == dense.shape
    if name != "llama_bf16":  # sums of experts are rounded differently in half precision
        assert torch.equal(converted, dense)
    set_gate(model, TopK(k=2))
    assert torch.equal(greedy(model, ids), greedy(model, ids, cache=False))
