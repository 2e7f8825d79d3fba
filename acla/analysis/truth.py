"""Train every subset of the insert positions of a small space: what there is for a search to find.

    python -m acla.analysis.truth truth.jsonl --task demosaic --blocks 6 --width 16

The first line of the file holds the plan. Each other line is a trained network: positions, seed,
multiply-adds of a 48×48 picture, in all and of the attention, parameters, seconds, and PSNR in dB
by validation set. Networks of one seed have the same initial backbone and the same patches. A call
with the same flags goes on where the file ends."""

import argparse
import dataclasses
import functools
import itertools
import json
import math
import multiprocessing
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch

from acla import cli, config, console
from acla.config import ATTENTIONS, ModelConfig, Task, TrainConfig
from acla.data.datasets import Loader, PatchSampler, Pictures, training_sets
from acla.distributed import Processes
from acla.errors import AclaError, UsageError, reading
from acla.files import Row, provenance
from acla.models.factory import describe
from acla.search.architecture import for_task
from acla.training import run_dir, validation
from acla.training.run_dir import TrainPlan
from acla.training.side_by_side import train_side_by_side
from acla.training.trainer import Trainer

MOST_BLOCKS = 12  # 4096 networks


class Group(NamedTuple):
    """Networks that one process trains side by side: a seed, and the positions of each."""

    seed: int
    subsets: list[tuple[int, ...]]


@dataclass(frozen=True)
class Space:
    """A worker's task: the plan, its pictures by validation set, and its device."""

    plan: TrainPlan
    pictures: tuple[Path, ...]
    val_sets: dict[str, list[Path]]
    device: torch.device

    def train(self, group: Group) -> list[Row]:
        """Train the networks of a group on the same patches. Returns their rows."""
        begun, task, length = time.monotonic(), self.plan.task, self.plan.train
        length = dataclasses.replace(length, seed=group.seed)
        net = self.plan.model
        models = [dataclasses.replace(net, positions=p) if p else net.plain for p in group.subsets]
        trainers = [Trainer(model, length, Processes(self.device)) for model in models]
        patches = length.patch_size, length.batch_size, length.seed
        sampler = PatchSampler(decoded(self.pictures), task, *patches, channels=net.channels)
        batch = functools.lru_cache(1)(Loader(sampler, self.device, workers=0).batch)
        for _ in train_side_by_side(trainers, [batch] * len(trainers), range(length.steps)):
            pass
        seconds = round((time.monotonic() - begun) / len(trainers), 2)
        return [self.row(trainer, length.seed, seconds) for trainer in trainers]

    def row(self, trainer: Trainer, seed: int, seconds: float) -> Row:
        """A trained network's row. Raises AclaError where its loss diverged."""
        paths = tuple(itertools.chain(*self.val_sets.values()))
        model, task = trainer.model.config, self.plan.task
        each = validation.each_psnr(trainer.result, decoded(paths), task, self.device)
        if not math.isfinite(sum(each)):
            raise AclaError(f"{model.positions}, seed {seed}: PSNR {sum(each)}; lower --lr")
        means = validation.means_by_set(each, self.val_sets)
        psnr = {name: round(mean, 4) for name, mean in means.items()}
        size = describe(model)
        row = {"positions": list(model.positions), "seed": seed, "psnr": psnr}
        row |= {name: size[name] for name in ("macs_48x48", "attention_macs_48x48", "params")}
        return row | {"seconds": seconds}


# The processes


@functools.cache  # once in a process
def decoded(paths: tuple[Path, ...]) -> Pictures:
    return Pictures(paths)


def train_all(space: Space, groups: Sequence[Group], jobs: int) -> Iterator[list[Row]]:
    """The rows of every group, from `jobs` processes as they are ready; of one in this process."""
    if jobs == 1:
        yield from map(space.train, groups)
        return
    # A forked process could not use a GPU.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(jobs, context, torch.set_num_threads, (1,)) as pool:
        try:
            for ready in as_completed([pool.submit(space.train, group) for group in groups]):
                yield ready.result()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def groups_left(blocks: int, seeds: Sequence[int], done: set, size: int) -> list[Group]:
    """The networks left, seed by seed, in groups of `size` of like cost, the largest first."""
    positions, groups = range(1, blocks + 1), []
    counts = range(blocks, -1, -1)
    subsets = [subset for n in counts for subset in itertools.combinations(positions, n)]
    for seed in seeds:
        left = [subset for subset in subsets if (subset, seed) not in done]
        groups += [Group(seed, left[i : i + size]) for i in range(0, len(left), size)]
    return groups


# The file


def read_truth(path: Path) -> tuple[dict[str, Any], list[Row]]:
    """The plan and the rows of a file, without an incomplete last line. Raises AclaError."""
    with reading(path, "a file of acla.analysis.truth"):
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
        head, *rows = [json.loads(line) for line in lines if line.endswith("\n")]
        for row in rows:
            row["positions"] = tuple(map(int, row["positions"]))
            row["mean"] = sum(row["psnr"].values()) / len(row["psnr"])
        return head["plan"], rows


def begin(path: Path, space: Space) -> set[tuple[tuple[int, ...], int]]:
    """The networks (positions, seed) that the file holds; a new file gets its first line. Raises
    UsageError for a file of another plan."""
    plan = json.loads(json.dumps(asdict(space.plan)))
    plan["data"] = {name: len(paths) for name, paths in space.val_sets.items()}
    plan["data"] |= {"train": len(space.pictures)}
    if not path.is_file():
        run_dir.append_row(path, {"plan": plan, **provenance(space.device)})
        return set()
    known, rows = read_truth(path)
    if known != plan:
        raise UsageError(f"{path} holds networks of another plan: give its flags or another file")
    complete = path.read_text(encoding="utf-8").rpartition("\n")
    path.write_text("".join(complete[:2]), encoding="utf-8")
    return {(row["positions"], row["seed"]) for row in rows}


# The command


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = cli.parser("acla.analysis.truth", __doc__)
    add = parser.add_argument
    add("file", type=Path, metavar="FILE", help="JSON lines to write, or to go on with")
    cli.add_common_flags(parser)
    text = "network size and schedule (default: tiny)"
    add("--preset", choices=config.PRESETS, default="tiny", help=text)
    add("--seeds", type=int, default=1, metavar="N", help="of each, from --seed on (default: 1)")
    add("--jobs", type=int, default=1, metavar="N", help="processes (default: 1)")
    text = (
        "networks that a process trains side by side, for a GPU that one leaves idle (default: 1)"
    )
    add("--together", type=int, default=1, metavar="N", help=text)
    cli.add_task_flags(parser)
    cli.add_flags(parser, TrainConfig, skip=("epoch_steps", "val_every"))
    cli.add_flags(parser, ModelConfig, skip=("positions",))
    args = parser.parse_args(argv)
    for name in ("seeds", "jobs", "together"):
        if getattr(args, name) < 1:
            raise UsageError(f"--{name} must be 1 or more, not {getattr(args, name)}")
    return args


def plan_from_flags(args: argparse.Namespace) -> TrainPlan:
    """The task, the network without positions, and its training. Raises UsageError."""
    task = cli.task_from_flags(args) or Task()
    size = config.model_preset(args.preset, task, getattr(args, "backbone", "edsr"))
    attention = getattr(args, "attention", "acla")
    size = dataclasses.replace(size, attention=attention, keys=ATTENTIONS[attention].keys)
    model = for_task(cli.override(size, args), task)
    cli.refuse_unused(args, model)
    if attention == "none" or model.blocks > MOST_BLOCKS:
        raise UsageError(
            f"every subset of {model.blocks} positions of --attention {attention}: give an "
            f"attention, and at most --blocks {MOST_BLOCKS}"
        )
    return TrainPlan(task, model, cli.override(config.train_preset(args.preset), args))


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    plan = plan_from_flags(args)
    training, val_sets = training_sets(plan.train.train_set, plan.train.val_set or None, args.data)
    paths = list(itertools.chain(*val_sets.values()))
    validation.validation_set(paths, plan.task, plan.model.channels)
    space = Space(plan, tuple(training), val_sets, cli.pick_device(args.device))
    done = begin(args.file, space)
    seeds = range(plan.train.seed, plan.train.seed + args.seeds)
    groups = groups_left(plan.model.blocks, seeds, done, args.together)
    total = len(done) + sum(len(group.subsets) for group in groups)
    console.notice(validation.validation_protocol(plan.task, plan.model.channels))
    with console.progress(None, initial=len(done), total=total, unit="network") as bar:
        for rows in train_all(space, groups, args.jobs):
            for row in rows:
                run_dir.append_row(args.file, row)
            bar.update(len(rows))
    console.say(f"written: {args.file}, {total} networks")


if __name__ == "__main__":
    cli.run(main)
