"""Click-through-rate models on your own click logs, or on Criteo's, with PyTorch Lightning.

The names of ``__all__`` are this project's public Python API. They are loaded at their first use, so that importing
the package loads neither torch nor Lightning::

    from lightning_dlrm import CTRModule, Criteo, DLRM

Before a public name is removed, it stays for one minor release, in which its use raises a ``DeprecationWarning`` that
names the replacement, and CHANGELOG.md lists the name under "Deprecated".
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from datamodules.clicks import Clicks
    from datamodules.criteo import Criteo, CriteoKaggle, CriteoTerabyte
    from datamodules.generate.demo import DemoSettings
    from datamodules.synthetic import RandomData, TraceData
    from lightning_dlrm.contracts.batch import Batch, SparseIds
    from lightning_dlrm.contracts.errors import UserError
    from lightning_dlrm.contracts.schema import DatasetSchema, Features
    from lightning_dlrm.engine.averaging import Averaging
    from lightning_dlrm.engine.checkpointing import FolderCheckpointIO
    from lightning_dlrm.engine.module import CTRModule
    from lightning_dlrm.engine.plateau import ReduceOnPlateau
    from lightning_dlrm.engine.strategy import EmbeddingShardedDDP
    from lightning_dlrm.models.autoint import AutoInt
    from lightning_dlrm.models.baselines import (
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
    from lightning_dlrm.models.network import CTRNetwork
    from lightning_dlrm.objectives.losses import FocalLoss, LogLoss, ProbabilityLogLoss, WeightedLogLoss
    from lightning_dlrm.objectives.regularization import Regularization
    from lightning_dlrm.optim.rules import SGD, Adagrad, Adam, RowWiseAdagrad
    from lightning_dlrm.tables.embeddings import Embeddings, TableSettings
    from lightning_dlrm.testing import check_network

_MODULES = {
    "datamodules.clicks": ("Clicks",),
    "datamodules.criteo": ("Criteo", "CriteoKaggle", "CriteoTerabyte"),
    "datamodules.generate.demo": ("DemoSettings",),
    "datamodules.synthetic": ("RandomData", "TraceData"),
    "lightning_dlrm.contracts.batch": ("Batch", "SparseIds"),
    "lightning_dlrm.contracts.errors": ("UserError",),
    "lightning_dlrm.contracts.schema": ("DatasetSchema", "Features"),
    "lightning_dlrm.engine.averaging": ("Averaging",),
    "lightning_dlrm.engine.checkpointing": ("FolderCheckpointIO",),
    "lightning_dlrm.engine.module": ("CTRModule",),
    "lightning_dlrm.engine.plateau": ("ReduceOnPlateau",),
    "lightning_dlrm.engine.strategy": ("EmbeddingShardedDDP",),
    "lightning_dlrm.models.autoint": ("AutoInt",),
    "lightning_dlrm.models.baselines": (
        "DeepFM",
        "FactorizationMachine",
        "LogisticRegression",
        "MatrixFactorization",
        "WideAndDeep",
        "XDeepFM",
    ),
    "lightning_dlrm.models.dcn": ("DCN",),
    "lightning_dlrm.models.dlrm": ("DLRM",),
    "lightning_dlrm.models.finalmlp": ("FinalMLP",),
    "lightning_dlrm.models.masknet": ("MaskNet",),
    "lightning_dlrm.models.network": ("CTRNetwork",),
    "lightning_dlrm.objectives.losses": ("FocalLoss", "LogLoss", "ProbabilityLogLoss", "WeightedLogLoss"),
    "lightning_dlrm.objectives.regularization": ("Regularization",),
    "lightning_dlrm.optim.rules": ("SGD", "Adagrad", "Adam", "RowWiseAdagrad"),
    "lightning_dlrm.tables.embeddings": ("Embeddings", "TableSettings"),
    "lightning_dlrm.testing": ("check_network",),
}
"""Module -> the public names that it defines; the imports above are the same for type checkers."""
_HOME = {name: module for module, names in _MODULES.items() for name in names}

__all__ = [
    "DCN",
    "DLRM",
    "SGD",
    "Adagrad",
    "Adam",
    "AutoInt",
    "Averaging",
    "Batch",
    "CTRModule",
    "CTRNetwork",
    "Clicks",
    "Criteo",
    "CriteoKaggle",
    "CriteoTerabyte",
    "DatasetSchema",
    "DeepFM",
    "DemoSettings",
    "EmbeddingShardedDDP",
    "Embeddings",
    "FactorizationMachine",
    "Features",
    "FinalMLP",
    "FocalLoss",
    "FolderCheckpointIO",
    "LogLoss",
    "LogisticRegression",
    "MaskNet",
    "MatrixFactorization",
    "ProbabilityLogLoss",
    "RandomData",
    "ReduceOnPlateau",
    "Regularization",
    "RowWiseAdagrad",
    "SparseIds",
    "TableSettings",
    "TraceData",
    "UserError",
    "WeightedLogLoss",
    "WideAndDeep",
    "XDeepFM",
    "check_network",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOME[name]), name)
    # Later uses find it without this function.
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
