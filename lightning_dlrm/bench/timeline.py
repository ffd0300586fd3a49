"""Where the time of a training step goes: forward and backward of each part of a network, told apart by hooks."""

import time
from collections import defaultdict
from typing import Any

import torch
from torch import Tensor, nn

from lightning_dlrm.bench.options import finisher


class Timeline:
    """Adds up the seconds between marks, each counted for the label it follows.

    On a CUDA device the marks are events in the stream, so that nothing waits for them.

    Args:
        network: a DLRM, ours or the plain one. Its parts run one after the other, forward and, in the opposite
            order, backward; hooks mark where each begins.
        device: that it is on.
    """

    def __init__(self, network: nn.Module, device: torch.device) -> None:
        self._finish = finisher(device)
        self._cuda = device.type == "cuda"
        self._marks: list[tuple[str, Any]] = []
        tables = "embeddings" if hasattr(network, "embeddings") else "tables"
        parts = {"bottom MLP": "bottom", "tables": tables, "top MLP": "top"}
        self._handles = []
        for name, attribute in parts.items():
            part = network.get_submodule(attribute)
            self._handles += [
                part.register_forward_pre_hook(lambda *_, name=name: self.mark(f"{name} forward")),
                part.register_forward_hook(lambda *given, name=name: self._after(name, given[-1])),
            ]
        top = network.get_submodule("top")
        self._handles.append(top.register_forward_pre_hook(lambda _, inputs: self._before_top(inputs[0])))

    def mark(self, label: str) -> None:
        """From here on, time counts for a label; for ``""`` it does not count."""
        if self._cuda:
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self._marks.append((label, event))
        else:
            self._marks.append((label, time.perf_counter()))

    def take(self) -> dict[str, float]:
        """Seconds of each label since the last call."""
        self._finish()
        seconds: dict[str, float] = defaultdict(float)
        for (label, start), (_, end) in zip(self._marks, self._marks[1:], strict=False):
            if label:
                seconds[label] += start.elapsed_time(end) / 1e3 if self._cuda else end - start
        self._marks.clear()
        return dict(seconds)

    def close(self) -> None:
        for handle in self._handles:
            handle.remove()

    def _after(self, name: str, output: Tensor | list[Tensor]) -> None:
        self.mark("loss" if name == "top MLP" else "interaction forward")
        for tensor in output if isinstance(output, list) else [output]:
            # Runs when its gradient is there: just before the part's own backward pass.
            tensor.register_hook(lambda _: self.mark(f"{name} backward"))

    def _before_top(self, joined_Bn: Tensor) -> None:
        joined_Bn.register_hook(lambda _: self.mark("interaction backward"))
