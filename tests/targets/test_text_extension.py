"""Extensions of language models by further domains: a chain equals one run, with one tokenizer."""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from earlier_versions import remove_digests
from language_runs import VOCABULARY, WORDS, options_of, write_domains

import clframe
from clframe.api import extend
from clframe.cli import main
from clframe.data.sources.language import language_model
from clframe.data.tokenizer import train_tokenizer
from clframe.errors import ClframeError
from clframe.targets.evaluation import evaluate
from clframe.targets.extension import plan_extension

STRATEGY = "strategy='er(memory=10) + exits(at=[block1])'"


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    return write_domains(tmp_path_factory.mktemp("texts"))


@pytest.fixture(scope="module")
def parent(texts, tmp_path_factory):
    return clframe.run("language_model", options_of(texts, STRATEGY), output=tmp_path_factory.mktemp("parent"))


@pytest.fixture(scope="module")
def child(parent, texts, tmp_path_factory):
    given = [f"benchmark.path={texts}", "benchmark.domains=[zahlen]"]
    return extend(parent.run_folder, given, output=tmp_path_factory.mktemp("child"))


def tokenizer_of(result):
    return Path(result.run_folder, "tokenizer.json").read_text()


def same(one, other):
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    return repr(one) == repr(other)


def test_a_chain_equals_one_run_over_the_same_domains(parent, child, texts, tmp_path):
    """With the tokenizer of the first two domains, bit for bit."""
    options = options_of(texts, STRATEGY, f"benchmark.tokenizer={parent.run_folder}", domains=tuple(WORDS))
    whole = clframe.run("language_model", options, output=tmp_path)
    ours, theirs = (clframe.load(result.run_folder) for result in (child, whole))
    assert same(ours.network.state_dict(), theirs.network.state_dict())
    assert same(ours.learner.state, theirs.learner.state)
    assert child.nll_matrix[-1] == whole.nll_matrix[-1] and child.test_samples == whole.test_samples
    assert child.exits[-1].nll_KE == whole.exits[-1].nll_KE
    for metric in ("final_perplexity", "forgetting_nats", "backward_transfer_nats", "learning_nats", "forgetting"):
        assert child.metrics[metric] == whole.metrics[metric]
    shutil.copytree(child.run_folder, copy := tmp_path / "copy")  # whose parent is gone, with its tokenizer
    config = copy / "config.yaml"
    config.write_text(config.read_text().replace(str(parent.run_folder), str(tmp_path / "gone")))
    again = evaluate(copy)
    assert [domain.name for domain in again.domains] == list(WORDS)
    assert [domain.nats for domain in again.domains] == pytest.approx(child.nll_matrix[-1], rel=1e-6)


def test_scores_on_a_domain_before_it_was_learned_are_undefined(parent, child):
    for row, before in zip(child.nll_matrix, parent.nll_matrix, strict=False):
        assert row[:2] == before and math.isnan(row[2])
    assert [math.isnan(row[2]) for row in child.accuracy_matrix] == [True, True, False]
    assert all(math.isnan(nll_E[2]) for nll_E in child.exits[0].nll_KE)
    assert math.isnan(child.metrics["forward_transfer_nats"]) and "forward_transfer_nats" in child.undefined


def test_the_tokenizer_is_that_of_the_run(parent, child, texts, tmp_path):
    assert tokenizer_of(child) == tokenizer_of(parent)
    config = Path(child.run_folder, "config.yaml").read_text()
    assert config.count(f"{parent.run_folder}/tokenizer.json") == 2  # of the new text, and of that of the parent
    shutil.copytree(texts, changed := tmp_path / "changed")
    (changed / "prose_train.txt").write_text(WORDS["prose"] * 39 + WORDS["zahlen"])  # would give another tokenizer
    plan = plan_extension(parent.run_folder, [f"benchmark.path={changed}", "benchmark.domains=[zahlen]"])
    assert plan.setup.benchmark.tokenizer == tokenizer_of(parent)
    assert plan.new == ("zahlen",) and plan.known == () and plan.missing == ()
    block = plan.setup.config.benchmark
    assert block.options["vocabulary"] == VOCABULARY and block.options["context"] == 8 and block.experiences == 1
    # A config file of the data set sets other sizes, which the user has not given.
    named = ["benchmark=language_model", f"benchmark.path={changed}", "benchmark.domains=[zahlen]"]
    assert plan_extension(parent.run_folder, named).setup.config.benchmark.options == block.options
    shutil.copytree(changed, context := tmp_path / "context")  # a path with the name of an option, which is not given
    whole = f"benchmark={{name: language_model, path: {context}, domains: [zahlen]}}"
    options = plan_extension(parent.run_folder, [whole]).setup.config.benchmark.options
    assert options == {**block.options, "path": str(context)}


def test_more_text_of_a_known_domain(parent, texts, tmp_path, caplog):
    more = write_domains(tmp_path / "more", of=("code",))
    plan = plan_extension(parent.run_folder, [f"benchmark.path={more}"])
    assert plan.known == ("code",) and plan.new == () and not caplog.records
    assert plan.setup.benchmark.classes == ((0,), (1,), (1,))
    plan_extension(parent.run_folder, [f"benchmark.path={texts}", "benchmark.domains=[code]"])
    assert "are data that the run has already learned" in caplog.text
    caplog.clear()
    plan_extension(parent.run_folder, [f"benchmark.path={texts}", "benchmark.domains=[zahlen]"])
    assert not caplog.records


def test_text_that_is_gone_is_not_evaluated(parent, texts, tmp_path, caplog):
    shutil.copytree(parent.run_folder, run := tmp_path / "run")
    config = run / "config.yaml"
    config.write_text(config.read_text().replace(str(texts), str(tmp_path / "gone")))
    plan = plan_extension(run, [f"benchmark.path={texts}", "benchmark.domains=[zahlen]"])
    assert plan.missing == (1, 2) and "are not evaluated" in caplog.text
    benchmark = plan.setup.benchmark
    assert benchmark.vocabulary == VOCABULARY and benchmark.tokenizer == tokenizer_of(parent)


def test_what_does_not_fit_the_run_is_refused(parent, texts, tmp_path):
    new = [f"benchmark.path={texts}", "benchmark.domains=[zahlen]"]
    other = train_tokenizer([WORDS["zahlen"] * 9 + "abcdefg " * 9], vocabulary=VOCABULARY)
    (tmp_path / "tokenizer.json").write_text(other)
    for given, message in (
        ("benchmark.vocabulary=281", "benchmark.vocabulary: found 281, but the run has 280; leave it out"),
        ("benchmark.context=4", "benchmark.context: found 4, but the run has 8; leave it out"),
        (f"benchmark={{name: language_model, path: {texts}, context: 4}}", "benchmark.context: found 4, but the run has 8"),
        (f"benchmark.tokenizer={tmp_path}", "benchmark.tokenizer: found .*, but the run was trained with another one"),
        ("benchmark=digits", "found inputs of shape 1 x 8 x 8, but the run was trained on 9"),
    ):
        with pytest.raises(ClframeError, match=message):
            plan_extension(parent.run_folder, [*([] if given.startswith("benchmark=") else new), given])
    source = language_model(path=str(texts), context=8, vocabulary=VOCABULARY, tokenizer=str(tmp_path))
    with pytest.raises(ClframeError, match="its text was encoded by another tokenizer than that of the run"):
        plan_extension(parent.run_folder, data=replace(source, name="in_memory"))
    shutil.copytree(parent.run_folder, run := tmp_path / "run")
    (run / "tokenizer.json").write_text(other)
    with pytest.raises(ClframeError, match="is another tokenizer than the run was trained with"):
        plan_extension(run, new)
    changed = write_domains(tmp_path / "changed")
    (changed / "code_test.txt").write_text(WORDS["code"] * 9)
    config = run / "config.yaml"
    config.write_text(config.read_text().replace(str(texts), str(changed)))
    (run / "tokenizer.json").write_text(tokenizer_of(parent))
    with pytest.raises(ClframeError, match="earlier data: experience 2 has 30 test samples, but had 23 when the run read"):
        plan_extension(run, new)
    remove_digests(run)
    with pytest.raises(ClframeError, match="experience 2 has .* test tokens, but had"):
        plan_extension(run, new)


@pytest.mark.slow
def test_the_verb_names_the_new_domain(parent, texts, tmp_path, capsys):
    words = ["extend", parent.run_folder, f"benchmark.path={texts}", "benchmark.domains=[zahlen]", "--output", str(tmp_path)]
    assert main(words) == 0
    shown = capsys.readouterr().out
    assert "new domains: zahlen (2)" in shown and "experience 3/3: perplexity" in shown
    (folder,) = (tmp_path / "language_model").iterdir()
    assert json.loads((folder / "results.json").read_text())["nll_matrix"][0][2] is None
    assert main(["report", str(folder)]) == 0
