"""Text encoders and causal language models of transformers as targets.

Shape suffixes: B batch, T tokens, C classes or vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from clframe.analysis.places import Inputs
from clframe.config.schema import Config
from clframe.data.sources.tokens import load_tokenizer, padded, token_ids
from clframe.errors import ConfigError, DataError, UnsupportedError
from clframe.nn.backbones.extras import needed
from clframe.studies.batches import Batch, Batches, spread
from clframe.studies.corpus import Corpus, labeled_texts, lines_of
from clframe.studies.nearest_mean import MeanTokens, NearestMean
from clframe.studies.target import Parts, Target, data_config

IGNORED = -100
"""The target of a token that is not asked for, as in torch's cross-entropy."""


def text_target(
    name: str,
    data: str,
    overrides: Sequence[str],
    *,
    device: torch.device,
    max_length: int,
    per_class: int,
    generate: int,
) -> Target:
    """A model of transformers on texts; see :func:`~clframe.studies.target.open_target`.

    An encoder answers with the class of the nearest mean embedding; a causal language model with the next token.
    """
    library = needed("transformers", where="target")
    settings = _loaded(name, partial(library.AutoConfig.from_pretrained, trust_remote_code=False), library)
    if getattr(settings, "is_encoder_decoder", False):
        raise UnsupportedError(f"{name}: is an encoder with a decoder ({settings.model_type}); give one of them alone")
    config = None if data.endswith(".txt") else data_config(data, overrides)
    corpus = lines_of(Path(data).expanduser()) if config is None else labeled_texts(config)
    causal = any("CausalLM" in kind or "LMHead" in kind for kind in settings.architectures or ())
    if generate and not causal:
        raise ConfigError(f"--generate: found {generate} for {name}, which writes no texts; leave it out")
    if config is None and not causal:
        raise ConfigError(f"--data: found {data} without labels for an encoder; name a benchmark such as clinc150")
    tokenizer = load_tokenizer(name, where=name)
    loader = library.AutoModelForCausalLM if causal else library.AutoModel
    options = {"use_safetensors": True, "trust_remote_code": False, "dtype": "auto"}
    model = _loaded(name, partial(loader.from_pretrained, **options), library).to(device)
    model.eval().requires_grad_(False)
    most = getattr(settings, "max_position_embeddings", None) or max_length
    encode = partial(token_ids, tokenizer=tokenizer, max_length=min(max_length, most - generate))
    padding = tokenizer.pad_token_id or 0
    if causal:
        return _causal(name, model, corpus, encode, padding=padding, device=device, generate=generate, config=config)
    assert config is not None
    return _encoder(name, model, corpus, encode, padding=padding, device=device, per_class=per_class, config=config)


Encode = Callable[[Sequence[str]], list[list[int]]]


class TextPart:
    """A part of texts as token ids, shortest first so that little is padding.

    Args:
        rows: Token ids of each text.
        y: targets_N; None without labels, as of a language model.
        padding: Its id.
        device: Of batches.
        make: From ids_BT, mask_BT and targets_B to a batch.
    """

    def __init__(
        self,
        rows: Sequence[Sequence[int]],
        y: Tensor | None,
        *,
        padding: int,
        device: torch.device,
        make: Callable[[Tensor, Tensor, Tensor | None], Batch],
    ) -> None:
        self.rows, self.y, self.padding, self.device, self.make = rows, y, padding, device, make

    def __len__(self) -> int:
        return len(self.rows)

    def batches(self, *, size: int = 64, limit: int | None = None) -> Batches:
        """See :class:`~clframe.studies.batches.Part`."""
        return self.some(spread(len(self), limit), size=size)

    def some(self, index_N: Tensor, *, size: int = 64) -> Batches:
        """The texts at ``index_N``, shortest first.

        They are small and made at once: a language model writes on as it is now, whatever is done to it later.
        """
        order = sorted(index_N.tolist(), key=lambda at: len(self.rows[at]))
        made = [self._made(order[at : at + size]) for at in range(0, len(order), size)]
        return Batches([partial(_itself, batch) for batch in made])

    def _made(self, places: Sequence[int]) -> Batch:
        rows = [self.rows[at] for at in places]
        ids_BT = padded(rows, padding=self.padding).long().to(self.device)
        length_B = torch.tensor([len(row) for row in rows], device=self.device)
        mask_BT = torch.arange(ids_BT.shape[1], device=self.device) < length_B[:, None]
        y_B = None if self.y is None else self.y[torch.tensor(places)].to(self.device)
        return self.make(ids_BT, mask_BT, y_B)


def _itself(batch: Batch) -> Batch:
    return batch


def _encoder(
    name: str,
    encoder: nn.Module,
    corpus: Corpus,
    encode: Encode,
    *,
    padding: int,
    device: torch.device,
    per_class: int,
    config: Config,
) -> Target:
    if per_class < 1:
        raise ConfigError(f"per_class: found {per_class}; give at least 1")

    def make(ids_BT: Tensor, mask_BT: Tensor, y_B: Tensor | None) -> Batch:
        return Batch({"input_ids": ids_BT, "attention_mask": mask_BT.long()}, y_B, mask_BT)

    parts = {
        part: TextPart(encode(texts), y, padding=padding, device=device, make=make)
        for part, (texts, y) in corpus.items()
    }
    y_N = parts["fit"].y
    assert y_N is not None
    classes = int(y_N.max()) + 1
    model = NearestMean(MeanTokens(encoder), classes=classes).to(device).eval()
    first = [(y_N == c).nonzero().flatten()[:per_class] for c in range(classes)]
    model.learn(parts["fit"].some(torch.cat(first)))
    return Target(
        name=name, kind="encoder", model=model, body_name="embed.encoder", answer=_scores, config=config,
        parts=Parts(parts["fit"], parts.get("validation"), parts["test"]),
    )  # fmt: skip


def _causal(
    name: str,
    model: nn.Module,
    corpus: Corpus,
    encode: Encode,
    *,
    padding: int,
    device: torch.device,
    generate: int,
    config: Config | None,
) -> Target:
    def make(ids_BT: Tensor, mask_BT: Tensor, _: Tensor | None) -> Batch:
        return continued(model, ids_BT, mask_BT, tokens=generate)

    parts = {
        part: TextPart(encode(texts), None, padding=padding, device=device, make=make)
        for part, (texts, _) in corpus.items()
    }
    return Target(
        name=name, kind="causal", model=model, body_name="", answer=_next_tokens, config=config,
        parts=Parts(parts["fit"], parts.get("validation"), parts["test"]),
    )  # fmt: skip


@torch.no_grad()
def continued(model: nn.Module, ids_BT: Tensor, mask_BT: Tensor, *, tokens: int) -> Batch:
    """Texts and what a language model writes on after them, greedily, with the next token as the target of each.

    Tokens of the text are ``prompt``, those written ``generated``; after an end-of-text token nothing counts. The
    whole sequence is run for each token, without a cache: exactly what a later pass over the whole computes.

    Args:
        model: Its output has logits.
        ids_BT: Texts, padded at the end.
        mask_BT: What is no padding.
        tokens: How many to write.
    """
    stop = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    ends = torch.tensor(stop if isinstance(stop, list) else [] if stop is None else [stop], device=ids_BT.device)
    prompt_BT = mask_BT = torch.nn.functional.pad(mask_BT, (0, tokens))
    ids_BT = torch.nn.functional.pad(ids_BT, (0, tokens))
    row_B = torch.arange(len(ids_BT), device=ids_BT.device)
    at_B = prompt_BT.sum(1)
    alive_B = torch.ones_like(at_B, dtype=torch.bool)
    for _ in range(tokens):
        logits_BTC = model(input_ids=ids_BT, attention_mask=mask_BT.long(), use_cache=False).logits
        written_B = logits_BTC[row_B, at_B - 1].argmax(-1)
        ids_BT[row_B[alive_B], at_B[alive_B]] = written_B[alive_B]
        mask_BT = mask_BT.clone()
        mask_BT[row_B[alive_B], at_B[alive_B]] = True
        at_B = at_B + alive_B
        alive_B = alive_B & ~torch.isin(written_B, ends)
    targets_BT = torch.full_like(ids_BT, IGNORED)
    targets_BT[:, :-1] = ids_BT[:, 1:].where(mask_BT[:, 1:], IGNORED)
    masks: Tensor | Mapping[str, Tensor] = {"prompt": prompt_BT, "generated": mask_BT & ~prompt_BT}
    return Batch({"input_ids": ids_BT, "attention_mask": mask_BT.long()}, targets_BT, masks if tokens else mask_BT)


def _scores(model: nn.Module, inputs: Inputs) -> Tensor:
    scores_BC: Tensor = model(inputs)
    return scores_BC


def _next_tokens(model: nn.Module, inputs: Inputs) -> Tensor:
    assert isinstance(inputs, Mapping)
    logits_BTC: Tensor = model(**inputs, use_cache=False).logits
    return logits_BTC


@contextmanager
def _quiet(library: Any) -> Iterator[None]:
    """Without reports of weights that are not used and without bars."""
    log = library.utils.logging
    level, bars = log.get_verbosity(), log.is_progress_bar_enabled()
    log.set_verbosity_error()
    log.disable_progress_bar()
    try:
        yield
    finally:
        log.set_verbosity(level)
        if bars:
            log.enable_progress_bar()


def _loaded(name: str, load: Callable[..., Any], library: Any) -> Any:
    folder = Path(name).expanduser()
    try:
        with _quiet(library):
            return load(str(folder) if folder.is_dir() else name)
    except Exception as error:  # what a library may say of a broken file is not listed anywhere
        reason = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
        raise DataError(
            f"{name}: could not be loaded ({reason}); connect, or give a folder with config.json and safetensors"
        ) from error
