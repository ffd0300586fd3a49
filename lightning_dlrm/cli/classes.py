"""The classes that a configuration may name in short: models, rules, schedules, losses, datamodules, strategies."""

from datamodules.criteo import Criteo, CriteoKaggle, CriteoTerabyte
from datamodules.synthetic import RandomData, TraceData
from lightning_dlrm.engine.strategy import EmbeddingShardedDDP
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
from lightning_dlrm.objectives.losses import FocalLoss, LogLoss, WeightedLogLoss
from lightning_dlrm.optim.rules import SGD, Adagrad, Adam, RowWiseAdagrad
from lightning_dlrm.optim.schedules import Constant, Cosine, WarmupQuadraticDecay, WarmupThenDecay

# Importing a class makes its short name known to the command line.
KNOWN_CLASSES = (
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
    SGD,
    Adagrad,
    RowWiseAdagrad,
    Adam,
    Constant,
    Cosine,
    WarmupQuadraticDecay,
    WarmupThenDecay,
    EmbeddingShardedDDP,
    LogLoss,
    WeightedLogLoss,
    FocalLoss,
)
