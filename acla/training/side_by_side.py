"""Several networks in training at once, which fill a GPU together."""

from collections.abc import Callable, Iterable, Iterator, Sequence

import torch
from torch import Tensor

from acla.training.trainer import Trainer


def train_side_by_side(
    trainers: Sequence[Trainer],
    batches: Sequence[Callable[[int], tuple[Tensor, Tensor] | None]],
    steps: Iterable[int],
) -> Iterator[int]:
    """Train networks step by step, each on its batch of a step, if it has one, and on a GPU in a
    stream of its own. Yields the number of steps done.

    The streams work after what the current stream has been given, which then goes on after them:
    memory that it frees may be in use until then."""
    gpu = trainers[0].device.type == "cuda"
    streams = [torch.cuda.Stream(t.device) if gpu else None for t in trainers]
    for step in steps:
        given = [batch(step) for batch in batches]
        for stream in filter(None, streams):
            stream.wait_stream(torch.cuda.current_stream())
        for trainer, stream, batch in zip(trainers, streams, given, strict=True):
            if batch:
                with torch.cuda.stream(stream):
                    trainer.step(step, range(len(batch[0])), *batch)
        for stream in filter(None, streams):
            torch.cuda.current_stream().wait_stream(stream)
        yield step + 1
