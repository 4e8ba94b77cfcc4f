"""transformers' encoders cut into stages, and what loading a folder may do."""

from __future__ import annotations

import json
import sys

import pytest
import torch
from transformers import BertConfig, BertModel, ViTConfig, ViTModel

from clframe.errors import ConfigError, DataError, UnsupportedError
from clframe.nn.backbones import bert, hf_text, hf_vit

IDS = torch.tensor([[2, 7, 9, 4, 0, 0], [2, 5, 4, 0, 0, 0], [2, 8, 8, 8, 8, 3]])


def text_model(**changes):
    torch.manual_seed(2)
    sizes = {"vocab_size": 12, "hidden_size": 8, "num_hidden_layers": 3, "num_attention_heads": 2}
    return BertModel(BertConfig(**{**sizes, "intermediate_size": 16, "max_position_embeddings": 10, **changes})).eval()


@pytest.fixture
def text_folder(tmp_path):
    text_model().save_pretrained(tmp_path)
    return tmp_path


@pytest.fixture
def image_folder(tmp_path):
    torch.manual_seed(2)
    sizes = {"hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16}
    ViTModel(ViTConfig(image_size=12, patch_size=4, num_channels=1, **sizes)).eval().save_pretrained(tmp_path)
    return tmp_path


def test_stages_of_bert_are_the_model(text_folder):
    backbone = hf_text((6,), pretrained=str(text_folder)).eval()
    assert backbone.tap_shapes == {
        "embed": (6, 8), "encoder.0": (6, 8), "encoder.1": (6, 8), "encoder.2": (6, 8), "pool": (8,),
    }  # fmt: skip
    model = text_model()
    with torch.no_grad():
        expected = model(IDS, attention_mask=(IDS != 0).long(), output_hidden_states=True)
        torch.testing.assert_close(backbone(IDS), expected.pooler_output, rtol=0, atol=1e-6)
        assert torch.equal(backbone(IDS), backbone(IDS.float()))
        value = IDS
        for stage, hidden in zip(backbone.stages[:-1], expected.hidden_states, strict=True):
            value = stage(value)
            keep = (IDS != 0)[..., None]
            torch.testing.assert_close(value[0] * keep, hidden * keep, rtol=0, atol=1e-6)
            assert torch.equal(value[1][:, 0, 0], IDS != 0)


@pytest.mark.parametrize("pooling", ["pooler", "cls", "mean"])
def test_padding_changes_nothing(pooling):
    backbone = bert((6,), vocabulary=12, width=8, depth=2, heads=2, pooling=pooling).eval()
    with torch.no_grad():
        torch.testing.assert_close(backbone(IDS[1:2]), backbone(IDS[1:2, :3]), rtol=0, atol=1e-6)
        assert backbone(torch.zeros(2, 6)).isfinite().all()


def test_poolings_by_arithmetic():
    tokens, keep = torch.randn(3, 6, 8), (IDS != 0)[:, None, None]
    pools = {pooling: bert((6,), vocabulary=12, width=8, pooling=pooling).stages[-1] for pooling in ("cls", "mean")}
    assert torch.equal(pools["cls"]((tokens, keep)), tokens[:, 0])
    means = torch.stack([tokens[0, :4].mean(0), tokens[1, :3].mean(0), tokens[2].mean(0)])
    torch.testing.assert_close(pools["mean"]((tokens, keep)), means)


def test_long_texts_get_positions():
    assert bert((600,), vocabulary=12, width=4, depth=1).tap_shapes["embed"] == (600, 4)


def test_stages_of_vit_are_the_model(image_folder):
    backbone = hf_vit((1, 12, 12), pretrained=str(image_folder)).eval()
    assert backbone.tap_shapes == {"embed": (10, 8), "encoder.0": (10, 8), "encoder.1": (10, 8), "pool": (8,)}
    model = ViTModel.from_pretrained(image_folder, add_pooling_layer=False).eval()
    for side in (12, 20):
        x = torch.randn(3, 1, side, side)
        backbone = hf_vit((1, side, side), pretrained=str(image_folder)).eval()
        with torch.no_grad():
            expected = model(x, interpolate_pos_encoding=True).last_hidden_state[:, 0]
            torch.testing.assert_close(backbone(x), expected, rtol=0, atol=1e-6)


def test_pickles_are_refused(text_folder):
    (text_folder / "model.safetensors").unlink()
    torch.save(text_model().state_dict(), text_folder / "pytorch_model.bin")
    with pytest.raises(DataError, match=r"^hf_text.pretrained: .+ could not be loaded \(.*safetensors") as caught:
        hf_text((6,), pretrained=str(text_folder))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", ["bert", "their_own"])
def test_code_beside_a_model_is_never_run(text_folder, kind):
    ran = text_folder / "ran"
    code = f"import pathlib\npathlib.Path({str(ran)!r}).touch()\n"
    code += "from transformers import BertConfig, BertModel\nclass C(BertConfig): ...\nclass M(BertModel): ...\n"
    (text_folder / "theirs.py").write_text(code)
    config = json.loads((text_folder / "config.json").read_text())
    config |= {"model_type": kind, "auto_map": {"AutoConfig": "theirs.C", "AutoModel": "theirs.M"}}
    (text_folder / "config.json").write_text(json.dumps(config))
    if kind == "bert":
        hf_text((6,), pretrained=str(text_folder))
    else:
        with pytest.raises(DataError, match=r"^hf_text.pretrained: .+ could not be loaded"):
            hf_text((6,), pretrained=str(text_folder))
    assert not ran.exists()


def test_other_kinds_of_models_are_refused(image_folder):
    with pytest.raises(UnsupportedError, match=r"^hf_text.pretrained: .+ is of type vit; give a bert model$"):
        hf_text((6,), pretrained=str(image_folder))


def test_what_does_not_fit_the_model_is_named(text_folder):
    with pytest.raises(ConfigError, match=r"^hf_text: found texts of 11 tokens; .+ takes 10$"):
        hf_text((11,), pretrained=str(text_folder))
    text_model(pad_token_id=1).save_pretrained(text_folder)
    with pytest.raises(ConfigError, match=r"^hf_text: .+ pads with id 1; take one that pads with 0$"):
        hf_text((6,), pretrained=str(text_folder))


def test_weights_that_the_model_lacks_are_named_and_nothing_is_printed(tmp_path, capfd):
    BertModel(text_model().config, add_pooling_layer=False).save_pretrained(tmp_path)
    capfd.readouterr()
    with pytest.raises(DataError, match=r"has no weights for pooler.dense.bias, pooler.dense.weight; .*pooling=mean"):
        hf_text((5,), pretrained=str(tmp_path))
    text_model().save_pretrained(tmp_path)
    capfd.readouterr()
    hf_text((5,), pretrained=str(tmp_path), pooling="mean")  # leaves the pooler's weights out
    assert capfd.readouterr() == ("", "")


def test_images_of_other_channels_are_refused(image_folder):
    with pytest.raises(ConfigError, match=r"^hf_vit: found images of 3 channels; .+ takes 1$"):
        hf_vit((3, 12, 12), pretrained=str(image_folder))


def test_a_folder_that_is_not_there_is_one_line(tmp_path):
    with pytest.raises(DataError, match=r"^hf_vit.pretrained: .+ could not be loaded") as caught:
        hf_vit((3, 16, 16), pretrained=str(tmp_path / "nothing"))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: bert((3, 8, 8)), r"bert: found inputs of shape \(3, 8, 8\); give token ids"),
        (lambda: bert((8,), width=0), "bert.width: found 0; give 1 or more"),
        (lambda: bert((8,), heads=3), "bert.heads: found 3 with width 128; give a number that divides it"),
        (lambda: bert((8,), dropout=1.5), "bert.dropout: found 1.5; give 0 or more"),
        (lambda: bert((8,), vocabulary=9, width=4, pooling="max"), "bert.pooling: found 'max'; give 'pooler'"),
    ],
)
def test_impossible_options_are_one_line(make, message):
    with pytest.raises(ConfigError, match=f"^{message}"):
        make()


def test_without_the_package_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(UnsupportedError, match=r"^bert: found no package transformers; pip install clframe\[transformers\]$"):
        bert((8,))
