"""What captures passes on a CPU, where there are no CUDA graphs: the same promises, kept by other means."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

READS = (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.item.default, torch.ops.aten.is_nonzero.default)
"""Operations that read a number from a tensor, for which a GPU is waited for; the latter two in inference mode."""


class Numbers(TorchDispatchMode):
    """How many numbers are read from tensors within it."""

    count = 0

    def __torch_dispatch__(self, operation: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        self.count += operation in READS
        return operation(*args, **(kwargs or {}))


class Counting:
    """How many passes were computed before others, captured and replayed, and how often their memory was given back."""

    def __init__(self) -> None:
        self.prepared = self.captured = self.replayed = self.released = 0

    def prepare(self, run: Callable[[], torch.Tensor]) -> torch.Tensor:
        self.prepared += 1
        return run()

    def release(self, forget: Callable[[], None]) -> None:
        forget()
        self.released += 1


class Operations(Counting):
    """As a CUDA graph does, it replays operations on the same memory: whatever else a pass depended on is lost.

    For passes that are not compiled; a compiled one is no sequence of PyTorch's operations.
    """

    def capture(self, run: Callable[[], torch.Tensor]) -> tuple[Callable[[], None], torch.Tensor]:
        self.captured += 1
        with _Recording() as recording:
            output = run()

        def replay() -> None:
            self.replayed += 1
            for repeat in recording.operations:
                repeat()

        return replay, output


class Reruns(Counting):
    """Computes a pass again, compiled code included, with its own inputs and a result in the same place."""

    def capture(self, run: Callable[[], torch.Tensor]) -> tuple[Callable[[], None], torch.Tensor]:
        self.captured += 1
        output = run().clone()

        def replay() -> None:
            self.replayed += 1
            output.copy_(run())

        return replay, output


class _Recording(TorchDispatchMode):
    """Every operation, and what repeats it: on the same tensors, into the same results."""

    def __init__(self) -> None:
        super().__init__()
        self.operations: list[Callable[[], None]] = []

    def __torch_dispatch__(
        self, operation: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if operation in READS:
            raise RuntimeError("a number was read from a tensor while a pass was captured")
        result = operation(*args, **(kwargs or {}))
        places = {tensor.untyped_storage().data_ptr() for tensor in _tensors((args, kwargs))}
        made = [tensor for tensor in _tensors(result) if tensor.untyped_storage().data_ptr() not in places]
        if made or operation._schema.is_mutable:

            def repeat() -> None:
                again = _tensors(operation(*args, **(kwargs or {})))
                for first, second in zip(_tensors(result), again, strict=True):
                    if any(first is one for one in made):
                        first.copy_(second)

            self.operations.append(repeat)
        return result


def _tensors(values: object) -> list[torch.Tensor]:
    return [value for value in tree_leaves(values) if isinstance(value, torch.Tensor)]
