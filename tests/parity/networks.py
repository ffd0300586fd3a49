"""FuxiCTR's models in this project: the class, and its options."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from lightning_dlrm.models.autoint import AutoInt
from lightning_dlrm.models.baselines import DeepFM, WideAndDeep, XDeepFM
from lightning_dlrm.models.dcn import DCN
from lightning_dlrm.models.dlrm import DLRM
from lightning_dlrm.models.finalmlp import FinalMLP
from lightning_dlrm.models.masknet import MaskNet
from lightning_dlrm.models.network import CTRNetwork

if TYPE_CHECKING:
    from tests.parity.fuxictr import Case

Options = tuple[type[CTRNetwork], dict[str, Any]]


def dlrm(case: "Case") -> Options:
    params = case.params
    return DLRM, {
        "bottom_mlp": [*params["bottom_mlp_units"], case.dim] if case.dense else [],
        "top_mlp": params["top_mlp_units"],
        "interaction": params["interaction_op"],
        "batch_norm": params["batch_norm"],
    }


def dcn(case: "Case") -> Options:
    params = case.params
    return DCN, {
        "cross": "vector",
        "cross_layers": params["num_cross_layers"],
        "deep": params["dnn_hidden_units"],
        "batch_norm": params["batch_norm"],
        "embed_dense": True,
    }


def dcnv2(case: "Case") -> Options:
    params = case.params
    options: dict[str, Any] = {
        "cross": "matrix",
        "cross_layers": params["num_cross_layers"],
        "batch_norm": params["batch_norm"],
        "embed_dense": True,
    }
    if params["use_low_rank_mixture"]:
        options |= {
            "cross": "mixture",
            "cross_rank": params["low_rank"],
            "cross_experts": params["num_experts"],
            "cross_activation": "tanh",
        }
    stacked, parallel = params["stacked_dnn_hidden_units"], params["parallel_dnn_hidden_units"]
    structures: dict[str, dict[str, Any]] = {
        "crossnet_only": {"deep": []},
        "stacked": {"structure": "stacked", "deep": stacked},
        "parallel": {"deep": parallel},
        "stacked_parallel": {"structure": "stacked_parallel", "stacked_deep": stacked, "deep": parallel},
    }
    return DCN, options | structures[params["model_structure"]]


def deepfm(case: "Case") -> Options:
    return DeepFM, {"deep": case.params["hidden_units"], "batch_norm": case.params["batch_norm"]}


def widedeep(case: "Case") -> Options:
    options = {"deep": case.params["hidden_units"], "batch_norm": case.params["batch_norm"]}
    return WideAndDeep, options | {"embed_dense": True, "linear_bias": False}


def xdeepfm(case: "Case") -> Options:
    params = case.params
    return XDeepFM, {
        "deep": params["dnn_hidden_units"],
        "cin_layers": params["cin_hidden_units"],
        "batch_norm": params["batch_norm"],
        "linear_bias": False,
    }


def autoint(case: "Case") -> Options:
    params = case.params
    assert not params.get("layer_norm")
    return AutoInt, {
        "attention": [params["attention_dim"]] * params["attention_layers"],
        "heads": params["num_heads"],
        "scale": params["use_scale"],
        "residual": params["use_residual"],
        "deep": params["dnn_hidden_units"],
        "batch_norm": params["batch_norm"],
        "wide": params["use_wide"],
    }


def finalmlp(case: "Case") -> Options:
    params = case.params
    gates = {"gate": params["fs_hidden_units"], "context1": params["fs1_context"], "context2": params["fs2_context"]}
    return FinalMLP, {
        "first": params["mlp1_hidden_units"],
        "second": params["mlp2_hidden_units"],
        "heads": params["num_heads"],
        "batch_norm": [params["mlp1_batch_norm"], params["mlp2_batch_norm"]],
        **(gates if params["use_fs"] else {"gates": False}),
    }


def masknet(case: "Case") -> Options:
    params = case.params
    assert params["net_layernorm"]
    options: dict[str, Any] = {"blocks": params["dnn_hidden_units"]}
    if params["model_type"] == "ParallelMaskNet":
        options = {
            "structure": "parallel",
            "blocks": [params["parallel_block_dim"]] * params["parallel_num_blocks"],
            "deep": params["dnn_hidden_units"],
        }
    return MaskNet, options | {"reduction": params["reduction_ratio"], "field_norm": params["emb_layernorm"]}


MODELS: dict[str, Callable[["Case"], Options]] = {
    "DLRM": dlrm,
    "DCN": dcn,
    "DCNv2": dcnv2,
    "DeepFM": deepfm,
    "WideDeep": widedeep,
    "xDeepFM": xdeepfm,
    "AutoInt": autoint,
    "FinalMLP": finalmlp,
    "MaskNet": masknet,
}
