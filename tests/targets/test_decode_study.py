"""Decoding without the zeros of models of transformers: scores, achieved sparsity, bytes, and the command."""

from __future__ import annotations

import inspect
import json
import math

import pytest
import torch
from torch.nn import functional as F

from clframe.cli import main
from clframe.data.target import IGNORED
from clframe.errors import ConfigError, UnknownNameError
from clframe.sparse_decode import calibrate, sparse_decoder, sparse_layers
from clframe.sparse_decode.projection import compute_active
from clframe.targets import folders, open_target
from clframe.targets.decode_study import TEXTS, require_places, study_decoding
from tests.targets.conftest import make_tokenizer
from tests.targets.test_language_models import FAMILIES, LINES, family


@pytest.fixture
def lines(tmp_path):
    file = tmp_path / "lines.txt"
    file.write_text("\n".join(LINES) + "\n")
    return file


def test_scores_are_those_of_the_sparse_model(llama, lines):
    target = open_target(str(llama), data=str(lines), max_length=16)
    study = study_decoding(target, ["intermediate", "all"], sparsities=[0.5, 0.75], pairs=2)
    (batch,) = target.batches(study.part, size=16)
    asked = batch.targets != IGNORED

    def perplexity(model):
        with torch.no_grad():
            logits = model(**batch.inputs).logits
        return math.exp(float(F.cross_entropy(logits[asked], batch.targets[asked])))

    training = target.batches("fit", limit=TEXTS)
    assert study.perplexity == pytest.approx(perplexity(target.model), rel=1e-5)
    assert [(one.place, one.asked) for one in study.timings] == [
        ("intermediate", 0.5),
        ("intermediate", 0.75),
        ("all", 0.5),
        ("all", 0.75),
    ]
    for one in study.timings:
        places = ("intermediate",) if one.place == "intermediate" else ("input", "intermediate")
        (rules,) = calibrate(target.model, training, sparsities=[one.asked], places=places)
        assert one.perplexity == pytest.approx(perplexity(sparse_decoder(target.model, rules)), rel=1e-5)
        assert tuple(one.sparsity) == places
        assert all(one.asked - 0.15 < share < 1 for share in one.sparsity.values())  # other texts than the thresholds
        # FFNs of a Llama: three matrices of 16 x 24 in each layer.
        zeros = one.sparsity.get("input", 0.0) * 2 / 3 + one.sparsity["intermediate"] / 3
        assert one.read == pytest.approx(1 - study.ffn_share * zeros) and one.ceiling == pytest.approx(1 / one.read)
        assert one.dense > 0 and one.sparse > 0
    body = 2 * (3 * 16 * 24 + 4 * 16 * 16 + 2 * 16) + 16
    assert study.ffn_share == pytest.approx(2 * 3 * 16 * 24 / (body + 16 * target.model.config.vocab_size))
    assert not sparse_layers(target.model)


def test_what_is_refused(llama, lines, encoder, texts):
    target = open_target(str(llama), data=str(lines))
    assert list(require_places(target, ["up", "all", "up"])) == ["up", "all"]
    with pytest.raises(ConfigError, match="--decode: found no place; give some of input, gate, up, intermediate, all"):
        require_places(target, [])
    with pytest.raises(UnknownNameError, match="--decode: unknown place 'gates'; did you mean 'gate'"):
        require_places(target, ["gates"])
    target = open_target(str(encoder), data="clinc150", overrides=[f"benchmark.data_dir={texts}"])
    with pytest.raises(ConfigError, match="--decode: found .*, which is not a language model; leave it out"):
        require_places(target, ["input"])


def test_the_command_prints_and_writes_a_table(llama, lines, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(
        study_decoding, "__kwdefaults__", {**study_decoding.__kwdefaults__, "sparsities": (0.5,), "pairs": 2}
    )
    # Without the tables and figures of the sweep, which take most of the time.
    monkeypatch.setattr(folders, "write_sparsity_study", lambda study, folder, command: folder / "sparsity.json")
    words = ["analyze", "sparsity", str(llama), "--rule", "max_p", "--roles", "up", "--data", str(lines)]
    words += ["--score", "perplexity", "--decode", "gate,all"]
    assert main([*words, "--output", str(tmp_path / "out")]) == 0
    shown = capsys.readouterr().out
    assert "Decoding without the zeros" in shown and "ceiling" in shown
    content = json.loads((tmp_path / "out" / "decode.json").read_text())
    assert content["command"] == ["clframe", *words] and content["threads"] == torch.get_num_threads()
    assert [one["place"] for one in content["timings"]] == ["gate", "all"]
    assert content["timings"][0]["read"] == pytest.approx(
        1 - content["ffn_share"] * 2 / 3 * content["timings"][0]["sparsity"]["gate"]
    )
    assert (tmp_path / "out" / "decode.csv").read_text().count("\n") == 3
    assert main([*words[:-1], "gates"]) == 2
    assert main(["analyze", "exits", "runs/none", "--decode", "gate"]) == 2
    errors = capsys.readouterr().err
    assert "unknown place 'gates'" in errors and "--decode: has no effect on analyze exits" in errors


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES)
def test_families_decode_with_their_cache(name, tmp_path, lines):
    """Token by token with the cache, the sparse model equals itself on the whole text, where it multiplies densely."""
    pytest.importorskip("transformers")
    torch.manual_seed(3)
    make_tokenizer(tmp_path)
    family(name).save_pretrained(tmp_path)
    target = open_target(str(tmp_path), data=str(lines), max_length=12)
    places = ("input", "intermediate") if name in ("gpt2", "opt") else ("gate",)
    (rules,) = calibrate(target.model, target.batches("fit"), sparsities=[0.5], places=places)
    sparse = sparse_decoder(target.model, rules)
    layers = list(sparse_layers(sparse).values())
    assert len(layers) == 2
    token = torch.randn(1, 16, dtype=layers[0].down.weight.dtype)
    assert layers[0].choose(layers[0].parts(), token) is compute_active
    ids = torch.tensor([[2, 5, 6, 7, 4, 8, 9, 5]])
    # Renamed in transformers 5.
    key = "cache" if "cache" in inspect.signature(sparse.forward).parameters else "past_key_values"
    with torch.no_grad():
        whole, dense, cache, steps = sparse(input_ids=ids).logits, target.model(input_ids=ids).logits, None, []
        for at in range(ids.shape[1]):
            out = sparse(input_ids=ids[:, at : at + 1], **{key: cache}, use_cache=True)
            cache = getattr(out, key)
            steps.append(out.logits)
    tolerance = 0.02 if name == "llama_bf16" else 1e-5
    torch.testing.assert_close(torch.cat(steps, 1), whole, rtol=tolerance, atol=tolerance)
    assert float((whole - dense).abs().max()) > 1e-4
