"""facebookresearch/dlrm as a contender: its network, and its whole program, each in another process."""

import argparse
import json
import textwrap
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from lightning_dlrm.bench.contenders import LEARNING_RATE, PlainBatch, Workload
from lightning_dlrm.bench.processes import Worker
from lightning_dlrm.contracts.batch import Batch
from lightning_dlrm.contracts.errors import UserError

_LOAD = """
    import importlib, sys

    sys.path.insert(0, sys.argv[1])
    try:
        import numpy

        if int(numpy.__version__.split(".")[0]) >= 2:
            raise ImportError(f"NumPy {numpy.__version__} found, which it fails on")
        peer = importlib.import_module(sys.argv[2])
    except ImportError as error:
        sys.exit(
            f"{error}; name an interpreter with numpy<2, torch, scikit-learn and tensorboard with --peer-python"
        )
"""

_START = """
    import json, os

    import torch
    from lightning_dlrm.bench.gate import Gate

    settings = json.loads(sys.argv[3])
    cuda = settings["device"] == "cuda"
    gate = Gate(torch.cuda.synchronize if cuda else lambda: None)
"""

_STEP = """
    network = peer.DLRM_Net(
        settings["width"], *(numpy.array(settings[name]) for name in ("tables", "bottom", "top")),
        arch_interaction_op="dot", sigmoid_top=len(settings["top"]) - 2, loss_function="bce",
        ndevices=1 if cuda else -1,
    ).to(settings["device"])
    optimizer = torch.optim.SGD(network.parameters(), lr=settings["learning_rate"])
    batches = torch.load("batches.pt", map_location=settings["device"])
    more = True
    while more:
        for dense, starts, ids, label in batches:
            loss = network.loss_fn(network(dense, starts, ids), label)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            more = gate.passed()
            if not more:
                break
"""

# The program's own loop, unchanged: the gate is in the optimizer's step, which ends an iteration, and the time of the
# loader is measured separately.
_FIT = """
    import time
    from torch.utils.data import dataloader

    step, fetch = torch.optim.SGD.step, dataloader._SingleProcessDataLoaderIter.__next__

    def gated_step(self, *args, **kwargs):
        result = step(self, *args, **kwargs)
        if not gate.passed():
            os._exit(0)
        return result

    def timed_fetch(self):
        start = time.perf_counter()
        try:
            return fetch(self)
        finally:
            gate.waited += time.perf_counter() - start

    torch.optim.SGD.step = gated_step
    dataloader._SingleProcessDataLoaderIter.__next__ = timed_fetch
    sys.argv = ["dlrm_s_pytorch.py", *settings["arguments"]]
    peer.run()
"""


def step_worker(args: argparse.Namespace, workload: Workload, batches: Sequence[Batch], folder: Path) -> Worker:
    """Start a worker that trains the peer's network on batches in memory, repeatedly, with its loss and plain SGD.

    Args:
        folder: empty folder for the batches.

    Raises:
        UserError: the program fails.
    """
    plain = map(PlainBatch.of, batches)
    torch.save([(b.dense, *_stacked(b), b.label[:, None]) for b in plain], folder / "batches.pt")
    settings = {
        "device": args.device,
        "width": workload.width,
        "tables": workload.tables,
        "bottom": (workload.dense, *workload.bottom),
        "top": (workload.joined, *workload.top, 1),
        "learning_rate": LEARNING_RATE,
    }
    return _worker(args, _STEP, settings, folder)


def fit_worker(args: argparse.Namespace, workload: Workload, batches: Sequence[Batch], folder: Path) -> Worker:
    """Start a worker that runs the peer's whole program, with the options of its ``bench/dlrm_s_criteo_kaggle.sh``.

    Args:
        workload: workload of Kaggle's shape: 13 dense features, 26 tables of one id each.
        batches: rows to train on repeatedly, in batches of any size.
        folder: empty folder for the rows in the peer's format.

    Raises:
        UserError: the program fails, or cannot read such data.
    """
    if (workload.dense, len(workload.tables)) != (13, 26) or any(batch.ids.offsets is not None for batch in batches):
        raise UserError(
            f"the peer's loader reads 13 dense features and 26 tables of one id each; the data have {workload.dense} "
            f"and {len(workload.tables)}: leave --peer out, or use other data"
        )
    label = np.concatenate([batch.label.numpy() for batch in batches if batch.label is not None])
    dense = np.concatenate([batch.dense.numpy() for batch in batches])
    np.savez(
        folder / "processed.npz",
        X_int=np.expm1(np.nan_to_num(dense)).clip(0, 2**30).astype(np.int32),
        X_cat=np.concatenate([batch.ids.values.numpy() for batch in batches]),
        y=label.astype(np.int32),
        counts=np.array(workload.tables),
    )
    # Rows of each day; the program trains on all days but the last.
    np.savez(folder / "train_day_count.npz", total_per_file=np.array([len(label) - 2, 0, 0, 0, 0, 0, 2]))
    arguments = {
        "arch-sparse-feature-size": workload.width,
        "arch-mlp-bot": "-".join(map(str, (workload.dense, *workload.bottom))),
        "arch-mlp-top": "-".join(map(str, (*workload.top, 1))),
        "data-generation": "dataset",
        "data-set": "kaggle",
        "raw-data-file": folder / "train.txt",
        "processed-data-file": folder / "processed.npz",
        "loss-function": "bce",
        "round-targets": True,
        "learning-rate": LEARNING_RATE,
        "mini-batch-size": args.batch_size,
        "print-freq": 1024,
        "nepochs": 1_000_000,
    }
    words = [f"--{name}={value}" for name, value in arguments.items()] + ["--print-time"]
    if args.device == "cuda":
        words.append("--use-gpu")
    return _worker(args, _FIT, {"device": args.device, "arguments": words}, folder)


def peer_name(args: argparse.Namespace) -> str:
    """Return the name of the peer for errors: its checkout and its interpreter."""
    return f"the peer {args.peer} (run by {args.peer_python})"


def peer_command(args: argparse.Namespace, module: str, program: str, *arguments: str) -> list[str]:
    """Return a command that imports a module of the peer as ``peer``, and runs a program.

    If the interpreter lacks a package, the program ends with the reason and what to do.

    Args:
        args: options with the peer's folder and its interpreter.
        module: module of the peer's checkout.
        program: text of the program, whose ``sys.argv[3:]`` are ``arguments``.
        arguments: arguments of the program.
    """
    text = textwrap.dedent(_LOAD) + textwrap.dedent(program)
    python = Path(args.peer_python)
    # Workers run in another folder. A name without a folder is searched on the PATH.
    typed = args.peer_python if python.name == args.peer_python else str(python.absolute())
    return [typed, "-c", text, str(args.peer.absolute()), module, *arguments]


def _worker(args: argparse.Namespace, program: str, settings: dict[str, object], folder: Path) -> Worker:
    command = peer_command(args, "dlrm_s_pytorch", _START + program, json.dumps(settings))
    return Worker(peer_name(args), command, folder)


def _stacked(batch: PlainBatch) -> tuple[object, object]:
    """Return offsets and ids of all tables: one tensor each if all tables have as many ids, as in the peer's loader."""
    starts, ids = [starts for _, starts in batch.ids], [ids for ids, _ in batch.ids]
    if len({len(values) for values in ids}) > 1:
        return starts, ids
    return torch.stack(starts), torch.stack(ids)
