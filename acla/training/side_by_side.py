"""Several networks in training at once, which fill a GPU together."""

from collections.abc import Sequence

import torch
from torch import Tensor

from acla.training.trainer import Trainer


def make_streams(count: int, device: torch.device) -> list[torch.cuda.Stream | None]:
    """A stream for each of several networks on a GPU; elsewhere there are none."""
    return [torch.cuda.Stream(device) if device.type == "cuda" else None for _ in range(count)]


def step_side_by_side(
    trainers: Sequence[Trainer],
    streams: Sequence[torch.cuda.Stream | None],
    step: int,
    batches: Sequence[tuple[Tensor, Tensor] | None],
) -> None:
    """A step of every network that has a batch, each in its stream. The streams work after what the
    current stream has been given, which then goes on after them: memory that it frees may be in use
    until then."""
    for stream in filter(None, streams):
        stream.wait_stream(torch.cuda.current_stream())
    for trainer, stream, batch in zip(trainers, streams, batches, strict=True):
        if batch:
            with torch.cuda.stream(stream):
                trainer.step(step, range(len(batch[0])), *batch)
    for stream in filter(None, streams):
        torch.cuda.current_stream().wait_stream(stream)
