"""Studies of activation sparsity of a target; for runs also by experience, together with forgetting."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from clframe.data.choices import ChoiceSplit
from clframe.data.target import IGNORED, Batches, SplitName, Target
from clframe.errors import ConfigError, UnknownNameError, unknown_name
from clframe.nn.frozen import evaluating
from clframe.nn.types import Inputs
from clframe.sparsity.analysis import ALL, SparsityReport, analyze
from clframe.sparsity.functional import MaskKind
from clframe.sparsity.masking import ATTENTION_ROLES, ROLES, find_attention_points, find_hook_points
from clframe.sparsity.part_activity import (
    ACTIVE,
    Domains,
    Experiences,
    measure_domains,
    measure_experiences,
    run_body,
)
from clframe.sparsity.scores import (
    SCORES,
    LanguageScores,
    ScoreName,
    choice_note,
    choice_values,
    language_scores,
    lowest_mean,
    reported_score,
    token_sums,
    token_values,
)
from clframe.sparsity.study_batches import count_data, restrict_tokens, with_predictions
from clframe.sparsity.union import ActiveUnion, measure_union

_log = logging.getLogger(__name__)

RULES: tuple[MaskKind, ...] = ("top_p", "top_k", "max_p", "threshold")
TOKENS = ("prompt", "generated")


@dataclass(frozen=True, kw_only=True)
class SparsityStudy:
    """Results of :func:`study_sparsity`.

    Attributes:
        target: Name as given.
        kind: Kind of target.
        part: Split of the data that was scored.
        samples: Number of samples.
        tokens: Number of unmasked tokens if samples are texts, else None.
        score: Its name, see :mod:`~clframe.sparsity.scores`.
        share: Share of the dense score that critical sparsity keeps; of a perplexity, see :attr:`tolerance`.
        report: Curves and ranks. Lower is better if ``score`` is ``perplexity``.
        experiences: For runs with several experiences.
        union: Neurons that batches of tokens or samples activate, on the same data, by top-p at its critical value for
            intermediate activations, or with p = :data:`ACTIVE` where that was not swept.
        language: Both scores of a dense language model.
        domains: For a language model measured on several files.
        origin: See :class:`~clframe.data.target.Target`.
    """

    target: str
    kind: str
    part: SplitName
    samples: int
    tokens: int | None
    score: ScoreName
    share: float
    report: SparsityReport
    experiences: Experiences | None
    union: ActiveUnion
    language: LanguageScores | None = None
    domains: Domains | None = None
    origin: Mapping[str, Any] = field(default_factory=dict)

    @property
    def tolerance(self) -> float:
        """Tolerated loss relative to the dense score: accuracy may fall, and perplexity rise, by this share of it."""
        return round(1 - self.share, 12)

    @property
    def limit_score(self) -> float:
        """The worst tolerated score."""
        dense = self.report.dense
        return dense * (1 + self.tolerance) if self.score == "perplexity" else dense * self.share


def study_sparsity(
    target: Target,
    *,
    rules: Sequence[str] = ("top_p",),
    power: float = 1.0,
    roles: Sequence[str] = (),
    tokens: Sequence[str] = TOKENS,
    score: ScoreName | None = None,
    share: float = 0.99,
    limit: int | None = None,
    size: int | None = None,
    on_pass: Callable[[int, int], None] | None = None,
) -> SparsityStudy:
    """Sweep rules over roles; for a run with several experiences, also measure the active neurons on each.

    Scored on validation data where the target has some, else on test data.

    Args:
        target: See :func:`~clframe.targets.opening.open_target`.
        rules: Some of :data:`RULES`.
        power: Of magnitudes in top-p: 1 for shares of the sum, 2 for shares of the sum of squares.
        roles: Some of input, up, gate, intermediate, ``all`` (input and intermediate together), attention and heads;
            empty for all but the last two.
        tokens: For a language model that generates: ``prompt``, ``generated`` or both, counted separately.
        score: ``accuracy`` where there are labels (of a language model: the next token), else ``agreement``; or
            ``perplexity`` of a language model; on questions ``choices`` or ``choices_normalized``, the share of
            questions whose right choice has the highest log-likelihood, or the highest per character.
        share: Share of the dense score to keep at the critical sparsity: accuracy and agreement may fall to ``share``
            times that of the dense model, perplexity may rise to ``2 - share`` times.
        limit: Samples to score on, evenly spaced; None for all. Applies to each experience's test data too.
        size: Samples per batch; None: 64, and 16 for a language model, whose texts need less padding then.
        on_pass: Called with the finished and the total number of passes.

    Raises:
        UnknownNameError: An unknown rule, role or kind of tokens.
        ConfigError: A role that the model lacks, no labels for accuracy, or a dense score of 0.
        DivergenceError: A language model whose logits contain NaN.
        UnsupportedError: A model without feed-forward networks or activations.
    """
    kinds = [_known("rule", rule, RULES) for rule in dict.fromkeys(rules)]
    wanted = _roles(target, roles)
    if score not in (None, *SCORES):
        raise UnknownNameError(unknown_name("score", str(score), SCORES, where="--score"))
    kept = [_known("tokens", name, TOKENS) for name in tokens]
    _check_options(target, kinds=kinds, tokens=kept, share=share, power=power)
    size = size or (64 if target.logits_at is None else 16)
    part: SplitName = "test" if target.splits.validation is None else "validation"
    batches = target.batches(part, size=size, limit=limit)
    if not batches:
        raise ConfigError(f"{target.name}: its {part} data are empty; give some samples")
    batches = restrict_tokens(batches, kept)
    samples, counted, labeled = count_data(batches)
    questions = target.splits.test if isinstance(target.splits.test, ChoiceSplit) else None
    score = score or ("choices" if questions is not None else "accuracy" if labeled else "agreement")
    _check_score(target, score, labeled=bool(labeled), asks=questions is not None)
    language = None if target.logits_at is None else _language_scores(target, batches, score)
    scored: Any = batches
    if questions is not None and score.startswith("choices"):
        divided = questions.choices(size=size, limit=limit)
        samples = sum(len(one.counts) for one in divided)
        scored = [(one.inputs, (one.targets, own), one.tokens) for one, own in zip(batches, divided, strict=True)]
        note = _choice_note(target, scored, normalized=score == "choices_normalized")
        language = None if language is None else replace(language, note=note)
    if language is not None and language.note:
        _log.warning("analyze: %s; check the model and its data", language.note)
    if score == "agreement":
        scored = with_predictions(target, batches)
    report = analyze(
        target.model, scored, evaluate=partial(_values, target, score), kinds=kinds, power=power, roles=wanted,
        inside=target.body, least=partial(lowest_mean, score, share=share), on_pass=on_pass,
    )  # fmt: skip
    value, power = _union_rule(report, power)
    return SparsityStudy(
        target=target.name, kind=target.kind, part=part, samples=samples, tokens=counted, score=score, share=share,
        report=_reported(report, score), language=language,
        experiences=measure_experiences(target, limit=limit, size=size),
        union=measure_union(
            target.model, batches, value=value, power=power, inside=target.body, predict=partial(run_body, target)
        ),
        domains=measure_domains(target, limit=limit, size=size), origin=target.origin,
    )  # fmt: skip


def _check_options(
    target: Target, *, kinds: Sequence[str], tokens: Sequence[str], share: float, power: float
) -> None:
    """Raise ConfigError for no rules or tokens, tokens of a model that generates none, and numbers out of range."""
    for option, names in (("rule", kinds), ("tokens", tokens)):
        if not names:
            raise ConfigError(f"--{option}: found none; give one or more")
    if target.kind != "causal" and set(tokens) != set(TOKENS):
        found = ", ".join(tokens)
        raise ConfigError(f"--tokens: found {found} for {target.name}, which is not a language model; leave it out")
    if not 0 < share <= 1:
        raise ConfigError(f"--share: found {share}; give a share above 0, at most 1")
    if not 0 < power < math.inf:
        raise ConfigError(f"--power: found {power}; give a number above 0")
    if power != 1 and "top_p" not in kinds:
        raise ConfigError(f"--power: found {power} for {', '.join(kinds)}; use it with top_p, or leave it out")


def _check_score(target: Target, score: ScoreName, *, labeled: bool, asks: bool) -> None:
    """Raise ConfigError for a score that needs labels, a language model or questions, which are not there."""
    if score == "accuracy" and not labeled:
        raise ConfigError("--score: found accuracy for data without labels; take agreement")
    if score == "perplexity" and target.logits_at is None:
        raise ConfigError(f"--score: found perplexity for {target.name}, which is not a language model; use accuracy")
    if score.startswith("choices") and not asks:
        raise ConfigError(f"--score: found {score}, but --data has no questions; give a .jsonl file with choices")


def _union_rule(report: SparsityReport, power: float) -> tuple[float, float]:
    """The critical p of top-p on intermediate activations and its power; :data:`ACTIVE` and 1 where not swept."""
    found = (one for one in report.curves if (one.kind, one.role) == ("top_p", "intermediate"))
    return next(((one.critical_value, power) for one in found), (ACTIVE, 1.0))


def _values(target: Target, score: ScoreName, model: nn.Module, inputs: Inputs, targets: Any) -> Tensor:
    """Values of all targets that are not ignored; of a language model, logits are computed for these only."""
    if score.startswith("choices"):
        assert target.logits_at is not None
        targets, choices = targets
        logits_NV = target.logits_at(model, inputs, targets != IGNORED)
        return choice_values(logits_NV, targets, choices, normalized=score == "choices_normalized")
    valid = targets != IGNORED
    if target.logits_at is not None:
        return token_values(score, target.logits_at(model, inputs, valid), targets[valid])
    right: Tensor = target.predict(model, inputs).argmax(-1)[valid] == targets[valid]
    return right.float()


def _language_scores(target: Target, batches: Batches, score: ScoreName) -> LanguageScores:
    assert target.logits_at is not None
    with evaluating(target.model):
        found = []
        for inputs, targets, _ in batches:
            assert targets is not None
            valid = targets != IGNORED
            found.append(token_sums(target.logits_at(target.model, inputs, valid), targets[valid]))
    return language_scores(found, accuracy_matters=score != "perplexity")


def _choice_note(target: Target, scored: Sequence[Any], *, normalized: bool) -> str:
    name: ScoreName = "choices_normalized" if normalized else "choices"
    with evaluating(target.model):
        right_Q = torch.cat([_values(target, name, target.model, inputs, given) for inputs, given, _ in scored])
    counts = [count for _, (_, choices), _ in scored for count in choices.counts]
    return choice_note(float(right_Q.mean()), counts)


def _reported(report: SparsityReport, score: ScoreName) -> SparsityReport:
    """The report with scores as users read them."""
    curves = tuple(
        replace(curve, scores=tuple(reported_score(score, mean) for mean in curve.scores)) for curve in report.curves
    )
    return replace(report, dense=reported_score(score, report.dense), curves=curves)


def _known(kind: str, name: str, known: Sequence[Any]) -> Any:
    if name not in known:
        raise UnknownNameError(unknown_name(kind, name, known, where=f"--{kind}"))
    return name


def _roles(target: Target, roles: Sequence[str]) -> tuple[str, ...]:
    there = {point.role for point in find_hook_points(target.body)}
    both = ["all"] if {"input", "intermediate"} <= there else []
    there |= {point.role for point in find_attention_points(target.body)}
    known = [*(role for role in (*ROLES, *ATTENTION_ROLES) if role in there), *both]
    for role in roles:
        _known("roles", role, [*ROLES, *ATTENTION_ROLES, "all"])
        if role not in known:
            raise ConfigError(f"--roles: found {role}, which {target.name} lacks; choose from {', '.join(known)}")
    chosen = roles or [role for role in known if role not in ATTENTION_ROLES]
    return tuple(ALL if role == "all" else role for role in known if role in chosen)
