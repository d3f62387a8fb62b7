"""Where trainings and judgements run: on a GPU where there is one. There, a step is captured once, then replayed.

A step of so small a net is thousands of kernels, each of which takes less time than the asking for it.
"""

from collections.abc import Callable, Sequence

import torch

Work = Callable[[Sequence[torch.Tensor]], torch.Tensor]
Captured = tuple[torch.cuda.CUDAGraph, list[torch.Tensor], torch.Tensor]
"""A graph, its inputs and its output."""

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def replayed(work: Work) -> Work:
    """`work` of tensors, which may lie on the CPU, done on DEVICE: on a GPU as a CUDA graph, of which there is one for
    each set of shapes. The first tensors of each are worked on once more than the others, to warm up."""
    graphs: dict[tuple[torch.Size, ...], Captured] = {}

    def replay(given: Sequence[torch.Tensor]) -> torch.Tensor:
        shapes = tuple(tensor.shape for tensor in given)
        if shapes not in graphs:
            graphs[shapes] = _captured(work, [tensor.to(DEVICE) for tensor in given])
        graph, held, made = graphs[shapes]
        for inside, tensor in zip(held, given, strict=True):
            inside.copy_(tensor)
        graph.replay()
        return made.clone()

    return replay if DEVICE.type == "cuda" else work


def _captured(work: Work, held: list[torch.Tensor]) -> Captured:
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        work(held)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        made = work(held)
    return graph, held, made
