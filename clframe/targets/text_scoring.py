"""Log-likelihoods of given texts under the language model of a run.

Shape suffixes: S ids of a window, N scored tokens, K exits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from clframe.data.tokenizer import TextTokenizer
from clframe.errors import ConfigError, DataError, UnsupportedError
from clframe.functional.language import Likelihood, perplexity, strided_windows
from clframe.nn.frozen import evaluating
from clframe.options import convert_argument, require_count
from clframe.records import to_json_lines, to_plain
from clframe.tables import Cell, Quantity, Table
from clframe.targets.domains import CHOSEN, domain_of, experience_of
from clframe.targets.given_texts import named_texts
from clframe.targets.loading import RunModel
from clframe.targets.run_tokenizer import run_tokenizer
from clframe.targets.text_scores import TokenScorer, TokenScores

SCHEMA_VERSION = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class TextScore:
    """Score of one text."""

    text: str
    """The text, or the name of its file."""
    tokens: int
    """Scored tokens: all but the first."""
    nats: float
    """Nats per token, of the exits that decide."""
    accuracy: float
    """Share of tokens that are the most likely ones of these exits."""
    decided_K: tuple[int, ...]
    """Number of tokens that each exit decided."""
    macs: int
    """MACs of all tokens up to the exits where they stop, those read again as context included."""

    @property
    def perplexity(self) -> float:
        """The exponential of ``nats``."""
        return perplexity(self.nats)


@dataclass(frozen=True, kw_only=True)
class ScoredTexts:
    """Scores of several texts, in their order."""

    rows: tuple[TextScore, ...]
    rule: str
    """The rule by which exits decided."""
    stride: int
    """Distance of the windows of texts longer than the context."""
    exit_names: tuple[str, ...]
    notes: tuple[str, ...]
    skipped: Mapping[str, str]
    """Reason for each text that could not be scored."""

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, at: int) -> TextScore:
        """One score."""
        return self.rows[at]


def score_texts(
    model: RunModel,
    texts: Sequence[str] | Mapping[str, str] | str,
    *,
    threshold: float | None = None,
    budget: float | None = None,
    stride: int | None = None,
    batch_size: int = 64,
    domain: str | None = None,
    progress: Callable[[int, int], object] | None = None,
) -> ScoredTexts:
    """Score texts by the log-likelihood of each token after the first.

    A text longer than the context is read in windows of :func:`~clframe.functional.language.strided_windows`.

    Args:
        model: A language model, as ``clframe.load`` returns it.
        texts: Texts, a single one, or texts by name.
        threshold: Largest probability of a token from which an exit decides it; None: the strategy's rule.
        budget: Mean cost as a share of the bare backbone's MACs, with the threshold that the run has recorded.
        stride: Distance of the windows; None: that of training, the context, so that windows share one token.
        batch_size: Windows per batch.
        domain: Domain of the texts, of a run with adapters for each domain; None: they are chosen by likelihood.
        progress: Called with the number of texts that have been scored, and of all texts.

    Raises:
        ConfigError: A stride or batch size out of range.
        DataError: What is not a text, or no text of at least two tokens.
        UnsupportedError: A classifier.
    """
    network = model.network
    if not network.vocabulary:
        raise UnsupportedError("score: found a classifier; use predict")
    context = network.input_shape[0] - 1
    require_count(batch_size, least=1, where="--batch-size")
    stride = context if stride is None else convert_argument(stride, int, where="--stride")
    if not 1 <= stride <= context:
        raise ConfigError(f"--stride: found {stride} for a context of {context} tokens; give 1 to {context}")
    named = named_texts(texts, where="score")
    experience = None if domain is None else experience_of(model, domain)
    scorer = TokenScorer(model, threshold=threshold, budget=budget)
    encoder = TextTokenizer(run_tokenizer(model.folder, model.inputs))
    rows, skipped = [], {}
    with evaluating(network), domain_of(network, experience):
        for number, (name, text) in enumerate(named):
            ids_N = encoder.encode(text)
            if len(ids_N) < 2:
                skipped[name] = _too_short(f"text {number + 1}" if name is text else name, len(ids_N))
                continue
            rows.append(_score(name, list(_scored(scorer, ids_N, context, stride, batch_size)), len(network.heads)))
            if progress is not None:
                progress(number + 1, len(named))
    if not rows:
        raise DataError(next(iter(skipped.values()), "score: found no text; give at least one"))
    notes = (*scorer.notes, *([CHOSEN] if network.choice is not None and domain is None else []))
    return ScoredTexts(
        rows=tuple(rows), rule=scorer.description, stride=stride, exit_names=network.exit_names, notes=notes,
        skipped=skipped,
    )  # fmt: skip


def _too_short(name: str, tokens: int) -> str:
    count = "1 token" if tokens == 1 else f"{tokens} tokens"
    return f"{name}: has {count}; give at least 2, as the first has no context"


def _scored(
    scorer: TokenScorer, ids_N: Tensor, context: int, stride: int, size: int
) -> Iterator[tuple[TokenScores, Tensor]]:
    """Scores of the windows of a text, batch by batch, and which of their tokens no window before has scored."""
    windows = strided_windows(len(ids_N), window=context + 1, stride=stride)
    start = 0
    while start < len(windows):
        length = windows[start].stop - windows[start].start
        part = [one for one in windows[start : start + size] if one.stop - one.start == length]
        ids_BS = torch.stack([ids_N[one.start : one.stop] for one in part])
        own_BT = torch.arange(1, length) >= torch.tensor([one.first - one.start for one in part])[:, None]
        yield scorer(ids_BS), own_BT.flatten()
        start += len(part)


def _score(name: str, found: Sequence[tuple[TokenScores, Tensor]], exits: int) -> TextScore:
    likelihood = Likelihood.joined(Likelihood.of(scores.nll_N[own_N]) for scores, own_N in found)
    right = sum(int(scores.right_N[own_N].sum()) for scores, own_N in found)
    decided_K = sum(torch.bincount(scores.exit_N[own_N], minlength=exits) for scores, own_N in found)
    assert isinstance(decided_K, Tensor)
    return TextScore(
        text=name, tokens=likelihood.tokens, nats=likelihood.mean, accuracy=right / likelihood.tokens,
        decided_K=tuple(decided_K.tolist()), macs=sum(scores.macs for scores, _ in found),
    )  # fmt: skip


def table(found: ScoredTexts) -> Table:
    """One row per text."""
    several = len(found.exit_names) > 1
    rows: list[tuple[Cell, ...]] = []
    for row in found.rows:
        shares = [Quantity(count / row.tokens) for count in row.decided_K] if several else []
        rows.append((
            _shorten(row.text), Quantity(row.tokens, kind="whole"), Quantity(row.nats, kind="fine"),
            Quantity(row.perplexity, kind="decimal"), Quantity(row.accuracy), *shares,
            Quantity(row.macs / row.tokens, kind="whole"),
        ))  # fmt: skip
    names = [f"{name}, %" for name in found.exit_names] if several else []
    columns = ("text", "tokens", "nats per token", "perplexity", "next-token accuracy, %", *names, "MACs per token")
    return Table(name="scores", title=f"Scores: {found.rule}", columns=columns, rows=tuple(rows))


def to_json(found: ScoredTexts, *, run: str) -> str:
    """All scores as JSON, one a line."""
    head = {
        "schema_version": SCHEMA_VERSION, "run": run, "rule": found.rule, "stride": found.stride, "notes": found.notes,
        "exit_names": found.exit_names, "skipped": found.skipped,
    }  # fmt: skip
    return to_json_lines(head, {"scores": [{**to_plain(row), "perplexity": row.perplexity} for row in found.rows]})


def _shorten(text: str, *, most: int = 40) -> str:
    return text if len(text) <= most else f"{text[: most - 3]}..."
