"""Contract: our numbers are the numbers of the published code.

Every ``*.npz`` beside this file, and in the folders that PARITY_DIR names, is one case: a small training run of
facebookresearch/dlrm (``dlrm_*``), or one layer's forward and backward pass (``cross_*``, ``factorization_machine*``).
A new case needs no code here. ``test_fuxictr.py`` has FuxiCTR's.
"""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from lightning_dlrm.contracts.batch import SparseIds
from lightning_dlrm.contracts.schema import Features
from lightning_dlrm.models.dcn import CrossNetwork, LowRankCross, MatrixCross, MixtureCross, VectorCross
from lightning_dlrm.models.dlrm import DLRM, reference_state_dict
from lightning_dlrm.models.layers import PairwiseSum
from lightning_dlrm.objectives.losses import LogLoss, Loss, WeightedLogLoss
from lightning_dlrm.optim.rules import SGD, Adagrad, RowWiseAdagrad
from lightning_dlrm.optim.schedules import Constant, WarmupQuadraticDecay
from lightning_dlrm.tables.embeddings import MixedDimensions, QuotientRemainder, TableSettings
from tests.parity.folders import FOLDERS, cases
from tests.toy import optimizer_of

CASES = cases("*.npz")

# The reference code's "rwsadagrad" treats the dense layers with ordinary Adagrad.
RULES = {
    "sgd": (SGD, SGD),
    "adagrad": (Adagrad, Adagrad),
    "rwsadagrad": (Adagrad, RowWiseAdagrad),
}


def test_the_folder_holds_cases() -> None:
    assert CASES, f"no *.npz in {FOLDERS}"


def load(path: Path) -> tuple[dict, dict[str, Tensor]]:
    with np.load(path, allow_pickle=False) as archive:
        text = str(archive["meta"]) if "meta" in archive.files else "{}"
        meta = json.loads(text) if text.startswith("{") else {"text": text}
        return meta, {name: torch.from_numpy(archive[name]) for name in archive.files if name != "meta"}


def build(meta: dict, arrays: dict[str, Tensor], folder: Path) -> DLRM:
    """The network of a case. Widths of single tables are those of its arrays."""
    tables = {f"C{t + 1}": rows for t, rows in enumerate(meta["tables"])}
    width = meta["bottom_mlp"][-1]
    dims = {}
    for t, name in enumerate(tables):
        found = next(
            (arrays[key] for key in (f"init/emb_l.{t}.weight", f"init/emb_l.{t}.embs.weight") if key in arrays), None
        )
        if found is not None and found.shape[1] != width:
            dims[name] = found.shape[1]
    trick = meta["qr"] and QuotientRemainder(
        operation=meta["qr"]["qr_operation"],
        collisions=meta["qr"]["qr_collisions"],
        threshold=meta["qr"]["qr_threshold"],
    )
    pooling_weights = meta["weighted_pooling"]
    if pooling_weights == "fixed":
        ones = {name: torch.ones(rows) for name, rows in tables.items()}
        given = {name: arrays.get(f"init/v_W_l.{t}", ones[name]) for t, name in enumerate(tables)}
        pooling_weights = str(folder / "factors.pt")
        torch.save(given, pooling_weights)
    return DLRM(
        Features(dense=meta["bottom_mlp"][0], tables=tables),
        embedding_dim=width,
        bottom_mlp=meta["bottom_mlp"][1:],
        top_mlp=meta["top_mlp"][1:-1],
        interaction=meta["interaction"],
        self_interaction=meta["interaction_itself"],
        tables=TableSettings(
            dims=dims, project=bool(meta["md"]), quotient_remainder=trick, pooling_weights=pooling_weights
        ),
    )


def loss_of(meta: dict) -> Loss:
    clamp = meta["loss_threshold"] or 0.0
    if meta["loss"] == "wbce":
        return WeightedLogLoss(click=3.0, no_click=1.0, clamp=clamp)
    assert meta["loss"] == "bce"
    return LogLoss(clamp=clamp)


def read_ids(arrays: dict[str, Tensor], step: int, tables: int) -> SparseIds:
    """Index lists table by table -> bags sample by sample."""
    lengths_TB = arrays["lengths"][step]
    per_table = [
        torch.split(arrays[f"indices/{step}/{t}"].to(torch.int32), lengths_TB[t].tolist()) for t in range(tables)
    ]
    bags = [per_table[t][b] for b in range(lengths_TB.shape[1]) for t in range(tables)]
    lengths = torch.tensor([0, *(len(bag) for bag in bags)])
    if set(lengths[1:].tolist()) == {1}:
        return SparseIds(values=torch.cat(bags).view(-1, tables), tables=tables)
    return SparseIds(values=torch.cat(bags), tables=tables, offsets=torch.cumsum(lengths, 0))


def test_mixed_dimensions_are_by_the_published_rule() -> None:
    mixed = [meta for meta, _ in map(load, CASES) if meta.get("md")]
    assert mixed
    for meta in mixed:
        rule = MixedDimensions(temperature=meta["md"]["temperature"], powers_of_two=meta["md"]["round"])
        tables = {f"C{t}": rows for t, rows in enumerate(meta["tables"])}
        assert list(rule.widths(tables, meta["embedding_dim"]).values()) == meta["table_dims"]


@pytest.mark.parametrize("path", [p for p in CASES if p.stem.startswith("dlrm")], ids=lambda p: p.stem)
def test_dlrm_training_run(path: Path, tmp_path: Path) -> None:
    meta, arrays = load(path)
    network = build(meta, arrays, tmp_path)
    ours = reference_state_dict(network)
    theirs = {name.removeprefix("init/") for name in arrays if name.startswith("init/")}
    if meta["weighted_pooling"] == "fixed":
        # The published state has no fixed factors.
        ours = {name: weight for name, weight in ours.items() if name in theirs}
    assert set(ours) == theirs
    with torch.no_grad():
        for name, weight in ours.items():
            weight.copy_(arrays[f"init/{name}"])

    dense_rule, table_rule = RULES[meta["optimizer"]]
    optimizer = optimizer_of(network, dense_rule(meta["lr"]), table_rule(meta["lr"]))
    loss_function, clamp = loss_of(meta), meta["loss_threshold"] or 0.0
    schedule = WarmupQuadraticDecay(optimizer, *meta["lr_policy"]) if meta["lr_policy"] else Constant(optimizer)
    losses, rates = [], []
    for step in range(meta["steps"]):
        optimizer.zero_grad()
        labels = arrays["labels"][step]
        logits = network(arrays["dense"][step], read_ids(arrays, step, len(meta["tables"])))
        if step == 0:
            # Published probabilities are clamped before the loss, ours within it.
            ours_B, theirs_B = (
                p.flatten().clamp(clamp, 1 - clamp) for p in (logits.sigmoid(), arrays["first_probability"])
            )
            torch.testing.assert_close(ours_B, theirs_B, rtol=0, atol=1e-6)
        loss = loss_function.summed(logits, labels.flatten()) / labels.numel()
        loss.backward()
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
        losses.append(loss.item())

    np.testing.assert_allclose(rates, arrays["lrs"].numpy(), rtol=1e-6)
    np.testing.assert_allclose(losses, arrays["losses"].numpy(), rtol=1e-5)
    for name, weight in ours.items():
        torch.testing.assert_close(
            weight, arrays[f"final/{name}"], rtol=0, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.mark.parametrize("path", [p for p in CASES if p.stem.startswith("factorization_machine")], ids=lambda p: p.stem)
def test_factorization_machine(path: Path) -> None:
    _, arrays = load(path)
    compare("y", PairwiseSum()(arrays["x"])[:, None], arrays["y"])


@pytest.mark.parametrize("path", [p for p in CASES if p.stem.startswith("cross")], ids=lambda p: p.stem)
def test_cross_network(path: Path) -> None:
    meta, arrays = load(path)
    layer, theirs = cross_layer(meta, arrays)
    with torch.no_grad():
        for name, parts in theirs.items():
            layer.get_parameter(name).copy_(stacked(arrays, "param", parts))
    x = arrays["x"].clone().requires_grad_()
    y = layer(x)
    y.square().sum().backward()
    compare("y", y, arrays["y"])
    compare("grad/x", x.grad, arrays["grad/x"])
    for name, parts in theirs.items():
        compare(name, layer.get_parameter(name).grad, stacked(arrays, "grad", parts))


def cross_layer(meta: dict, arrays: dict[str, Tensor]) -> tuple[CrossNetwork, dict[str, list[str]]]:
    """Our network, and for each of its parameters the names that make it up in the published code."""
    features, layers = meta["features"], meta["layers"]

    def each(name: str, count: int = layers, suffix: str = "") -> list[str]:
        return [f"{name}.{i}{suffix}" for i in range(count)]

    if "param/kernels" in arrays:
        kind = VectorCross if arrays["param/kernels"].shape[-1] == 1 else MatrixCross
        return kind(features, layers), {"weight": ["kernels"], "bias": ["bias"]}
    if "experts" in meta:
        network: CrossNetwork = MixtureCross(features, layers, meta["rank"], meta["experts"])
        # The published gates belong to the experts and serve all layers.
        gates = each("gates", meta["experts"], ".weight")
        return network, {
            "up": each("U_kernels"),
            "core": each("C_kernels"),
            "down": each("V_kernels"),
            "bias": each("bias"),
            "gates": gates,
        }
    return LowRankCross(features, layers, meta["rank"]), {
        "up": each("W_kernels"),
        "down": each("V_kernels"),
        "bias": each("bias"),
    }


def stacked(arrays: dict[str, Tensor], kind: str, parts: list[str]) -> Tensor:
    """The parts of one parameter in our shape: a layer (or gate) each, columns of one element dropped."""
    tensors = [arrays[f"{kind}/{part}"] for part in parts]
    tensor = tensors[0] if len(tensors) == 1 else torch.stack(tensors)
    if parts[0].startswith("gates"):
        return tensor.squeeze(1)
    return tensor.squeeze(-1) if tensor.shape[-1] == 1 else tensor


def compare(name: str, value: Tensor | None, expected: Tensor) -> None:
    scale = expected.abs().max().item()
    torch.testing.assert_close(value, expected, rtol=1e-5, atol=1e-5 * scale, msg=lambda m: f"{name}: {m}")
