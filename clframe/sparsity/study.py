"""How sparse a target's activations are and may become; of a run, experience by experience beside forgetting."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from clframe.data.target import IGNORED, Batch, Batches, PartName, Target
from clframe.errors import ConfigError, UnknownNameError, unknown_name
from clframe.metrics.continual import forgetting_E
from clframe.nn.frozen import answering
from clframe.nn.types import Inputs
from clframe.sparsity import activity
from clframe.sparsity.activity import overlap
from clframe.sparsity.analysis import ALL, Report, analyze
from clframe.sparsity.functional import MaskKind, baseline_sparsity
from clframe.sparsity.masking import ROLES, places_of

RULES: tuple[MaskKind, ...] = ("top_p", "top_k", "max_p", "threshold")
TOKENS = ("prompt", "generated")
ScoreName = Literal["accuracy", "agreement"]
SCORES: tuple[ScoreName, ...] = ("accuracy", "agreement")

ACTIVE = 0.99
"""A neuron is active in a token where top-p with this p keeps it."""


@dataclass(frozen=True, kw_only=True)
class Experiences:
    """The neurons of a run's model after its last experience, by the test data of each experience.

    Attributes:
        sparsity: By layer, the share of neurons that a token of each experience leaves inactive.
        gaussian: What a Gaussian vector would by the same rule.
        overlap: By layer, Jaccard overlap of active neurons between each two experiences: the rates at which neurons
            are active, compared.
        forgetting: What each experience has lost; None where the run does not say, or for the last.
    """

    sparsity: Mapping[str, tuple[float, ...]]
    gaussian: float
    overlap: Mapping[str, tuple[tuple[float, ...], ...]]
    forgetting: tuple[float | None, ...]

    def __len__(self) -> int:
        return len(self.forgetting)

    @property
    def mean_sparsity(self) -> tuple[float, ...]:
        """Of each experience, mean over layers."""
        return tuple(sum(values) / len(values) for values in zip(*self.sparsity.values(), strict=True))

    @property
    def mean_overlap(self) -> tuple[tuple[float, ...], ...]:
        """Between each two experiences, mean over layers."""
        stacked = torch.tensor(list(self.overlap.values()), dtype=torch.float64)
        return tuple(tuple(row) for row in stacked.mean(0).tolist())


@dataclass(frozen=True, kw_only=True)
class SparsityStudy:
    """What :func:`study_sparsity` found.

    Attributes:
        target: As it was asked for.
        kind: What it is.
        part: The data that it was scored on.
        samples: How many of them.
        tokens: Those that count, where samples are texts; None otherwise.
        score: ``accuracy``, or ``agreement`` with the dense model.
        share: Of the dense score that critical sparsity keeps.
        report: Curves and ranks.
        experiences: For runs of several.
    """

    target: str
    kind: str
    part: PartName
    samples: int
    tokens: int | None
    score: ScoreName
    share: float
    report: Report
    experiences: Experiences | None


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
    """Sweep rules over roles; of a run of several experiences, measure each one's active neurons too.

    Scored on validation data where the target holds some out, else on test data.

    Args:
        target: See :func:`~clframe.targets.opening.open_target`.
        rules: Some of :data:`RULES`.
        roles: Some of input, up, gate, intermediate and ``all`` (input and intermediate together); none: all there are.
        tokens: Of a language model that writes on: ``prompt``, ``generated`` or both, each counted apart.
        score: ``accuracy`` where there are labels (of a language model: the next token), else ``agreement``.
        share: Of the dense score that critical sparsity keeps.
        limit: Samples to score on, spread evenly; None takes all. Of each experience's test data as many.
        size: Samples of a batch.
        on_pass: Called with passes done and to do.

    Raises:
        UnknownNameError: A rule, role or kind of tokens that there is not.
        ConfigError: A role that the model does not have, no labels for accuracy, or a dense score of 0.
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
    if not 0 < share <= 1:
        raise ConfigError(f"--share: found {share}; give a share above 0, at most 1")
    part: PartName = "test" if target.parts.validation is None else "validation"
    batches = target.batches(part, size=size, limit=limit)
    if not batches:
        raise ConfigError(f"{target.name}: its {part} data are empty; give some")
    batches = _narrowed(batches, kept)
    samples, counted, labeled = _counted(batches)
    score = score or ("accuracy" if labeled else "agreement")
    if score == "accuracy" and not labeled:
        raise ConfigError("--score: found accuracy for data without labels; take agreement")
    if score == "agreement":
        batches = _answered(target, batches)
    report = analyze(
        target.model, batches, score=_correct, kinds=kinds, roles=wanted, share=share, inside=target.body,
        answer=target.answer, on_pass=on_pass,
    )  # fmt: skip
    return SparsityStudy(
        target=target.name, kind=target.kind, part=part, samples=samples, tokens=counted, score=score, share=share,
        report=report, experiences=_experiences(target, limit=limit, size=size),
    )  # fmt: skip


def _known(kind: str, name: str, known: Sequence[Any]) -> Any:
    if name not in known:
        raise UnknownNameError(unknown_name(kind, name, known, where=f"--{kind}"))
    return name


def _roles(target: Target, roles: Sequence[str]) -> tuple[str, ...]:
    there = {place.role for place in places_of(target.body)}
    both = ["all"] if {"input", "intermediate"} <= there else []
    known = [*(role for role in ROLES if role in there), *both]
    for role in roles:
        _known("roles", role, [*ROLES, "all"])
        if role not in known:
            raise ConfigError(f"--roles: found {role}, which {target.name} has not; choose from {', '.join(known)}")
    return tuple(ALL if role == "all" else role for role in known if not roles or role in roles)


def _narrowed(batches: Batches, tokens: Sequence[str]) -> Batches:
    """Only the named kinds of tokens, of batches that know them."""

    def narrowed(batch: Batch) -> Batch:
        if not isinstance(batch.tokens, Mapping) or batch.targets is None:
            return batch
        masks = {name: mask_BT for name, mask_BT in batch.tokens.items() if name in tokens}
        any_BT = torch.stack(list(masks.values())).any(0)
        targets_BT = torch.full_like(batch.targets, IGNORED)
        # A token is asked for where the one before it is read.
        targets_BT[:, :-1] = batch.targets[:, :-1].where(any_BT[:, 1:], IGNORED)
        return Batch(batch.inputs, targets_BT, masks)

    return Batches([lambda at=at: narrowed(batches[at]) for at in range(len(batches))])  # type: ignore[misc]


def _counted(batches: Batches) -> tuple[int, int | None, bool]:
    """Samples, tokens that count (None where samples have none), and whether there are labels."""
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


def _answered(target: Target, batches: Batches) -> Batches:
    """The same inputs with what the dense model answers as targets."""
    made = []
    with answering(target.model):
        for batch in batches:
            found = target.answer(target.model, batch.inputs).argmax(-1)
            asked = batch.targets if batch.targets is not None and batch.targets.shape == found.shape else None
            made.append(found if asked is None else found.where(asked != IGNORED, IGNORED))
    return Batches([lambda at=at: batches[at]._replace(targets=made[at]) for at in range(len(made))])  # type: ignore[misc]


def _correct(output: Any, targets: Any) -> Tensor:
    """1 where the largest score is the target's, else 0, of all that are asked for."""
    asked = targets != IGNORED
    right: Tensor = output.argmax(-1)[asked] == targets[asked]
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
    assert not isinstance(batch.tokens, Mapping)  # no run writes texts
    return batch.inputs, batch.tokens


def _forgetting(target: Target) -> tuple[float | None, ...]:
    """Forgetting of each experience; None where the run is not finished."""
    if target.accuracy_matrix is None:
        return (None,) * len(target.experiences)
    lost = forgetting_E(target.accuracy_matrix)
    return tuple(None if score.undefined else score.value for score in lost)
