"""``trainer.sync_batchnorm``: batch normalization over the global batch, on CPUs as on GPUs."""

from pytorch_lightning.plugins import LayerSync
from torch import nn

from lightning_dlrm.contracts.errors import UserError
from lightning_dlrm.models.layers import BatchNorm
from lightning_dlrm.sharding.collectives import differentiable_sum


class SyncBatchNorm(LayerSync):
    """Plugin of Lightning that lets every ``layers.BatchNorm`` normalize over the slices of all ranks.

    Lightning's own plugin takes torch.nn.SyncBatchNorm, which works on GPUs only and not with an empty slice.
    """

    def apply(self, model: nn.Module) -> nn.Module:
        """
        Raises:
            UserError: the network has another layer that normalizes over a batch.
        """
        for name, layer in model.named_modules():
            if isinstance(layer, BatchNorm):
                layer.sum_over_ranks = differentiable_sum
            elif isinstance(layer, (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)):
                raise UserError(
                    f"trainer.sync_batchnorm: layer {name} is a {type(layer).__name__}; use "
                    "lightning_dlrm.models.layers.BatchNorm, or leave trainer.sync_batchnorm out"
                )
        return model

    def revert(self, model: nn.Module) -> nn.Module:
        for layer in model.modules():
            if isinstance(layer, BatchNorm):
                layer.sum_over_ranks = None
        return model
