"""Models of timm as targets, and a nearest-mean classifier for encoders.

Shape suffixes: B batch, C classes, D width, T tokens.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from clframe.config.schema import Config
from clframe.data.source import Source
from clframe.data.target import DataSplits, SampleSplit, Target
from clframe.errors import DataError
from clframe.files import read_json
from clframe.nn.backbones.pretrained import require_package
from clframe.nn.frozen import call_model
from clframe.nn.types import Inputs
from clframe.stream import build_data

if TYPE_CHECKING:
    from clframe.data.target import Batch


SCALE = 20.0
"""Factor of cosine similarities, common for trained cosine logits; does not change predictions."""


class MeanTokens(nn.Module):
    """Mean token embedding of texts, accumulated in float32.

    Args:
        encoder: Encoder of transformers.
    """

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """embedding_BD of ids_BT and the mask of tokens that are not padding."""
        hidden_BTD = self.encoder(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        mask_BT1 = attention_mask[..., None].to(hidden_BTD.dtype)
        total_BD: Tensor = (hidden_BTD * mask_BT1).float().sum(1)
        return total_BD / mask_BT1.float().sum(1)


class NearestMean(nn.Module):
    """Nearest-mean classifier: 20 times the cosine similarity of an input's embedding to each class's mean embedding.

    The means are computed once by :meth:`learn` from normalized embeddings.

    Args:
        embed: Module from inputs to embeddings.
        classes: Number of classes.
    """

    means_CD: Tensor

    def __init__(self, embed: nn.Module, *, classes: int) -> None:
        super().__init__()
        self.embed = embed
        self.classes = classes
        self.register_buffer("means_CD", torch.zeros(classes, 0))

    def forward(self, inputs: Inputs) -> Tensor:
        """scores_BC."""
        return SCALE * self._unit_embedding(inputs) @ self.means_CD.T

    @torch.no_grad()
    def learn(self, batches: Iterable[Batch]) -> None:
        """Compute the mean embedding of each class from labeled batches.

        Raises:
            DataError: A class without samples.
        """
        sums_CD, seen_C = None, None
        for batch in batches:
            embedded_BD, y_B = self._unit_embedding(batch.inputs), batch.targets
            assert y_B is not None
            if sums_CD is None:
                sums_CD = embedded_BD.new_zeros(self.classes, embedded_BD.shape[1])
                seen_C = embedded_BD.new_zeros(self.classes)
            assert seen_C is not None
            sums_CD.index_add_(0, y_B, embedded_BD)
            seen_C.index_add_(0, y_B, torch.ones_like(y_B, dtype=seen_C.dtype))
        if sums_CD is None or seen_C is None or bool((seen_C == 0).any()):
            raise DataError("target: found a class without training samples; give each at least one")
        self.means_CD = F.normalize(sums_CD, dim=1)

    def _unit_embedding(self, inputs: Inputs) -> Tensor:
        embedded_BD: Tensor = call_model(self.embed, inputs)
        return F.normalize(embedded_BD.float(), dim=1)


def is_timm(name: str) -> bool:
    """Whether a name or folder is a timm model: ``timm/...``, a name in timm's registry, or a folder saved by timm."""
    file = Path(name).expanduser() / "config.json"
    if file.is_file():
        try:
            content = read_json(file)
        except (OSError, ValueError):
            return False
        return isinstance(content, dict) and "architecture" in content and "model_type" not in content
    if name.startswith("timm/"):
        return True
    if "/" in name or importlib.util.find_spec("timm") is None:
        return False
    return bool(require_package("timm", where="target").is_model(name))


def images_target(name: str, *, config: Config, device: torch.device, per_class: int) -> Target:
    """Open a model of timm on images, resized and normalized for the model.

    Uses the model's classifier if it has one output per class of the data, else nearest mean embeddings.
    """
    source, _ = build_data(config.benchmark, seed=config.seed)
    if len(source.input_shape) != 3:
        raise DataError(f"--data: found {source.name}, which has no images; give a benchmark of images for {name}")
    whole = _create_model(name).to(device)
    fits = getattr(whole, "num_classes", 0) == source.classes
    place = _TimmTransform(whole, source, device=device)
    train, held = source.hold_out(config.benchmark.validation, seed=config.seed)
    # Without the data set's normalization: the transform applies the model's mean and standard deviation.
    parts = [None if part is None else SampleSplit([part], place=place) for part in (train, held, source.test)]
    fit, validation, test = parts
    assert fit is not None and test is not None
    if fits:
        model: nn.Module = whole
    else:
        whole.reset_classifier(0)
        model = NearestMean(whole, classes=source.classes).to(device)
        model.learn(_first_of_classes(source, fit, per_class).batches())
    model.eval().requires_grad_(False)
    return Target(
        name=name, kind="images", model=model, body_name="" if fits else "embed", predict=class_scores, config=config,
        origin={"revision": whole.pretrained_cfg.get("tag")}, splits=DataSplits(fit, validation, test),
    )  # fmt: skip


class _TimmTransform:
    """Transform from prepared images of a data set to inputs of a timm model."""

    def __init__(self, model: Any, source: Source, *, device: torch.device) -> None:
        published = model.pretrained_cfg
        self.channels, *size = published.get("input_size", (3, 224, 224))
        self.size = tuple(size)
        first = next(model.parameters())
        self.device, self.dtype = device, first.dtype
        stored = source.train.raw(torch.arange(1))
        self.top = 1.0 if stored.is_floating_point() else 255.0
        self.data_mean, self.data_std = self._channelwise(source.train.mean), self._channelwise(source.train.std)
        self.mean, self.std = (self._channelwise(published.get(name, 0.5)) for name in ("mean", "std"))

    def __call__(self, x: Tensor) -> Tensor:
        x = x.float().to(self.device) * self.data_std + self.data_mean  # undoes the data set's normalization
        x = F.interpolate(x / self.top, size=self.size, mode="bilinear", antialias=True, align_corners=False)
        if x.shape[1] != self.channels:
            x = x.mean(1, keepdim=True).expand(-1, self.channels, -1, -1)
        return ((x - self.mean) / self.std).to(self.dtype)

    def _channelwise(self, value: Any) -> Tensor:
        values = value if isinstance(value, (tuple, list)) else (value,)
        return torch.tensor(values, dtype=torch.float32, device=self.device).reshape(1, -1, 1, 1)


def _first_of_classes(source: Source, fit: SampleSplit, per_class: int) -> SampleSplit:
    (train,) = fit.samples
    first = [(train.y == c).nonzero().flatten()[:per_class] for c in range(source.classes)]
    return SampleSplit([train.subset(torch.cat(first))], place=fit.place)


def _create_model(name: str) -> Any:
    library = require_package("timm", where="target")
    folder = Path(name).expanduser()
    asked = f"local-dir:{folder}" if folder.is_dir() else f"hf-hub:{name}" if "/" in name else name
    try:
        return library.create_model(asked, pretrained=True)
    except Exception as error:  # the library does not document which exceptions a damaged file raises
        reason = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
        raise DataError(f"{name}: timm could not load it ({reason}); connect, or give a folder of timm's") from error


def class_scores(model: nn.Module, inputs: Inputs) -> Tensor:
    """scores_BC of a classifier that is called with one argument."""
    scores_BC: Tensor = model(inputs)
    return scores_BC
