"""State that a module adds to Lightning's checkpoint and loads from it: tables by pieces, random generators."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from lightning_dlrm.contracts.errors import UserError, require
from lightning_dlrm.contracts.schema import DatasetSchema
from lightning_dlrm.engine.averaging import KEY as AVERAGES
from lightning_dlrm.engine.averaging import average_rows, averaged_dense
from lightning_dlrm.engine.fit_length import planned_steps, refuse_longer_fit
from lightning_dlrm.optim.optimizer import CTROptimizer
from lightning_dlrm.optim.schedules import needs_total_steps
from lightning_dlrm.sharding.checkpoint import CHECKED_REST, CheckpointReader, PieceTensors
from lightning_dlrm.sharding.collectives import Ranks
from lightning_dlrm.sharding.finite import is_finite, nonfinite_tensors
from lightning_dlrm.tables.lookup import EmbeddingTables

if TYPE_CHECKING:
    from lightning_dlrm.engine.module import CTRModule


def add_state(module: "CTRModule", checkpoint: dict[str, Any]) -> None:
    """Replace the tables and their optimizer state in Lightning's dictionary by pieces that are written separately.

    Args:
        module: the module under training.
        checkpoint: Lightning's dictionary; modified in place.

    Raises:
        UserError: on all ranks, if a loss, a parameter or an element of the optimizer state of a rank is not finite,
            so that no checkpoint replaces the last good one.
    """
    optimizer = optimizer_of(module) if checkpoint.get("optimizer_states") else None
    module.guard.check_state(module.network, optimizer, checkpoint["global_step"])
    for key in _table_keys(module):
        del checkpoint["state_dict"][key]
    if (averages := module.averages) is not None:
        checkpoint[AVERAGES] = averages.state(checkpoint["global_step"])
    checkpoint["tables"] = table_pieces(module, with_state=bool(checkpoint.get("optimizer_states")))
    checkpoint["header"] = {
        "model": type(module.network).__name__,
        "encoding_fingerprint": module.schema.encoding_fingerprint,
        "data_fingerprint": module.data_schema().data_fingerprint,
        "step": checkpoint["global_step"],
        "epoch": checkpoint["epoch"],
        "dense_parameters": sum(parameter.numel() for parameter in module.network.dense_parameters()),
    }
    checkpoint["random_state"] = random_states(module.device)


def table_pieces(module: "CTRModule", with_state: bool = True) -> list[PieceTensors]:
    """Return this rank's pieces of the tables, their optimizer state and averages, as views of the live tensors."""
    slots: dict[EmbeddingTables, dict[str, Tensor]] = {}
    if with_state:
        optimizer = optimizer_of(module)
        slots = dict(zip(optimizer.lookups, optimizer.table_state, strict=True))
    averages = {} if module.averages is None else module.averages.slots()

    def tensors_of(lookup: EmbeddingTables) -> dict[str, Tensor]:
        return {"weight": lookup.weight, **slots.get(lookup, {}), **averages.get(lookup, {})}

    return [
        PieceTensors(piece, {name: piece.of(tensor) for name, tensor in tensors_of(lookup).items()})
        for lookup in module.network.lookups()
        for piece in lookup.pieces
    ]


def dense_tensors(module: "CTRModule") -> list[Tensor]:
    """Return the dense parameters, their optimizer state, and that of tables with ``dense_gradients``."""
    kept = (values for state in optimizer_of(module).state.values() for values in state.values())
    return [*module.network.dense_parameters(), *(values for values in kept if torch.is_tensor(values))]


def take_state(module: "CTRModule", checkpoint: dict[str, Any], training: bool) -> None:
    """Check that a checkpoint fits this model and data, and read its tables in place.

    Args:
        module: the module to train or evaluate.
        checkpoint: Lightning's dictionary, as ``FolderCheckpointIO`` returns it; modified in place.
        training: whether a fit continues from it.

    Raises:
        UserError: the checkpoint is of another model or dataset encoding, or has NaN or infinite values, or a fit would
            continue on other data.
    """
    reader: CheckpointReader = checkpoint["tables"]
    require(
        not training or checkpoint.get("optimizer_states"),
        f"checkpoint {reader.folder} has no optimizer state, so a fit cannot continue from it; validate, test and "
        "predict can use it",
    )
    _check_header(module, reader, training)
    _check_parameters(module, reader, checkpoint["state_dict"])
    if not reader.allow_nonfinite:
        _refuse_nonfinite(module, reader, checkpoint, training)
    averages = checkpoint.get(AVERAGES)
    if training:
        if needs_total_steps(module.schedule):
            # Before the run folder is changed.
            for state in checkpoint["lr_schedulers"]:
                if "_schedule_phases" in state:
                    refuse_longer_fit(state["total_steps"], planned_steps(module.trainer, "OneCycleLR"))
        _keep_averages(module, averages, reader)
    elif module.averaging is not None:
        # Averages of an earlier fit do not belong to the parameters that are loaded.
        module.averaging.averages = None
    averaged = averages if not training else None
    if averaged is not None:
        names_here = {f"network.{name}": value for name, value in averaged["dense"].items()}
        checkpoint["state_dict"] = averaged_dense(averaged | {"dense": names_here}, checkpoint["state_dict"])
    with torch.no_grad():
        for lookup in module.network.lookups():
            for piece in lookup.pieces:
                rows = piece.of(lookup.weight)
                reader.read_rows(piece, "weight", rows)
                if averaged is not None:
                    average_rows(averaged, reader, piece, rows)
    # Lightning loads the state strictly. Loading a parameter from itself copies nothing.
    checkpoint["state_dict"] |= {key: lookup.weight for key, lookup in _table_keys(module).items()}
    for state in checkpoint.get("optimizer_states", []):
        state["read_table_rows"] = reader.read_rows
    if "random_state" in checkpoint:
        restore_random_states(checkpoint["random_state"], module.device)


def check_setup(module: "CTRModule") -> None:
    """Check the trainer and the data of a module before a fit or an evaluation.

    Raises:
        UserError: the trainer saves or opens checkpoints as single files, or its data have another encoding than those
            that the module was made for.
    """
    trainer = module.trainer
    uses_checkpoints = trainer.checkpoint_callbacks or trainer.ckpt_path is not None
    require(
        not uses_checkpoints or getattr(trainer.strategy.checkpoint_io, "HOLDS_TABLES", False),
        "this Trainer keeps checkpoints as single files, which do not hold tables: give it "
        "plugins=[lightning_dlrm.FolderCheckpointIO()], or enable_checkpointing=False",
    )
    _require_encoding(module.data_schema(), module.schema.encoding_fingerprint, "the module was made or trained")


def optimizer_of(module: "CTRModule") -> CTROptimizer:
    """Return the optimizer of a module under training."""
    optimizer = module.optimizers(use_pl_optimizer=False)
    assert isinstance(optimizer, CTROptimizer)
    return optimizer


def _check_parameters(module: "CTRModule", reader: CheckpointReader, state_dict: dict[str, Tensor]) -> None:
    """
    Raises:
        UserError: the checkpoint has other tables, or other dense parameters.
    """
    theirs = set(reader.manifest.tables)
    ours = {table.name for lookup in module.network.lookups() for table in lookup.tables}
    require(
        theirs == ours,
        f"checkpoint {reader.folder} has tables {_few(theirs)}, this run needs {_few(ours)}: "
        "it is of another model or dataset",
    )
    table_keys = _table_keys(module)
    dense = {k: tuple(v.shape) for k, v in module.state_dict().items() if k not in table_keys}
    saved = {k: tuple(v.shape) for k, v in state_dict.items()}
    if dense != saved:
        key = min(k for k in dense.keys() | saved.keys() if dense.get(k) != saved.get(k))
        raise UserError(
            f"checkpoint {reader.folder} is of another model: {key} is {saved.get(key, 'missing')} there "
            f"and {dense.get(key, 'missing')} here; use the configuration it was trained with"
        )


def _refuse_nonfinite(
    module: "CTRModule", reader: CheckpointReader, checkpoint: Mapping[str, Any], training: bool
) -> None:
    """
    Raises:
        UserError: dense tensors that are needed have NaN or infinite elements; rows of tables are checked when read.
    """
    # A custom network may have infinite constants, such as masks.
    ours = module.state_dict()
    saved = {
        **{key: checkpoint.get(key) for key in CHECKED_REST if training or key != "optimizer_states"},
        "state_dict": {key: value for key, value in checkpoint["state_dict"].items() if is_finite(ours[key])},
    }
    bad = [name for key in CHECKED_REST for name in nonfinite_tensors(saved.get(key), key)]
    if bad:
        raise reader.nonfinite(", ".join(bad))


def _keep_averages(module: "CTRModule", averages: dict[str, Any] | None, reader: CheckpointReader) -> None:
    """
    Raises:
        UserError: only one of the checkpoint and this run has averages.
    """
    if (averages is None) != (module.averaging is None):
        has, wants = ("no averages", "averages") if averages is None else ("averages", "no averages")
        raise UserError(
            f"checkpoint {reader.folder} has {has} of its parameters, but this run asks for "
            f"{wants} (model.averaging): resume with the configuration it was trained with, or start a new run"
        )
    if averages is not None and module.averaging is not None:
        module.averaging.saved = averages, reader


def _check_header(module: "CTRModule", reader: CheckpointReader, training: bool) -> None:
    header, network = reader.header, type(module.network).__name__
    require(
        header.get("model") == network,
        f"checkpoint {reader.folder} holds the model {header.get('model')}, but this run trains "
        f"{network}: use the configuration it was trained with",
    )
    check_encoding(module.schema, reader)
    data, stored = module.data_schema().data_fingerprint, str(header.get("data_fingerprint"))
    if training and stored != data:
        raise UserError(
            f"checkpoint {reader.folder} was trained on other rows (fingerprint {stored[:12]}, "
            f"the data here have {data[:12]}): resume on the same dataset"
        )


def check_encoding(schema: DatasetSchema, reader: CheckpointReader) -> None:
    """
    Raises:
        UserError: a checkpoint belongs to data with another encoding than that of a schema.
    """
    _require_encoding(schema, str(reader.header.get("encoding_fingerprint")), f"checkpoint {reader.folder} was trained")


def _require_encoding(schema: DatasetSchema, expected: str, what: str) -> None:
    found = schema.encoding_fingerprint
    require(
        found == expected,
        f"{what} on data with another encoding (fingerprint {expected[:12]}, the data here have {found[:12]}): give "
        "the dataset folder that it was trained on (data.path in its run's config.yaml), or rows that preprocess "
        "--vocabulary has encoded with that folder",
    )


def _table_keys(module: "CTRModule") -> dict[str, EmbeddingTables]:
    """Return key of each lookup's weight in the module's state -> the lookup."""
    modules = module.network.named_modules(prefix="network")
    return {f"{name}.weight": lookup for name, lookup in modules if isinstance(lookup, EmbeddingTables)}


def _few(items: set[str]) -> str:
    listed = sorted(items)
    return ", ".join(listed[:5]) + (f" and {len(listed) - 5} more" if len(listed) > 5 else "")


def random_states(device: torch.device) -> dict[str, Tensor]:
    """Return the states of all ranks' generators; all ranks call it together.

    Returns:
        ``cpu``, and ``cuda`` on a CUDA device: uint8 [ranks, bytes of a state].
    """
    states = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(device)
    ranks = Ranks()
    return {kind: torch.from_numpy(np.stack(ranks.all_gather(state.numpy()))) for kind, state in states.items()}


def restore_random_states(states: Mapping[str, Tensor], device: torch.device) -> None:
    """Restore the states that ``random_states`` returned; another device or more ranks draw other numbers."""
    rank = Ranks().rank
    for kind, of_ranks in states.items():
        # Older checkpoints have the state of one rank.
        of_ranks = torch.atleast_2d(of_ranks)
        state = of_ranks[rank % len(of_ranks)].clone()
        if kind == "cpu":
            torch.set_rng_state(state)
        elif device.type == "cuda":
            torch.cuda.set_rng_state(state, device)
