"""Classes of Avalanche and Lightning that training uses, imported quietly and quickly.

Modules outside this package import them from here: importing it first has imported Avalanche as
:mod:`clframe.data.slow_imports` describes, which an import of ``avalanche`` or ``lightning`` by itself does not.
"""

from avalanche.benchmarks import OnlineCLExperience
from avalanche.core import SupervisedPlugin
from avalanche.training.plugins import EvaluationPlugin
from avalanche.training.plugins.clock import Clock
from avalanche.training.plugins.evaluation import default_evaluator
from avalanche.training.templates import SupervisedTemplate
from avalanche.training.templates.base_sgd import PeriodicEval

from clframe.data.slow_imports import quick_imports

with quick_imports():
    from lightning import Callback, Fabric, LightningModule, Trainer
    from lightning.fabric.plugins.environments.lightning import LightningEnvironment
    from lightning.fabric.strategies.ddp import DDPStrategy
    from lightning.fabric.utilities.exceptions import MisconfigurationException
    from lightning.pytorch import callbacks as lightning_callbacks
    from lightning.pytorch import loggers as lightning_loggers
    from lightning.pytorch.plugins.precision import Precision

__all__ = [
    "Callback", "Clock", "DDPStrategy", "EvaluationPlugin", "Fabric", "LightningEnvironment", "LightningModule",
    "MisconfigurationException", "OnlineCLExperience", "PeriodicEval", "Precision", "SupervisedPlugin",
    "SupervisedTemplate", "Trainer", "default_evaluator", "lightning_callbacks", "lightning_loggers",
]  # fmt: skip
