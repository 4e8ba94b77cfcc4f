"""Studies of activation sparsity of a target; for runs also by experience, together with forgetting."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from clframe.data.target import IGNORED, Batch, Batches, SplitName, Target
from clframe.errors import ConfigError, UnknownNameError, unknown_name
from clframe.metrics.continual import forgetting_E
from clframe.nn.frozen import evaluating
from clframe.nn.types import Inputs
from clframe.sparsity import activity
from clframe.sparsity.activity import overlap
from clframe.sparsity.analysis import ALL, SparsityReport, analyze
from clframe.sparsity.functional import MaskKind, baseline_sparsity
from clframe.sparsity.masking import ROLES, find_hook_points

RULES: tuple[MaskKind, ...] = ("top_p", "top_k", "max_p", "threshold")
TOKENS = ("prompt", "generated")
ScoreName = Literal["accuracy", "agreement"]
SCORES: tuple[ScoreName, ...] = ("accuracy", "agreement")

ACTIVE = 0.99
"""A neuron is active in a token if top-p with this p keeps it."""


@dataclass(frozen=True, kw_only=True)
class Experiences:
    """Activity of a run's final model on the test data of each experience.

    Attributes:
        sparsity: By layer, the share of inactive neurons per token on each experience.
        gaussian: Sparsity of a Gaussian vector under the same rule.
        overlap: By layer, Jaccard overlap of the rates of activity between experiences.
        forgetting: Forgetting of each experience; None for the last one and for an unfinished run.
    """

    sparsity: Mapping[str, tuple[float, ...]]
    gaussian: float
    overlap: Mapping[str, tuple[tuple[float, ...], ...]]
    forgetting: tuple[float | None, ...]

    def __len__(self) -> int:
        return len(self.forgetting)

    @property
    def mean_sparsity(self) -> tuple[float, ...]:
        """Sparsity on each experience, mean over layers."""
        return tuple(sum(values) / len(values) for values in zip(*self.sparsity.values(), strict=True))

    @property
    def mean_overlap(self) -> tuple[tuple[float, ...], ...]:
        """Overlap between experiences, mean over layers."""
        stacked = torch.tensor(list(self.overlap.values()), dtype=torch.float64)
        return tuple(tuple(row) for row in stacked.mean(0).tolist())


@dataclass(frozen=True, kw_only=True)
class SparsityStudy:
    """Results of :func:`study_sparsity`.

    Attributes:
        target: Name as given.
        kind: Kind of target.
        part: Split of the data that was scored.
        samples: Number of samples.
        tokens: Number of unmasked tokens if samples are texts, else None.
        score: ``accuracy``, or ``agreement`` with the dense model.
        share: Share of the dense score that critical sparsity keeps.
        report: Curves and ranks.
        experiences: For runs with several experiences.
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
    origin: Mapping[str, Any] = field(default_factory=dict)


def study_sparsity(
    target: Target,
    *,
    rules: Sequence[str] = ("top_p",),
    roles: Sequence[str] = (),
    tokens: Sequence[str] = TOKENS,
    score: ScoreName | None = None,
    share: float = 0.99,
    limit: int | None = None,
    size: int = 64,
    on_pass: Callable[[int, int], None] | None = None,
) -> SparsityStudy:
    """Sweep rules over roles; for a run with several experiences, also measure the active neurons on each.

    Scored on validation data where the target has some, else on test data.

    Args:
        target: See :func:`~clframe.targets.opening.open_target`.
        rules: Some of :data:`RULES`.
        roles: Some of input, up, gate, intermediate and ``all`` (input and intermediate together); empty for all.
        tokens: For a language model that generates: ``prompt``, ``generated`` or both, counted separately.
        score: ``accuracy`` where there are labels (of a language model: the next token), else ``agreement``.
        share: Share of the dense score to keep at the critical sparsity.
        limit: Samples to score on, evenly spaced; None for all. Applies to each experience's test data too.
        size: Samples per batch.
        on_pass: Called with the finished and the total number of passes.

    Raises:
        UnknownNameError: An unknown rule, role or kind of tokens.
        ConfigError: A role that the model lacks, no labels for accuracy, or a dense score of 0.
        UnsupportedError: A model without feed-forward networks or activations.
    """
    kinds = [_known("rule", rule, RULES) for rule in dict.fromkeys(rules)]
    wanted = _roles(target, roles)
    if score not in (None, *SCORES):
        raise UnknownNameError(unknown_name("score", str(score), SCORES, where="--score"))
    kept = [_known("tokens", name, TOKENS) for name in tokens]
    for option, names in (("rule", kinds), ("tokens", kept)):
        if not names:
            raise ConfigError(f"--{option}: found none; give one or more")
    if target.kind != "causal" and set(kept) != set(TOKENS):
        found = ", ".join(kept)
        raise ConfigError(f"--tokens: found {found} for {target.name}, which is not a language model; leave it out")
    if not 0 < share <= 1:
        raise ConfigError(f"--share: found {share}; give a share above 0, at most 1")
    part: SplitName = "test" if target.splits.validation is None else "validation"
    batches = target.batches(part, size=size, limit=limit)
    if not batches:
        raise ConfigError(f"{target.name}: its {part} data are empty; give some samples")
    batches = _restrict_tokens(batches, kept)
    samples, counted, labeled = _count(batches)
    score = score or ("accuracy" if labeled else "agreement")
    if score == "accuracy" and not labeled:
        raise ConfigError("--score: found accuracy for data without labels; take agreement")
    if score == "agreement":
        batches = _with_predictions(target, batches)
    report = analyze(
        target.model, batches, score=_correct, kinds=kinds, roles=wanted, share=share, inside=target.body,
        predict=target.predict, on_pass=on_pass,
    )  # fmt: skip
    return SparsityStudy(
        target=target.name, kind=target.kind, part=part, samples=samples, tokens=counted, score=score, share=share,
        report=report, experiences=_experiences(target, limit=limit, size=size), origin=target.origin,
    )  # fmt: skip


def _known(kind: str, name: str, known: Sequence[Any]) -> Any:
    if name not in known:
        raise UnknownNameError(unknown_name(kind, name, known, where=f"--{kind}"))
    return name


def _roles(target: Target, roles: Sequence[str]) -> tuple[str, ...]:
    there = {point.role for point in find_hook_points(target.body)}
    both = ["all"] if {"input", "intermediate"} <= there else []
    known = [*(role for role in ROLES if role in there), *both]
    for role in roles:
        _known("roles", role, [*ROLES, "all"])
        if role not in known:
            raise ConfigError(f"--roles: found {role}, which {target.name} lacks; choose from {', '.join(known)}")
    return tuple(ALL if role == "all" else role for role in known if not roles or role in roles)


def _restrict_tokens(batches: Batches, tokens: Sequence[str]) -> Batches:
    """Restrict batches of language models to the named kinds of tokens."""

    def narrowed(batch: Batch) -> Batch:
        if not isinstance(batch.tokens, Mapping) or batch.targets is None:
            return batch
        masks = {name: mask_BT for name, mask_BT in batch.tokens.items() if name in tokens}
        any_BT = torch.stack(list(masks.values())).any(0)
        targets_BT = torch.full_like(batch.targets, IGNORED)
        # The target of a token is at the position of the token before it.
        targets_BT[:, :-1] = batch.targets[:, :-1].where(any_BT[:, 1:], IGNORED)
        return Batch(batch.inputs, targets_BT, masks)

    return Batches([lambda at=at: narrowed(batches[at]) for at in range(len(batches))])  # type: ignore[misc]


def _count(batches: Batches) -> tuple[int, int | None, bool]:
    """Count samples and unmasked tokens (None where samples are not texts); also whether all have labels."""
    samples, tokens, labeled, texts = 0, 0, True, True
    for batch in batches:
        first = next(iter(batch.inputs.values())) if isinstance(batch.inputs, Mapping) else batch.inputs
        samples += len(first)
        labeled &= batch.targets is not None
        if batch.tokens is None:
            texts = False
        else:
            masks = batch.tokens.values() if isinstance(batch.tokens, Mapping) else [batch.tokens]
            tokens += sum(int(mask.sum()) for mask in masks)
    return samples, tokens if texts else None, labeled


def _with_predictions(target: Target, batches: Batches) -> Batches:
    """Return the same inputs with the dense model's predictions as targets."""
    predictions = []
    with evaluating(target.model):
        for batch in batches:
            found = target.predict(target.model, batch.inputs).argmax(-1)
            given = batch.targets if batch.targets is not None and batch.targets.shape == found.shape else None
            predictions.append(found if given is None else found.where(given != IGNORED, IGNORED))
    return Batches([lambda at=at: batches[at]._replace(targets=predictions[at]) for at in range(len(predictions))])  # type: ignore[misc]


def _correct(output: Any, targets: Any) -> Tensor:
    """Return 1 where the largest score is the target's, else 0, for all targets that are not ignored."""
    valid = targets != IGNORED
    right: Tensor = output.argmax(-1)[valid] == targets[valid]
    return right.float()


def _experiences(target: Target, *, limit: int | None, size: int) -> Experiences | None:
    if target.run is None or len(target.experiences) < 2:
        return None
    found = [
        activity(target.body, [_with_mask(batch) for batch in part.batches(size=size, limit=limit)], value=ACTIVE)
        for part in target.experiences
    ]
    layers = list(found[0].active)
    widths = [len(rate_N) for rate_N in found[0].active.values()]
    gaussian = [baseline_sparsity(ACTIVE, kind="top_p", neurons=width) for width in widths]
    return Experiences(
        sparsity={layer: tuple(one.sparsity[layer] for one in found) for layer in layers},
        gaussian=sum(gaussian) / len(gaussian),
        overlap={
            layer: tuple(tuple(row) for row in jaccard_EE.tolist()) for layer, jaccard_EE in overlap(found).items()
        },
        forgetting=_forgetting(target),
    )


def _with_mask(batch: Batch) -> tuple[Inputs, Tensor | None]:
    assert not isinstance(batch.tokens, Mapping)  # only language models have token kinds, and a run is not one
    return batch.inputs, batch.tokens


def _forgetting(target: Target) -> tuple[float | None, ...]:
    """Compute forgetting of each experience; None where the run is not finished."""
    if target.accuracy_matrix is None:
        return (None,) * len(target.experiences)
    lost = forgetting_E(target.accuracy_matrix)
    return tuple(None if score.undefined else score.value for score in lost)
