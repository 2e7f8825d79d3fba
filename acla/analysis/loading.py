"""Batches made ahead by threads, so that a GPU need not wait for them; and how fast they come.

python -m acla.analysis.loading --task sr --scale 2 --data DIR --train-set DIV2K
    one JSON row for each number of workers, and one for what training consumes
"""

import argparse
import json
import time
from collections.abc import Callable
from dataclasses import replace

import torch

from acla import cli, config, console
from acla.data.datasets import Loader, PatchSampler, Pictures, training_sets
from acla.distributed import Processes
from acla.errors import UsageError
from acla.training.trainer import Trainer

STEPS = 5  # of training, at most, that are timed


# The benchmark


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    cli.add_common_flags(parser)
    parser.add_argument("--preset", choices=config.PRESETS, help="size (default: as train.py's)")
    cli.add_task_flags(parser)
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
    task = cli.task_from_flags(args) or config.Task()
    how = config.train_preset(preset)
    pictures = Pictures(training_sets(args.train_set, None, args.data)[0])
    sampler = PatchSampler(pictures, task, how.patch_size, how.batch_size)
    common = {"task": str(task), "preset": preset, "batch": how.batch_size, "patch": how.patch_size}
    for workers in args.workers:
        loader = Loader(sampler, device, workers)
        rate = how.batch_size * per_second(loader.batch, args.batches, device)
        console.say(
            json.dumps({**common, "workers": workers, "patches_per_second": round(rate, 1)})
        )
    steps = training_step(task, preset, sampler, device)
    rate = how.batch_size * per_second(steps, min(STEPS, args.batches), device)
    console.say(
        json.dumps({**common, "training": str(device), "patches_per_second": round(rate, 1)})
    )


def training_step(
    task: config.Task, preset: str, sampler: PatchSampler, device: torch.device
) -> Callable[[int], None]:
    """Steps on one batch that lies ready: what training consumes if it never waits."""
    found = config.PAPER_POSITIONS[task.name, "edsr"]
    model = replace(config.model_preset(preset, task), positions=found)
    trainer = Trainer(model, config.train_preset(preset), Processes(device))
    low, target = Loader(sampler, device, 0).batch(0)
    return lambda step: trainer.step(step, sampler.indices, low, target)


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
