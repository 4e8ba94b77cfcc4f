"""Runs of language models after training: evaluation, scores and generation against the loaded network."""

from __future__ import annotations

import io
import json
import math
import re
import shutil
from dataclasses import replace

import pytest
import torch
from earlier_versions import remove_digests
from language_runs import CONTEXT, LEARNED, VOCABULARY, WORDS, options_of, write_domains

import clframe
from clframe.accounting import MacCounter, stage_macs
from clframe.cli import main
from clframe.data.inputs import InputFormat
from clframe.data.sources.language import windows_of
from clframe.data.tokenizer import TextTokenizer, train_tokenizer
from clframe.errors import ClframeError
from clframe.exits import ExitPolicy, select
from clframe.exits.policies import CONFIDENCE_MEASURES
from clframe.functional.language import next_token_targets, strided_windows, token_nll
from clframe.nn.generation import generate
from clframe.targets.evaluation import evaluate
from clframe.targets.run_tokenizer import run_tokenizer
from clframe.targets.text_evaluation_output import describe
from clframe.targets.token_rules import PolicyRule


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    return write_domains(tmp_path_factory.mktemp("texts"))


@pytest.fixture(scope="module")
def other(tmp_path_factory):
    """A folder with another domain than those of the run."""
    return write_domains(tmp_path_factory.mktemp("other"), of=["zahlen"])


@pytest.fixture(scope="module")
def result(texts, tmp_path_factory):
    strategy = "strategy='er(memory=10) + exits(at=[block1]) + early_exit(threshold=0.5)'"
    given = options_of(texts, strategy, "trainer.epochs=2", "optimizer.lr=0.03")
    return clframe.run("language_model", given, output=tmp_path_factory.mktemp("runs"))


@pytest.fixture(scope="module")
def model(result):
    return clframe.load(result.run_folder)


@pytest.fixture(scope="module")
def encoder(model):
    return TextTokenizer(run_tokenizer(model.folder, model.inputs))


def windows(encoder, text):
    return windows_of(encoder.encode(text), context=CONTEXT)


def exit_logits(model, ids_BS):
    with torch.no_grad():
        return model.network(ids_BS).logits


def some_threshold(model, ids_BS):
    """One that stops about half of the tokens at the first exit, far from every probability: rounding may differ."""
    largest_N = exit_logits(model, ids_BS)[0].softmax(1).amax(1).sort().values
    middle = largest_N[len(largest_N) // 4 : 3 * len(largest_N) // 4]
    at = int(middle.diff().argmax())
    return float(middle[at : at + 2].mean())


def test_on_its_own_text_the_numbers_are_those_of_the_results(result, model):
    found = evaluate(result.run_folder)
    assert [domain.name for domain in found.domains] == list(LEARNED)
    assert [domain.tokens for domain in found.domains] == list(result.test_samples)
    assert [domain.nats for domain in found.domains] == pytest.approx(result.nll_matrix[-1], rel=1e-6)
    assert [domain.accuracy for domain in found.domains] == pytest.approx(result.accuracy_matrix[-1], abs=1e-12)
    for k, nll_E in enumerate(result.exits[-1].nll_KE):
        assert [domain.nats_K[k] for domain in found.domains] == pytest.approx(nll_E, rel=1e-6)
        accuracies = result.exits[-1].accuracy_KE[k]
        assert [domain.accuracy_K[k] for domain in found.domains] == pytest.approx(accuracies, abs=1e-12)
    assert found.perplexity == pytest.approx(result.final_perplexity, rel=1e-6)
    assert found.rule == "policy of early_exit" and "perplexity" in describe(found)
    assert [CONTEXT * macs for macs in found.macs_K] == list(result.exits[-1].macs_K)
    assert CONTEXT * found.backbone_macs == result.exits[-1].backbone_macs


def test_with_a_threshold_the_first_sure_exit_decides_each_token(model, texts, encoder):
    ids_BS = windows(encoder, (texts / "zahlen_test.txt").read_text())
    threshold = some_threshold(model, ids_BS)
    logits, y_N = exit_logits(model, ids_BS), next_token_targets(ids_BS)
    early_N = logits[0].softmax(1).amax(1) >= threshold
    nll_N = torch.where(early_N, token_nll(logits[0], y_N), token_nll(logits[1], y_N)).double()
    other = ["benchmark=language_model", f"benchmark.path={texts}", "benchmark.domains=[zahlen]"]
    found = evaluate(model.folder, other, threshold=threshold)
    (domain,), counts = found.domains, stage_macs(model.network)
    assert domain.nats == pytest.approx(float(nll_N.mean()), rel=1e-6) and domain.tokens == len(y_N)
    assert found.decided_K == (int(early_N.sum()), int((~early_N).sum())) and min(found.decided_K) > 0
    nats_W = nll_N.reshape(-1, CONTEXT).mean(1)
    assert domain.interval[1] - domain.interval[0] == pytest.approx(2 * 1.96 * float(nats_W.std()) / math.sqrt(len(nats_W)))
    share = found.decided_K[1] / len(y_N)
    assert found.macs == pytest.approx(found.macs_K[0] + share * (found.macs_K[1] - found.macs_K[0]), rel=1e-3)
    waits = 0  # stopped tokens before the last one of their window that reaches the second block
    for early_T in early_N.reshape(-1, CONTEXT).tolist():
        last = max((t for t in range(CONTEXT) if not early_T[t]), default=-1)
        waits += sum(early_T[: last + 1])
    assert waits > 0
    assert found.waiting == pytest.approx(waits * counts["block2"] / CONTEXT / len(y_N), rel=1e-3)
    # Of the run's own text that was moved, and of one file.
    moved = evaluate(model.folder, [f"benchmark.path={texts}"], threshold=math.inf)
    assert moved.decided_K[0] == 0 and moved.waiting == 0
    one = evaluate(model.folder, [other[0], f"benchmark.path={texts}/zahlen_test.txt"], threshold=threshold)
    assert one.domains[0].name == "zahlen_test" and replace(one.domains[0], name="zahlen") == domain


def test_scores_are_those_of_strided_windows(model, encoder):
    text = WORDS["prose"] * 3
    ids = encoder.encode(text)
    for stride in (3, CONTEXT):
        nats, right, first = [], [], []
        for one in strided_windows(len(ids), window=CONTEXT + 1, stride=stride):
            logits = exit_logits(model, ids[None, one.start : one.stop])
            y_N, own = ids[one.start + 1 : one.stop].long(), slice(one.first - one.start - 1, None)
            scores_NV, exit_N = select(logits, ExitPolicy(thresholds=0.5))
            nats += token_nll(scores_NV, y_N)[own].tolist()
            right += (scores_NV.argmax(1) == y_N)[own].tolist()
            first += (exit_N == 0)[own].tolist()
        found = model.score({"a": text, "b": "x"}, stride=stride, batch_size=2)
        assert len(found) == 1 and found[0].tokens == len(ids) - 1 == len(nats)
        assert found[0].nats == pytest.approx(sum(nats) / len(nats), rel=1e-6)
        assert found[0].accuracy == sum(right) / len(right)
        assert found[0].decided_K == (sum(first), len(first) - sum(first))
        assert found.skipped == {"b": "b: has 1 token; give at least 2, as the first has no context"}
    assert found[0].perplexity == pytest.approx(math.exp(found[0].nats))


def test_a_file_without_tokens_is_named(model, tmp_path, capsys):
    (tmp_path / "empty.txt").write_text("")
    assert main(["predict", str(model.folder), str(tmp_path / "empty.txt"), "--score", "--document", "file"]) == 2
    expected = f"{tmp_path}/empty.txt: has 0 tokens; give at least 2, as the first has no context"
    assert capsys.readouterr().err == f"clframe: error: {expected}\n"


@pytest.mark.parametrize(
    ("call", "expected"),
    [
        (lambda model: model.generate(None), "generate: found null; give a text, or a list of texts"),
        (lambda model: model.generate(b"ab"), "generate: found b'ab'; give a text, or a list of texts"),
        (lambda model: model.generate(["the", 3]), "generate: found 3 as text 2; give text"),
        (lambda model: model.generate("a\udc80"), "generate: character 1 of text 1 is half of a pair; give whole characters"),
        (lambda model: model.generate("the", tokens=1.5), "--generate: found 1.5; give a whole number"),
        (lambda model: model.generate("the", tokens=True), "--generate: found true; give a whole number"),
        (lambda model: model.generate("the", draft=1.5), "--draft: found 1.5; give a whole number"),
        (lambda model: model.score({"a.txt": None}), "score: found null as a.txt; give text"),
        (lambda model: model.score({"a.txt": "\ud800"}), "score: character 0 of a.txt is half of a pair; give whole characters"),
        (lambda model: model.score(7), "score: found 7; give a text, or a list of texts"),
        (lambda model: model.score("the fox", batch_size=0), "--batch-size: found 0; give at least 1"),
        (lambda model: model.score("the fox", stride=1.5), "--stride: found 1.5; give a whole number"),
    ],
)
def test_arguments_from_python_are_checked(model, call, expected):
    with pytest.raises(ClframeError) as error:
        call(model)
    assert str(error.value) == expected


def test_continuations_are_those_of_the_network_and_drafts_change_no_token(model, encoder):
    prompt = "a quick wolf"
    full, read = model.generate(prompt, tokens=5, threshold=math.inf), encoder.encode(prompt).tolist()
    assert len(read) > 4
    expected = generate(model.network, read[-4:], 5)
    assert full[0].ids == expected.ids and full[0].positions == expected.positions == (8, 8, 8)
    assert full[0].cut == len(read) - 4 and full.notes == ("of 1 prompt only the end was read, as the context has 8 tokens",)
    whole = encoder.decode([*read[-4:], *expected.ids])
    assert whole == encoder.decode(read[-4:]) + full[0].text and len(full[0].text) >= 5
    assert set(full[0].exits) == {"final"}
    for draft in (1, 3):
        drafted = model.generate([prompt, "def"], tokens=5, draft=draft, draft_exit="block1")
        assert drafted[0].ids == full[0].ids and len(drafted) == 2
    early = model.generate(prompt, tokens=5, threshold=0.0)
    assert set(early[0].exits) == {"block1"} and early[0].positions[2] == early[0].passes[2] == 0
    assert early[0].ids == generate(model.network, read[-4:], 5, threshold=0.0).ids


def test_the_cost_of_a_token_is_that_of_its_prompt_and_one_classifier(model, encoder):
    found = model.generate("def ", tokens=1, threshold=math.inf)
    ids = encoder.encode("def ")
    with torch.no_grad(), MacCounter() as counter:
        value = torch.cat([ids, torch.zeros(1)])[None]
        for stage in model.network.backbone.stages:
            value = stage(value)
    assert found[0].macs == counter.macs + VOCABULARY * 8 and len(ids) < CONTEXT


@pytest.mark.parametrize("fallback", ["last", "confident"])
@pytest.mark.parametrize("measure", ["entropy", "patience"])
def test_a_policy_decides_tokens_as_it_decides_samples(measure, fallback):
    scores = [torch.randn(40, 6, generator=torch.Generator().manual_seed(k)) * 2 for k in range(4)]
    policy = ExitPolicy(measure=CONFIDENCE_MEASURES.get(measure), thresholds=(0.5, 2.0, 0.45), fallback=fallback)
    rule, chosen = PolicyRule(policy, 4), []
    for n in range(40):
        exits, computed, carried = [*rule.exits, 3], [], ()
        for exit in exits:
            computed.append(scores[exit][n : n + 1])
            stops, carried = rule.stops(exit, computed[-1], carried) if exit < 3 else (False, ())
            if stops:
                chosen.append(exit)
                break
        else:
            chosen.append(exits[rule.decide(computed)])
    assert chosen == select(scores, policy).exit_B.tolist() and len(set(chosen)) > 1


def test_the_command_line_continues_and_scores(model, texts, capsys, tmp_path):
    run = str(model.folder)
    assert main(["predict", run, "the", "def", "--generate", "3", "--json", "-"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [row["prompt"] for row in found["continuations"]] == ["the", "def"]
    assert found["rule"] == "policy of early_exit" and len(found["continuations"][0]["ids"]) == 3
    file = str(texts / "code_test.txt")
    assert main(["predict", run, file, "--score", "--document", "file", "--csv", str(tmp_path / "a.csv")]) == 0
    assert "nats" in capsys.readouterr().out and (tmp_path / "a.csv").read_text().count("\n") == 2
    (tmp_path / "lines.txt").write_text("the fox\na dog\nthe fox\n")
    assert main(["predict", run, str(tmp_path / "lines.txt"), "--score", "--json", "-"]) == 0
    assert [row["text"] for row in json.loads(capsys.readouterr().out)["scores"]] == ["the fox", "a dog", "the fox"]
    assert main(["predict", run, "x", "the fox", "--score"]) == 3
    assert "skipped text 1: has 1 token; give" in capsys.readouterr().err
    assert main(["predict", run, "no.txt", "the fox", "--score", "--json", "-"]) == 3
    printed = capsys.readouterr()
    assert "skipped no.txt: cannot be read" in printed.err and list(json.loads(printed.out)["skipped"]) == ["no.txt"]
    assert main(["predict", run, "no.txt", "the", "--generate", "1"]) == 3
    assert "skipped no.txt: cannot be read" in capsys.readouterr().err
    assert main(["evaluate", run, "--output", str(tmp_path / "out"), "--json", "-"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed == json.loads((tmp_path / "out" / "evaluation.json").read_text())
    assert [domain["name"] for domain in printed["domains"]] == list(LEARNED)


def test_prompts_in_files_keep_their_whitespace(model, capsys, tmp_path, monkeypatch):
    prompts = ["    return x", "the ", "\tdef"]
    (tmp_path / "lines.txt").write_text("\n".join([prompts[0], "", *prompts[1:]]) + "\n")
    (tmp_path / "rows.csv").write_text('text\n"    return x"\n"the "\n"\tdef"\n')
    monkeypatch.setattr("sys.stdin", io.StringIO("\n".join(prompts) + "\r\n"))
    call = ["predict", str(model.folder), "--generate", "2", "--json", "-"]
    found = []
    for words in ([str(tmp_path / "lines.txt")], [str(tmp_path / "rows.csv")], ["-"], prompts):
        assert main([*call[:2], *words, *call[2:]]) == 0
        found.append(json.loads(capsys.readouterr().out)["continuations"])
        assert [row["prompt"] for row in found[-1]] == prompts
    assert all(rows == found[0] for rows in found)


@pytest.mark.parametrize(
    "words, message",
    [
        (["predict", "RUN", "x", "--top", "3"], "--top: found 3 for a language model"),
        (["predict", "RUN", "x", "--no-graphs"], "--no-graphs: found it for a language model"),
        (["predict", "RUN", "x", "--generate", "9"], "--generate: found 9 for a context of 8 tokens; give 1 to 8"),
        (["predict", "RUN", "x", "--batch-size", "9"], "--batch-size: found 9 for generation"),
        (["predict", "RUN", "x", "--stride", "2"], "--stride: found 2 for generation"),
        (["predict", "RUN", "x y", "--score", "--stride", "9"], "--stride: found 9 for a context of 8 tokens"),
        (["predict", "RUN", "x y", "--score", "--draft", "2"], "--draft: found 2 for the scores of given texts"),
        (["predict", "RUN", "x", "--draft", "2", "--threshold", "0.5"], "--draft: found a threshold or a budget too"),
        (["predict", "RUN", "x", "--draft-exit", "block1"], "--draft: found none with an exit that drafts"),
        (["predict", "RUN", "x", "--draft", "2", "--draft-exit", "final"], "--draft-exit: unknown exit 'final'"),
        (["predict", "RUN", "x", "--threshold", "2"], "--threshold: found 2; give a probability"),
        (["predict", "RUN", "x", "--budget", "0.5"], "--budget: the run has no thresholds"),
        (["predict", "RUN", "x", "--document", "page"], "--document: found 'page'"),
        (["predict", "RUN", "no.txt", "--score", "--document", "file"], "no.txt: no such file"),
        (["predict", "RUN", "x", "--score"], "text 1: has 1 token; give at least 2"),
        (["predict", "RUN", ""], "predict: prompt 1 has no text"),
        (["evaluate", "RUN", "benchmark=digits"], "benchmark: found digits for a language model"),
        (["evaluate", "RUN", "benchmark=language_model", "benchmark.vocabulary=280"], "has no effect on an evaluation"),
        (["evaluate", "RUN", "benchmark=language_model"], "benchmark.path: found ''"),
        (["evaluate", "RUN", "benchmark=language_model", "benchmark.path=TEXTS", "benchmark.domains=[cod]"], "cod_test.txt"),
        (["evaluate", "RUN", "--threshold", "2"], "--threshold: found 2; give a probability"),
        (["evaluate", "RUN", "benchmark.path=OTHER"], "without text of the run's domains prose, code (NAME_train.txt and NAME_test"
         ".txt); give their folder, or add benchmark=language_model to measure it on other text"),
        (["evaluate", "RUN", "benchmark.test_characters=9"], "override 'benchmark.test_characters=9': a run uses its own config; "
         "change only benchmark.path=FOLDER, or add benchmark=language_model"),
        (["analyze", "sparsity", "RUN"], "found the run of a language model"),
        (["analyze", "exits", "RUN"], "found the run of a language model"),
        (["moefy", "RUN"], "found the run of a language model"),
        (["export", "RUN", "--format", "safetensors"], "--format transformers writes it"),
        (["latency", "RUN"], "found the run of a language model"),
        (["card", "RUN"], "card: found the run of a language model"),
    ],
)
def test_what_has_no_effect_or_meaning_is_one_line(model, texts, other, capsys, words, message):
    places = {"RUN": str(model.folder), "TEXTS": str(texts), "OTHER": str(other)}
    named = [re.sub("RUN|TEXTS|OTHER", lambda found: places[found[0]], word) for word in words]
    assert main(named) == 2
    error = capsys.readouterr().err.strip()
    assert message in error and "\n" not in error


def test_options_of_text_are_refused_for_a_classifier(capsys, finished):
    assert main(["predict", finished.run_folder, "x.png", "--generate", "3"]) == 2
    assert "--generate: found 3 for a classifier; leave it out" in capsys.readouterr().err
    with pytest.raises(ClframeError, match="generate: found a classifier"):
        clframe.load(finished.run_folder).generate("x")


def test_a_changed_tokenizer_or_text_is_refused(model, texts, tmp_path):
    other = train_tokenizer([WORDS["zahlen"] * 9 + "abcdefg " * 9], vocabulary=VOCABULARY)
    folder = tmp_path / "run"
    folder.mkdir()
    for content, message in ((None, "tokenizer.json could not be read"), (other, "is another tokenizer than the run")):
        if content is not None:
            (folder / "tokenizer.json").write_text(content)
        with pytest.raises(ClframeError, match=message):
            run_tokenizer(folder, model.inputs)
    assert run_tokenizer(folder, InputFormat(kind="language")) == other  # of a checkpoint without a digest
    changed = write_domains(tmp_path / "texts")
    (changed / "code_test.txt").write_text(WORDS["code"] * 9)
    with pytest.raises(ClframeError, match=r"experience 2 has \d+ test samples, but had \d+ when the run .*; restore the text"):
        evaluate(model.folder, [f"benchmark.path={changed}"])
    remove_digests(old := shutil.copytree(model.folder, tmp_path / "old"))
    with pytest.raises(ClframeError, match="test tokens, the run was evaluated on"):
        evaluate(old, [f"benchmark.path={changed}"])
