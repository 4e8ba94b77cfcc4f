"""Evaluation of a language model on the test text of its domains, or on other text.

Shape suffixes: S ids of a window, W windows, K exits.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from operator import mul

from clframe.accounting import backbone_macs
from clframe.device_defaults import evaluation_batch
from clframe.exits.study import Progress
from clframe.functional.language import perplexity
from clframe.nn.frozen import evaluating
from clframe.nn.network import Network
from clframe.records import to_json_lines
from clframe.targets.domains import CHOSEN, domain_of
from clframe.targets.loading import RunModel
from clframe.targets.text_evaluation_data import Part, other_text, own_text
from clframe.targets.text_scores import TextTotals, TokenScorer
from clframe.training.prediction_cost import exit_costs

SCHEMA_VERSION = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class DomainScore:
    """Scores of the text of one domain."""

    name: str
    tokens: int
    nats: float
    """Nats per token of the exit that decides."""
    interval: tuple[float, float]
    """95 % interval of ``nats``: 1.96 standard errors of the mean over windows."""
    accuracy: float
    """Share of tokens that are the most likely one of the exit that decides."""
    nats_K: tuple[float, ...]
    """Nats per token of each exit, if it decided every token."""
    accuracy_K: tuple[float, ...]
    """Next-token accuracy of each exit, if it decided every token."""

    @property
    def perplexity(self) -> float:
        """The exponential of ``nats``."""
        return perplexity(self.nats)


@dataclass(frozen=True, eq=False, kw_only=True)
class TextEvaluation:
    """Result of the evaluation of a language model.

    Attributes:
        run: The run folder.
        data: The text, for people.
        rule: The rule by which exits decide tokens.
        threshold: Threshold of all exits; None for the strategy's own rule.
        notes: Restrictions of the numbers.
        context: Tokens of a window.
        domains: Scores of each domain, in order.
        exit_names: Names of the exits.
        decided_K: Number of tokens that each exit decided.
        macs_K: Mean MACs of a token up to and including each exit.
        macs: Mean MACs of a token up to the exit where it stops.
        waiting: Mean MACs of a token after its exit, since later tokens need the keys and values of later blocks.
        backbone_macs: Mean MACs of a token in the bare backbone with its classifier.
    """

    run: str
    data: str
    rule: str
    threshold: float | None
    notes: tuple[str, ...]
    context: int
    domains: tuple[DomainScore, ...]
    exit_names: tuple[str, ...]
    decided_K: tuple[int, ...]
    macs_K: tuple[float, ...]
    macs: float
    waiting: float
    backbone_macs: float

    @property
    def tokens(self) -> int:
        """Number of scored tokens."""
        return sum(domain.tokens for domain in self.domains)

    @property
    def nats(self) -> float:
        """Mean of the nats per token of the domains, each with the same weight, as ``final_nats_per_token``."""
        return sum(domain.nats for domain in self.domains) / len(self.domains)

    @property
    def perplexity(self) -> float:
        """The exponential of ``nats``."""
        return perplexity(self.nats)


def evaluate_text(
    model: RunModel,
    overrides: Sequence[str] = (),
    *,
    threshold: float | None = None,
    budget: float | None = None,
    batch_size: int = 64,
    progress: Progress | None = None,
) -> TextEvaluation:
    """Measure the language model of a run.

    Without ``benchmark=language_model`` the text is the test text of the domains that the run has learned, and the
    numbers equal those of ``results.json``. With it, it is the test text of other domains, encoded by the tokenizer of
    the run: ``NAME_test.txt`` in the folder ``benchmark.path``, or one text file.

    Args:
        model: The model of a run.
        overrides: ``benchmark=language_model`` with ``benchmark.path``, ``benchmark.domains`` and
            ``benchmark.test_characters``; or the new location of the run's own text (``benchmark.path=FOLDER``).
        threshold: Largest probability of a token from which an exit decides it; None: the strategy's rule.
        budget: Mean cost as a share of the bare backbone's MACs, with the threshold that the run has recorded.
        batch_size: Most windows per batch; fewer where their logits would need much memory.
        progress: Called with a step's name, what is done and how much there is.

    Raises:
        RunFolderError: Text or a tokenizer that has changed.
        ConfigError: Overrides or options that cannot take effect.
        DataError: Text that cannot be used.
    """
    scorer = TokenScorer(model, threshold=threshold, budget=budget)
    given = [text for text in overrides if text.partition("=")[0] == "benchmark"]
    if given:
        data, parts = other_text(model, given[-1].partition("=")[2], overrides)
    else:
        data, parts = "own test text", own_text(model, overrides)
    network, tokens = model.network, model.network.input_shape[0] - 1
    totals = _add_up(network, scorer, parts, batch_size, progress)
    unknown = network.choice is not None and any(part.experience is None for part in parts)
    all_tokens = sum(total.total.tokens for total in totals)
    return TextEvaluation(
        run=str(model.folder), data=data, rule=scorer.description, threshold=scorer.threshold,
        notes=(*scorer.notes, *([CHOSEN] if unknown else [])), context=tokens, exit_names=network.exit_names,
        domains=tuple(_score(part.name, total) for part, total in zip(parts, totals, strict=True)),
        decided_K=tuple(map(sum, zip(*(total.decided_K for total in totals), strict=True))),
        macs_K=_mean_costs(network, parts, totals),
        macs=sum(total.macs for total in totals) / all_tokens,
        waiting=sum(total.waiting for total in totals) / all_tokens,
        backbone_macs=backbone_macs(network) / tokens,
    )  # fmt: skip


def _mean_costs(network: Network, parts: Sequence[Part], totals: Sequence[TextTotals]) -> tuple[float, ...]:
    """Mean MACs of a token up to each exit; domains with known adapters may differ."""
    cost_by: dict[int | None, tuple[int, ...]] = {}
    for experience in {part.experience for part in parts}:
        with domain_of(network, experience):
            cost_by[experience] = exit_costs(network)
    counts = [total.total.tokens for total in totals]
    windows = sum(counts) * (network.input_shape[0] - 1)
    rows = [cost_by[part.experience] for part in parts]
    return tuple(sum(map(mul, cost_P, counts)) / windows for cost_P in zip(*rows, strict=True))


def _add_up(
    network: Network, scorer: TokenScorer, parts: Sequence[Part], batch_size: int, progress: Progress | None
) -> list[TextTotals]:
    """Sums over the windows of each part."""
    tokens, cuda = network.input_shape[0] - 1, network.final.weight.device.type == "cuda"
    size = min(batch_size, evaluation_batch(network.input_shape, cuda=cuda, vocabulary=network.vocabulary))
    totals, done, count = [], 0, sum(len(part.windows_WS) for part in parts)
    with evaluating(network):
        for part in parts:
            totals.append(TextTotals(len(network.heads)))
            with domain_of(network, part.experience):
                for batch_BS in part.windows_WS.split(size):
                    totals[-1].add(scorer(batch_BS), windows=len(batch_BS))
                    done += len(batch_BS)
                    if progress is not None:
                        progress("evaluate", done * tokens, count * tokens)
    return totals


def to_json(found: TextEvaluation) -> str:
    """The evaluation as JSON."""
    exits = [
        {"name": name, "decided": found.decided_K[k], "macs": found.macs_K[k]}
        for k, name in enumerate(found.exit_names)
    ]
    content = {
        "schema_version": SCHEMA_VERSION, "run": found.run, "data": found.data, "rule": found.rule,
        "threshold": found.threshold, "notes": found.notes, "context": found.context, "tokens": found.tokens,
        "nats_per_token": found.nats, "perplexity": found.perplexity, "macs_per_token": found.macs,
        "waiting_macs_per_token": found.waiting, "backbone_macs_per_token": found.backbone_macs,
        "domains": [{**asdict(domain), "perplexity": domain.perplexity} for domain in found.domains], "exits": exits,
    }  # fmt: skip
    return to_json_lines(content)


def _score(name: str, total: TextTotals) -> DomainScore:
    tokens = total.total.tokens
    return DomainScore(
        name=name, tokens=tokens, nats=total.total.mean, interval=total.interval, accuracy=total.right / tokens,
        nats_K=tuple(exit.mean for exit in total.exits), accuracy_K=tuple(right / tokens for right in total.right_K),
    )  # fmt: skip
