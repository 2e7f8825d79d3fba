"""Batches made ahead by threads, so that a GPU need not wait for them; and how fast they come.

python -m acla.loader --task sr --scale 2 --data DIR --train-set DIV2K
    one JSON row for each number of workers, and one for what training consumes
"""

import argparse
import json
import os
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace

import torch
from torch import Tensor

from acla import cli, config, flags
from acla.data import PatchSampler, Pictures, training_sets
from acla.errors import UsageError
from acla.learner import Learner
from acla.processes import Processes

AHEAD = 2  # batches for each worker
STEPS = 5  # of training, at most, that are timed
MOST = 4  # workers, where their number is not given


class Loader:
    """A sampler's batches on `device`, made by threads before they are asked for.

    A batch is a function of its step alone, so the number of workers changes no bit of it; 0 makes
    a batch when it is asked for. Decoding, JPEG and array arithmetic leave Python's lock to
    others. For a GPU the batches lie in pinned memory, so that nobody waits for the copy.
    """

    def __init__(self, sampler: PatchSampler, device: torch.device, workers: int | None = None):
        self.sampler, self.device = sampler, device
        self.workers = default_workers(device) if workers is None else workers
        if self.workers < 0:
            raise UsageError(f"--workers must be 0 or more, not {self.workers}")
        self.pool = ThreadPoolExecutor(self.workers) if self.workers else None
        self.made: dict[int, Future] = {}

    def batch(self, step: int) -> tuple[Tensor, Tensor]:
        """(degraded, target) of one step, as PatchSampler.batch makes them, on the device."""
        low, target = self.take(step) if self.pool else self.sampler.batch(step)
        return low.to(self.device, non_blocking=True), target.to(self.device, non_blocking=True)

    def take(self, step: int) -> tuple[Tensor, Tensor]:
        """The batch of a step, from the threads, who go on with the steps behind it."""
        wanted = range(step, step + 1 + AHEAD * self.workers)
        for other in self.made.keys() - set(wanted):
            self.made.pop(other).cancel()
        pinned = self.device.type == "cuda"
        for ahead in wanted:
            if ahead not in self.made:
                self.made[ahead] = self.pool.submit(make, self.sampler, ahead, pinned)
        return self.made.pop(step).result()


def make(sampler: PatchSampler, step: int, pinned: bool) -> tuple[Tensor, Tensor]:
    """What a worker does. It knows no loader, so that a loader nobody holds ends its threads."""
    low, target = sampler.batch(step)
    return (low.pin_memory(), target.pin_memory()) if pinned else (low, target)


def default_workers(device: torch.device) -> int:
    """None on a CPU, whose cores train; for a GPU four, or as many as its process has cores."""
    if device.type == "cpu":
        return 0
    cores = (os.cpu_count() or 1) // int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    return max(1, min(MOST, cores))


# The benchmark


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    cli.add_common_flags(parser)
    parser.add_argument("--preset", choices=config.PRESETS, help="size (default: as train.py's)")
    flags.add_task_flags(parser)
    parser.add_argument("--train-set", default="sample", help="set of pictures (default: sample)")
    parser.add_argument(
        "--workers",
        type=int,
        nargs="+",
        default=[0, 1, 2],
        help="numbers of threads to try (default: 0 1 2)",
    )
    parser.add_argument(
        "--batches",
        type=int,
        default=50,
        help=f"batches of each measurement; of training, whose steps are long, at most {STEPS} "
        "(default: 50)",
    )
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    if args.batches < 1 or min(args.workers) < 0:
        raise UsageError("--batches must be 1 or more, and --workers 0 or more")
    device = cli.pick_device(args.device)
    preset = cli.pick_preset(args.preset, device)
    task = flags.task_from_flags(args) or config.Task()
    how = config.train_preset(preset)
    pictures = Pictures(training_sets(args.train_set, None, args.data)[0])
    sampler = PatchSampler(pictures, task, how.patch, how.batch)
    common = {"task": str(task), "preset": preset, "batch": how.batch, "patch": how.patch}
    for workers in args.workers:
        loader = Loader(sampler, device, workers)
        rate = how.batch * per_second(loader.batch, args.batches, device)
        cli.say(json.dumps({**common, "workers": workers, "patches_per_second": round(rate, 1)}))
    steps = training_step(task, preset, sampler, device)
    rate = how.batch * per_second(steps, min(STEPS, args.batches), device)
    cli.say(json.dumps({**common, "training": str(device), "patches_per_second": round(rate, 1)}))


def training_step(
    task: config.Task, preset: str, sampler: PatchSampler, device: torch.device
) -> Callable[[int], None]:
    """Steps on one batch that lies ready: what training consumes if it never waits."""
    found = config.PAPER_POSITIONS[task.name, "edsr"]
    model = replace(config.model_preset(preset, task), positions=found)
    learner = Learner(model, config.train_preset(preset), Processes(device))
    low, target = Loader(sampler, device, 0).batch(0)
    return lambda step: learner.step(step, sampler.indices, low, target)


def per_second(call: Callable[[int], object], times: int, device: torch.device) -> float:
    """Calls a second, with 0, 1, 2 …; the first call, which reads files, is not counted."""
    call(0)
    synchronize(device)
    begun = time.perf_counter()
    for i in range(1, times + 1):
        call(i)
    synchronize(device)
    return times / (time.perf_counter() - begun)


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


if __name__ == "__main__":
    cli.run(main)
