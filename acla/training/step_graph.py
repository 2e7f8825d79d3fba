"""A training step as one CUDA graph: all of its kernels in one launch."""

from collections.abc import Callable

import torch
from torch import Tensor

WARM_UP = 3  # eager steps, in which libraries choose their kernels and Adam makes its moments


class CaptureError(RuntimeError):
    """The step has an operation that no graph can hold. It has had no effect."""


class StepGraph:
    """Runs `step` on tensors of always the same shapes: the first times as it is, then captured
    once and replayed. `step` must not wait for the GPU; what it changes is changed in place.

    Raises what `step` raises, and CaptureError."""

    def __init__(self, step: Callable[..., tuple[Tensor, ...]], device: torch.device):
        self.step = step
        self.stream = torch.cuda.Stream(device)  # capturing needs another than the default one
        self.graph: torch.cuda.CUDAGraph | None = None
        self.runs = 0
        self.inputs: list[Tensor] = []
        self.results: tuple[Tensor, ...] = ()

    def __call__(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """step(*inputs), whose results the next call leaves alone."""
        self.runs += 1
        if self.runs <= WARM_UP:
            return self.eager(*inputs)
        if self.graph is None:
            self.capture(*inputs)
        for place, given in zip(self.inputs, inputs, strict=True):
            place.copy_(given, non_blocking=True)
        self.graph.replay()
        return tuple(result.clone() for result in self.results)

    def eager(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        current = torch.cuda.current_stream()
        self.stream.wait_stream(current)
        with torch.cuda.stream(self.stream):
            results = self.step(*inputs)
        current.wait_stream(self.stream)
        return results

    def capture(self, *inputs: Tensor) -> None:
        self.inputs = [given.clone() for given in inputs]
        graph = torch.cuda.CUDAGraph()
        try:
            # The loader's thread may pin memory meanwhile.
            with torch.cuda.graph(graph, stream=self.stream, capture_error_mode="thread_local"):
                self.results = self.step(*self.inputs)
        except RuntimeError as error:
            raise CaptureError(str(error)) from error
        self.graph = graph
