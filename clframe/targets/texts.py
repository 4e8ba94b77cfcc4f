"""Text encoders and causal language models of transformers, opened with their texts.

Shape suffixes: B batch, T tokens, C classes.
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
from clframe.data.choices import read_questions
from clframe.data.protocol import hold_out
from clframe.data.source import SOURCES
from clframe.data.sources.text import CORPORA, load_tokenizer, token_ids
from clframe.data.target import Batch, DataSplits, Target, TextSplit
from clframe.errors import ConfigError, DataError, UnsupportedError
from clframe.nn.backbones.pretrained import require_package
from clframe.options import check_options
from clframe.targets.images import MeanTokens, NearestMean, class_scores
from clframe.targets.language import CausalRows, Reading, causal_target, choice_target
from clframe.targets.text_files import Document, divide_rows, read_texts, text_files

Corpus = Mapping[str, tuple[Sequence[str], Tensor | None]]
"""Texts and their classes of ``fit``, ``test`` and, if held out, ``validation``."""


LENGTH = 64
"""Tokens of a text or window unless given, at most as many as fit the model's context."""


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


def text_target(
    name: str,
    data: str,
    overrides: Sequence[str],
    *,
    device: torch.device,
    max_length: int | None,
    per_class: int,
    generate: int,
    stride: int | None = None,
    document: Document = "line",
    divide: bool = False,
) -> Target:
    """Open a model of transformers on texts; see :func:`~clframe.targets.opening.open_target`.

    An encoder predicts the class with the nearest mean embedding; a causal language model predicts the next token.
    """
    library = require_package("transformers", where="target")
    settings = load_quietly(name, partial(library.AutoConfig.from_pretrained, trust_remote_code=False), library)
    if getattr(settings, "is_encoder_decoder", False):
        raise UnsupportedError(f"{name}: found an encoder-decoder model ({settings.model_type}); use one of the two")
    files = text_files(data)
    config = None if files else data_config(data, overrides)
    asked = data.endswith(".jsonl")
    questions = read_questions(files[0]) if asked else ()
    texts = read_texts(files, document=document) if config is None and not asked else {}
    corpus = {} if config is None else labeled_texts(config)
    causal = any("CausalLM" in kind or "LMHead" in kind for kind in settings.architectures or ())
    if not causal:
        _refuse_for_encoder(name, data, labeled=config is not None, generate=generate, stride=stride)
    for option, value in (("generate", generate), ("stride", stride), ("document", document != "line" and document)):
        if asked and value:
            raise ConfigError(f"--{option}: found {value} for questions ({data}), which are read whole; leave it out")
    length = _window(name, settings, given=max_length, generate=generate)
    if asked and divide:
        raise ConfigError(f"--data: found questions ({data}), which a model cannot be converted on; give texts")
    if config is not None and document != "line":
        raise ConfigError(f"--document: found {document} for {data}, which is not a text file; leave it out")
    tokenizer = load_tokenizer(name, where=name)
    loader = library.AutoModelForCausalLM if causal else library.AutoModel
    options = {"use_safetensors": True, "trust_remote_code": False, "dtype": "auto"}
    model = load_quietly(name, partial(loader.from_pretrained, **options), library).to(device)
    model.eval().requires_grad_(False)
    padding = tokenizer.pad_token_id or 0
    if asked:
        target = choice_target(name, model, questions, tokenizer, window=length, device=device)
    elif causal:
        reading = Reading(window=length, stride=stride, generate=generate)
        target = causal_target(
            name, model, _causal_rows(texts, corpus, partial(_all_ids, tokenizer, library), divide=divide),
            reading=reading, padding=padding, device=device, config=config,
        )  # fmt: skip
    else:
        assert config is not None
        encode = partial(token_ids, tokenizer=tokenizer, max_length=length)
        target = _encoder(
            name, model, corpus, encode, padding=padding, device=device, per_class=per_class, config=config
        )
    # The commit of a hub model, which transformers stores in its config.
    revision = getattr(settings, "_commit_hash", None)
    return replace(target, origin={"revision": revision, "options": {"max_length": length}})


def _refuse_for_encoder(name: str, data: str, *, labeled: bool, generate: int, stride: int | None) -> None:
    """Raise ConfigError for options of language models, and for data without labels."""
    for option, given in (("generate", generate), ("stride", stride)):
        if given:
            raise ConfigError(f"--{option}: found {given} for {name}, which is not a language model; leave it out")
    if not labeled:
        raise ConfigError(f"--data: found {data} without labels for an encoder; give a benchmark such as clinc150")


def _window(name: str, settings: Any, *, given: int | None, generate: int) -> int:
    """Tokens of a text or window: those given, else 64 or as many as fit the context next to the generated ones.

    Raises:
        ConfigError: More than fit, or fewer than two that fit.
    """
    context = getattr(settings, "max_position_embeddings", None)
    if context is None:
        return LENGTH if given is None else given
    fits = context - generate
    if fits < 2:
        raise ConfigError(
            f"--generate: found {generate} tokens, but {name} has a context of {context} (max_position_embeddings); "
            f"give at most {context - 2}, which leaves 2 of a text"
        )
    if given is not None and given > fits:
        left = f", the context without the {generate} of --generate" if generate else ""
        raise ConfigError(
            f"--length: found {given} tokens, but {name} has a context of {context} (max_position_embeddings); give at "
            f"most {fits}{left}"
        )
    return min(LENGTH, fits) if given is None else given


Encode = Callable[[Sequence[str]], list[list[int]]]


def _all_ids(tokenizer: Any, library: Any, texts: Sequence[str]) -> list[list[int]]:
    """Ids of whole texts, without the warning that some are longer than the model's context."""
    with _quiet(library):
        ids: list[list[int]] = tokenizer(list(texts), truncation=False)["input_ids"]
    return ids


def _causal_rows(texts: Mapping[str, Sequence[str]], corpus: Corpus, encode: Encode, *, divide: bool) -> CausalRows:
    """Ids of the data splits of a corpus, or of text files: divided, or all texts to train and to test on."""
    if not texts:
        return CausalRows({part: encode(given) for part, (given, _) in corpus.items()})
    domains = {domain: encode(given) for domain, given in texts.items()}
    parts: dict[str, list[list[int]]] = {}
    if divide:
        divided = [divide_rows(rows, name=domain) for domain, rows in domains.items()]
        parts = {part: [row for each in divided for row in each[part]] for part in ("fit", "validation", "test")}
    else:
        every = [row for rows in domains.values() for row in rows]
        parts = {"fit": every, "test": every}
    return CausalRows(parts, domains if len(domains) > 1 and not divide else {})


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


def load_quietly(name: str, load: Callable[..., Any], library: Any) -> Any:
    """Call ``load`` with a folder or hub name, without progress bars.

    Raises:
        DataError: Whatever the library raises, in one line.
    """
    folder = Path(name).expanduser()
    try:
        with _quiet(library):
            return load(str(folder) if folder.is_dir() else name)
    except Exception as error:  # the library does not document which exceptions a damaged file raises
        reason = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
        raise DataError(
            f"{name}: could not be loaded ({reason}); connect, or give a folder with config.json and safetensors"
        ) from error
