"""Train several networks side by side on the same patches, and compare them.

    python -m acla.analysis.trial --out runs/trial --seeds 0,1,2 \
        --network "none: --attention none" \
        --network "acla: --attention acla --positions 2,4,6,8" \
        --task demosaic --blocks 8 --width 32 --train-set BSD400 --val-set Kodak24,McMaster18

Every network is what train.py makes of the flags of all, those of --network and the seed; its files
lie in --out/NAME-SEED. On a GPU each has a stream of its own, so that small networks fill it
together. The table gives the PSNR on the validation sets, and the gain over the first network.
--show prints it once more from a file of --json."""

import argparse
import itertools
import json
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from acla import cli, console
from acla.analysis.results import mean_and_deviation
from acla.analysis.truth import beside
from acla.data.datasets import Loader
from acla.distributed import Processes
from acla.errors import NOT_VALID, AclaError, UsageError
from acla.models.factory import describe
from acla.scripts import train
from acla.training import run_dir
from acla.training.run_dir import LOG, STATE, RunDir

OUT = Path("runs/trial")
MACS = "macs_48x48"


class SharedLoader:
    """A loader's batches for several networks in step: each batch is made once."""

    def __init__(self, loader: Loader):
        self.loader, self.step = loader, -1
        self.current: tuple[Tensor, Tensor] = ()

    def batch(self, step: int) -> tuple[Tensor, Tensor]:
        if step != self.step:
            self.step, self.current = step, self.loader.batch(step)
        return self.current


class Run:
    """One network in training. argv: flags of train.py."""

    def __init__(self, argv: Sequence[str], processes: Processes, loaders: dict[str, SharedLoader]):
        self.args = train.parse([*argv])
        run_dir.open_run(self.args.out, STATE, resume=False)
        preset = cli.pick_preset(self.args.preset, processes.device)
        self.plan = train.plan_from_flags(self.args, preset)
        self.data = train.load_data(self.plan, self.args, processes)
        config, network = self.plan.train, self.plan.model
        patches = config.train_set, config.batch_size, config.patch_size, config.seed
        key = str((self.plan.task, network.channels, *patches))
        self.loader = loaders.setdefault(key, SharedLoader(self.data.loader))
        self.trainer, progress = train.restore_or_init(
            self.plan, self.args, processes, self.data, None, None
        )
        self.folder = RunDir(self.args.out, self.plan, progress, processes, self.data.sampler)
        gpu = processes.device.type == "cuda"
        self.stream = torch.cuda.Stream(processes.device) if gpu else None

    def batch(self, step: int) -> tuple[Tensor, Tensor] | None:
        """The patches of a step, None after the last one."""
        return self.loader.batch(step) if step < self.plan.train.steps else None

    def validate(self, done: int) -> None:
        """The validation that is due after so many steps, if one is."""
        steps, every = self.plan.train.steps, self.plan.train.val_every
        if done == steps or (done < steps and done % every == 0):
            psnr = train.validate(self.trainer, self.plan, self.data)
            self.folder.write(self.trainer, done, psnr)


def advance(runs: Sequence[Run], step: int) -> None:
    """One step of every network that has it, side by side, and the validations after it."""
    batches = [run.batch(step) for run in runs]
    with beside([run.stream for run in runs]):
        for run, batch in zip(runs, batches, strict=True):
            if batch:
                with torch.cuda.stream(run.stream):
                    run.trainer.step(step, run.data.sampler.indices, *batch)
    for run in runs:
        run.validate(step + 1)


def row(name: str, run: Run) -> dict[str, Any]:
    """What a network is and has reached, by the last line of its log."""
    last = json.loads((run.args.out / LOG).read_text(encoding="utf-8").splitlines()[-1])
    size = describe(run.plan.model)
    sizes = {key: size[key] for key in ("params", MACS)}
    about = {"network": name, "task": str(run.plan.task), "seed": run.plan.train.seed}
    return about | sizes | last


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Networks down, validation sets across: PSNR in dB (mean ± standard deviation over seeds) and
    the gain over the first network, paired by seed (mean ± standard error)."""
    sets = [key for key in rows[0] if key.startswith("val_psnr_")] or ["val_psnr"]
    groups: dict[str, list[dict[str, Any]]] = {}
    for one in rows:
        groups.setdefault(one["network"], []).append(one)
    first = next(iter(groups))
    base = {one["seed"]: one for one in groups[first]}
    head, lines = ["network", "parameters", "multiply-adds"], []
    for key in sets:
        head += [key.removeprefix("val_psnr_").replace("val_psnr", "PSNR"), "gain"]
    for name, own in groups.items():
        cells = [name, f"{own[0]['params']:,}", f"{own[0][MACS] / 1e9:.2f} G"]
        for key in sets:
            cells.append(mean_and_deviation([one[key] for one in own]))
            gains = [one[key] - base[one["seed"]][key] for one in own]
            cells.append("–" if name == first else mean_and_deviation(gains, "+", of_mean=True))
        lines.append(cells)
    return console.markdown(head, lines)


def parse(argv: list[str] | None) -> tuple[argparse.Namespace, list[str]]:
    parser = cli.parser("acla.analysis.trial", __doc__, allow_abbrev=False)
    parser.add_argument(
        "--network",
        action="append",
        default=[],
        metavar="'NAME: FLAGS'",
        help="a network by flags of train.py, once for each",
    )
    parser.add_argument("--seeds", default="0", help="seeds of every network (default: 0)")
    parser.add_argument("--out", type=Path, default=OUT, help=f"folder (default: {OUT})")
    parser.add_argument("--json", type=Path, help="write a line for each network there")
    text = "the table of a file of --json; nothing is trained"
    parser.add_argument("--show", type=Path, metavar="FILE", help=text)
    args, common = parser.parse_known_args(argv)
    if bool(args.network) == bool(args.show):
        raise UsageError("give --network for each network to train, or --show FILE")
    if args.show and common:
        raise UsageError(f"--show trains nothing: leave out {' '.join(common)}")
    return args, common


def read(path: Path) -> list[dict[str, Any]]:
    """The rows of a file of --json. Raises AclaError."""
    try:
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        wanted = {"network", "task", "seed", "step", "params", MACS}
        if not wanted <= set.intersection(*map(set, rows)):
            raise ValueError("rows of something else")
        return rows
    except (OSError, *NOT_VALID) as error:
        raise AclaError(f"{path}: not a file of --json: {error!r}") from error


def train_all(args: argparse.Namespace, common: list[str]) -> list[dict[str, Any]]:
    """Train the networks; their rows."""
    processes = Processes(cli.pick_device(train.parse(common).device))
    named = [text.partition(":")[::2] for text in args.network]
    keys = [(name, seed) for seed in args.seeds.split(",") for name, _ in named]
    if len(set(keys)) < len(keys):
        raise UsageError("--network: every NAME and every seed once")
    runs: dict[tuple[str, str], Run] = {}
    loaders: dict[str, SharedLoader] = {}
    for (name, seed), (_, flags) in zip(keys, itertools.cycle(named), strict=False):
        out = ["--out", str(args.out / f"{name}-{seed}"), "--seed", seed]
        runs[name, seed] = Run([*common, *shlex.split(flags), *out], processes, loaders)
    steps = max(run.plan.train.steps for run in runs.values())
    for step in console.progress(range(steps), unit="step", desc="trial"):
        advance([*runs.values()], step)
    return [row(name, run) for (name, _), run in runs.items()]


def main(argv: list[str] | None = None) -> None:
    args, common = parse(argv)
    rows = read(args.show) if args.show else train_all(args, common)
    if args.json:
        lines = "".join(json.dumps(r) + "\n" for r in rows)
        args.json.write_text(lines, encoding="utf-8")
    parts = []
    for task in dict.fromkeys(r["task"] for r in rows):
        own = [r for r in rows if r["task"] == task]
        parts.append(f"{task}, {max(r['step'] for r in own)} steps:\n\n{table(own)}")
    console.say("\n\n".join(parts))


if __name__ == "__main__":
    cli.run(main)
