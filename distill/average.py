"""The average of the student's weights over the steps: the weights of the result."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import safe_open
from torch import nn
from torch.distributed.tensor import DTensor, distribute_tensor

from ..koala.files.atomic_write import write_safetensors


class Average:
    """An exponential moving average of every parameter of a network.

    It is in fp32 whatever the parameters are: in bf16 a decay of 0.9999 changes nothing. It lies where the parameters
    lie, or on the CPU, and of a sharded parameter each process averages its own shard. The file is the whole average,
    so that any number of processes can read it.
    """

    def __init__(self, network: nn.Module, decay: float, on_cpu: bool = False) -> None:
        self.network, self.decay, self.device = network, decay, torch.device("cpu") if on_cpu else None
        self.weights = [self._own(parameter).clone() for parameter in network.parameters()]

    def _own(self, parameter: torch.Tensor) -> torch.Tensor:
        """This process's part of a parameter, fp32, where the average lies."""
        return _local(parameter).to(self.device, torch.float32)

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Take in the weights after optimiser step ``step`` (from 0). The decay rises with the steps, from 0 to
        ``decay``, as in diffusers' EMAModel: (1 + step) / (10 + step)."""
        decay = min(self.decay, (1 + step) / (10 + step)) if step else 0.0
        new = [self._own(parameter) for parameter in self.network.parameters()]
        torch._foreach_lerp_(self.weights, new, 1 - decay)

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """The network has the averaged weights while this is active."""
        own = [_local(parameter).clone() for parameter in self.network.parameters()]
        self._set(self.weights)
        try:
            yield
        finally:
            self._set(own)

    @torch.no_grad()
    def _set(self, weights: list[torch.Tensor]) -> None:
        for parameter, weight in zip(self.network.parameters(), weights, strict=True):
            _local(parameter).copy_(weight)

    def gathered(self, keep: bool = True) -> dict[str, torch.Tensor]:
        """The whole average, fp32 on the CPU, by the parameters' names; empty without ``keep``. Called on every
        process."""
        whole = {}
        for (name, parameter), own in zip(self.network.named_parameters(), self.weights, strict=True):
            tensor = _whole(own, parameter)
            if keep:
                whole[name] = tensor.to("cpu", copy=True)
        return whole

    def save(self, path: Path, writes: bool) -> None:
        """Write a safetensors file, on the process that ``writes``; called on every process. Raises OSError."""
        whole = self.gathered(keep=writes)
        if writes:
            write_safetensors(path, whole, {})

    @torch.no_grad()
    def load(self, path: Path) -> None:
        """Read this process's part of a file. Raises OSError, SafetensorError or RuntimeError where that fails."""
        with safe_open(path, framework="pt") as file:
            for (name, parameter), own in zip(self.network.named_parameters(), self.weights, strict=True):
                own.copy_(_part(file.get_tensor(name), parameter))


def _local(parameter: torch.Tensor) -> torch.Tensor:
    tensor = parameter.detach()
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _whole(own: torch.Tensor, parameter: torch.Tensor) -> torch.Tensor:
    """A process's part of a tensor that is sharded as a parameter is -> the whole of it."""
    if not isinstance(parameter, DTensor):
        return own
    mesh, placements = parameter.device_mesh, parameter.placements
    spread = DTensor.from_local(
        own.to(_local(parameter).device), mesh, placements, shape=parameter.shape, stride=parameter.stride()
    )
    return spread.full_tensor()


def _part(whole: torch.Tensor, parameter: torch.Tensor) -> torch.Tensor:
    """The reverse: every process has the whole, and nothing is sent."""
    if not isinstance(parameter, DTensor):
        return whole
    return distribute_tensor(whole, parameter.device_mesh, parameter.placements, src_data_rank=None).to_local()
