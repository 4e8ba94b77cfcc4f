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

from clframe.config.load import data_config
from clframe.config.schema import Config
from clframe.data.protocol import hold_out
from clframe.data.source import SOURCES
from clframe.data.sources.paths import text_of
from clframe.data.sources.text import CORPORA, load_tokenizer, token_ids
from clframe.data.target import IGNORED, Batch, Parts, Target, TextPart
from clframe.errors import ConfigError, DataError, UnsupportedError
from clframe.nn.backbones.pretrained import needed
from clframe.nn.types import Inputs
from clframe.options import check_options
from clframe.targets.images import MeanTokens, NearestMean

Corpus = Mapping[str, tuple[Sequence[str], Tensor | None]]
"""Texts and their classes of each part: ``fit``, ``test`` and, where some are held out, ``validation``."""


def labeled_texts(config: Config) -> Corpus:
    """The texts of a benchmark, the validation share held out of the training texts as in a run.

    Raises:
        ConfigError: A benchmark without texts.
    """
    block = config.benchmark
    if block.name not in CORPORA:
        raise ConfigError(f"--data: found {block.name}, which holds no texts; give one of {', '.join(sorted(CORPORA))}")
    options = check_options(SOURCES.get(block.name), block.options, where="benchmark")
    places = {key: value for key, value in options.items() if key in ("data_dir", "download")}
    corpus = CORPORA[block.name](**places)
    classes = block.classes if block.classes is not None else len(corpus.class_names)
    found: dict[str, tuple[Sequence[str], Tensor]] = {}
    for part, pairs in (("fit", corpus.train), ("test", corpus.test)):
        y_N = corpus.ids(pairs)
        inside = (y_N < classes).nonzero().flatten()
        found[part] = [pairs[at][0] for at in inside.tolist()], y_N[inside]
    texts, y_N = found["fit"]
    train, held = hold_out(y_N, block.validation, seed=config.seed)
    if len(held):
        found["fit"] = [texts[at] for at in train.tolist()], y_N[train]
        found["validation"] = [texts[at] for at in held.tolist()], y_N[held]
    return found


def lines_of(file: Path) -> Corpus:
    """The texts of a file, one a line: the same to fit and to measure on, without labels.

    Raises:
        DataError: No file, or none in it.
    """
    if not file.is_file():
        raise DataError(f"--data: no file {file}; give a text file with one text a line, or a benchmark")
    texts = [line.strip() for line in text_of(file).splitlines() if line.strip()]
    if not texts:
        raise DataError(f"--data: {file} holds no text; give one a line")
    return {"fit": (texts, None), "test": (texts, None)}


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
    """A model of transformers on texts; see :func:`~clframe.targets.opening.open_target`.

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
