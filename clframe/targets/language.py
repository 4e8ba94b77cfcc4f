"""Causal language models as targets: windows of long texts, greedy generation, logits at chosen positions.

Shape suffixes: B batch, T tokens, N scored tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from clframe.config.schema import Config
from clframe.data.choices import ChoiceSplit, Question
from clframe.data.sources.text import load_tokenizer
from clframe.data.target import IGNORED, Batch, DataSplits, Target, TextSplit
from clframe.errors import ConfigError, DataError
from clframe.functional.language import strided_windows
from clframe.nn.types import Inputs

Rows = Sequence[Sequence[int]]
"""Token ids of each text."""


@dataclass(frozen=True)
class CausalRows:
    """Token ids of the texts of a language model.

    Attributes:
        parts: Of ``fit``, ``test`` and, if held out, ``validation``.
        domains: Of each of several files by name; empty for one file.
    """

    parts: Mapping[str, Rows]
    domains: Mapping[str, Rows] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Reading:
    """Division of texts into the windows that a language model reads.

    Attributes:
        window: Maximum number of ids in one pass.
        stride: Distance of the windows of a longer text; None: half of the window. See
            :func:`~clframe.functional.language.strided_windows`.
        generate: Number of tokens to generate after the first ``window`` ids of each text; its other ids are cut off.

    Raises:
        ConfigError: A value out of range, or a stride for prompts.
    """

    window: int
    stride: int | None = None
    generate: int = 0

    def __post_init__(self) -> None:
        """Refuse values out of range."""
        if self.window < 2:
            raise ConfigError(f"--length: found {self.window} tokens for a window; give at least 2")
        if self.stride is not None and self.generate:
            raise ConfigError("--stride: found one with --generate, which reads the start of each text; leave one out")
        if self.stride is not None and not 1 <= self.stride < self.window:
            raise ConfigError(
                f"--stride: found {self.stride} for windows of {self.window} tokens; give 1 to {self.window - 1}"
            )

    def divide(self, rows: Rows) -> tuple[list[list[int]], list[int]]:
        """Return windows of ids, and the number of ids at the start of each that only are context.

        A text that fits a window is one window; a window at the start of a text has no context.
        """
        windows, context = [], []
        for row in rows:
            if self.generate or len(row) <= self.window:
                windows.append(list(row[: self.window]))
                context.append(0)
                continue
            stride = self.window // 2 if self.stride is None else self.stride
            for one in strided_windows(len(row), window=self.window, stride=stride):
                windows.append(list(row[one.start : one.stop]))
                context.append(one.first - one.start if one.start else 0)
        return windows, context


def causal_target(
    name: str,
    model: nn.Module,
    rows: CausalRows,
    *,
    reading: Reading,
    padding: int,
    device: torch.device,
    config: Config | None,
) -> Target:
    """Create the target of a language model; see :func:`~clframe.targets.opening.open_target`.

    Args:
        name: Of the target.
        model: A model of transformers with a language-model head.
        rows: Token ids of the texts.
        reading: Division into windows.
        padding: Id of the padding token.
        device: Of the model.
        config: Of the benchmark, if the texts are those of one.

    Raises:
        ConfigError: A stride although no text is longer than a window.
        DataError: Ids outside of the model's vocabulary, or no text of two tokens.
    """
    vocabulary = vocabulary_size(model)
    _check_rows(name, [row for part in rows.parts.values() for row in part], vocabulary=vocabulary, reading=reading)

    def make(ids_BT: Tensor, mask_BT: Tensor, context_B: Tensor | None) -> Batch:
        if reading.generate:
            return generate_greedily(model, ids_BT, mask_BT, tokens=reading.generate)
        return next_token_batch(ids_BT, mask_BT, context_B)

    def split(texts: Rows) -> TextSplit:
        windows, context = reading.divide(texts)
        return TextSplit(
            windows, torch.tensor(context), padding=padding if padding < vocabulary else 0, device=device, make=make
        )

    parts, held = rows.parts, rows.parts.get("validation")
    return Target(
        name=name, kind="causal", model=model, body_name="", predict=_next_tokens, logits_at=logits_at, config=config,
        splits=DataSplits(split(parts["fit"]), None if held is None else split(held), split(parts["test"])),
        domains={domain: split(own) for domain, own in rows.domains.items()},
    )  # fmt: skip


def choice_target(
    name: str,
    model: nn.Module,
    questions: Sequence[Question],
    tokenizer: Any,
    *,
    window: int,
    device: torch.device,
) -> Target:
    """Create the target of a language model on multiple-choice questions.

    Raises:
        DataError: Ids outside of the model's vocabulary, or a question longer than ``window`` tokens.
    """
    vocabulary = vocabulary_size(model)
    # Special tokens before the text, such as begin-of-text; one at its end would separate question and choice.
    whole, bare = (tokenizer(questions[0].text, add_special_tokens=add)["input_ids"] for add in (True, False))
    before: list[int] = next((whole[:at] for at in range(len(whole)) if whole[at : at + len(bare)] == bare), [])

    def encode(text: str) -> list[int]:
        return [*before, *tokenizer(text, add_special_tokens=False)["input_ids"]]

    padding = tokenizer.pad_token_id or 0
    split = ChoiceSplit(
        questions, encode=encode, longest=window, padding=padding if padding < vocabulary else 0, device=device
    )
    ids = [ids for rows in split.rows for ids, _ in rows]
    _check_rows(name, ids, vocabulary=vocabulary, reading=Reading(window=window))
    return Target(
        name=name, kind="causal", model=model, body_name="", predict=_next_tokens, logits_at=logits_at,
        splits=DataSplits(split, None, split),
    )  # fmt: skip


def vocabulary_size(model: Any) -> int:
    """Number of rows of the model's embedding of tokens."""
    return int(model.get_input_embeddings().weight.shape[0])


def _check_rows(name: str, rows: Rows, *, vocabulary: int, reading: Reading) -> None:
    largest = max((max(row, default=0) for row in rows), default=0)
    if largest >= vocabulary:
        raise DataError(
            f"{name}: its tokenizer gives id {largest}, but the model has a vocabulary of {vocabulary}; use the "
            f"tokenizer that the model was trained with"
        )
    longest = max(map(len, rows), default=0)
    if longest + reading.generate < 2:
        raise DataError(f"{name}: found texts of one token, which has no context; give texts of at least 2 tokens")
    if reading.stride is not None and longest <= reading.window:
        raise ConfigError(
            f"--stride: found {reading.stride}, but no text is longer than a window of {reading.window} tokens (the "
            f"longest has {longest}); leave it out, or lower --length"
        )


def next_token_batch(ids_BT: Tensor, mask_BT: Tensor, context_B: Tensor | None = None) -> Batch:
    """Make the batch in which the target of each token is the next one.

    Tokens before ``context_B`` of a window are those of the window before it: neither scored nor counted.

    >>> batch = next_token_batch(torch.tensor([[5, 6, 7, 0]]), torch.tensor([[True, True, True, False]]))
    >>> batch.targets.tolist(), batch.tokens.tolist()
    ([[6, 7, -100, -100]], [[True, True, True, False]])
    """
    own_BT = mask_BT
    if context_B is not None:
        own_BT = mask_BT & (torch.arange(ids_BT.shape[1], device=ids_BT.device) >= context_B[:, None])
    targets_BT = torch.full_like(ids_BT, IGNORED)
    targets_BT[:, :-1] = ids_BT[:, 1:].where(own_BT[:, 1:], IGNORED)
    return Batch({"input_ids": ids_BT, "attention_mask": mask_BT.long()}, targets_BT, own_BT)


@torch.no_grad()
def generate_greedily(model: nn.Module, ids_BT: Tensor, mask_BT: Tensor, *, tokens: int) -> Batch:
    """Continue texts greedily with a language model; the target of each token is the next token.

    Tokens of the text are masked as ``prompt``, new ones as ``generated``; tokens after end-of-text are ignored. Runs
    the whole sequence for each new token without a cache, which equals a later pass over the sequence exactly.

    Args:
        model: Returns an output with logits.
        ids_BT: Texts, padded at the end.
        mask_BT: Tokens that are not padding.
        tokens: Number of tokens to generate, at least 1.
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
    made = next_token_batch(ids_BT, mask_BT)
    return made._replace(tokens={"prompt": prompt_BT, "generated": mask_BT & ~prompt_BT})


def _next_tokens(model: nn.Module, inputs: Inputs) -> Tensor:
    assert isinstance(inputs, Mapping)
    logits_BTV: Tensor = model(**inputs, use_cache=False).logits
    return logits_BTV


def logits_at(model: Any, inputs: Inputs, where_BT: Tensor) -> Tensor:
    """Compute logits_NV of the positions in ``where_BT``; the language-model head runs on these only.

    The head's input is reduced by a hook, so that everything a model does with its logits afterwards, such as
    soft-capping, is unchanged. A model whose head is not a module that reads hidden states runs as a whole.

    Args:
        model: A language model of transformers.
        inputs: Named inputs.
        where_BT: Positions, at least one.
    """
    assert isinstance(inputs, Mapping)
    head, hooked = model.get_output_embeddings(), list[bool]()

    def select(_: nn.Module, given: tuple[Any, ...]) -> tuple[Any, ...] | None:
        if not given or hooked or given[0].shape[:-1] != where_BT.shape:
            return None
        hooked.append(True)
        return (given[0][where_BT][None], *given[1:])

    hook = None if head is None else head.register_forward_pre_hook(select)
    try:
        logits: Tensor = model(**inputs, use_cache=False).logits
    finally:
        if hook is not None:
            hook.remove()
    return logits[0] if hooked else logits[where_BT]


DENSE = "dense"
"""Folder, in that of a conversion, with config and tokenizer of the dense model, without weights."""


def write_architecture(target: Target, folder: Path) -> None:
    """Write config, settings of generation and tokenizer of a target's language model to ``folder/dense``."""
    model: Any = target.model
    model.config.save_pretrained(folder / DENSE)
    if model.generation_config is not None:
        model.generation_config.save_pretrained(folder / DENSE)
    load_tokenizer(target.name, where="moefy").save_pretrained(folder / DENSE)
