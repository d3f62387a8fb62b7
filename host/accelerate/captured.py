"""Passes through a network captured once and replayed: as CUDA graphs (cuda_graphs.py), on a GPU.

A captured pass reads its inputs from tensors of its own and its weights from where they are in memory. So it is right
as long as the weights stay there, whatever their values: a LoRA or a return from CPU memory puts them elsewhere, which
is noticed, and the pass is captured anew.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple, Protocol

import torch

MAX_PASSES = 8
"""Captured passes that are kept: of four image sizes, each with a deep and a shallow branch."""
PLAIN = (torch.nn.Parameter, torch.Tensor)
"""Kinds of weights that are in memory as they are computed with; those of quantised files are others."""
CHANGED_WHEN_USED = "changed when used"
"""In a weight's place: it is another kind of tensor, or the host changes it whenever it is used."""

Inputs = Mapping[str, torch.Tensor]


@dataclass(frozen=True)
class Pass:
    """A pass through a network or a part of it, by name. ``compute`` computes it from its inputs, and depends on
    nothing else but the weights."""

    name: str
    compute: Callable[[Inputs], torch.Tensor]
    inputs: Inputs

    @cached_property
    def kind(self) -> Hashable:
        """Passes of a kind are captured as one: of the same name, with inputs of the same shapes and types."""
        shapes = ((name, tuple(one.shape), one.dtype, one.device) for name, one in self.inputs.items())
        return self.name, *shapes


class Recorder(Protocol):
    """What captures passes. Passes of one recorder share their memory, and so must run one after another."""

    def prepare(self, run: Callable[[], torch.Tensor]) -> torch.Tensor:
        """Compute what ``run`` computes, in a way after which it can be captured: code is compiled in it, and libraries
        choose their routines."""

    def capture(self, run: Callable[[], torch.Tensor]) -> tuple[Callable[[], None], torch.Tensor]:
        """Capture what ``run`` computes; returns what replays it, and the tensor in which its result then is."""

    def release(self, forget: Callable[[], None]) -> None:
        """Give back the memory of all passes, which ``forget`` forgets: none of them is used any more."""


class Weights:
    """Where the weights of a network are. ``version`` is another one whenever they have moved."""

    def __init__(self, network: torch.nn.Module) -> None:
        # Only modules that have weights, and not the network itself: it may go while this is kept.
        self._own = [vars(module) for module in network.modules() if module._parameters and module is not network]
        self._places: tuple[Hashable, ...] = ()
        self._device: torch.device | None = None
        self.version = 0

    def update(self) -> None:
        """Look where they are now; cheap enough for every pass."""
        places = self._look()
        if places != self._places:
            self._places = places
            self._device = self._find_device()
            self.version += 1

    def are_on(self, device: torch.device) -> bool:
        """Whether they all were on a device at the last look, and the host computes with them as they are: it neither
        streams them from the CPU's memory nor patches them whenever they are used."""
        return self._device == device

    def _look(self) -> tuple[Hashable, ...]:
        weights = self._weights()
        changed = [CHANGED_WHEN_USED for own in self._own if own.get("weight_function") or own.get("bias_function")]
        places = [weight.data_ptr() if type(weight) in PLAIN else CHANGED_WHEN_USED for weight in weights]
        return *places, *changed, *[weight.dtype for weight in weights]

    def _weights(self) -> list[torch.Tensor]:
        return [weight for own in self._own for weight in own["_parameters"].values() if weight is not None]

    def _find_device(self) -> torch.device | None:
        devices = {weight.device for weight in self._weights()}
        return devices.pop() if len(devices) == 1 and CHANGED_WHEN_USED not in self._places else None


class _Captured(NamedTuple):
    inputs: dict[str, torch.Tensor]
    replay: Callable[[], None]
    output: torch.Tensor

    def run(self, inputs: Inputs) -> torch.Tensor:
        for name, tensor in inputs.items():
            self.inputs[name].copy_(tensor)
        self.replay()
        return self.output.clone()


class Captures:
    """The captured passes of one network, the last used ones.

    The first pass of a kind is computed as it is, by ``prepare``. Those that follow are captured and replayed, also
    after ``clear``, so that no pass is computed of which the result is thrown away.
    """

    def __init__(self, weights: Weights, recorder: Recorder) -> None:
        self.count = 0  # passes captured so far
        self._recorder = recorder
        self._weights = weights
        self._version = weights.version
        self._prepared: set[Hashable] = set()
        self._captured: OrderedDict[Hashable, _Captured] = OrderedDict()

    def __len__(self) -> int:
        return len(self._captured)

    def is_prepared(self, one: Pass) -> bool:
        """Whether a pass of its kind was computed before, so that it can be captured."""
        return one.kind in self._prepared

    def has(self, one: Pass) -> bool:
        """Whether ``run`` would replay a pass, and not capture it first."""
        if self._weights.version != self._version:
            self.clear()
        return one.kind in self._captured

    def prepare(self, one: Pass) -> torch.Tensor:
        """The result of the first pass of its kind. Raises what computing it raises."""
        own = _copied(one.inputs)
        output = self._recorder.prepare(lambda: one.compute(own))
        self._prepared.add(one.kind)
        return output

    def run(self, one: Pass) -> torch.Tensor:
        """The result of a pass, captured if none of its kind is, and replayed.

        Raises what computing it and the recorder raise; nothing of the pass is then kept.
        """
        if not self.has(one):
            self._prepared.discard(one.kind)  # where it fails, something has changed since
            own = _copied(one.inputs)
            self._captured[one.kind] = _Captured(own, *self._recorder.capture(lambda: one.compute(own)))
            self._prepared.add(one.kind)
            self.count += 1
        self._captured.move_to_end(one.kind)
        while len(self._captured) > MAX_PASSES:
            self._captured.popitem(last=False)
        return self._captured[one.kind].run(one.inputs)

    def clear(self) -> None:
        """Forget all captured passes, and give back their memory."""
        self._version = self._weights.version
        if self._captured:
            self._recorder.release(self._captured.clear)


def _copied(inputs: Inputs) -> dict[str, torch.Tensor]:
    """Tensors of a pass's own, with the inputs in them, that can be written to within inference mode and outside of
    it. Passes are computed with such ones from the first on: for others PyTorch would compile anew."""
    with torch.inference_mode(False):
        own = {name: torch.zeros_like(tensor) for name, tensor in inputs.items()}
    for name, tensor in inputs.items():
        own[name].copy_(tensor)
    return own
