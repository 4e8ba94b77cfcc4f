"""The methods that strategy_parity.py compares: each as our expression and as Avalanche's strategy, with equal options."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from peer_bic import bic
from peer_changes import er_ace_of_the_past, ewc_by_sample, lwf_by_experience, mas_by_sample
from peer_course import EXPERIENCES, LR, WIDTH, Course, Maker, Setting, own, plugged, plugin
from torch import nn


def icarl(course: Course, shared: dict[str, Any]) -> Any:
    from avalanche.training import ICaRL

    parts = nn.ModuleDict({"feature_extractor": course.body(), "classifier": nn.Linear(WIDTH, course.classes)})
    # Its loss is a mean over the outputs, ours a sum.
    optimizer = torch.optim.SGD(parts.parameters(), lr=LR * course.classes)
    memory = {"memory_size": course.setting.memory, "buffer_transform": None, "fixed_memory": True}
    return ICaRL(**dict(parts.items()), optimizer=optimizer, **memory, **shared)


def cwr(course: Course, shared: dict[str, Any]) -> Any:
    from avalanche.training import CWRStar

    model = course.model()
    optimizer = torch.optim.SGD(model.parameters(), lr=LR)
    return CWRStar(model=model, optimizer=optimizer, criterion=nn.CrossEntropyLoss(), cwr_layer_name=None, **shared)


def slda(course: Course, shared: dict[str, Any]) -> Any:
    from avalanche.training import StreamingLDA

    sizes = {"input_size": WIDTH, "num_classes": course.classes}
    return StreamingLDA(
        slda_model=course.body(), criterion=nn.CrossEntropyLoss(), **sizes, **{**shared, "train_epochs": 1}
    )


def memory(setting: Setting) -> int:
    return setting.memory


def batch(setting: Setting) -> int:
    return setting.batch


def er(setting: Setting) -> str:
    return f"er(memory={setting.memory}, selection='random')"


def our_bic(setting: Setting) -> str:
    return f"bic(memory={setting.memory}, held_out=0.1)"


@dataclass(frozen=True)
class Method:
    """One row."""

    ours: Callable[[Setting], str]
    theirs: Maker
    definition: str = ""
    """Where the two differ by definition, options being as equal as they can be made."""
    growing: bool = True
    """Whether heads grow, on both sides, or have an output for each class from the start."""
    flat: bool = False
    """Whether Avalanche's side is given vectors in place of images."""
    defect: str = ""
    """What does not work in Avalanche 0.6 on current torch, and what was done about it."""


STOPS = "stops with growing heads, because stored outputs differ in size; ten outputs from the start"
GROWS = "stops with growing heads, because the teacher's weights no longer fit; ten outputs from the start"
SLICES = "indexes with a list of slices, of which torch warns; mended"
VERBOSE = "passes verbose= to MultiStepLR, which torch 2.7 removed, and stops; mended"
METHODS = {
    "Naive": Method(lambda s: "naive", own("Naive")),
    "JointTraining": Method(lambda s: "joint", own("JointTraining")),
    "Cumulative": Method(lambda s: "cumulative", own("Cumulative")),
    "Replay": Method(er, own("Replay", mem_size=memory)),
    "LwF": Method(
        lambda s: "lwf(alpha=1, temperature=2)", own("LwF", alpha=4.0, temperature=2.0),
        "ours: T^2 times the distillation, old classes of each experience under a softmax of their own; Avalanche: no "
        "T^2 (so alpha is 4 times ours), all old classes under one softmax",
    ),
    "LwF by experience": Method(lambda s: "lwf(alpha=1, temperature=2)", plugged(lwf_by_experience)),
    "LwF + Replay": Method(
        lambda s: f"{er(s)} + lwf(alpha=1, temperature=2)",
        plugged(plugin("ReplayPlugin", mem_size=memory), plugin("LwFPlugin", alpha=4.0, temperature=2.0)),
        "as LwF",
    ),
    "EWC": Method(
        lambda s: f"ewc(lamb=100, estimate='batches', batch_size={s.batch})", own("EWC", ewc_lambda=50.0),
        "both square mean gradients of batches, but Avalanche's experiences are sorted by class and its batches of one "
        "class, where gradients do not cancel; ours are drawn at random",
        defect=SLICES,
    ),
    "EWC by sample": Method(lambda s: "ewc(lamb=20)", plugged(ewc_by_sample), defect=SLICES),
    "SI": Method(
        lambda s: "si(c=100, damping=0.1, path='total', ceiling=0.001)",
        plugged(plugin("SynapticIntelligencePlugin", si_lambda=200.0, eps=0.1)),
        "ours caps importances as they are summed, Avalanche as they are used",
        defect="compares live weights with themselves on the CPU, which makes every importance 0; mended",
    ),
    "MAS": Method(
        lambda s: "mas(lamb=0.01, alpha=0.5)", own("MAS", lambda_reg=0.01, alpha=0.5),
        "ours: mean over samples of absolute gradients, merged from zero on; Avalanche: absolute values of the mean "
        "gradients of batches (of one class), the first ones unmerged",
        defect=SLICES,
    ),
    "MAS by sample": Method(lambda s: "mas(lamb=0.01, alpha=0.5)", plugged(mas_by_sample), defect=SLICES),
    "AGEM": Method(
        lambda s: f"agem(memory={s.memory}, sample=60)",
        own("AGEM", patterns_per_exp=lambda s: s.memory // EXPERIENCES, sample_size=60),
        "ours shares the memory among the experiences so far; Avalanche keeps a fifth for each from the start",
    ),
    "GDumb": Method(lambda s: f"gdumb(memory={s.memory})", own("GDumb", mem_size=memory)),
    "CWR*": Method(
        lambda s: "cwr", cwr,
        "ours treats biases like weights and centers each row by the mean of the trained ones; Avalanche leaves biases as "
        "they are and subtracts one number",
    ),
    "ER-ACE": Method(
        lambda s: f"{er(s)} + er_ace", own("ER_ACE", mem_size=memory, batch_size_mem=batch),
        "Avalanche takes the mean of the two terms, not their sum, and its memory takes in an experience before it is "
        "trained; ours after it, and new samples of the batch stand for those in the second term",
    ),
    "ER-ACE of the past": Method(lambda s: f"{er(s)} + er_ace(rehearse='past')", er_ace_of_the_past),
    "DER": Method(
        lambda s: f"der(alpha=0.1, memory={s.memory}, selection='balanced', replay='extra')",
        own("DER", growing=False, mem_size=memory, alpha=0.1, beta=0.0),
        growing=False, defect=STOPS,
    ),
    "DER++": Method(
        lambda s: f"derpp(alpha=0.1, beta=0.5, draws='one', memory={s.memory}, selection='balanced', replay='extra')",
        own("DER", growing=False, mem_size=memory, alpha=0.1, beta=0.5),
        growing=False, defect=STOPS,
    ),
    "iCaRL": Method(
        lambda s: f"er(memory={s.memory}, selection='herding', replay='concatenate') + icarl", icarl,
        "Avalanche's outputs of classes to come are trained towards 0, its means include mirrored images",
        growing=False, defect=GROWS,
    ),
    "iCaRL, flat inputs": Method(
        lambda s: f"er(memory={s.memory}, selection='herding', replay='concatenate') + icarl", icarl,
        "Avalanche's outputs of classes to come are trained towards 0; without images it mirrors nothing",
        growing=False, defect=GROWS, flat=True,
    ),
    "BiC": Method(
        our_bic, own("BiC", mem_size=memory, val_percentage=0.1),
        "Avalanche: distillation by a softmax over the batch instead of the classes, replay by joined batches instead of "
        "one pool, held-out samples beside the memory, the pair of the last experience only, fitted by SGD; it is the pool "
        "that makes the difference on digits (26 steps of 16 an epoch, where joined batches take 16 of 32)",
        defect=VERBOSE,
    ),
    "BiC, softmax over classes": Method(our_bic, bic("softmax"), defect=VERBOSE),
    "BiC, one pool": Method(our_bic, bic("pool"), defect=VERBOSE),
    "BiC, memory with what is held out": Method(our_bic, bic("memory"), defect=VERBOSE),
    "BiC, every pair": Method(our_bic, bic("pairs"), defect=VERBOSE),
    "BiC, exact fit": Method(our_bic, bic("fit"), defect=VERBOSE),
    "BiC, all five": Method(our_bic, bic("softmax", "pool", "memory", "pairs", "fit"), defect=VERBOSE),
    "SLDA": Method(
        lambda s: "slda(covariance='published')", slda,
        "the published covariance depends on the order of samples: Avalanche's are shuffled",
    ),
}  # fmt: skip
"""Row -> both sides."""
