"""The device for training and judging: a GPU where there is one, on which a step is captured once, then replayed.

A step of so small a network is thousands of kernels, each of which takes less time to run than to launch.
"""

from collections.abc import Callable, Sequence

import torch

Work = Callable[[Sequence[torch.Tensor]], torch.Tensor]
Captured = tuple[torch.cuda.CUDAGraph, list[torch.Tensor], torch.Tensor]
"""A graph, its inputs and its output."""

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def replayed(work: Work) -> Work:
    """`work` on DEVICE; its tensors may be on the CPU. On a GPU it runs as a CUDA graph, one for each set of shapes.
    The first tensors of each set are processed one more time than the others, as warm-up."""
    graphs: dict[tuple[torch.Size, ...], Captured] = {}

    def replay(given: Sequence[torch.Tensor]) -> torch.Tensor:
        shapes = tuple(tensor.shape for tensor in given)
        if shapes not in graphs:
            graphs[shapes] = _captured(work, [tensor.to(DEVICE) for tensor in given])
        graph, inputs, output = graphs[shapes]
        for own, tensor in zip(inputs, given, strict=True):
            own.copy_(tensor)
        graph.replay()
        return output.clone()

    return replay if DEVICE.type == "cuda" else work


def _captured(work: Work, inputs: list[torch.Tensor]) -> Captured:
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        work(inputs)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = work(inputs)
    return graph, inputs, output
