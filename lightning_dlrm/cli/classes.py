"""Classes with a short name in configurations: models, rules, optimizers, schedules, losses, data, and so on."""

from types import ModuleType

import pytorch_lightning as pl
import torch
from pytorch_lightning import callbacks, loggers, plugins, profilers
from torch.optim import lr_scheduler

from datamodules.clicks import Clicks
from datamodules.criteo import Criteo, CriteoKaggle, CriteoTerabyte
from datamodules.synthetic import RandomData, TraceData
from lightning_dlrm.engine.plateau import ReduceOnPlateau
from lightning_dlrm.engine.strategy import EmbeddingShardedDDP
from lightning_dlrm.models.autoint import AutoInt
from lightning_dlrm.models.baselines import (
    MLP,
    DeepFM,
    FactorizationMachine,
    LogisticRegression,
    MatrixFactorization,
    WideAndDeep,
    XDeepFM,
)
from lightning_dlrm.models.dcn import DCN
from lightning_dlrm.models.dlrm import DLRM
from lightning_dlrm.models.finalmlp import FinalMLP
from lightning_dlrm.models.masknet import MaskNet
from lightning_dlrm.objectives.losses import FocalLoss, LogLoss, ProbabilityLogLoss, WeightedLogLoss
from lightning_dlrm.optim.rules import SGD, Adagrad, Adam, RowWiseAdagrad
from lightning_dlrm.optim.schedules import Constant, Cosine, WarmupQuadraticDecay, WarmupThenDecay


def _public_classes(module: ModuleType, base: type, *left_out: type) -> tuple[type, ...]:
    """Return the public subclasses of ``base`` in a module of torch."""
    found = (getattr(module, name) for name in module.__all__)
    return tuple(item for item in found if isinstance(item, type) and issubclass(item, base) and item not in left_out)


PRECISIONS = {
    "32-true": "float32", "64-true": "float64", "bf16-true": "bfloat16", "bf16-mixed": "float32 with bfloat16 products",
}  # fmt: skip
"""Lightning's name of a precision -> words."""

# Importing a class makes its short name known to the command line.
KNOWN_CLASSES = (
    Clicks,
    Criteo,
    CriteoKaggle,
    CriteoTerabyte,
    RandomData,
    TraceData,
    DLRM,
    DCN,
    LogisticRegression,
    MatrixFactorization,
    FactorizationMachine,
    MLP,
    WideAndDeep,
    DeepFM,
    XDeepFM,
    FinalMLP,
    AutoInt,
    MaskNet,
    SGD,
    Adagrad,
    RowWiseAdagrad,
    Adam,
    Constant,
    Cosine,
    WarmupQuadraticDecay,
    WarmupThenDecay,
    EmbeddingShardedDDP,
    ReduceOnPlateau,
    LogLoss,
    WeightedLogLoss,
    ProbabilityLogLoss,
    FocalLoss,
    *_public_classes(
        torch.optim, torch.optim.Optimizer, torch.optim.Optimizer, torch.optim.LBFGS, torch.optim.SparseAdam
    ),
    *_public_classes(lr_scheduler, lr_scheduler.LRScheduler, lr_scheduler.LRScheduler, lr_scheduler.ReduceLROnPlateau),
)

OFFERED_CLASSES = (
    *KNOWN_CLASSES,
    *_public_classes(
        callbacks,
        pl.Callback,
        *(pl.Callback, callbacks.BaseFinetuning, callbacks.BasePredictionWriter, callbacks.Checkpoint),
        *(callbacks.ProgressBar, callbacks.StochasticWeightAveraging, callbacks.WeightAveraging),
        callbacks.EMAWeightAveraging,
    ),
    *_public_classes(loggers, loggers.Logger, loggers.Logger),
    *_public_classes(profilers, profilers.Profiler, profilers.Profiler, profilers.XLAProfiler),
    *_public_classes(plugins, object),
)
"""Classes that help and errors name: those above, and Lightning's that a run takes."""
