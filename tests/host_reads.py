"""What makes the host wait for a device, counted on CPU tensors too: ``with HostReads() as reads: step()``.

On a CPU every tensor stands for one of a device, so that ids and sizes that are truly in host memory count as well.
"""

import traceback
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

ROOT = Path(__file__).resolve().parent.parent
_READS = {
    *("_local_scalar_dense", "is_nonzero", "equal", "nonzero", "masked_select", "bincount"),
    *("unique_consecutive", "_unique", "_unique2", "unique_dim", "unique_dim_consecutive"),
}
"""Operators whose results, or the shapes of them, the host learns from values."""
_METHODS = {torch.Tensor.tolist, torch.Tensor.numpy, torch.Tensor.cpu}
"""What no dispatched operator tells of tensors that are on a CPU already."""


class HostReads:
    """Context in which reads are counted.

    Attributes:
        found: ``operator in file:function`` -> how often; the file and function are the innermost of this project, or
            of torch's optimizers.
    """

    def __init__(self) -> None:
        self.found: Counter[str] = Counter()
        self._modes = (_Functions(self.found), _Operators(self.found))

    def __enter__(self) -> Counter[str]:
        for mode in self._modes:
            mode.__enter__()
        return self.found

    def __exit__(self, *details: Any) -> None:
        for mode in reversed(self._modes):
            mode.__exit__(*details)


def _site() -> str:
    for frame in reversed(traceback.extract_stack()):
        path = Path(frame.filename)
        if path.is_relative_to(ROOT / "lightning_dlrm") or "torch/optim" in frame.filename:
            return f"{path.parent.name}/{path.name}:{frame.name}"
    return "elsewhere"


class _Functions(TorchFunctionMode):
    def __init__(self, found: Counter[str]) -> None:
        super().__init__()
        self._found = found

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _METHODS:
            self._found[f"{func.__name__} in {_site()}"] += 1
        return func(*args, **(kwargs or {}))


class _Operators(TorchDispatchMode):
    def __init__(self, found: Counter[str]) -> None:
        super().__init__()
        self._found = found

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func.__name__.partition(".")[0]
        if name in _READS or _has_unknown_shape(name, args, kwargs) or _leaves_device(name, args, kwargs):
            self._found[f"{name} in {_site()}"] += 1
        return func(*args, **kwargs)


def _has_unknown_shape(name: str, args: Any, kwargs: Any) -> bool:
    if name == "repeat_interleave":
        return kwargs.get("output_size") is None
    if name in ("index", "index_put", "index_put_", "_index_put_impl_"):
        return any(index is not None and index.dtype in (torch.bool, torch.uint8) for index in args[1])
    return False


def _leaves_device(name: str, args: Any, kwargs: Any) -> bool:
    """Whether a tensor of another device is copied to the CPU."""
    if name == "_to_copy":
        return str(kwargs.get("device")) == "cpu" and args[0].device.type != "cpu"
    return name == "copy_" and args[0].device.type == "cpu" and args[1].device.type != "cpu"
