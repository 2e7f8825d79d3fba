"""How far short number formats move the PSNR of networks, beside fp32.

    python -m acla.analysis.precision --precision bf16 --crop 96 --data DIR

Every network that comes with this package, or those of --checkpoint, on the sets of its task, by
the protocol of evaluate.py: at its setting, or at both ends of its range and at the usual one."""

import argparse
import functools
import statistics
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from acla import cli, console
from acla.config import SETTING_DEFAULT, Task
from acla.data.datasets import find_set
from acla.data.degradations import generator_for
from acla.data.image import middle
from acla.data.metrics import score_pictures
from acla.kernels.bench import Row, stream_rows
from acla.models.serialization import Checkpoint, load_model
from acla.restore.inference import AUTOCAST_TYPES, computing_in, restored_pair
from acla.restore.pretrained import shipped

SETS = {
    "car": ("LIVE1", "Classic5"),
    "sr": ("Set5", "Set14", "B100"),
    "denoise": ("Kodak24", "BSD68"),
    "demosaic": ("McMaster18", "Kodak24"),
}
HEAD = ("network", "task", "set", "fp32, dB", "format", "change, dB", "least", "most")


def psnrs(
    network: Checkpoint, task: Task, precision: str, paths: list[Path], crop: int | None
) -> list[float]:
    """PSNR in dB of every picture, or of its middle `crop` pixels."""

    def predict(clean: Tensor, path: Path) -> tuple[Tensor, Tensor]:
        return restored_pair(network, middle(clean, crop), task, generator_for(path.stem))

    device = next(network.model.parameters()).device
    with computing_in(precision, device):
        scored = score_pictures(predict, paths, task, desc=f"{task}, {precision}", leave=False)
        return [one.psnr for one in scored]


def tasks(trained: Task) -> list[Task]:
    """What a network is scored on; no noise, σ 0, is no task."""
    if not trained.until:
        return [trained]
    settings = {trained.setting or 1, SETTING_DEFAULT[trained.name], trained.until}
    found = [Task(trained.name, setting) for setting in sorted(settings)]
    return [task for task in found if trained.covers(task)]


def measured_rows(args: argparse.Namespace, device: torch.device) -> Iterator[Row]:
    """A row for each network, task and set."""
    for path in args.checkpoint or [model.path for model in shipped()]:
        network = load_model(path)
        network.model.to(device)
        for task in tasks(network.task):
            for name in args.dataset.split(",") if args.dataset else SETS[task.name]:
                score = functools.partial(
                    psnrs, network, task, paths=find_set(name, args.data), crop=args.crop
                )
                exact, short = score(precision="fp32"), score(precision=args.precision)
                changes = [b - a for a, b in zip(exact, short, strict=True)]
                values = {"psnr": exact, "change": changes}
                means = {key: round(statistics.mean(of), 4) for key, of in values.items()}
                row = {"network": path.stem, "task": str(task), "dataset": name, "crop": args.crop}
                row |= {"precision": args.precision, **means}
                yield row | {"least": round(min(changes), 4), "most": round(max(changes), 4)}


def table(rows: list[Row]) -> str:
    """A line for each row; least and most: of a picture."""
    return console.markdown(
        HEAD,
        [
            [row["network"], row["task"], row["dataset"], f"{row['psnr']:.2f}", row["precision"]]
            + [f"{row[key]:+.4f}" for key in ("change", "least", "most")]
            for row in rows
        ],
    )


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = cli.parser("acla.analysis.precision", __doc__)
    add = parser.add_argument
    short = [name for name in AUTOCAST_TYPES if name != "fp32"]
    add("--precision", choices=short, default="bf16", help="(default: bf16)")
    text = "networks (default: all that come with the package)"
    add("--checkpoint", type=Path, nargs="+", metavar="FILE", help=text)
    add("--dataset", metavar="NAME[,NAME...]", help="sets (default: those of the task)")
    add("--crop", type=int, metavar="N", help="the middle N pixels alone (default: all)")
    cli.add_json(parser, "the rows")
    cli.add_common_flags(parser)
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    console.check_json(args.json)
    rows = stream_rows(measured_rows(args, cli.pick_device(args.device)), args.json)
    if args.json != "-":
        console.say(table(rows))


if __name__ == "__main__":
    cli.run(main)
