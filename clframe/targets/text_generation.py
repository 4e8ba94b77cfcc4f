"""Continuations of prompts by the language model of a run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial

from clframe.accounting import MacCounter
from clframe.data.tokenizer import TextTokenizer
from clframe.errors import ConfigError, DataError, UnknownNameError, UnsupportedError, unknown_name
from clframe.moe import routed_layers
from clframe.nn.frozen import evaluating
from clframe.nn.generation import Generation, generate, speculate
from clframe.nn.network import Network
from clframe.options import convert_argument
from clframe.records import to_json_lines
from clframe.tables import Quantity, Table
from clframe.targets.decoding_macs import DecodingMacs
from clframe.targets.domains import CHOSEN, domain_of, experience_of
from clframe.targets.given_texts import named_texts
from clframe.targets.loading import RunModel
from clframe.targets.run_tokenizer import run_tokenizer
from clframe.targets.token_rules import token_rule

SCHEMA_VERSION = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Continuation:
    """Generated continuation of one prompt."""

    prompt: str
    text: str
    """The new text."""
    ids: tuple[int, ...]
    """Its token ids."""
    exits: tuple[str, ...]
    """Name of the exit that chose each token."""
    positions: tuple[int, ...]
    """Positions that each stage has computed, the prompt included."""
    passes: tuple[int, ...]
    """Calls of each stage."""
    macs: int
    """MACs of everything that was computed, the prompt included."""
    cut: int
    """Tokens at the start of the prompt that were left out, since prompt and continuation exceed the context."""


@dataclass(frozen=True, kw_only=True)
class Continuations:
    """Continuations of several prompts, in their order."""

    rows: tuple[Continuation, ...]
    rule: str
    """The rule by which exits decided."""
    stage_names: tuple[str, ...]
    exit_names: tuple[str, ...]
    notes: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, at: int) -> Continuation:
        """One continuation."""
        return self.rows[at]


def continue_prompts(
    model: RunModel,
    prompts: Sequence[str] | str,
    *,
    tokens: int = 32,
    threshold: float | None = None,
    budget: float | None = None,
    draft: int = 0,
    draft_exit: str | None = None,
    domain: str | None = None,
    progress: Callable[[int, int], object] | None = None,
) -> Continuations:
    """Continue prompts by the most likely next token, one after the other.

    Of a prompt that is too long for the context of the model, the end is read.

    Args:
        model: A language model, as ``clframe.load`` returns it.
        prompts: Texts, or a single one.
        tokens: Number of tokens to generate.
        threshold: Largest probability of a token from which an exit decides it; None: the strategy's rule.
        budget: Mean cost as a share of the bare backbone's MACs, with the threshold that the run has recorded.
        draft: Most tokens that an early exit drafts before the last exit confirms them in one pass (self-speculative
            decoding), which gives the tokens of the last exit; 0: none.
        draft_exit: Name of the exit that drafts; None: the first.
        domain: Domain of the prompts, of a run with adapters for each domain; None: those under which a prompt is most
            likely.
        progress: Called with the number of prompts that have been continued, and of all prompts.

    Raises:
        ConfigError: Options that contradict each other or are out of range.
        DataError: A prompt that is not a text, or without text.
        UnsupportedError: A network that is not a decoder, or a rule that combines all exits.
    """
    network = model.network
    if not network.vocabulary:
        raise UnsupportedError("generate: found a classifier; use predict")
    given = [text for _, text in named_texts(prompts, where="generate")]
    tokens, draft = (
        convert_argument(value, int, where=name) for name, value in (("--generate", tokens), ("--draft", draft))
    )
    context = network.input_shape[0] - 1
    if not 1 <= tokens <= context:
        raise ConfigError(f"--generate: found {tokens} for a context of {context} tokens; give 1 to {context}")
    run: Callable[..., Generation]
    if draft or draft_exit is not None:
        at = _drafting_exit(model, draft, draft_exit, other=threshold if budget is None else budget)
        run = partial(speculate, network, tokens=tokens, exit=at, draft=draft)
        name = f"drafts of up to {draft} tokens at {network.exit_names[at]}, confirmed by the last exit"
    else:
        rule, name = token_rule(model, threshold=threshold, budget=budget)
        run = partial(generate, network, tokens=tokens, rule=rule)
    experience = None if domain is None else experience_of(model, domain)
    encoder, rows = TextTokenizer(run_tokenizer(model.folder, model.inputs)), []
    cost = None if network.choice is not None or routed_layers(network) else DecodingMacs(network)
    with domain_of(network, experience):
        for number, prompt in enumerate(given):
            ids = encoder.encode(prompt).tolist()
            if not ids:
                raise DataError(f"predict: prompt {number + 1} has no text; give at least one character")
            rows.append(_continue(network, run, encoder, prompt, ids, most=context - tokens + 1, cost=cost))
            if progress is not None:
                progress(number + 1, len(given))
    cut = sum(row.cut > 0 for row in rows)
    noun = "prompt" if cut == 1 else "prompts"
    notes = [f"of {cut} {noun} only the end was read, as the context has {context} tokens"] if cut else []
    return Continuations(
        rows=tuple(rows), rule=name, stage_names=network.backbone.names, exit_names=network.exit_names,
        notes=(*notes, *([CHOSEN] if network.choice is not None and domain is None else [])),
    )  # fmt: skip


def _continue(
    network: Network,
    run: Callable[..., Generation],
    encoder: TextTokenizer,
    prompt: str,
    ids: Sequence[int],
    *,
    most: int,
    cost: DecodingMacs | None,
) -> Continuation:
    """Continue the last ``most`` ids of a prompt, with the adapters for it where the network has several."""
    read, choice = ids[-most:], network.choice
    with evaluating(network), ExitStack() as stack:
        with MacCounter() as counter:
            if choice is not None:
                stack.enter_context(choice.best_for(network, read))
            # MACs of experts depend on the tokens: they are counted as they run.
            found = run(read, graphs=False) if routed_layers(network) else None
        macs = counter.macs
        if found is None:
            found = run(read)
            macs += (cost or DecodingMacs(network)).of(found)  # of several adapters, those of the present one
    text = encoder.decode([*read, *found.ids]).removeprefix(encoder.decode(read))
    return Continuation(
        prompt=prompt, text=text, ids=found.ids, exits=tuple(network.exit_names[k] for k in found.exits),
        positions=found.positions, passes=found.passes, macs=macs, cut=len(ids) - len(read),
    )  # fmt: skip


def _drafting_exit(model: RunModel, draft: int, name: str | None, *, other: float | None) -> int:
    """Index of the exit that drafts."""
    early = model.network.exit_names[:-1]
    if not early:
        raise UnsupportedError("--draft: the model has one exit only; train with strategy='... + exits'")
    if other is not None:
        raise ConfigError(
            "--draft: found a threshold or a budget too, but the last exit decides every token; give one of them"
        )
    if draft < 1:
        raise ConfigError(f"--draft: found {draft or 'none'} with an exit that drafts; give the tokens of a draft")
    if name is not None and name not in early:
        raise UnknownNameError(unknown_name("exit", name, early, where="--draft-exit"))
    return 0 if name is None else early.index(name)


def table(found: Continuations) -> Table:
    """One row per prompt."""
    rows = tuple(
        (
            row.prompt, row.text, Quantity(len(row.ids), kind="whole"), _by_exit(row, found.exit_names),
            Quantity(row.positions[-1], kind="whole"), Quantity(row.passes[-1], kind="whole"),
            Quantity(row.macs, kind="whole"),
        )
        for row in found.rows
    )  # fmt: skip
    columns = ("prompt", "text", "tokens", "exits", "positions of the last stage", "its passes", "MACs")
    return Table(name="continuations", title=f"Continuations: {found.rule}", columns=columns, rows=rows)


def describe(found: Continuations) -> str:
    """Prompts and texts in full, each followed by its cost, and the rule."""
    blocks = []
    for row in found.rows:
        cost = f"{len(row.ids)} tokens ({_by_exit(row, found.exit_names)}), {row.macs:,} MACs"
        deep = f"{found.stage_names[-1]} computed {row.positions[-1]} positions in {row.passes[-1]} passes"
        blocks.append(f"prompt: {row.prompt}\ntext: {row.text}\n{cost}; {deep}")
    return "\n\n".join([*blocks, "\n".join([f"rule: {found.rule}", *found.notes])])


def to_json(found: Continuations, *, run: str) -> str:
    """All continuations as JSON, one a line."""
    head = {
        "schema_version": SCHEMA_VERSION, "run": run, "rule": found.rule, "notes": found.notes,
        "stage_names": found.stage_names, "exit_names": found.exit_names,
    }  # fmt: skip
    return to_json_lines(head, {"continuations": found.rows})


def _by_exit(row: Continuation, names: Sequence[str]) -> str:
    return ", ".join(f"{row.exits.count(name)} at {name}" for name in names if name in row.exits)
