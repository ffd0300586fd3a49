"""Model and data of a configuration, for commands without a Trainer."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pytorch_lightning as pl
import yaml
from jsonargparse import Namespace

from lightning_dlrm.cli.log_levels import configure_logging
from lightning_dlrm.cli.parser import CommandParser, build_model_parser, fill_data_seed, parse
from lightning_dlrm.engine.module import CTRModule


@dataclass(frozen=True, kw_only=True)
class ModelAndData:
    """The model and the data of a configuration.

    Args:
        settings: all settings, as parsed.
        parser: parser of the settings.
        module: the model; its network has not been built.
        datamodule: the data; they have not been prepared.
    """

    settings: Namespace
    parser: CommandParser
    module: CTRModule
    datamodule: Any

    def document(self) -> dict[str, Any]:
        """Return the whole configuration with all defaults, as plain values."""
        document: dict[str, Any] = yaml.safe_load(self.parser.dump(self.settings, skip_unset=False))
        return document


def build_model_and_data(arguments: Sequence[str], parser: CommandParser | None = None) -> ModelAndData:
    """Parse options and build the model and the data that they describe.

    Args:
        arguments: options, such as ``--config dlrm.yaml --data.path DIR``.
        parser: made by ``build_model_parser``; by default one without further options.

    Raises:
        UserError: a configuration, an option, or a setting of model or data is wrong.
    """
    configure_logging()
    parser = parser or build_model_parser("params", "")
    settings = parse(parser, arguments)
    to_build = settings.clone()
    fill_data_seed(to_build)
    # Callbacks, loggers and strategies belong to a Trainer.
    to_build.pop("trainer")
    built = parser.build(to_build)
    assert isinstance(built.model, CTRModule) and isinstance(built.data, pl.LightningDataModule)
    return ModelAndData(settings=settings, parser=parser, module=built.model, datamodule=built.data)
