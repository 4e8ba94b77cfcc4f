"""Runs and models of hubs as targets: the right data, the right answers, and what is refused."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from clframe.data.target import IGNORED
from clframe.errors import ClframeError, ConfigError, DataError, RunFolderError, UnsupportedError
from clframe.targets import open_target
from clframe.targets.language import generate_greedily


def share_right(target, part):
    right = total = 0
    with torch.no_grad():
        for inputs, targets, _ in part.batches(size=50):
            right += int((target.predict(target.model, inputs).argmax(1) == targets).sum())
            total += len(targets)
    return right / total


def test_a_run_answers_as_it_was_evaluated(finished):
    target = open_target(finished.run_folder)
    assert (target.kind, target.body_name) == ("run", "backbone") and target.body is target.model.backbone
    for part, expected in zip(target.experiences, finished.accuracy_matrix[-1], strict=True):
        assert share_right(target, part) == pytest.approx(expected, abs=1e-12)
    assert len(target.splits.test) == sum(finished.test_samples)
    assert len(target.splits.fit) + len(target.splits.validation) + len(target.splits.test) == 1797
    some = target.batches("fit", size=7, limit=20)
    sizes = [len(batch.targets) for batch in some]
    assert sizes[0] == sizes[2] == 7 and sum(sizes) == 20 and sizes[1] + 7 in (10, 11)  # as many of each experience
    assert torch.equal(some[0].inputs, some[0].inputs) and some[1:][0].tokens is None
    assert not any(weight.requires_grad for weight in target.model.parameters())


def test_a_run_that_is_not_finished_is_asked_what_it_has_learnt(finished, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(finished.run_folder, folder)
    *_, last = sorted((folder / "checkpoints").iterdir())
    last.unlink()
    target = open_target(str(folder))
    assert len(target.experiences) == 1 and share_right(target, target.splits.test) == finished.accuracy_matrix[0][0]
    assert int(max(batch.targets.max() for batch in target.batches("fit"))) == 4


def test_a_run_of_token_ids_knows_its_padding(texts, encoder, tmp_path):
    from clframe import run

    words = ["benchmark=clinc150", f"benchmark.data_dir={texts}", f"benchmark.tokens={encoder}", "backbone=hf_text",
             "benchmark.experiences=3", f"backbone.pretrained={encoder}", "backbone.pooling=mean", "strategy=er",
             "trainer.precision=bf16-mixed", "trainer.epochs=1", "trainer.progress=false", "trainer.loggers=[]"]
    done = run("quickstart", words, output=tmp_path)
    target = open_target(done.run_folder)
    (batch,) = target.batches("test")[:1]
    assert batch.inputs.dtype == torch.int64 and torch.equal(batch.tokens, batch.inputs != 0)
    assert batch.inputs.shape[1] == 7  # "set the alarm now please" and two of the tokenizer's own
    kept = target.run.learner.state["er"]
    assert kept["x"].dtype == torch.int32 and len(kept["x"]) == 6
    assert target.model.to_device(batch.inputs).dtype == torch.int64


def test_an_encoder_answers_with_the_nearest_mean(texts, encoder):
    from transformers import AutoModel, AutoTokenizer

    target = open_target(str(encoder), data="clinc150", overrides=[f"benchmark.data_dir={texts}"], per_class=2)
    assert target.kind == "encoder" and len(target.batches("fit", size=4)) == 2
    tokenizer, model = AutoTokenizer.from_pretrained(encoder), AutoModel.from_pretrained(encoder).eval()

    def embed(text):
        with torch.no_grad():
            return F.normalize(model(**tokenizer(text, return_tensors="pt")).last_hidden_state.mean(1), dim=1)[0]

    pairs = [("pay my bill", "pay the rent now"), ("lost my card", "where is my card"), ("wake me up", "set the alarm now please")]
    means = F.normalize(torch.stack([embed(a) + embed(b) for a, b in pairs]), dim=1)
    torch.testing.assert_close(target.model.means_CD, means, atol=1e-5, rtol=0)
    (batch,) = target.batches("test")
    expected = 20 * torch.stack([embed(b) for _, b in pairs]) @ means.T
    with torch.no_grad():
        scores = target.predict(target.model, batch.inputs)
    torch.testing.assert_close(scores[batch.targets.argsort()], expected, atol=1e-4, rtol=0)
    assert int(batch.tokens.sum()) == 6 + 6 + 7


def test_an_encoder_in_half_precision(texts, encoder, tmp_path):
    from transformers import AutoModel

    for dtype in (torch.bfloat16, torch.float16):
        folder = tmp_path / str(dtype)
        shutil.copytree(encoder, folder)
        AutoModel.from_pretrained(encoder).to(dtype).save_pretrained(folder)
        target = open_target(str(folder), data="clinc150", overrides=[f"benchmark.data_dir={texts}"])
        assert next(target.body.parameters()).dtype == dtype and target.model.means_CD.dtype == torch.float32
        (batch,) = target.batches("test")
        with torch.no_grad():
            assert target.predict(target.model, batch.inputs).isfinite().all()


def test_validation_texts_are_no_training_texts(texts, encoder):
    words = [f"benchmark.data_dir={texts}", "benchmark.validation=0.5", "benchmark.classes=2"]
    target = open_target(str(encoder), data="clinc150", overrides=words)
    fit, held = ({tuple(row) for row in part.rows} for part in (target.splits.fit, target.splits.validation))
    assert len(fit) == len(held) == 2 and not fit & held and len(target.splits.test) == 2


def test_a_language_model_writes_on(llama, texts):
    from transformers import AutoModelForCausalLM

    target = open_target(str(llama), data="clinc150", overrides=[f"benchmark.data_dir={texts}"], generate=3)
    assert target.kind == "causal"
    model = AutoModelForCausalLM.from_pretrained(llama).eval()
    (batch,) = target.batches("test")
    ids, prompt, generated = batch.inputs["input_ids"], batch.tokens["prompt"], batch.tokens["generated"]
    for row in range(3):
        sequence = ids[row][prompt[row]][None]
        for _ in range(3):
            with torch.no_grad():
                token = model(input_ids=sequence).logits[:, -1].argmax(-1)
            sequence = torch.cat((sequence, token[:, None]), 1)
            if int(token) == 3:
                break
        assert torch.equal(ids[row][prompt[row] | generated[row]], sequence[0])
        count = sequence.shape[1]
        assert batch.targets[row, : count - 1].tolist() == sequence[0, 1:].tolist()
        assert (batch.targets[row, count - 1 :] == IGNORED).all()
    assert not (prompt & generated).any() and torch.equal(prompt | generated, batch.inputs["attention_mask"].bool())


def test_nothing_counts_after_the_end_of_a_text():
    class Ender(torch.nn.Module):
        generation_config = type("Settings", (), {"eos_token_id": [2]})()

        def forward(self, input_ids, attention_mask, use_cache):
            return type("Output", (), {"logits": F.one_hot((input_ids + 1) % 4, 4).float()})()

    batch = generate_greedily(Ender(), torch.tensor([[1, 0], [3, 0]]), torch.tensor([[True, False], [True, True]]), tokens=3)
    assert batch.inputs["input_ids"].tolist() == [[1, 2, 0, 0, 0], [3, 0, 1, 2, 0]]
    assert batch.tokens["generated"].int().tolist() == [[0, 1, 0, 0, 0], [0, 0, 1, 1, 0]]
    assert batch.targets.tolist() == [[2, IGNORED, IGNORED, IGNORED, IGNORED], [0, 1, 2, IGNORED, IGNORED]]


@pytest.mark.parametrize("classes", [10, 7])
def test_a_model_of_timm_sees_images_as_it_wants_them(tmp_path, classes):
    library = pytest.importorskip("timm")
    torch.manual_seed(5)
    whole = library.create_model("test_vit", num_classes=classes, img_size=32).eval()
    whole.pretrained_cfg = {**whole.pretrained_cfg, "input_size": (3, 32, 32)}
    library.models.save_for_hf(whole, tmp_path, model_args={"img_size": 32}, safe_serialization=True)
    target = open_target(str(tmp_path), data="digits", per_class=3)
    assert target.kind == "images" and target.body_name == ("" if classes == 10 else "embed")
    batch = target.batches("test", size=5)[0]
    assert batch.inputs.shape == (5, 3, 32, 32)
    with torch.no_grad():
        scores = target.predict(target.model, batch.inputs)
        if classes == 10:
            torch.testing.assert_close(scores, whole(batch.inputs), atol=1e-5, rtol=0)
        else:
            embedded = F.normalize(whole.forward_head(whole.forward_features(batch.inputs), pre_logits=True), dim=1)
            torch.testing.assert_close(scores, 20 * embedded @ target.model.means_CD.T, atol=1e-4, rtol=0)
    source_mean = torch.tensor(whole.pretrained_cfg["mean"])
    assert batch.inputs.amin((0, 2, 3)).tolist() == pytest.approx((-source_mean / torch.tensor(whole.pretrained_cfg["std"])).tolist(), abs=1e-4)


def test_what_is_refused(finished, encoder, texts, tmp_path):
    run, model, here = finished.run_folder, str(encoder), f"benchmark.data_dir={texts}"
    (tmp_path / "empty").mkdir()
    (tmp_path / "none.txt").write_text(" \n\n")
    for options, kind, said in (
        (dict(name=""), ConfigError, "target: found nothing"),
        (dict(name=str(tmp_path / "no")), RunFolderError, "no such folder, and not the name"),
        (dict(name=str(tmp_path / "empty")), RunFolderError, "found neither a run's config.yaml nor"),
        (dict(name=model), ConfigError, "--data: found none"),
        (dict(name=run, data="clinc150"), ConfigError, "--data: found clinc150 for a run"),
        (dict(name=run, generate=2), ConfigError, "--generate: found 2 for .*, which is not a language model"),
        (dict(name=run, max_length=64), ConfigError, "--length: found 64 for .*, which is not a language model"),
        (dict(name=run, overrides=["benchmark.classes=2"]), ConfigError, "a run uses its own config"),
        (dict(name=run, device="cud"), UnsupportedError, "--device: found cud"),
        (dict(name=run, device="meta"), UnsupportedError, "has no values"),
        (dict(name=model, data="digits"), ConfigError, "has no texts; give one of banking77, clinc150"),
        (dict(name=model, data="clinc150", overrides=["trainer.epochs=2"]), ConfigError, "does not change data"),
        (dict(name=model, data="clinc150", overrides=[here], generate=2), ConfigError, "not a language model"),
        (dict(name=model, data="clinc150", overrides=[here], max_length=2), ConfigError, "give at least 3"),
        (dict(name=model, data=str(tmp_path / "none.txt")), DataError, "contains no text"),
        (dict(name=model, data=str(tmp_path / "gone.txt")), DataError, "no file"),
    ):
        with pytest.raises(kind, match=said) as caught:
            open_target(**options)
        assert isinstance(caught.value, ClframeError) and "\n" not in str(caught.value)


def test_a_model_that_cannot_be_read(encoder, texts, tmp_path):
    folder = tmp_path / "broken"
    shutil.copytree(encoder, folder)
    (folder / "model.safetensors").write_bytes(b"no weights")
    with pytest.raises(DataError, match="could not be loaded .*; connect, or give a folder with"):
        open_target(str(folder), data="clinc150", overrides=[f"benchmark.data_dir={texts}"])
    (Path(folder) / "model.safetensors").unlink()
    torch.save({}, folder / "pytorch_model.bin")  # never unpickled
    with pytest.raises(DataError, match="could not be loaded"):
        open_target(str(folder), data="clinc150", overrides=[f"benchmark.data_dir={texts}"])
