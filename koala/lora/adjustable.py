"""A network with a LoRA whose numbers can be set: its outputs, and how they change with those numbers.

The factors work beside the layers, so that no weight of the network is copied. Changes of norms and biases, which have
no factors, are added to the parameters themselves.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from types import MappingProxyType

import torch
from torch import Tensor, nn
from torch.nn import functional

from .factors import DOWN, UP
from .fit import Changes

Output = Callable[[Tensor], Tensor]
"""The network's outputs for some inputs, by their numbers."""


class Adjustable:
    """A network of linear and convolutional layers, frozen, with places for the numbers of a LoRA.

    Args:
        network: on its device, fp32; it gets hooks, and parameters that require gradients, and is not given back.
        start: a LoRA of ``factors``, which says where the places are, and of which rank.
        names: name of a weight in ``start`` -> its name in the network, where that is another.
    """

    def __init__(self, network: nn.Module, start: Changes, names: Mapping[str, str] = MappingProxyType({})) -> None:
        network.requires_grad_(False)
        self.base: dict[str, Tensor] = {}
        self.parameters: dict[str, nn.Parameter] = {}
        for name, change in start.items():
            weight = name.removesuffix(UP).removesuffix(DOWN)
            parameter = network.get_parameter(names.get(weight, weight))
            if weight == name:
                self.base[name] = parameter.detach().clone()
                parameter.data = parameter.data.clone()  # it may be the file itself, mapped into memory
                parameter.requires_grad_(True)
                self.parameters[name] = parameter
            else:
                self.parameters[name] = nn.Parameter(torch.zeros_like(change, device=parameter.device))
        for name in start:
            if name.endswith(UP):
                weight = name.removesuffix(UP)
                layer = network.get_submodule(names.get(weight, weight).removesuffix(".weight"))
                layer.register_forward_hook(_beside(self.parameters[name], self.parameters[weight + DOWN]))

    @torch.no_grad()
    def set(self, changes: Changes) -> None:
        """Give the LoRA its numbers."""
        for name, parameter in self.parameters.items():
            value = changes[name].to(parameter.device)
            parameter.copy_(self.base[name] + value if name in self.base else value)

    @torch.no_grad()
    def outputs(self, changes: Changes, output: Output, parts: Iterable[Tensor]) -> Tensor:
        """The outputs with these numbers, one part of the inputs after the other; on the CPU."""
        self.set(changes)
        return torch.cat([output(part).cpu() for part in parts])

    def slopes(
        self, changes: Changes, output: Output, error: Callable[[Tensor, Tensor], Tensor], parts: Iterable[Tensor]
    ) -> Changes:
        """The transposed Jacobian of ``outputs`` times an error, one part after the other.

        Args:
            changes: the LoRA's numbers.
            output: differentiable.
            error: function of the outputs of a part, and of the part: as many numbers as outputs.
            parts: of the inputs.
        """
        self.set(changes)
        total = {name: torch.zeros_like(change) for name, change in changes.items()}
        for part in parts:
            with torch.enable_grad():
                found = output(part)
                scaled = (found * error(found.detach().cpu(), part).to(found.device)).sum()
                slopes = torch.autograd.grad(scaled, list(self.parameters.values()))
            for name, slope in zip(self.parameters, slopes, strict=True):
                total[name] += slope.cpu()
        return total


def _beside(up: nn.Parameter, down: nn.Parameter) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], Tensor]:
    """A hook that adds to a layer's output what a product of factors, [out, rank] and [rank, in], does."""

    def add(layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        if not isinstance(layer, nn.Conv2d):
            return output + functional.linear(functional.linear(inputs[0], down), up)
        kernel = down.reshape(len(down), *layer.weight.shape[1:])
        inner = functional.conv2d(inputs[0], kernel, None, layer.stride, layer.padding, layer.dilation)
        return output + functional.conv2d(inner, up[:, :, None, None])

    return add
