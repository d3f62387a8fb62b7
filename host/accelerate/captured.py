"""Passes through a network captured once and replayed: as CUDA graphs, which launch a pass's kernels all at once.

A captured pass reads its inputs from tensors of its own and its weights from where they are in memory. So it is right
as long as the weights stay there, whatever their values: a LoRA or a return from CPU memory puts them elsewhere, which
is noticed, and the pass is captured anew.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator, Mapping
from typing import Any, NamedTuple, Protocol

import torch

MAX_PASSES = 8
"""Captured passes that are kept: of four image sizes, each with a deep and a shallow branch."""
WARMUPS = 2
"""Passes before one is captured: the first compiles, and libraries choose their routines."""

PLAIN = (torch.nn.Parameter, torch.Tensor)
"""Kinds of weights that are in memory as they are computed with; those of quantised files are others."""
CHANGED_WHEN_USED = "changed when used"
"""In a weight's place: it is another kind of tensor, or the host changes it whenever it is used."""

Inputs = Mapping[str, torch.Tensor]
Pass = Callable[[Inputs], torch.Tensor]
"""One pass through a network."""


class Recorder(Protocol):
    """What captures passes. Passes of one recorder share their memory, and so must run one after another."""

    def capture(self, run: Callable[[], torch.Tensor]) -> tuple[Callable[[], None], torch.Tensor]:
        """Capture what ``run`` computes; returns what replays it, and the tensor in which its result then is."""

    def release(self) -> None:
        """Give back the memory of all passes, none of which is used any more."""


class CudaGraphs:
    """Captures passes as CUDA graphs. Their memory is no other tensor's until they are gone."""

    def __init__(self) -> None:
        self._pool: Any = None
        self._stream: torch.cuda.Stream | None = None  # one for all: libraries hold memory for each stream

    def capture(self, run: Callable[[], torch.Tensor]) -> tuple[Callable[[], None], torch.Tensor]:
        """See ``Recorder``. Raises torch.OutOfMemoryError where it does not fit, and RuntimeError where it cannot be
        captured."""
        current, aside = torch.cuda.current_stream(), self._stream or torch.cuda.Stream()
        self._stream = aside
        aside.wait_stream(current)
        with torch.cuda.stream(aside):
            for _ in range(WARMUPS):
                run()
        current.wait_stream(aside)
        torch.cuda.synchronize()
        torch.cuda.empty_cache()  # what the passes above took: while capturing nothing can be given back
        if self._pool is None:
            self._pool = torch.cuda.graph_pool_handle()
        graph = torch.cuda.CUDAGraph()
        try:
            # Only this thread's calls are captured: the server's may ask for free memory meanwhile.
            with torch.cuda.graph(graph, pool=self._pool, stream=aside, capture_error_mode="thread_local"):
                output = run()
        finally:
            torch.cuda.set_stream(current)  # where capturing fails at its end, PyTorch does not return to it
        return graph.replay, output

    def release(self) -> None:
        """See ``Recorder``."""
        self._pool = None
        torch.cuda.synchronize()
        torch.cuda.empty_cache()


class Weights:
    """Where the weights of a network are. ``version`` is another one whenever they have moved."""

    def __init__(self, network: torch.nn.Module) -> None:
        # Only modules that have weights, and not the network itself: it may go while this is kept.
        self._modules = [module for module in network.modules() if module._parameters and module is not network]
        self._places: tuple[Hashable, ...] = ()
        self._device: torch.device | None = None
        self.version = 0

    def update(self) -> None:
        """Look where they are now; cheap enough for every pass."""
        places = tuple(self._look())
        if places != self._places:
            self._places = places
            self._device = self._find_device()
            self.version += 1

    def are_on(self, device: torch.device) -> bool:
        """Whether they all were on a device at the last look, and the host computes with them as they are: it neither
        streams them from the CPU's memory nor patches them whenever they are used."""
        return self._device == device

    def _look(self) -> Iterator[Hashable]:
        for module in self._modules:
            own = vars(module)
            if own.get("weight_function") or own.get("bias_function"):
                yield CHANGED_WHEN_USED
            for weight in module._parameters.values():
                if weight is not None:
                    yield weight.data_ptr() if type(weight) in PLAIN else CHANGED_WHEN_USED
                    yield weight.dtype

    def _find_device(self) -> torch.device | None:
        weights = (weight for module in self._modules for weight in module._parameters.values() if weight is not None)
        devices = {weight.device for weight in weights}
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
    """The captured passes of one network, the last used ones."""

    def __init__(self, weights: Weights, recorder: Recorder) -> None:
        self.count = 0  # passes captured so far
        self._recorder = recorder
        self._weights = weights
        self._version = weights.version
        self._captured: OrderedDict[Hashable, _Captured] = OrderedDict()

    def __len__(self) -> int:
        return len(self._captured)

    def has(self, name: str, inputs: Inputs) -> bool:
        """Whether ``run`` would replay a pass, and not capture it first."""
        if self._weights.version != self._version:
            self.clear()
        return _key(name, inputs) in self._captured

    def run(self, name: str, compute: Pass, inputs: Inputs) -> torch.Tensor:
        """The result of a pass, replayed if one of its name and its inputs' shapes and types was captured.

        Args:
            name: of the network, or of a part of it.
            compute: the pass. It may depend on its inputs, on the weights and on nothing else.
            inputs: its inputs.

        Raises what ``compute`` and the recorder raise; nothing of the pass is then kept.
        """
        key = _key(name, inputs)
        if not self.has(name, inputs):
            self._captured[key] = self._capture(compute, inputs)
            self.count += 1
        self._captured.move_to_end(key)
        while len(self._captured) > MAX_PASSES:
            self._captured.popitem(last=False)
        return self._captured[key].run(inputs)

    def clear(self) -> None:
        """Forget all passes, and give back their memory."""
        self._version = self._weights.version
        if self._captured:
            self._captured.clear()
            self._recorder.release()

    def _capture(self, compute: Pass, inputs: Inputs) -> _Captured:
        with torch.inference_mode(False):  # tensors that can be written to within inference mode and outside of it
            own = {name: torch.zeros_like(tensor) for name, tensor in inputs.items()}
        for name, tensor in inputs.items():
            own[name].copy_(tensor)
        return _Captured(own, *self._recorder.capture(lambda: compute(own)))


def _key(name: str, inputs: Inputs) -> Hashable:
    shapes = ((key, tuple(tensor.shape), tensor.dtype, tensor.device) for key, tensor in inputs.items())
    return name, *shapes
