"""Causal language models: perplexity in windows, its critical sparsity, domains, and models of several families."""

from __future__ import annotations

import json
import logging
import math
import shutil
import warnings

import pytest
import torch
from torch.nn import functional as F

from clframe.cli import main
from clframe.data.target import IGNORED
from clframe.errors import ConfigError, DataError, DivergenceError
from clframe.functional.chance import above_chance
from clframe.sparsity import activity
from clframe.sparsity.attention import find_attentions
from clframe.sparsity.functional import jaccard
from clframe.sparsity.scores import language_scores, lowest_mean, token_sums
from clframe.sparsity.study import study_sparsity
from clframe.targets import open_target
from clframe.targets.language import Reading, logits_at
from clframe.targets.text_files import divide_rows
from tests.targets.conftest import SPECIAL, WORDS, make_tokenizer

LINES = ("pay my bill now please pay the rent", "lost my card where is my card", "wake me up", "set the alarm now")


@pytest.fixture(scope="module")
def lines(tmp_path_factory):
    file = tmp_path_factory.mktemp("lines") / "lines.txt"
    file.write_text("\n".join(LINES) + "\n")
    return file


def learned(target, steps=60):
    """The target, its model trained on its texts, so that masks cost something."""
    (batch,) = target.batches("fit")
    optimizer = torch.optim.Adam(target.model.requires_grad_(True).parameters(), lr=0.01)
    with torch.enable_grad():
        for _ in range(steps):
            loss = F.cross_entropy(target.predict(target.model, batch.inputs).flatten(0, 1), batch.targets.flatten())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    target.model.requires_grad_(False)
    return target


def longhand(model, rows, *, window, stride):
    """Nats and right predictions of every token but the first, each from its own window cut before it."""
    nats, right = [], []
    for row in rows:
        stop, start = window, 0
        for at in range(1, len(row)):
            if at >= stop:
                start, stop = start + stride, min(stop + stride, len(row))
            with torch.no_grad():
                logits = model(input_ids=torch.tensor([row[start:at]])).logits[0, -1].float()
            nats.append(float(F.cross_entropy(logits, torch.tensor(row[at]))))
            right.append(float(logits.argmax() == row[at]))
    return math.exp(sum(nats) / len(nats)), sum(right) / len(right), len(nats)


def test_perplexity_and_accuracy_in_strided_windows(llama, lines):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    target = open_target(str(llama), data=str(lines), max_length=5, stride=2)
    study = study_sparsity(target, score="perplexity", roles=["intermediate"], share=0.9)
    rows = AutoTokenizer.from_pretrained(llama)(list(LINES))["input_ids"]
    expected = longhand(AutoModelForCausalLM.from_pretrained(llama).eval(), rows, window=5, stride=2)
    assert (study.language.perplexity, study.language.accuracy, study.language.tokens) == pytest.approx(expected)
    assert study.report.dense == pytest.approx(expected[0]) and study.score == "perplexity"
    assert study.tokens == sum(map(len, rows))  # context of a window is counted once
    (curve,) = study.report.curves
    assert curve.scores[0] == pytest.approx(expected[0]) and study.tolerance == 0.1
    assert study.limit_score == pytest.approx(1.1 * expected[0])
    # A random model is near chance, so that every sparsity is tolerated; no score is worse than the limit.
    assert max(curve.scores) <= study.limit_score and curve.critical == 1.0
    assert f"{len(SPECIAL) + len(WORDS)}" in study.language.note and "near that of chance" in study.language.note
    same = study_sparsity(target, roles=["intermediate"], score="agreement")
    assert same.report.dense == 1 and same.language == study.language


def test_critical_sparsity_of_a_perplexity_is_interpolated_in_nats(llama, lines):
    target = learned(open_target(str(llama), data=str(lines)))
    study = study_sparsity(target, score="perplexity", rules=["top_k"], roles=["intermediate"], share=0.95)
    (curve,) = study.report.curves
    assert study.language.perplexity < 4 and study.language.note == ""
    limit = math.log(1.05 * study.report.dense)
    nats = [math.log(score) for score in curve.scores]
    last = max(at for at, one in enumerate(nats) if one <= limit)  # top-k: achieved sparsity rises along the sweep
    assert 0 <= last < len(nats) - 1 and nats[last + 1] > limit
    way = (limit - nats[last]) / (nats[last + 1] - nats[last])
    expected = curve.achieved[last] + way * (curve.achieved[last + 1] - curve.achieved[last])
    assert curve.critical == pytest.approx(expected)


def test_tolerance_of_either_score():
    assert lowest_mean("perplexity", -2.0, share=0.98) == pytest.approx(-2.0 - math.log(1.02))
    assert lowest_mean("accuracy", 0.5, share=0.98) == pytest.approx(0.49)
    with pytest.raises(ConfigError, match=r"--score: found 0\.0 for the dense model's accuracy.*perplexity"):
        lowest_mean("accuracy", 0.0, share=0.98)
    with pytest.raises(DivergenceError, match="found inf nats per token"):
        lowest_mean("perplexity", -math.inf, share=0.98)


def test_notes_near_chance():
    targets = torch.arange(100) % 10
    sure = F.one_hot(targets, 10).float() * 5
    assert language_scores([token_sums(sure, targets)]).note == ""
    flat = torch.zeros(100, 10)
    found = language_scores([token_sums(flat[:30], targets[:30]), token_sums(flat[30:], targets[30:])])
    assert found.perplexity == pytest.approx(10) and "perplexity 10.0, near that of chance" in found.note
    # Half of the tokens are 0. Always 0 gives an accuracy of 50 %, with a better perplexity than 10.
    often = torch.where(targets < 5, 0, targets)
    always = torch.tensor([[3.0, *[0.0] * 9]]).expand(100, 10)
    for more, said in ((0, "50.0"), (3, "53.0")):  # more of the other tokens are right: above, but not significantly
        at, better = (often != 0).nonzero().flatten()[:more], always.clone()
        better[at, often[at]] = 9.0
        assert (
            f"{said} % accuracy on 100 tokens, not clearly above the 50.0 % of always predicting the most frequent one "
            f"(clear is more than 58.2 %, one-sided at 95 %)" in language_scores([token_sums(better, often)]).note
        )
        assert language_scores([token_sums(better, often)], accuracy_matters=False).note == ""
    assert above_chance(0.58, often) == 0.5 and above_chance(0.59, often) is None
    with pytest.raises(DivergenceError, match="found NaN in"):
        language_scores([token_sums(flat * math.nan, targets)])


def test_logits_of_chosen_positions(llama):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(llama).eval()
    ids = torch.tensor([[2, 5, 6, 7], [2, 9, 4, 0]])
    where = torch.tensor([[True, False, True, True], [False, True, False, False]])
    seen = []
    hook = model.get_output_embeddings().register_forward_hook(lambda _, given, out: seen.append(out.shape[:-1]))
    with torch.no_grad():
        whole = model(input_ids=ids).logits
        found = logits_at(model, {"input_ids": ids}, where)
    hook.remove()
    torch.testing.assert_close(found, whole[where])
    assert seen == [(2, 4), (1, 4)] and not model.get_output_embeddings()._forward_pre_hooks


def test_windows_and_parts():
    windows, context = Reading(window=4, stride=2).divide([[1, 2, 3, 4, 5, 6, 7], [8, 9]])
    assert windows == [[1, 2, 3, 4], [3, 4, 5, 6], [5, 6, 7], [8, 9]] and context == [0, 2, 2, 0]
    assert Reading(window=3, generate=2).divide([[1, 2, 3, 4]]) == ([[1, 2, 3]], [0])
    parts = divide_rows([[n] for n in range(10)], name="a")
    assert [len(parts[part]) for part in ("fit", "validation", "test")] == [6, 2, 2] and parts["test"] == [[8], [9]]
    with pytest.raises(DataError, match="a: found 2 texts, too few to divide"):
        divide_rows([[1], [2]], name="a")


def test_domains_are_compared(llama, lines, tmp_path):
    files = [tmp_path / "one.txt", tmp_path / "two.txt"]
    for file, part in zip(files, (LINES[:2], LINES[2:]), strict=True):
        file.write_text("\n".join(part))
    joined = ",".join(map(str, files))
    target = open_target(str(llama), data=joined)
    study = study_sparsity(target, score="perplexity", roles=["intermediate"])
    alone = [open_target(str(llama), data=str(file)) for file in files]
    found = [activity(one.model, [(b.inputs, b.tokens) for b in one.batches("test")]) for one in alone]
    assert study.domains.names == ("one", "two") and target.origin["data"]["name"] == "one+two"
    for layer, rows in study.domains.overlap.items():
        expected = jaccard(found[0].active[layer], found[1].active[layer])
        assert rows[0][1] == rows[1][0] == pytest.approx(expected) and rows[0][0] == 1 and 0 < rows[0][1] < 1
        assert study.domains.sparsity[layer] == pytest.approx([one.sparsity[layer] for one in found])


@pytest.mark.slow
def test_the_command_writes_domains_and_scores(llama, lines, tmp_path, capsys):
    (tmp_path / "two.txt").write_text(LINES[0])
    joined = f"{lines},{tmp_path / 'two.txt'}"
    assert main(["analyze", "sparsity", str(llama), "--data", joined, "--roles", "up", "--score", "perplexity",
                 "--tolerance", "0.05", "--document", "file", "--output", str(tmp_path / "out")]) == 0  # fmt: skip
    content = json.loads((tmp_path / "out" / "sparsity.json").read_text())
    assert content["domains"]["names"] == ["lines", "two"] and content["tolerance"] == 0.05 and content["samples"] == 2
    assert (tmp_path / "out" / "domains.svg").is_file() and content["language"]["tokens"] > 0
    assert "perplexity of the dense model" in capsys.readouterr().out


@pytest.mark.parametrize(
    "words, said",
    [
        (["--stride", "9", "--length", "9"], "--stride: found 9 for windows of 9 tokens; give 1 to 8"),
        (["--stride", "4"], "--stride: found 4, but no text is longer than a window of 64 tokens (the longest has 10)"),
        (["--stride", "4", "--generate", "2"], "--stride: found one with --generate"),
        (["--document", "page"], "--document: found 'page'; choose from line, file"),
        (["--tolerance", "1"], "--tolerance: found '1'; give 0 or more, less than 1"),
        (["--tolerance", "0.1", "--share", "0.9"], "--tolerance: found one next to --share"),
        (["--score", "perplexed"], "--score: unknown score 'perplexed'; did you mean 'perplexity'"),
        (["--data", "LINES,clinc150"], "--data: found 'clinc150' among text files"),
        (["--data", "LINES,LINES"], "--data: found two files lines.txt"),
    ],
)
def test_one_line_for_what_is_wrong(llama, lines, capsys, tmp_path, words, said):
    words = [word.replace("LINES", str(lines)) for word in words]
    given = [] if "--data" in words else ["--data", str(lines)]
    code = main(["analyze", "sparsity", str(llama), *given, *words, "--output", str(tmp_path / "out")])
    error = capsys.readouterr().err
    assert code == 2 and said in error and error.startswith("clframe: error: ") and error.count("\n") == 1


def with_context(llama, folder, context):
    """A copy of the model with this number of positions."""
    shutil.copytree(llama, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "max_position_embeddings": context}))
    return folder


@pytest.mark.parametrize(
    "words, said",
    [
        (["--length", "9"], "--length: found 9 tokens, but MODEL has a context of 8 (max_position_embeddings); give at most 8\n"),
        (["--length", "6", "--generate", "3"], "--length: found 6 tokens, but MODEL has a context of 8 (max_position_embeddings); "
         "give at most 5, the context without the 3 of --generate\n"),
        (["--generate", "7"], "--generate: found 7 tokens, but MODEL has a context of 8 (max_position_embeddings); give at most 6, "),
        (["--stride", "9"], "--stride: found 9 for windows of 8 tokens; give 1 to 7\n"),
    ],
)
def test_what_does_not_fit_the_context_is_refused(llama, lines, tmp_path, capsys, words, said):
    model = with_context(llama, tmp_path / "small", 8)
    given = ["analyze", "sparsity", str(model), "--data", str(lines), *words, "--output", str(tmp_path / "out")]
    assert main(given) == 2
    error = capsys.readouterr().err
    assert said.replace("MODEL", str(model)) in error and error.count("\n") == 1
    if words == ["--length", "9"]:
        assert main(["moefy", str(model), "--data", str(lines), *words]) == 2
        assert capsys.readouterr().err == error


def test_the_length_that_is_used_is_recorded(llama, lines, tmp_path):
    model = with_context(llama, tmp_path / "small", 8)
    for given, generate, used in ((None, 0, 8), (None, 3, 5), (7, 0, 7), (5, 3, 5)):
        target = open_target(str(model), data=str(lines), max_length=given, generate=generate)
        assert target.origin["options"]["max_length"] == used
        assert max(map(len, target.splits.test.rows)) == used
    assert open_target(str(llama), data=str(lines)).origin["options"] == {
        "max_length": 64, "per_class": 20, "generate": 0, "stride": None, "document": "line", "divide": False,
    }  # fmt: skip


def test_models_that_do_not_fit_are_refused(llama, encoder, lines, texts, tmp_path):
    from transformers import AutoModelForCausalLM

    wrong = tmp_path / "wrong"
    shutil.copytree(llama, wrong)
    small = AutoModelForCausalLM.from_pretrained(llama)
    small.resize_token_embeddings(5)
    small.save_pretrained(wrong)
    with pytest.raises(DataError, match="its tokenizer gives id .*, but the model has a vocabulary of 5; use the tokenizer"):
        open_target(str(wrong), data=str(lines))
    target = open_target(str(llama), data=str(lines))
    target.model.lm_head.weight.data[0, 0] = math.nan
    with pytest.raises(DivergenceError, match="logits: found NaN in the dense model's"):
        study_sparsity(target, score="perplexity")
    other = open_target(str(encoder), data="clinc150", overrides=[f"benchmark.data_dir={texts}"], per_class=1)
    with pytest.raises(ConfigError, match="--score: found perplexity for .*, which is not a language model"):
        study_sparsity(other, score="perplexity")
    with pytest.raises(ConfigError, match="--stride: found 3 for .*, which is not a language model"):
        open_target(str(encoder), data="clinc150", overrides=[f"benchmark.data_dir={texts}"], stride=3)


@pytest.mark.slow
def test_a_model_without_networks_is_refused(lines, tmp_path, capsys):
    library = pytest.importorskip("transformers")
    make_tokenizer(tmp_path)
    sizes = dict(hidden_size=16, num_hidden_layers=1, state_size=4, pad_token_id=0, bos_token_id=2, eos_token_id=3)
    library.MambaForCausalLM(library.MambaConfig(vocab_size=len(SPECIAL) + len(WORDS), **sizes)).save_pretrained(tmp_path)
    words = ["analyze", "sparsity", str(tmp_path), "--data", str(lines), "--score", "perplexity"]
    code = main([*words, "--output", str(tmp_path / "out")])
    assert code == 2 and "found no feed-forward network in MambaForCausalLM" in capsys.readouterr().err
    (tmp_path / "model.safetensors").unlink()
    assert main([*words, "--output", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert "could not be loaded" in error and "safetensors" in error and not (tmp_path / "out").exists()


def family(name):
    """A random model of two layers; ``gqa``: fewer keys than heads."""
    import transformers as library

    count = len(SPECIAL) + len(WORDS)
    ids = dict(vocab_size=count, bos_token_id=2, eos_token_id=3)
    sizes = dict(hidden_size=16, num_hidden_layers=2, num_attention_heads=4, intermediate_size=24, pad_token_id=0, **ids)
    few = dict(sizes, num_key_value_heads=2)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if name in ("llama_tied", "llama_bf16"):
            model = library.LlamaForCausalLM(library.LlamaConfig(**few, tie_word_embeddings=name == "llama_tied"))
            return model.bfloat16() if name == "llama_bf16" else model
        if name == "qwen3":
            return library.Qwen3ForCausalLM(library.Qwen3Config(**few, head_dim=4))
        if name == "gemma2":
            return library.Gemma2ForCausalLM(library.Gemma2Config(**few, head_dim=4))
        if name == "gemma3":
            return library.Gemma3ForCausalLM(library.Gemma3TextConfig(**few, head_dim=4))
        if name == "gpt2":
            own = dict(n_embd=16, n_layer=2, n_head=4, n_inner=24, n_positions=64, **ids)
            return library.GPT2LMHeadModel(library.GPT2Config(**own))
        own = dict(hidden_size=16, num_hidden_layers=2, num_attention_heads=4, ffn_dim=24, word_embed_proj_dim=16,
                   max_position_embeddings=64, pad_token_id=0, **ids)  # fmt: skip
        return library.OPTForCausalLM(library.OPTConfig(**own))


FAMILIES = ("llama_tied", "llama_bf16", "qwen3", "gemma2", "gemma3", "gpt2", "opt")


def test_attention_inputs_and_heads(llama, lines):
    target = open_target(str(llama), data=str(lines), max_length=8)
    study = study_sparsity(target, score="perplexity", rules=["top_k"], roles=["heads", "attention"])
    assert [curve.role for curve in study.report.curves] == ["attention", "heads"]
    assert all(list(curve.layers) == [f"model.layers.{n}.self_attn" for n in (0, 1)] for curve in study.report.curves)
    assert study.report.curves[0].achieved == study.report.curves[1].achieved == pytest.approx(
        [1 - round(16 * value) / 16 for value in study.report.curves[0].values]
    )
    # Without its inputs, as without the outputs of its heads, an attention adds nothing to a text.
    for layer in target.model.model.layers:
        layer.self_attn.o_proj.weight.data.zero_()
    without = study_sparsity(target, score="perplexity", rules=["top_k"], roles=["up"])
    assert [curve.scores[-1] for curve in study.report.curves] == pytest.approx([without.report.dense] * 2)


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES)
def test_families(name, lines, tmp_path):
    pytest.importorskip("transformers")
    torch.manual_seed(3)
    make_tokenizer(tmp_path)
    family(name).save_pretrained(tmp_path)
    target = open_target(str(tmp_path), data=str(lines), max_length=6, stride=3)
    study = study_sparsity(target, score="perplexity", rules=["max_p"])
    gated = name not in ("gpt2", "opt")
    roles = ["input", *(["up", "gate"] if gated else []), "intermediate", "all inputs"]
    assert [curve.role for curve in study.report.curves] == roles
    assert all(len(curve.critical_layers) == (4 if curve.role == "all inputs" else 2) for curve in study.report.curves)
    assert len(find_attentions(target.model)) == 2
    (batch,) = target.batches("test")
    valid = batch.targets != IGNORED
    with torch.no_grad():
        logits = target.predict(target.model, batch.inputs)
    nats = F.cross_entropy(logits[valid].float(), batch.targets[valid])
    assert study.report.dense == pytest.approx(nats.exp().item(), rel=2e-2 if name == "llama_bf16" else 1e-5)


def test_a_warning_near_chance(llama, lines, caplog):
    target = open_target(str(llama), data=str(lines))
    with caplog.at_level(logging.WARNING):
        study_sparsity(target, score="perplexity", roles=["up"])
    (line,) = [record.getMessage() for record in caplog.records if record.name.startswith("clframe")]
    assert line.startswith("analyze: the dense model has perplexity") and line.endswith("check the model and its data")
