"""Criteo's click logs, and demo data with the same columns, as LightningDataModules."""

from pathlib import Path
from typing import Any, ClassVar

from datamodules.clicks import DEMO, Clicks
from datamodules.generate.demo import DemoSettings, demo_folder, demo_schema, generate_demo
from lightning_dlrm.contracts.errors import require
from lightning_dlrm.contracts.schema import DatasetSchema


class Criteo(Clicks):
    """A dataset folder made by `preprocess` or `generate`, or demo data.

    Args:
        path: A dataset folder, or `demo` for planted demo data, which are generated when they are first needed. A URL
            such as `s3://bucket/folder`, `gs://...` or `hf://...` works if the package for it is installed.
        demo: Settings of demo data; without effect on a dataset folder.
        options: Those of Clicks.

    Raises:
        UserError: there is no dataset at `path`, or an option is unknown or out of range.
    """

    kind: ClassVar[str | None] = None
    """The only `dataset` that a schema may name; None for any."""

    def __init__(
        self,
        path: str,
        *,
        demo: DemoSettings = DemoSettings(),  # noqa: B008 (immutable)
        **options: Any,
    ) -> None:
        super().__init__(demo_folder(demo) if path == DEMO else path, **options)
        self.path, self.demo = path, demo

    @property
    def planned(self) -> DatasetSchema | None:
        return demo_schema(self.demo) if self.path == DEMO else None

    def _generate(self, folder: Path) -> None:
        generate_demo(self.demo, folder)

    def _accepted(self, schema: DatasetSchema) -> DatasetSchema:
        require(
            self.kind is None or schema.dataset == self.kind,
            f"{self.path} holds the dataset {schema.dataset!r}, but {type(self).__name__} reads {self.kind!r}: add "
            "--data Criteo, which reads every dataset, or give another folder with --data.path",
        )
        return schema


class CriteoKaggle(Criteo):
    """Criteo, restricted to the Display Advertising Challenge of Kaggle."""

    kind = "kaggle"


class CriteoTerabyte(Criteo):
    """Criteo, restricted to the Terabyte click logs."""

    kind = "terabyte"
