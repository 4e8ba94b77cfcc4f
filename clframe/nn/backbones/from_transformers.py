"""Encoders of the transformers library as backbones: its own modules, run as stages.

Shape suffixes: B batch, T tokens, D width.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn

from clframe.errors import ConfigError, DataError, UnsupportedError
from clframe.nn.backbones.base import BACKBONES, Backbone
from clframe.nn.backbones.checks import require_at_least, require_depth, require_image
from clframe.nn.backbones.pretrained import require_package
from clframe.nn.backbones.stages import infer_shapes
from clframe.nn.backbones.vit import ClassToken

Pooling = Literal["pooler", "cls", "mean"]
"""Reduction of tokens to one vector, see :func:`bert`."""
Masked = tuple[Tensor, Tensor]
"""tokens_BTD and the mask keep_B11T, true for tokens that may be attended to."""


class TextEmbed(nn.Module):
    """Embeds token ids and computes their mask.

    Args:
        embeddings: The embedding module of the model.
    """

    def __init__(self, embeddings: nn.Module) -> None:
        super().__init__()
        self.embeddings = embeddings

    def forward(self, x: Tensor) -> Masked:
        """Compute tokens and mask of ids_BT."""
        ids_BT = x.long()
        return self.embeddings(ids_BT), real_tokens(ids_BT)[:, None, None]


def real_tokens(ids_BT: Tensor) -> Tensor:
    """mask_BT of ids that are not padding; the first token always counts.

    >>> real_tokens(torch.tensor([[7, 3, 0], [0, 0, 0]])).tolist()
    [[True, True, False], [True, False, False]]
    """
    mask_BT = ids_BT != 0
    mask_BT[:, 0] = True
    return mask_BT


def token_mask(backbone: Backbone, x: Tensor) -> Tensor | None:
    """mask_BT of the tokens in inputs of a text encoder that are not padding; None for another backbone."""
    return real_tokens(x) if isinstance(backbone.stages[0], TextEmbed) else None


class TextLayer(nn.Module):
    """One encoder layer that passes the mask on.

    Args:
        layer: The layer of the model.
    """

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, value: Masked) -> Masked:
        """Compute the tokens; the mask is unchanged."""
        tokens_BTD, keep_B11T = value
        return _tensor(self.layer(tokens_BTD, keep_B11T)), keep_B11T


class TextPool(nn.Module):
    """Reduces the tokens of a text to one vector.

    Args:
        pooling: As in :func:`~clframe.nn.backbones.from_transformers.bert`.
        pooler: The pooler of the model, for ``pooler``.
    """

    def __init__(self, *, pooling: Pooling, pooler: nn.Module | None) -> None:
        super().__init__()
        self.pooling = pooling
        self.pooler = pooler

    def forward(self, value: Masked) -> Tensor:
        """Compute features_BD of tokens_BTD and their mask."""
        tokens_BTD, keep_B11T = value
        if self.pooler is not None:
            pooled: Tensor = self.pooler(tokens_BTD)
            return pooled
        if self.pooling == "cls":
            return tokens_BTD[:, 0]
        weights_BT1 = keep_B11T.flatten(1)[..., None].to(tokens_BTD.dtype)
        return (tokens_BTD * weights_BT1).sum(1) / weights_BT1.sum(1)


class ImageEmbed(nn.Module):
    """Embeds images, with positions interpolated for other image sizes.

    Args:
        embeddings: The embedding module of the model.
    """

    def __init__(self, embeddings: nn.Module) -> None:
        super().__init__()
        self.embeddings = embeddings

    def forward(self, x: Tensor) -> Tensor:
        """Compute tokens_BTD of images_BCHW."""
        out: Tensor = self.embeddings(x, interpolate_pos_encoding=True)
        return out


class ImageLayer(nn.Module):
    """One encoder layer.

    Args:
        layer: The layer of the model.
    """

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        """Compute tokens_BTD of tokens_BTD."""
        return _tensor(self.layer(x))


def _tensor(out: Any) -> Tensor:
    """The output of a layer, which is a tuple of one before transformers 5."""
    tensor: Tensor = out if isinstance(out, Tensor) else out[0]
    return tensor


@BACKBONES.register("bert")
def bert(
    input_shape: tuple[int],
    *,
    vocabulary: int = 30522,
    width: int = 128,
    depth: int = 2,
    heads: int = 2,
    dropout: float = 0.1,
    pooling: Literal["pooler", "cls", "mean"] = "pooler",
) -> Backbone:
    """BERT with random weights; the defaults are the size of BERT-tiny (needs the extra transformers).

    Devlin et al., "BERT: pre-training of deep bidirectional transformers", 2019.

    Args:
        input_shape: (length,) of one text in tokens.
        vocabulary: Number of token ids; id 0 is padding.
        width: Width of a token; the hidden layer of a block has four times as many units.
        depth: Encoder layers.
        heads: Attention heads; they must divide the width.
        dropout: Probability of dropout.
        pooling: Input of the classifier: ``pooler``, BERT's tanh layer on the first token; ``cls``, the first token;
            ``mean``, the average over all tokens except padding.

    Raises:
        ConfigError: An option out of range or inputs that are not texts.
        UnsupportedError: transformers is not installed.
    """
    length = _length(input_shape, where="bert")
    for option, value in (("vocabulary", vocabulary), ("width", width), ("heads", heads)):
        require_at_least(value, 1, where=f"bert.{option}")
    require_depth(depth, where="bert.depth")
    if width % heads:
        raise ConfigError(f"bert.heads: found {heads} with width {width}; give a number that divides it")
    if not 0 <= dropout < 1:
        raise ConfigError(f"bert.dropout: found {dropout}; give 0 or more and less than 1")
    library = require_package("transformers", where="bert")
    config = library.BertConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        num_hidden_layers=depth,
        num_attention_heads=heads,
        intermediate_size=4 * width,
        max_position_embeddings=max(length, 512),
        hidden_dropout_prob=dropout,
        attention_probs_dropout_prob=dropout,
        attn_implementation="sdpa",
    )
    model = library.BertModel(config, add_pooling_layer=pooling == "pooler")
    return _text_backbone(model, input_shape, pooling=pooling, where="bert")


@BACKBONES.register("hf_text")
def hf_text(
    input_shape: tuple[int], *, pretrained: str, pooling: Literal["pooler", "cls", "mean"] = "pooler"
) -> Backbone:
    """Pre-trained BERT from the Hugging Face hub or a folder (needs the extra transformers).

    Args:
        input_shape: (length,) of one text in tokens, no longer than the model's positions.
        pretrained: Name on the hub, such as ``google-bert/bert-base-uncased``, or a folder.
        pooling: As in :func:`bert`.

    Raises:
        ConfigError: Texts that are too long, or a padding id other than 0.
        DataError: A model that could not be loaded, or that is not in safetensors files.
        UnsupportedError: transformers is not installed, or the model is not a BERT.
    """
    length = _length(input_shape, where="hf_text")
    options = {"add_pooling_layer": pooling == "pooler"}
    model = _pretrained(pretrained, kind="bert", loader="BertModel", options=options, where="hf_text")
    if length > model.config.max_position_embeddings:
        raise ConfigError(
            f"hf_text: found texts of {length} tokens; {pretrained} takes {model.config.max_position_embeddings}"
        )
    if model.config.pad_token_id != 0:
        raise ConfigError(f"hf_text: {pretrained} pads with id {model.config.pad_token_id}; take one that pads with 0")
    return _text_backbone(model, input_shape, pooling=pooling, where="hf_text")


@BACKBONES.register("hf_vit")
def hf_vit(input_shape: tuple[int, int, int], *, pretrained: str) -> Backbone:
    """Pre-trained vision transformer from the Hugging Face hub or a folder (needs the extra transformers).

    Positions are interpolated for images of another size; the last tap is the class token, normalized.

    Args:
        input_shape: (channels, height, width) of one image, at least one patch.
        pretrained: Name on the hub, such as ``google/vit-base-patch16-224-in21k``, or a folder.

    Raises:
        ConfigError: Images of other channels than the model's, or smaller than a patch.
        DataError: A model that could not be loaded, or that is not in safetensors files.
        UnsupportedError: transformers is not installed, or the model is not a ViT.
    """
    options = {"add_pooling_layer": False}
    model = _pretrained(pretrained, kind="vit", loader="ViTModel", options=options, where="hf_vit")
    channels, _, _ = require_image(input_shape, model.config.patch_size, where="hf_vit")
    if channels != model.config.num_channels:
        raise ConfigError(
            f"hf_vit: found images of {channels} channels; {pretrained} takes {model.config.num_channels}"
        )
    stages: list[tuple[str, nn.Module]] = [("embed", ImageEmbed(model.embeddings)), *_layers(model, ImageLayer)]
    stages.append(("pool", ClassToken(model.layernorm)))
    return Backbone(infer_shapes(stages, input_shape, where="hf_vit"), input_shape=input_shape)


def _text_backbone(model: Any, input_shape: tuple[int], *, pooling: Pooling, where: str) -> Backbone:
    if pooling not in ("pooler", "cls", "mean"):
        raise ConfigError(f"{where}.pooling: found {pooling!r}; give 'pooler', 'cls' or 'mean'")
    stages: list[tuple[str, nn.Module]] = [("embed", TextEmbed(model.embeddings)), *_layers(model, TextLayer)]
    stages.append(("pool", TextPool(pooling=pooling, pooler=model.pooler)))
    return Backbone(infer_shapes(stages, input_shape, where=where), input_shape=input_shape)


def _layers(model: nn.Module, kind: type[TextLayer] | type[ImageLayer]) -> list[tuple[str, nn.Module]]:
    # Found as the only ModuleList, because its attribute name differs between versions of transformers.
    layers = next(part for part in model.modules() if isinstance(part, nn.ModuleList))
    return [(f"encoder.{index}", kind(layer)) for index, layer in enumerate(layers)]


def _length(input_shape: tuple[int, ...], *, where: str) -> int:
    if len(input_shape) != 1 or input_shape[0] < 1:
        raise ConfigError(f"{where}: found inputs of shape {input_shape}; give token ids of shape (length,)")
    return input_shape[0]


def _pretrained(name: str, *, kind: str, loader: str, options: dict[str, bool], where: str) -> Any:
    """Load a model of the hub or a folder from safetensors files, with the attention that supports our masks."""
    library = require_package("transformers", where=where)
    try:
        config = library.AutoConfig.from_pretrained(name, trust_remote_code=False)
        if config.model_type != kind:
            raise UnsupportedError(f"{where}.pretrained: {name} is of type {config.model_type}; give a {kind} model")
        with _quiet(library):
            model, found = getattr(library, loader).from_pretrained(
                name, config=config, use_safetensors=True, dtype=torch.float32, attn_implementation="sdpa",
                output_loading_info=True, **options
            )  # fmt: skip
    except UnsupportedError:
        raise
    except (OSError, ValueError) as error:  # missing, no connection, no safetensors, or custom code
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise DataError(
            f"{where}.pretrained: {name} could not be loaded ({reason}); connect, or give a folder with safetensors"
        ) from error
    if found["missing_keys"]:
        raise DataError(
            f"{where}.pretrained: {name} has no weights for {', '.join(sorted(found['missing_keys']))}; take another "
            f"model" + (", or pooling=mean" if options.get("add_pooling_layer") else "")
        )
    return model


@contextmanager
def _quiet(library: Any) -> Iterator[None]:
    """Silence progress bars and reports of unused weights; both settings are restored at the end."""
    logging = library.logging
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    try:
        logging.set_verbosity_error()
        logging.disable_progress_bar()
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()
