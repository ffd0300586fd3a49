"""MaskNet: instance-guided masks over the fields' vectors (Wang et al. 2021, arXiv:2102.07619).

Shape suffixes: B samples, V fields, D width, n = V * D, m width of a block's input, k width of its output.
"""

from collections.abc import Mapping, Sequence
from typing import ClassVar, Literal, cast

import torch
from torch import Tensor, nn

from lightning_dlrm.contracts.errors import require
from lightning_dlrm.contracts.schema import Features
from lightning_dlrm.models.fields import FieldVectors
from lightning_dlrm.models.layers import MLP, initialize
from lightning_dlrm.models.network import CTRNetwork, Missing
from lightning_dlrm.tables.embeddings import TableSettings


class MaskBlock(nn.Module):
    """relu(LayerNorm(W (mask * v))), with a mask that two layers make of all fields' vectors (equations 4, 6 and 8).

    Args:
        guide: n, the width of the fields' vectors together.
        width: m.
        outputs: k.
        reduction: width of the mask's hidden layer, as a multiple of m.
    """

    def __init__(self, guide: int, width: int, outputs: int, reduction: float) -> None:
        super().__init__()
        self.mask = MLP([guide, int(width * reduction), width], linear_output=True)
        self.hidden = nn.Linear(width, outputs, bias=False)
        self.norm = nn.LayerNorm(outputs)

    def forward(self, guide_Bn: Tensor, v_Bm: Tensor) -> Tensor:
        """Return the block's output: [B, n], [B, m] -> [B, k]."""
        return torch.relu(self.norm(self.hidden(self.mask(guide_Bn) * v_Bm)))

    def multiply_adds(self) -> int:
        """Return the multiply-adds of a sample: the layers, and the mask times its input."""
        return self.mask.multiply_adds() + self.hidden.weight.numel() + self.hidden.in_features


class MaskNet(CTRNetwork):
    """Mask blocks on top of each other, or side by side under an MLP (sections 3.4.1 and 3.4.2).

    Args:
        features: dense inputs and tables, from the dataset's schema.
        seed: seed of the initial parameters.
        embedding_dim: D, the width of every vector.
        structure: serial (each block takes the output of the one before) or parallel (each takes all fields' vectors).
        blocks: width of each block's output.
        reduction: width of each mask's hidden layer, as a multiple of the mask's width.
        deep: widths of the MLP over the blocks' outputs; for parallel only.
        field_norm: normalize each field's vector, by a LayerNorm of its own, before the first blocks.
        batch_norm: normalize over the batch in the MLP, between each hidden layer and its ReLU.
        dropout: share of the MLP's hidden outputs that training sets to 0.
        tables: settings of the tables, such as pooling.
        missing: replacement of missing dense values: zero, or learned (a number for each feature).
    """

    HIDDEN_WIDTHS: ClassVar[Mapping[str, slice]] = {"blocks": slice(None), "deep": slice(None)}

    def __init__(
        self,
        features: Features,
        seed: int = 0,
        *,
        embedding_dim: int = 16,
        structure: Literal["serial", "parallel"] = "serial",
        blocks: Sequence[int] = (256, 256),
        reduction: float = 1.0,
        deep: Sequence[int] = (),
        field_norm: bool = True,
        batch_norm: bool = False,
        dropout: float = 0.0,
        tables: TableSettings | None = None,
        missing: Missing = "zero",
    ) -> None:
        super().__init__(features.dense, missing)
        require(structure in ("serial", "parallel"), f"structure {structure!r} is not one of serial, parallel")
        require(blocks and min(blocks) >= 1, f"blocks is {list(blocks)}; expected at least one width, each 1 or more")
        require(structure == "parallel" or not deep, f"deep is {list(deep)}, which needs structure: parallel")
        self.fields = FieldVectors(features, embedding_dim, seed, tables, "MaskNet", dense_first=True)
        fields, guide = self.fields.fields, self.fields.fields * embedding_dim
        norms = nn.ModuleList(nn.LayerNorm(embedding_dim) for _ in range(fields if field_norm else 0))
        self.field_norms = cast(Sequence[nn.LayerNorm], norms)
        self.is_serial = structure == "serial"
        inputs = [guide, *blocks] if self.is_serial else [guide] * len(blocks)
        layers = nn.ModuleList(MaskBlock(guide, a, b, reduction) for a, b in zip(inputs, blocks, strict=False))
        self.blocks = cast(Sequence[MaskBlock], layers)
        joined = blocks[-1] if self.is_serial else sum(blocks)
        self.logit = MLP([joined, *deep, 1], linear_output=True, batch_norm=batch_norm, dropout=dropout)
        initialize(self, seed)

    def score(self, dense_BI: Tensor, vectors: dict[str, Tensor]) -> Tensor:
        """See CTRNetwork.score."""
        vectors_BVD = self.fields(self.missing(dense_BI), vectors["fields"])
        guide_Bn = v_Bn = vectors_BVD.flatten(1)
        if self.field_norms:
            normed = [norm(x_BD) for norm, x_BD in zip(self.field_norms, vectors_BVD.unbind(1), strict=True)]
            v_Bn = torch.cat(normed, dim=1)
        if self.is_serial:
            for block in self.blocks:
                v_Bn = block(guide_Bn, v_Bn)
        else:
            v_Bn = torch.cat([block(guide_Bn, v_Bn) for block in self.blocks], dim=1)
        return self.logit(v_Bn).squeeze(1)

    def multiply_adds(self) -> int:
        """See CTRNetwork.multiply_adds."""
        of_blocks = sum(block.multiply_adds() for block in self.blocks)
        return self.fields.multiply_adds() + of_blocks + self.logit.multiply_adds()
