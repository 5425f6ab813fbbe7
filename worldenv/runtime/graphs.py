"""CUDA graphs: a function of tensors recorded once and replayed on new values."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

Function = Callable[..., tuple[Tensor, ...]]


class Captured:
    """A CUDA graph of `function` for inputs of one set of shapes: one launch instead of hundreds.

    The function must decide nothing on the host and allocate nothing that outlives a call, except
    in place: what it writes elsewhere is written again at each replay, at the same addresses.
    Not yet run on a GPU.

    Args:
        function: tensors to tensors, all on one CUDA device, without gradients.
        inputs: an example; the graph keeps copies, which every call fills with its own.
    """

    WARM_UP = 3  # calls before the capture, in which kernels are compiled and chosen

    def __init__(self, function: Function, inputs: Sequence[Tensor]) -> None:
        self.inputs = [x.clone() for x in inputs]
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(self.WARM_UP):
                function(*self.inputs)
        torch.cuda.current_stream().wait_stream(stream)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.outputs = function(*self.inputs)

    def __call__(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """Results of this call's own: the graph's are overwritten by the next."""
        for mine, given in zip(self.inputs, inputs, strict=True):
            mine.copy_(given, non_blocking=True)
        self.graph.replay()
        return tuple(x.clone() for x in self.outputs)
