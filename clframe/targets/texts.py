"""Text encoders and causal language models of transformers as targets.

Shape suffixes: B batch, T tokens, C classes or vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from clframe.config.load import data_config
from clframe.config.schema import Config
from clframe.data.protocol import hold_out
from clframe.data.source import SOURCES
from clframe.data.sources.paths import read_text
from clframe.data.sources.text import CORPORA, load_tokenizer, token_ids
from clframe.data.target import IGNORED, Batch, DataSplits, Target, TextSplit
from clframe.errors import ConfigError, DataError, UnsupportedError
from clframe.nn.backbones.pretrained import require_package
from clframe.nn.types import Inputs
from clframe.options import check_options
from clframe.targets.images import MeanTokens, NearestMean, class_scores

Corpus = Mapping[str, tuple[Sequence[str], Tensor | None]]
"""Texts and their classes of ``fit``, ``test`` and, if held out, ``validation``."""


def labeled_texts(config: Config) -> Corpus:
    """Texts of a benchmark, with the validation fraction held out of the training texts as in a run.

    Raises:
        ConfigError: A benchmark without texts.
    """
    block = config.benchmark
    if block.name not in CORPORA:
        raise ConfigError(f"--data: found {block.name}, which has no texts; give one of {', '.join(sorted(CORPORA))}")
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


def read_lines(file: Path) -> Corpus:
    """Texts of a file, one per line, unlabeled; the same texts are used to fit and to test.

    Raises:
        DataError: No file, or an empty one.
    """
    if not file.is_file():
        raise DataError(f"--data: no file {file}; give a text file with one text per line, or a benchmark")
    texts = [line.strip() for line in read_text(file).splitlines() if line.strip()]
    if not texts:
        raise DataError(f"--data: {file} contains no text; give one text per line")
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
    """Open a model of transformers on texts; see :func:`~clframe.targets.opening.open_target`.

    An encoder predicts the class with the nearest mean embedding; a causal language model predicts the next token.
    """
    library = require_package("transformers", where="target")
    settings = _load(name, partial(library.AutoConfig.from_pretrained, trust_remote_code=False), library)
    if getattr(settings, "is_encoder_decoder", False):
        raise UnsupportedError(f"{name}: found an encoder-decoder model ({settings.model_type}); use one of the two")
    config = None if data.endswith(".txt") else data_config(data, overrides)
    corpus = read_lines(Path(data).expanduser()) if config is None else labeled_texts(config)
    causal = any("CausalLM" in kind or "LMHead" in kind for kind in settings.architectures or ())
    if generate and not causal:
        raise ConfigError(f"--generate: found {generate} for {name}, which is not a language model; leave it out")
    if config is None and not causal:
        raise ConfigError(f"--data: found {data} without labels for an encoder; give a benchmark such as clinc150")
    tokenizer = load_tokenizer(name, where=name)
    loader = library.AutoModelForCausalLM if causal else library.AutoModel
    options = {"use_safetensors": True, "trust_remote_code": False, "dtype": "auto"}
    model = _load(name, partial(loader.from_pretrained, **options), library).to(device)
    model.eval().requires_grad_(False)
    most = getattr(settings, "max_position_embeddings", None) or max_length
    encode = partial(token_ids, tokenizer=tokenizer, max_length=min(max_length, most - generate))
    padding = tokenizer.pad_token_id or 0
    if causal:
        target = _causal(name, model, corpus, encode, padding=padding, device=device, generate=generate, config=config)
    else:
        assert config is not None
        target = _encoder(
            name, model, corpus, encode, padding=padding, device=device, per_class=per_class, config=config
        )
    # The commit of a hub model, which transformers stores in its config.
    return replace(target, origin={"revision": getattr(settings, "_commit_hash", None)})


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
        part: TextSplit(encode(texts), y, padding=padding, device=device, make=make)
        for part, (texts, y) in corpus.items()
    }
    y_N = parts["fit"].y
    assert y_N is not None
    classes = int(y_N.max()) + 1
    model = NearestMean(MeanTokens(encoder), classes=classes).to(device).eval()
    first = [(y_N == c).nonzero().flatten()[:per_class] for c in range(classes)]
    model.learn(parts["fit"].batches_at(torch.cat(first)))
    return Target(
        name=name, kind="encoder", model=model, body_name="embed.encoder", predict=class_scores, config=config,
        splits=DataSplits(parts["fit"], parts.get("validation"), parts["test"]),
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
        return generate_greedily(model, ids_BT, mask_BT, tokens=generate)

    parts = {
        part: TextSplit(encode(texts), None, padding=padding, device=device, make=make)
        for part, (texts, _) in corpus.items()
    }
    return Target(
        name=name, kind="causal", model=model, body_name="", predict=_next_tokens, config=config,
        splits=DataSplits(parts["fit"], parts.get("validation"), parts["test"]),
    )  # fmt: skip


@torch.no_grad()
def generate_greedily(model: nn.Module, ids_BT: Tensor, mask_BT: Tensor, *, tokens: int) -> Batch:
    """Continue texts greedily with a language model; the target of each token is the next token.

    Tokens of the text are masked as ``prompt``, new ones as ``generated``; tokens after end-of-text are ignored. Runs
    the whole sequence for each new token without a cache, which equals a later pass over the sequence exactly.

    Args:
        model: Returns an output with logits.
        ids_BT: Texts, padded at the end.
        mask_BT: Tokens that are not padding.
        tokens: Number of tokens to generate.
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


def _next_tokens(model: nn.Module, inputs: Inputs) -> Tensor:
    assert isinstance(inputs, Mapping)
    logits_BTC: Tensor = model(**inputs, use_cache=False).logits
    return logits_BTC


@contextmanager
def _quiet(library: Any) -> Iterator[None]:
    """Context without progress bars and without reports of unused weights."""
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


def _load(name: str, load: Callable[..., Any], library: Any) -> Any:
    folder = Path(name).expanduser()
    try:
        with _quiet(library):
            return load(str(folder) if folder.is_dir() else name)
    except Exception as error:  # the library does not document which exceptions a damaged file raises
        reason = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
        raise DataError(
            f"{name}: could not be loaded ({reason}); connect, or give a folder with config.json and safetensors"
        ) from error
