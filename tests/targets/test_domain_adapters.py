"""Language models with adapters for each domain: choice in evaluation, cost, and what is refused."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from language_runs import CONTEXT, VOCABULARY, WORDS, options_of, write_domains

import clframe
from clframe.accounting import count_macs, count_parameters
from clframe.api import extend
from clframe.data.sources.language import windows_of
from clframe.data.tokenizer import TextTokenizer
from clframe.errors import ClframeError
from clframe.functional.language import next_token_targets, token_nll
from clframe.nn import Network
from clframe.nn.backbones import mlp
from clframe.nn.backbones.decoder import decoder
from clframe.nn.generation import generate
from clframe.nn.low_rank import NONE, AdaptedLinear
from clframe.targets.evaluation import evaluate
from clframe.targets.export import export_run
from clframe.targets.run_tokenizer import run_tokenizer
from strategies import LoRA

DOMAINS, RANK = tuple(WORDS), 2
APART = "strategy='lora(merge=apart, rank=2)'"
KNOWN = ("strategy='lora(merge=apart, rank=2, choose=domain)'", "benchmark.protocol=task_incremental")
FAST = ("trainer.epochs=2", "optimizer.lr=0.02")


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    return write_domains(tmp_path_factory.mktemp("texts"))


@pytest.fixture(scope="module")
def runs(texts, tmp_path_factory):
    """One run whose evaluations choose by likelihood, and one whose evaluations know the domain."""
    return [
        clframe.run("language_model", options_of(texts, *more, *FAST, domains=DOMAINS), output=tmp_path_factory.mktemp("runs"))
        for more in ((APART,), KNOWN)
    ]


def layers(model):
    return [part for part in model.network.modules() if isinstance(part, AdaptedLinear)]


def encoder_of(model):
    return TextTokenizer(run_tokenizer(model.folder, model.inputs))


def nll_by_adapter(model, ids_BS):
    """nll_DBT with the weights alone and with each kept adapter."""
    found = []
    for chosen in (NONE, 0, 1):
        for layer in layers(model):
            layer.chosen = chosen
        with torch.no_grad():
            logits_NV = model.network.run_once(ids_BS).last
        found.append(token_nll(logits_NV, next_token_targets(ids_BS)).reshape(len(ids_BS), -1))
    for layer in layers(model):
        layer.chosen = 1
    return torch.stack(found)


def test_known_domains_are_never_forgotten(runs):
    known = runs[1].nll_matrix
    for experience in range(3):
        assert {row[experience] for row in known[experience:]} == {known[experience][experience]}
    assert runs[1].forgetting_nats == 0 and runs[0].forgetting_nats != 0
    again = evaluate(runs[1].run_folder)
    assert [domain.nats for domain in again.domains] == pytest.approx(known[-1], rel=1e-6) and not again.notes


def test_tokens_of_unknown_domains_have_the_adapter_that_fits_the_tokens_before(runs, texts):
    model = clframe.load(runs[0].run_folder)
    means = []
    for name in DOMAINS:
        text = (texts / f"{name}_test.txt").read_text()
        nll_DBT = nll_by_adapter(model, windows_of(encoder_of(model).encode(text), context=CONTEXT))
        chosen = []
        for nll_DT in nll_DBT.unbind(1):
            for t in range(CONTEXT):
                before = nll_DT[:, :t].sum(1).tolist()
                best = 2 if t == 0 else before.index(min(before))
                chosen.append(float(nll_DT[best, t]))
        means.append(sum(chosen) / len(chosen))
    assert runs[0].nll_matrix[-1] == pytest.approx(means, rel=1e-5)
    found = evaluate(runs[0].run_folder)
    assert [domain.nats for domain in found.domains] == pytest.approx(means, rel=1e-5)
    assert found.notes == ("adapters are chosen by the likelihood of the text before",)
    assert found.macs == pytest.approx(runs[0].macs / CONTEXT, abs=1)


def test_a_prediction_costs_a_pass_with_each_adapter_or_one(runs):
    plain = Network(decoder((CONTEXT + 1,), vocabulary=VOCABULARY, width=8, depth=2, heads=2))
    once, sides = count_macs(plain, (CONTEXT + 1,)), 0
    for part in plain.backbone.modules():
        sides += sum(part.weight.shape) if isinstance(part, torch.nn.Linear) else 0
    adapter = CONTEXT * RANK * sides
    assert runs[0].macs == 3 * once + 2 * adapter and runs[1].macs == once + adapter
    for run, macs in zip(runs, (3 * once + 2 * adapter, once + adapter), strict=True):
        assert run.parameters == count_parameters(plain) + 3 * RANK * sides  # two kept, and the one in training
        assert run.exits[-1].macs_K == (macs,) and run.exits[-1].backbone_macs == once + adapter
        ledger = json.loads(Path(run.run_folder, "ledger.json").read_text())["ledger"]["predictions"]
        last = [row for row in ledger["parts"] if row["experience"] == 2]
        assert sum(row["macs"] for row in last) == macs
        variants = [row["macs"] for row in last if row["name"] == "other variants"]
        assert variants == ([2 * once + adapter] if run is runs[0] else [])


def test_tokens_of_a_known_domain_cost_a_pass_with_its_adapter(runs, texts):
    plain = Network(decoder((CONTEXT + 1,), vocabulary=VOCABULARY, width=8, depth=2, heads=2))
    once = count_macs(plain, (CONTEXT + 1,))
    adapter = runs[1].macs - once  # of a window; the first domain has none
    assert adapter > 0
    found = evaluate(runs[1].run_folder)
    tokens = [domain.tokens for domain in found.domains]
    mean = (once * tokens[0] + (once + adapter) * sum(tokens[1:])) / (CONTEXT * sum(tokens))
    assert found.macs == pytest.approx(mean, rel=1e-9) and found.macs_K == pytest.approx((mean,), rel=1e-9)
    entries = json.loads(Path(runs[1].run_folder, "ledger.json").read_text())["ledger"]["entries"]
    rows = [row for row in entries if row["phase"] == "evaluation" and row["experience"] == 2]
    assert sum(row["macs"] for row in rows) == round(sum(tokens) * mean)
    # The first evaluations know one adapter: none.
    assert [row["macs"] for row in entries if row["phase"] == "evaluation"][:2] == [once * sum(tokens) // CONTEXT] * 2


def test_texts_are_scored_and_continued_with_the_adapters_of_a_given_domain(runs):
    model = clframe.load(runs[0].run_folder)
    text = WORDS["code"]
    ids = encoder_of(model).encode(text)
    for number, name in enumerate(DOMAINS):
        found = model.score(text, domain=name)
        ids_BS = windows_of(ids, context=CONTEXT)
        whole = nll_by_adapter(model, ids_BS)[number]
        assert found[0].tokens == len(ids) - 1 and not found.notes
        rest = ids[len(ids_BS) * CONTEXT :]
        nats = float(whole.double().sum())
        if len(rest) > 1:
            nats += float(nll_by_adapter(model, rest[None])[number].double().sum())
        assert found[0].nats == pytest.approx(nats / (len(ids) - 1), rel=1e-5)
    prompt = ids[:4].tolist()
    given = encoder_of(model).decode(prompt)
    assert encoder_of(model).encode(given).tolist() == prompt
    nats_D = nll_by_adapter(model, torch.tensor([prompt])).sum(2)[:, 0].tolist()
    best = DOMAINS[nats_D.index(min(nats_D))]
    chosen = model.generate(given, tokens=4)
    assert chosen[0].ids == model.generate(given, tokens=4, domain=best)[0].ids and chosen.notes
    for number, name in enumerate(DOMAINS):
        for layer in layers(model):
            layer.chosen = number - 1
        expected = generate(model.network, prompt, 4).ids
        assert model.generate(given, tokens=4, domain=name)[0].ids == expected
    with pytest.raises(ClframeError, match="--domain: unknown domain 'cod'; did you mean 'code'"):
        model.generate(given, tokens=2, domain="cod")


def test_such_a_model_is_not_exported(runs, tmp_path):
    with pytest.raises(ClframeError, match="adapters of several domains .*lora.*, between which a Llama cannot choose"):
        export_run(runs[0].run_folder, format="transformers", output=tmp_path / "llama")


@pytest.mark.parametrize(
    "more, message",
    [
        ((KNOWN[0],), "components.lora.choose: found domain, but evaluations do not know the experience"),
        (("strategy='lora(choose=domain)'", KNOWN[1]), "components.lora.choose: found domain with merge=experience"),
        (("strategy='lora(merge=apart) + er(memory=9)'",), "'lora' with merge=apart has separate adapters .*'er' would mix"),
        (("strategy='lora(merge=apart) + lwf'",), "'lwf' would mix"),
        (("strategy='lora(merge=apart) + exits'",), "'exits' would mix"),
        (("strategy='lora(merge=apart) + ewc(samples=8)'",), "'ewc' keeps values of single weights, and 'lora'"),
    ],
)
def test_what_cannot_take_effect_is_refused(texts, more, message):
    with pytest.raises(ClframeError, match=message):
        clframe.explain("language_model", options_of(texts, *more))


def test_classifiers_have_no_adapters_for_each_domain():
    with pytest.raises(ClframeError, match="components.lora.merge: found apart for a classifier"):
        LoRA(merge="apart").setup_network(Network(mlp((4,))))
    clframe.parse("lora(merge=apart) + label_smoothing").check_needs()


@pytest.mark.slow
@pytest.mark.parametrize("more", [(APART,), KNOWN, (APART, "trainer.ema=0.9")])
def test_an_extension_trains_adapters_for_a_further_domain(more, texts, tmp_path):
    parent = clframe.run("language_model", options_of(texts, *more, *FAST), output=tmp_path / "parent")
    child = extend(parent.run_folder, [f"benchmark.path={texts}", "benchmark.domains=[zahlen]"])
    options = options_of(texts, *more, *FAST, f"benchmark.tokenizer={parent.run_folder}", domains=DOMAINS)
    whole = clframe.run("language_model", options, output=tmp_path / "whole")
    assert child.nll_matrix[-1] == whole.nll_matrix[-1] and math.isnan(child.nll_matrix[0][2])
    ours, theirs = (clframe.load(result.run_folder).network.state_dict() for result in (child, whole))
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
