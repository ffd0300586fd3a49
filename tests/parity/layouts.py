"""Where FuxiCTR's arrays are in our networks, fields apart: our name, maybe with an index, and the change of layout."""

import re
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from tests.parity.fuxictr import Case

Change = Callable[[Tensor], Tensor]
Rule = tuple[str, Change]


def same(tensor: Tensor) -> Tensor:
    return tensor


def mlp(case: "Case", name: str, prefixes: Mapping[str, str]) -> Rule | None:
    """An array of one of the MLPs, FuxiCTR's prefix -> ours; the first layers take all fields' vectors."""
    for theirs, ours in prefixes.items():
        if match := re.fullmatch(rf"{theirs}\.(?:mlp\.)?(\d+\.\w+)", name):
            of_input = match[1] == "0.weight"
            return f"{ours}.{match[1]}", (lambda t: t[:, case.features]) if of_input else same
    return None


def first_columns(case: "Case") -> Change:
    """The first columns are features of all fields."""
    rest = len(case.features)
    return lambda t: torch.cat([t[:, case.features], t[:, rest:]], 1) if t.dim() == 2 else t


def dlrm(case: "Case", name: str) -> Rule:
    ours = name.replace("bottom_mlp.mlp", "bottom").replace("top_mlp.mlp", "top")
    return ours, (lambda t: t[:, top_inputs(case)]) if ours == "top.0.weight" else same


def top_inputs(case: "Case") -> Tensor:
    """The places of our top MLP's inputs among FuxiCTR's."""
    tables, has_bottom, dim = len(case.columns), bool(case.dense), case.dim
    # Our bottom vector comes first, FuxiCTR's last.
    vectors = [tables] * has_bottom + list(range(tables))
    if case.params["interaction_op"] == "cat":
        return (torch.tensor(vectors)[:, None] * dim + torch.arange(dim)).flatten()
    pairs = [(i, j) for i in range(len(vectors)) for j in range(i + 1, len(vectors))]
    products = [pairs.index((min(a, b), max(a, b))) for i, a in enumerate(vectors) for b in vectors[:i]]
    return torch.tensor([len(pairs) + k for k in range(dim * has_bottom)] + products)


def dcn(case: "Case", name: str) -> Rule:
    d = case.features
    structure = case.params.get("model_structure", "parallel")
    over_crosses = "deep" if structure == "stacked" else "stacked_deep"
    # The crosses of the features are in the order of the features.
    if rule := mlp(case, name, {"dnn": "deep", "parallel_dnn": "deep", "stacked_dnn": over_crosses}):
        return rule
    if match := re.fullmatch(r"fc\.(\w+)", name):
        takes_crosses = structure in ("parallel", "crossnet_only")
        return f"logit.0.{match[1]}", first_columns(case) if takes_crosses else same
    layer = int(re.findall(r"\d+", name)[0])
    if name.startswith("crossnet.cross_net."):
        return f"cross.{name.split('.')[3]}[{layer}]", lambda t: t.squeeze(0)[d]
    if name.startswith("crossnet.cross_layers."):
        return f"cross.{name.split('.')[3]}[{layer}]", lambda t: t[d][:, d] if t.dim() == 2 else t[d]
    if name.startswith("crossnet.gating"):
        return f"cross.gates[{layer}]", lambda t: t.squeeze(0)[d]
    rules: dict[str, Rule] = {
        "U_list": (f"cross.up[{layer}]", lambda t: t[:, d]),
        "V_list": (f"cross.down[{layer}]", lambda t: t[:, d].transpose(1, 2)),
        "C_list": (f"cross.core[{layer}]", same),
        "bias": (f"cross.bias[{layer}]", lambda t: t.squeeze(1)[d]),
    }
    return rules[name.split(".")[1]]


def deepfm(case: "Case", name: str) -> Rule:
    if name == "fm.lr_layer.bias":
        return "linear.bias", lambda t: t.squeeze()
    return widedeep(case, name)


def widedeep(case: "Case", name: str) -> Rule:
    rule = mlp(case, name, {"dnn": "deep", "mlp": "deep"})
    assert rule is not None, name
    return rule


def xdeepfm(case: "Case", name: str) -> Rule:
    if rule := mlp(case, name, {"dnn": "deep"}):
        return rule
    if name.startswith("cin.fc"):
        return name.replace("cin.fc", "cin_output.0"), same
    match = re.fullmatch(r"cin\.cin_layer\.layer_(\d+)\.(\w+)", name)
    assert match is not None, name
    k, fields = int(match[1]), case.fields

    def change(weight: Tensor) -> Tensor:
        products = weight.view(len(weight), len(fields), -1)[:, fields]
        return (products[:, :, fields] if k == 1 else products).transpose(1, 2).flatten(1)

    return f"cin.layers.{k - 1}.{match[2]}", change if match[2] == "weight" else same


def autoint(case: "Case", name: str) -> Rule:
    if rule := mlp(case, name, {"dnn": "deep"}):
        return rule
    if match := re.fullmatch(r"self_attention\.(\d+)\.W_(\w+)\.weight", name):
        ours = {"q": "query", "k": "key", "v": "value", "res": "residual"}[match[2]]
        return f"attention.{match[1]}.{ours}.weight", same
    width = case.params["attention_dim"]
    fields = (case.fields[:, None] * width + torch.arange(width)).flatten()
    return name.replace("fc", "logit.0"), lambda t: t[:, fields] if t.dim() == 2 else t


def finalmlp(case: "Case", name: str) -> Rule:
    if rule := mlp(case, name, {"mlp1": "first", "mlp2": "second"}):
        return rule
    if match := re.fullmatch(r"fs_module\.fs(\d)_gate\.mlp\.(\d+)\.(\w+)", name):
        is_last = int(match[2]) == 2 * len(case.params["fs_hidden_units"])
        return f"gate{match[1]}.layers.{match[2]}.{match[3]}", (lambda t: t[case.features]) if is_last else same
    if match := re.fullmatch(r"fs_module\.fs(\d)_ctx_bias", name):
        return f"gate{match[1]}.vector", lambda t: t.squeeze(0)
    if name == "fusion_module.w_xy":
        heads, p, q = (case.params[key] for key in ("num_heads", "mlp1_hidden_units", "mlp2_hidden_units"))
        return "fusion.products", lambda t: t.view(heads, p[-1] // heads, q[-1] // heads)
    return name.replace("fusion_module.w_x", "fusion.first").replace("fusion_module.w_y", "fusion.second"), same


def masknet(case: "Case", name: str) -> Rule:
    d, is_serial = case.features, case.params["model_type"] == "SerialMaskNet"
    if match := re.fullmatch(r"emb_norm\.(\d+)\.(\w+)", name):
        return f"field_norms.{case.fields.tolist().index(int(match[1]))}.{match[2]}", same
    match = re.fullmatch(r"mask_net\.mask_blocks\.(\d+)\.(\w+)_layer\.(\d)\.(\w+)", name)
    if match is None:
        last = re.fullmatch(r"mask_net\.(?:fc|dnn)\.(?:mlp\.)?(\d+\.\w+)", name)
        assert last is not None, name
        return f"logit.{last[1]}", same
    block, part, layer, kind = match.groups()
    takes_fields = not is_serial or block == "0"
    if part == "hidden":
        ours = f"blocks.{block}.{'hidden' if layer == '0' else 'norm'}.{kind}"
        return ours, (lambda t: t[:, d]) if layer == "0" and takes_fields else same
    ours = f"blocks.{block}.mask.{layer}.{kind}"
    if layer == "0":
        return ours, (lambda t: t[:, d]) if kind == "weight" else same
    return ours, (lambda t: t[d]) if takes_fields else same


RULES: dict[str, Callable[["Case", str], Rule]] = {
    "DLRM": dlrm,
    "DCN": dcn,
    "DCNv2": dcn,
    "DeepFM": deepfm,
    "WideDeep": widedeep,
    "xDeepFM": xdeepfm,
    "AutoInt": autoint,
    "FinalMLP": finalmlp,
    "MaskNet": masknet,
}
