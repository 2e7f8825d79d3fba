"""Train several networks side by side on the same patches, and compare them.

    python -m acla.analysis.trial --out runs/trial --seeds 0,1,2 \
        --network "none: --attention none" \
        --network "acla: --attention acla --positions 2,4,6,8" \
        --task demosaic --blocks 8 --width 32 --train-set BSD400 --val-set Kodak24,McMaster18

Every network is what train.py makes of the flags of all, those of --network and the seed; its files
lie in --out/NAME-SEED. On a GPU each has a stream of its own, so that small networks fill it
together. The table gives the time of one 48×48 picture, measured at the end, the PSNR on the
validation sets, and the gain over the first network.
--show prints it once more from a file of --json."""

import argparse
import functools
import json
import shlex
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from acla import cli, console
from acla.analysis.results import psnr_cells
from acla.distributed import Processes
from acla.errors import UsageError
from acla.files import read_rows, write_rows
from acla.models.factory import describe
from acla.scripts import train
from acla.search.front import latencies
from acla.training import run_dir
from acla.training.run_dir import LOG, STATE, RunDir
from acla.training.side_by_side import train_side_by_side
from acla.training.trainer import Trainer

OUT = Path("runs/trial")
MACS, MS = "macs_48x48", "ms_48x48"
BatchOf = Callable[[int], tuple[Tensor, Tensor]]  # of a step
Change = Callable[[Trainer], None]  # of a network before its training
Networks = Mapping[str, tuple[str, Change | None]]  # by name: flags of train.py, and a change


class TrialRun:
    """One network in training. argv: flags of train.py; batches: those of the networks so far, by
    what decides them, so that several networks in step make each batch once."""

    def __init__(self, argv: Sequence[str], processes: Processes, batches: dict[str, BatchOf]):
        self.args = train.parse([*argv])
        run_dir.open_run(self.args.out, STATE, resume=False)
        preset = cli.pick_preset(self.args.preset, processes.device)
        self.plan = train.plan_from_flags(self.args, preset)
        self.data = train.load_data(self.plan, self.args, processes)
        config, network = self.plan.train, self.plan.model
        patches = config.train_set, config.batch_size, config.patch_size, config.seed
        key = str((self.plan.task, network.channels, *patches))
        self.batches = batches.setdefault(key, functools.lru_cache(1)(self.data.loader.batch))
        self.trainer, progress = train.restore_or_init(
            self.plan, self.args, processes, self.data, None, None
        )
        self.folder = RunDir(self.args.out, self.plan, progress, processes, self.data.sampler)

    def batch(self, step: int) -> tuple[Tensor, Tensor] | None:
        """The patches of a step, None after the last one."""
        return self.batches(step) if step < self.plan.train.steps else None

    def validate(self, done: int) -> None:
        """The validation after so many steps, if one is due."""
        steps, every = self.plan.train.steps, self.plan.train.val_every
        if done == steps or (done < steps and done % every == 0):
            psnr = train.validate(self.trainer, self.plan, self.data)
            self.folder.write(self.trainer, done, psnr)


def row(name: str, run: TrialRun) -> dict[str, Any]:
    """What a network is and has reached, by the last line of its log."""
    last = json.loads((run.args.out / LOG).read_text(encoding="utf-8").splitlines()[-1])
    size = describe(run.plan.model)
    sizes = {key: size[key] for key in ("params", MACS)}
    about = {"network": name, "task": str(run.plan.task), "seed": run.plan.train.seed}
    return about | sizes | last


def trial_table(rows: Sequence[dict[str, Any]]) -> str:
    """Networks down, validation sets across: PSNR and the gain over the first network. ms: of one
    48×48 picture, where and when the networks were trained."""
    sets = [key for key in rows[0] if key.startswith("val_psnr_")] or ["val_psnr"]
    groups: dict[str, list[dict[str, Any]]] = {}
    for one in rows:
        groups.setdefault(one["network"], []).append(one)
    first = next(iter(groups.values()))
    head, lines = ["network", "parameters", "multiply-adds", *["ms"][: MS in rows[0]]], []
    for key in sets:
        head += [key.removeprefix("val_psnr_").replace("val_psnr", "PSNR"), "gain"]
    for name, own in groups.items():
        cells = [name, f"{own[0]['params']:,}", f"{own[0][MACS] / 1e9:.2f} G"]
        if MS in rows[0]:
            cells.append(f"{own[0][MS]:.1f}")
        for key in sets:
            ours, base = ({one["seed"]: one[key] for one in group} for group in (own, first))
            cells += psnr_cells(ours, {} if own is first else base)
        lines.append(cells)
    return console.markdown(head, lines)


def trial_parser(name: str, text: str, out: Path) -> argparse.ArgumentParser:
    """The flags of every command that trains several networks; the others are those of train.py."""
    parser = cli.parser(name, text, allow_abbrev=False)
    add = parser.add_argument
    add("--seeds", default="0", help="seeds of every network (default: 0)")
    add("--out", type=Path, default=out, help=f"folder (default: {out})")
    add("--json", type=Path, help="write a line for each network there")
    return parser


def train_all(
    args: argparse.Namespace, networks: Networks, common: list[str]
) -> list[dict[str, Any]]:
    """Train the networks, with the flags that are common to all; their rows."""
    processes = Processes(cli.pick_device(train.parse(common).device))
    keys = [(name, seed) for seed in args.seeds.split(",") for name in networks]
    if len(set(keys)) < len(keys):
        raise UsageError("--seeds: every seed once")
    runs: dict[tuple[str, str], TrialRun] = {}
    batches: dict[str, BatchOf] = {}
    for name, seed in keys:
        flags, change = networks[name]
        out = ["--out", str(args.out / f"{name}-{seed}"), "--seed", seed]
        runs[name, seed] = TrialRun([*common, *shlex.split(flags), *out], processes, batches)
        if change:
            if runs[name, seed].trainer.averaged:
                raise UsageError(f"--ema: averages would lack the change of {name!r}; leave it out")
            change(runs[name, seed].trainer)
    trainers, batch = zip(*((run.trainer, run.batch) for run in runs.values()), strict=True)
    steps = range(max(run.plan.train.steps for run in runs.values()))
    bar = console.progress(steps, unit="step", desc="trial")
    for done in train_side_by_side(trainers, batch, bar):
        for run in runs.values():
            run.validate(done)
    first = {name: run for (name, seed), run in runs.items() if seed == keys[0][1]}
    times = latencies([run.trainer.model for run in first.values()])
    ms = dict(zip(first, times, strict=True))
    return [row(name, run) | {MS: ms[name]} for (name, _), run in runs.items()]


def report(args: argparse.Namespace, rows: Sequence[dict[str, Any]]) -> None:
    """Write the rows to --json, and print the table of every task."""
    if args.json:
        write_rows(args.json, rows)
    parts = []
    for task in dict.fromkeys(r["task"] for r in rows):
        own = [r for r in rows if r["task"] == task]
        parts.append(f"{task}, {max(r['step'] for r in own)} steps:\n\n{trial_table(own)}")
    console.say("\n\n".join(parts))


def parse(argv: list[str] | None) -> tuple[argparse.Namespace, Networks, list[str]]:
    """The command's flags, the networks, and the flags that are common to all."""
    flags = trial_parser("acla.analysis.trial", __doc__, OUT)
    text = "a network by flags of train.py, once for each"
    flags.add_argument("--network", action="append", default=[], metavar="'NAME: FLAGS'", help=text)
    text = "the table of a file of --json; nothing is trained"
    flags.add_argument("--show", type=Path, metavar="FILE", help=text)
    args, common = flags.parse_known_args(argv)
    if bool(args.network) == bool(args.show):
        raise UsageError("give --network for each network to train, or --show FILE")
    if args.show and common:
        raise UsageError(f"--show trains nothing: leave out {' '.join(common)}")
    named = [text.partition(":")[::2] for text in args.network]
    if len(dict(named)) < len(named):
        raise UsageError("--network: every NAME once")
    return args, {name: (flags, None) for name, flags in named}, common


def main(argv: list[str] | None = None) -> None:
    args, networks, common = parse(argv)
    if args.show:
        wanted = ("network", "task", "seed", "step", "params", MACS)
        rows = read_rows(args.show, "a file of --json", wanted)
    else:
        rows = train_all(args, networks, common)
    report(args, rows)


if __name__ == "__main__":
    cli.run(main)
