"""Parameters of DLRM by their names in facebookresearch/dlrm, to read its files and to compare results."""

from torch import Tensor

from lightning_dlrm.models.dlrm import DLRM

SUFFIXES = {"": "weight", "quotient": "weight_q", "remainder": "weight_r"}


def reference_state_dict(network: DLRM) -> dict[str, Tensor]:
    """Return our parameters by their names in the ``state_dict`` of facebookresearch/dlrm; tables are views.

    Fixed pooling weights are included; the ``state_dict`` of facebookresearch/dlrm has learned pooling weights only.
    """
    embeddings = network.embeddings
    mixed = embeddings.settings.project
    names: dict[str, Tensor] = {}
    for group in embeddings.groups:
        for member, piece in zip(group.members, group.lookup.pieces, strict=True):
            name = SUFFIXES[member.table.name.removeprefix(embeddings.names[member.column]).removeprefix("/")]
            part = "embs." if mixed and name == "weight" else ""
            names[f"emb_l.{member.column}.{part}{name}"] = piece.of(group.lookup.weight)
    for column, projection in enumerate(embeddings.projections):
        for weight in projection.parameters():
            names[f"emb_l.{column}.proj.weight"] = weight
    if embeddings.pooling_weights is not None:
        for column, piece in enumerate(embeddings.pooling_weights.pieces):
            names[f"v_W_l.{column}"] = piece.of(embeddings.pooling_weights.weight)[:, 0]
    for prefix, mlp in (("bot_l", network.bottom), ("top_l", network.top)):
        for i, linear in enumerate(mlp.linears()):
            names |= {f"{prefix}.{2 * i}.weight": linear.weight, f"{prefix}.{2 * i}.bias": linear.bias}
    return names
