"""Runs of language models: likelihoods against those of the loaded model, metrics, and what is refused."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

import clframe
from clframe.build import build
from clframe.config.load import load_config
from clframe.core import Batch
from clframe.data.samples import TensorSamples
from clframe.data.tokenizer import TextTokenizer
from clframe.errors import ClframeError, UnsupportedError
from clframe.functional.language import next_token_targets, token_nll
from clframe.nn import Network
from clframe.nn.backbones.decoder import decoder
from clframe.nn.frozen import top_logits_reader
from clframe.nn.low_rank import AdaptedLinear
from clframe.nn.token_heads import TokenLinear
from clframe.report.language_tables import perplexity_tables
from clframe.report.shown_metrics import shown_metrics
from clframe.results import Result
from clframe.stream import build_stream
from clframe.tables import to_text
from clframe.targets.export import export_run
from clframe.targets.export_transformers import write_llama
from strategies import DERpp, LoRA

WORDS = {"prose": "the quick brown fox jumps over the lazy dog\n", "code": "def area(r):\n    return 3.14 * r ** 2\n"}
SMALL = (
    "benchmark.experiences=2", "benchmark.context=8", "benchmark.vocabulary=280", "backbone.width=8",
    "backbone.depth=2", "backbone.heads=2", "trainer.batch_size=16", "trainer.figures=none", "trainer.loggers=[csv]",
)  # fmt: skip


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    path = tmp_path_factory.mktemp("texts")
    for name, words in WORDS.items():
        (path / f"{name}_train.txt").write_text(words * 40, encoding="utf-8")
        (path / f"{name}_test.txt").write_text(words[5:] + words * 6, encoding="utf-8")
    return path


def overrides(texts, *more):
    small = [text for text in SMALL if "backbone=mlp" not in more or not text.startswith("backbone.")]
    return [f"benchmark.path={texts}", *small, *more]


@pytest.fixture(scope="module")
def run(texts, tmp_path_factory):
    strategy = "strategy='er(memory=10) + exits(at=[block1])'"
    return clframe.run("language_model", overrides(texts, strategy), output=tmp_path_factory.mktemp("runs"))


def test_likelihoods_are_those_of_the_loaded_model(run, texts):
    model = clframe.load(run.run_folder)
    benchmark = build_stream(load_config("language_model", overrides(texts)))[1]
    for domain, samples in enumerate(benchmark.test):
        x = samples.prepare(samples.raw(torch.arange(len(samples))))
        with torch.no_grad():
            logits = model.network(x).logits
        nats = [float(token_nll(logits_NV, next_token_targets(x)).double().mean()) for logits_NV in logits]
        assert run.test_samples[domain] == 8 * len(samples)  # tokens
        assert [nll_E[domain] for nll_E in run.exits[-1].nll_KE] == pytest.approx(nats, rel=1e-5)
        assert run.nll_matrix[-1][domain] == pytest.approx(nats[-1], rel=1e-5)
        assert run.perplexity_matrix[-1][domain] == pytest.approx(math.exp(nats[-1]), rel=1e-5)
        right = (logits[-1].argmax(1) == next_token_targets(x)).double().mean()
        assert run.accuracy_matrix[-1][domain] == pytest.approx(float(right))


def test_with_validation_data_the_numbers_of_exits_are_those_of_the_test_text(texts, tmp_path):
    given = overrides(texts, "strategy='exits(at=[block1]) + early_exit'", "benchmark.validation=0.2", "optimizer.lr=0.03")
    held_out = clframe.run("language_model", given, output=tmp_path)
    model, benchmark = clframe.load(held_out.run_folder), build_stream(load_config("language_model", given))[1]
    assert len(held_out.exits[-1].nll_KE[0]) == len(benchmark.test) and held_out.exits[-1].points.points is not None
    for domain, (samples, held) in enumerate(zip(benchmark.test, benchmark.validation, strict=True)):
        nats = []
        for of in (samples, held):
            x = of.prepare(of.raw(torch.arange(len(of))))
            with torch.no_grad():
                logits = model.network(x).logits
            nats.append([float(token_nll(logits_NV, next_token_targets(x)).double().mean()) for logits_NV in logits])
        assert [nll_E[domain] for nll_E in held_out.exits[-1].nll_KE] == pytest.approx(nats[0], rel=1e-5)
        assert nats[0] != pytest.approx(nats[1], rel=1e-3)  # the two texts differ
    for record, row in zip(held_out.exits, held_out.nll_matrix, strict=True):
        assert record.nll_KE[-1] == pytest.approx(row, rel=1e-12)
    assert held_out.exit_forgetting_nats[-1] == pytest.approx(held_out.forgetting_nats, rel=1e-12)


def test_metrics_are_the_formulas_in_nats(run):
    (first, _), (then, last) = run.nll_matrix
    assert run.final_nats_per_token == pytest.approx((then + last) / 2)
    assert run.final_perplexity == pytest.approx(math.exp((then + last) / 2))
    assert run.forgetting_nats == pytest.approx(then - first)
    assert run.backward_transfer_nats == pytest.approx(first - then)
    assert run.learning_nats == pytest.approx((first + last) / 2)
    assert run.exit_forgetting_nats[-1] == pytest.approx(run.forgetting_nats)


def test_a_run_shows_perplexity_and_stores_its_tokenizer(run, texts):
    stored = json.loads(Path(run.run_folder, "results.json").read_text())
    assert stored["nll_matrix"] == [pytest.approx(row) for row in run.nll_matrix]
    assert Result.from_json(f"{run.run_folder}/results.json").to_json() == run.to_json()
    matrix, exits = (to_text(table) for table in perplexity_tables([run]))
    assert "after prose" in matrix and f"{run.perplexity_matrix[0][1]:.1f}" in matrix
    assert f"{math.exp(run.exits[-1].nll_KE[0][1]):.1f}" in exits and "block1" in exits
    assert next(iter(shown_metrics([run]))) == "final_perplexity"
    log = Path(run.run_folder, "log.txt").read_text()
    assert f"(code): perplexity {run.perplexity_matrix[0][0]:.2f}" in log
    tokenizer = TextTokenizer(Path(run.run_folder, "tokenizer.json").read_text())
    assert tokenizer.decode(tokenizer.encode(WORDS["code"])) == WORDS["code"]
    assert run.metrics.keys() >= {"final_perplexity", "final_average_accuracy"}


def test_classes_are_not_predicted(run):
    with pytest.raises(ClframeError, match="found the run of a language model.*its methods generate and score take text"):
        clframe.load(run.run_folder).predict(torch.zeros(1, 9, dtype=torch.long))


def test_an_exported_run_is_the_same_llama(run, tmp_path):
    transformers = pytest.importorskip("transformers")
    folder = export_run(run.run_folder, format="transformers", output=tmp_path / "llama")
    model = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    network = clframe.load(run.run_folder).network
    ids = torch.randint(280, (3, 9), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(model(ids[:, :-1]).logits.flatten(0, 1), network(ids).last, rtol=1e-4, atol=1e-5)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    own = TextTokenizer(Path(run.run_folder, "tokenizer.json").read_text())
    assert tokenizer(WORDS["code"])["input_ids"] == own.encode(WORDS["code"]).tolist()
    with pytest.raises(UnsupportedError, match="--format transformers writes it"):
        export_run(run.run_folder, format="pt2", output=tmp_path / "other")


def test_only_a_decoder_with_gates_is_a_llama(tmp_path):
    adapted = Network(decoder((5,), vocabulary=20, width=8, depth=1, heads=2, tied=False))
    LoRA(rank=2, merge="never", after=0).setup_network(adapted)
    for part in adapted.modules():
        if isinstance(part, AdaptedLinear):
            part.draw()
            torch.nn.init.normal_(part.up_OR, std=0.1)
    write_llama(adapted, tmp_path)  # compares the logits, those of active adapters too
    assert (tmp_path / "model.safetensors").is_file()
    plain = Network(decoder((5,), vocabulary=20, width=8, depth=1, heads=2, ffn="relu"))
    with pytest.raises(UnsupportedError, match="needs backbone=decoder with ffn=swiglu"):
        write_llama(plain, tmp_path / "none")


@pytest.mark.parametrize(
    "override, message",
    [
        ("backbone=mlp", "backbone.name: found mlp for language_model, of which every token is predicted"),
        ("backbone.vocabulary=300", "backbone.vocabulary: found 300, but the tokenizer of language_model has 280 ids"),
        ("strategy=bic", "strategy: 'bic' is not defined for a language model"),
        ("strategy='er_ace + er'", "strategy: 'er_ace' is not defined for a language model"),
        ("benchmark={protocol: permuted, class_order: seeded}", "benchmark.protocol: found permuted for text"),
        ("trainer.devices=2", "trainer.devices: found 2 for a language model"),
        ("strategy='exits(control=last)'", "components.exits.control: found last with a language model"),
    ],
)
def test_what_has_no_meaning_for_text_is_refused(texts, override, message):
    with pytest.raises(ClframeError, match=message):
        clframe.explain("language_model", overrides(texts, override))


def test_a_language_model_is_refused_for_other_data():
    with pytest.raises(ClframeError, match="decoder: found inputs of shape"):
        build(load_config("quickstart", ["backbone=decoder"]))


def test_stored_logits_are_the_largest_ones_of_each_token():
    torch.manual_seed(0)
    net = Network(decoder((5,), vocabulary=20, width=8, depth=1, heads=2), exits=[("embed", TokenLinear(8, vocabulary=20))])
    samples = TensorSamples(torch.randint(0, 20, (3, 5)), torch.zeros(3, dtype=torch.long), mean=(), std=())
    column = top_logits_reader(net, samples, batch_size=2)(torch.tensor([2, 0]))
    assert column["logits"].shape == column["tokens"].shape == (2, 4, 2, 16)
    windows = samples.prepare(samples.raw(torch.tensor([2, 0])))
    batch = Batch(windows, torch.zeros(2), torch.tensor([1.0, 0.5]), extras=column).by_token()
    logits = net.eval()(windows).logits
    for k, matched in enumerate(DERpp(memory=4).at_stored(logits, batch.extras)):
        torch.testing.assert_close(matched, batch.extras["logits"][:, k])
        torch.testing.assert_close(matched, logits[k].sort(dim=1, descending=True).values[:, :16])
    assert batch.y.tolist() == windows[:, 1:].flatten().tolist()
    assert batch.weight_B.tolist() == [1.0] * 4 + [0.5] * 4


@pytest.mark.slow
@pytest.mark.parametrize(
    "strategy", ["lwf", "ewc(samples=8)", "ewc(samples=8, labels='sampled')", "si", "mas(samples=8)", "sparsity",
                 "moe(experts=4)", "lora", "der(memory=10)", "derpp(memory=10) + exits", "exits + early_exit", "label_smoothing", "joint",
                 "er(memory=10, selection='herding')", "er(memory=10, selection='reservoir', update='step')"],
)  # fmt: skip
def test_every_component_for_tokens_trains(texts, strategy, tmp_path):
    result = clframe.run("language_model", overrides(texts, f'strategy="{strategy}"'), output=tmp_path)
    assert all(math.isfinite(nats) for row in result.nll_matrix for nats in row)
    assert result.nll_matrix[0][0] < math.log(280)
