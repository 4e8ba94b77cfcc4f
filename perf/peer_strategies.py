"""What strategy_parity.py compares: each method as our expression and as Avalanche's strategy, with equal options.

Both sides train the same perceptron from the same weights, on the same experiences, with SGD without momentum, and
memories of the same size. Avalanche's model has its ``IncrementalClassifier``, which grows with the classes as our head
does, or ten outputs from the start where a method of Avalanche's cannot grow.
"""

from __future__ import annotations

import copy
import random
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from avalanche.core import SupervisedPlugin
from torch import Tensor, nn
from torch.utils.data import Dataset

from clframe.data import SOURCES, Benchmark, Source, class_incremental
from clframe.functional.seeding import derive_seed
from clframe.nn import BACKBONES, Network
from clframe.training.module import ContinualModule
from clframe.training.repairs import repair
from clframe.training.strategy import LightningStrategy

EXPERIENCES, PER_EXPERIENCE, WIDTH, LR = 5, 2, 128, 0.05


@dataclass(frozen=True)
class Setting:
    """What both sides train: a data set, how much of it, and how."""

    source: str
    per_class: int | None
    """Training samples of each class, the first ones; None takes all."""
    epochs: int
    batch: int
    memory: int


SETTINGS = {
    "split digits": Setting("digits", 128, epochs=5, batch=16, memory=192),
    "Split MNIST": Setting("mnist", 992, epochs=2, batch=32, memory=512),
}
"""Experiences and memories are multiples of a batch: Avalanche sets a whole replayed batch beside a rest of new samples."""


class Course:
    """Data and first weights of one seed, alike for both sides."""

    def __init__(self, setting: Setting, *, seed: int, source: Source | None = None, data_dir: str | None = None) -> None:
        if source is None:
            options = {"data_dir": data_dir, "download": False} if data_dir and setting.source != "digits" else {}
            source = SOURCES.get(setting.source)(**options)
        if setting.per_class is not None:
            train = source.train
            order = [(train.y == c).nonzero().flatten()[: setting.per_class] for c in range(source.classes)]
            source = Source(source.name, train.subset(torch.cat(order)), source.test, source.classes)
        self.setting, self.seed = setting, seed
        self.benchmark: Benchmark = class_incremental(source, experiences=EXPERIENCES, seed=seed)
        self.classes = source.classes
        torch.manual_seed(derive_seed(seed, "network"))
        self.network = Network(BACKBONES.get("mlp")(self.benchmark.input_shape, width=WIDTH))

    def body(self) -> nn.Module:
        """Everything below the classifier, with the weights that ours begins with."""
        return copy.deepcopy(self.network.backbone)

    def model(self, *, growing: bool = True) -> nn.Module:
        """The body with Avalanche's growing classifier, or with an output for each class of the stream."""
        from avalanche.models import IncrementalClassifier

        head = IncrementalClassifier(WIDTH, PER_EXPERIENCE) if growing else nn.Linear(WIDTH, self.classes)
        return nn.Sequential(self.body(), head)

    def theirs(self, *, flat: bool = False) -> Any:
        """The experiences as a benchmark of Avalanche's; classes are numbered in learning order here as well."""
        from avalanche.benchmarks import nc_benchmark

        train, test = (joined(parts) for parts in (self.benchmark.train, self.benchmark.test))
        if flat:
            train.x, test.x = train.x.flatten(1), test.x.flatten(1)
        order = list(range(self.classes))
        return nc_benchmark(train, test, EXPERIENCES, task_labels=False, shuffle=False, fixed_class_order=order)


class Samples(Dataset[tuple[Tensor, int]]):
    """Tensors as a map-style data set; Avalanche reads ``targets``."""

    def __init__(self, x: Tensor, y: Tensor) -> None:
        self.x, self.targets = x, y.tolist()

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.x[index], self.targets[index]


def joined(parts: Any) -> Samples:
    """All experiences' samples in one data set, as the model wants them."""
    x = torch.cat([part.prepare(part.raw(torch.arange(len(part)))) for part in parts])
    return Samples(x, torch.cat([part.y for part in parts]))


Maker = Callable[[Course, dict[str, Any]], Any]
"""Avalanche's strategy for a course, given the arguments that all of them take."""


def own(name: str, *, growing: bool = True, lr: float = LR, **options: Any) -> Maker:
    """A strategy class of ``avalanche.training``; an option may be a function of the setting."""

    def make(course: Course, shared: dict[str, Any]) -> Any:
        from avalanche import training

        model = course.model(growing=growing)
        given = {key: value(course.setting) if callable(value) else value for key, value in options.items()}
        optimizer = torch.optim.SGD(model.parameters(), lr=lr)
        return getattr(training, name)(model=model, optimizer=optimizer, criterion=nn.CrossEntropyLoss(), **given, **shared)

    return make


def plugged(*plugins: Callable[[Setting], Any]) -> Maker:
    """``Naive`` with plugins."""

    def make(course: Course, shared: dict[str, Any]) -> Any:
        return own("Naive", plugins=lambda setting: [plugin(setting) for plugin in plugins])(course, shared)

    return make


def plugin(name: str, **options: Any) -> Callable[[Setting], Any]:
    """A plugin class of ``avalanche.training.plugins``; an option may be a function of the setting."""

    def make(setting: Setting) -> Any:
        from avalanche.training import plugins

        given = {key: value(setting) if callable(value) else value for key, value in options.items()}
        return getattr(plugins, name)(**given)

    return make


def ewc_by_sample(setting: Setting) -> Any:
    """Avalanche's EWC with batches of one sample in its pass for the Fisher diagonal."""
    from avalanche.training.plugins import EWCPlugin

    class BySample(EWCPlugin):
        def compute_importances(self, *arguments: Any, **options: Any) -> Any:
            *others, _ = arguments  # the last one is the size of batches
            return super().compute_importances(*others, 1, **options)

    return BySample(ewc_lambda=10.0)


def mas_by_sample(setting: Setting) -> Any:
    """Avalanche's MAS with batches of one sample in its pass, merging from zero on."""
    from avalanche.training.plugins import MASPlugin

    class BySample(MASPlugin):
        def _get_importance(self, strategy: Any) -> Any:
            size, strategy.train_mb_size = strategy.train_mb_size, 1
            try:
                found = super()._get_importance(strategy)
            finally:
                strategy.train_mb_size = size
            if self.importance is None:
                for value in found.values():
                    value.data = (1 - self.alpha) * value.data
            return found

    return BySample(lambda_reg=0.01, alpha=0.5)


def lwf_by_experience(setting: Setting) -> Any:
    """Avalanche's LwF with a softmax for the classes of each old experience."""
    from avalanche.training.plugins import LwFPlugin

    made = LwFPlugin(alpha=4.0, temperature=2.0)
    whole = made.lwf._distillation_loss

    def by_experience(out: Tensor, old: Tensor, classes: Any) -> Tensor:
        known = sorted(classes)
        return sum(whole(out, old, known[i : i + PER_EXPERIENCE]) for i in range(0, len(known), PER_EXPERIENCE))

    made.lwf._distillation_loss = by_experience
    return made


def er_ace_of_the_past(course: Course, shared: dict[str, Any]) -> Any:
    """Avalanche's ER-ACE with a memory that takes in an experience after it was trained, its two terms added up."""
    from avalanche.training import ER_ACE

    class Past(ER_ACE):
        def _before_training_exp(self, **kwargs: Any) -> None:
            update, self.storage_policy.update = self.storage_policy.update, lambda *_, **__: None
            super()._before_training_exp(**kwargs)
            self.storage_policy.update = update

        def _after_training_exp(self, **kwargs: Any) -> None:
            self.storage_policy.update(self, **kwargs)
            super()._after_training_exp(**kwargs)

    model, setting = course.model(), course.setting
    optimizer, sizes = torch.optim.SGD(model.parameters(), lr=LR), {"mem_size": setting.memory, "batch_size_mem": setting.batch}
    strategy = Past(model=model, optimizer=optimizer, criterion=nn.CrossEntropyLoss(), **sizes, **shared)
    mean = strategy.ace_criterion
    strategy.ace_criterion = lambda *outputs_and_targets: 2 * mean(*outputs_and_targets)
    return strategy


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
    return StreamingLDA(slda_model=course.body(), criterion=nn.CrossEntropyLoss(), **sizes, **{**shared, "train_epochs": 1})


def memory(setting: Setting) -> int:
    return setting.memory


def batch(setting: Setting) -> int:
    return setting.batch


def er(setting: Setting) -> str:
    return f"er(memory={setting.memory}, selection='random')"


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
        lambda s: f"bic(memory={s.memory}, held_out=0.1)", own("BiC", mem_size=memory, val_percentage=0.1),
        "Avalanche: distillation by a softmax over the batch instead of the classes, replay by joined batches instead of "
        "one pool, held-out samples beside the memory, the pair of the last experience only",
        defect="passes verbose= to MultiStepLR, which torch 2.7 removed, and stops; mended",
    ),
    "SLDA": Method(
        lambda s: "slda(covariance='published')", slda,
        "the published covariance depends on the order of samples: Avalanche's are shuffled",
    ),
}  # fmt: skip
"""Row -> both sides."""


def final_accuracy(course: Course, name: str, side: str) -> dict[str, float]:
    """Averages over the experiences of the accuracies after the last one, from 0 to 1, counted alike for both sides.

    ``agnostic``: of an answer among all classes, by Avalanche's metric; ``aware``: among those of the sample's experience.
    """
    watch = Aware()
    with warnings.catch_warnings(record=True):  # Avalanche uses functions of its own that it deprecates
        if side == "ours":
            strategy, stream = _ours(course, METHODS[name]), course.benchmark.avalanche
        else:
            strategy, stream = _theirs(course, METHODS[name].theirs), course.theirs(flat=METHODS[name].flat)
        if name == "JointTraining" and side != "ours":
            strategy.train(stream.train_stream)
        else:
            for experience in stream.train_stream:
                strategy.train(experience)
        strategy.plugins.append(watch)
        metrics = strategy.eval(stream.test_stream)
    accuracies = [value for key, value in metrics.items() if key.startswith("Top1_Acc_Exp/eval_phase/")]
    assert len(accuracies) == EXPERIENCES, metrics
    return {"agnostic": sum(accuracies) / EXPERIENCES, "aware": watch.average()}


class Aware(SupervisedPlugin):
    """Counts answers among the classes of the experience at hand."""

    def __init__(self) -> None:
        super().__init__()
        self.right, self.seen = Counter(), Counter()

    def after_eval_iteration(self, strategy: Any, **kwargs: Any) -> None:
        index, classes = strategy.experience.current_experience, sorted(strategy.experience.classes_in_this_experience)
        answers = torch.tensor(classes)[strategy.mb_output[:, classes].argmax(1)]
        self.right[index] += int((answers == strategy.mb_y).sum())
        self.seen[index] += len(answers)

    def average(self) -> float:
        """Mean of the experiences' accuracies."""
        return sum(self.right[index] / count for index, count in self.seen.items()) / len(self.seen)


def _evaluator() -> Any:
    from avalanche.evaluation.metrics import accuracy_metrics
    from avalanche.training.plugins import EvaluationPlugin

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="No loggers specified")  # numbers are read, not logged
        return EvaluationPlugin(accuracy_metrics(experience=True), loggers=[])


def _ours(course: Course, method: Method) -> Any:
    setting, network = course.setting, copy.deepcopy(course.network)
    if not method.growing:
        network.grow(range(course.classes))
    optimizer = partial(torch.optim.SGD, lr=LR)
    module = ContinualModule(network, method.ours(setting), optimizer=optimizer, seed=course.seed)
    return LightningStrategy(
        model=module, benchmark=course.benchmark, train_mb_size=setting.batch, train_epochs=setting.epochs,
        eval_mb_size=256, evaluator=_evaluator(),
    )  # fmt: skip


def _theirs(course: Course, make: Maker) -> Any:
    setting = course.setting
    torch.manual_seed(course.seed)
    np.random.seed(course.seed)
    random.seed(course.seed)
    sizes = {"train_mb_size": setting.batch, "train_epochs": setting.epochs, "eval_mb_size": 256}
    strategy = make(course, {**sizes, "evaluator": _evaluator()})
    repair(strategy.plugins)
    return strategy
