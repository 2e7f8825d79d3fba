"""Our networks on CPUs beside what users would take instead, DnCNN: seconds a megapixel on one core
and on two, multiply-adds a pixel, and PSNR on LIVE1 at JPEG quality 10.

    python -m acla.analysis.alternatives --data DIR

With and without attention, which is taken out of the shipped file, in fp32 and bf16. DnCNN has the
20 layers of 64 channels that its authors use for JPEGs, and no weights here: its time alone counts.
One tile is restored, as all tiles of a photo are; networks take turns. One core: processor time;
two: wall time, which other programs lengthen."""

import argparse
import copy
import dataclasses
import functools
import itertools
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from acla import cli, console
from acla.analysis.precision import psnrs
from acla.config import Task
from acla.data.datasets import find_set
from acla.kernels.bench import Row, device_name, stream_rows
from acla.kernels.timing import paired, percentiles
from acla.models.factory import describe
from acla.models.serialization import Checkpoint
from acla.restore.inference import computing_in
from acla.restore.pretrained import PretrainedModels

TASK, SET = Task("car", 10), "LIVE1"
CPU = torch.device("cpu")


class DnCNN(nn.Sequential):
    """The network of Zhang et al. (IEEE Trans. Image Processing 26, 2017) for JPEGs, as KAIR's
    `dncnn3`: 3×3 convolutions with ReLU, without batch normalisation; the input is added."""

    def __init__(self) -> None:
        channels = [1, *[64] * 19, 1]
        parts = [nn.Conv2d(i, o, 3, padding=1) for i, o in itertools.pairwise(channels)]
        super().__init__(*[part for one in parts for part in (one, nn.ReLU())][:-1])

    def forward(self, pictures: Tensor) -> Tensor:
        return pictures - super().forward(pictures)


def without_attention(network: Checkpoint) -> Checkpoint:
    """The network with its attention modules taken out."""
    model = copy.deepcopy(network.model)
    model.config, model.attention = network.config.plain, nn.ModuleDict()
    return dataclasses.replace(network, model=model, config=model.config)


def kilo_macs(network: Checkpoint | None) -> float:
    """Multiply-adds a pixel in thousands, every key kept; of DnCNN for None."""
    if network:
        return describe(network.config, 48)["macs_48x48"] / 48**2 / 1e3
    with torch.device("meta"), FlopCounterMode(display=False) as counter, torch.no_grad():
        DnCNN()(torch.empty(1, 1, 48, 48))
    return counter.get_total_flops() / 2 / 48**2 / 1e3


def measured_rows(args: argparse.Namespace) -> Iterator[Row]:
    """A row for each network, format and number of cores."""
    path, ours, *_ = PretrainedModels(None, TASK, CPU, channels=1).pick(10, False)
    networks = {path.stem: ours, f"{path.stem}, no attention": without_attention(ours)}
    paths = find_set(SET, args.data) if args.data else []
    picture = torch.rand(1, 1, args.side, args.side)
    rows, works = [], []
    for precision in ("fp32", "bf16"):
        for name, network in {**networks, "DnCNN 20×64": None}.items():
            row: dict[str, Any] = {"device": device_name("cpu"), "network": name}
            row |= {"precision": precision, "side": args.side, "crop": args.crop}
            row["kmacs_per_pixel"] = round(kilo_macs(network), 1)
            row["psnr"] = None
            if network and paths:
                row["psnr"] = round(
                    statistics.mean(psnrs(network, TASK, precision, paths, args.crop)), 4
                )
            model = network.model if network else DnCNN().eval()
            model.to(memory_format=torch.channels_last)
            rows.append(row)
            tile = functools.partial(model, picture)
            works.append(torch.no_grad()(computing_in(precision, CPU)(tile)))
    for threads in args.cores:
        torch.set_num_threads(threads)
        for row, times in zip(rows, paired(works, "cpu", args.seconds), strict=True):
            shares = percentiles([ms / 1e3 / (args.side**2 / 1e6) for ms in times])
            seconds = {key.replace("ms_", "s_per_mp_"): value for key, value in shares.items()}
            yield {"threads": threads, **row, **seconds}


def times_table(rows: list[Row]) -> str:
    """A line for each network and format: medians."""
    lines: dict[tuple, list[Row]] = {}
    for row in rows:
        lines.setdefault((row["network"], row["precision"]), []).append(row)
    cells = []
    for (name, precision), own in lines.items():
        seconds = [f"{row['s_per_mp_p50']:.1f}" for row in own]
        cores = [f"s/MP, cores: {row['threads']}" for row in own]
        psnr = "–" if own[0]["psnr"] is None else f"{own[0]['psnr']:.3f}"
        cells.append([name, precision, *seconds, f"{own[0]['kmacs_per_pixel']:.0f}", psnr])
    head = ["network", "format", *cores, "multiply-adds, k/pixel", "PSNR, dB"]
    return console.markdown(head, cells)


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = cli.parser("acla.analysis.alternatives", __doc__)
    add = parser.add_argument
    add("--data", type=Path, metavar="DIR", help=f"folder that holds {SET} (default: time alone)")
    add("--cores", type=int, nargs="+", default=[1, 2], metavar="N", help="(default: 1 2)")
    add("--crop", type=int, metavar="N", help="PSNR of the middle N pixels alone (default: all)")
    add("--side", type=int, default=192, help="of the tile that is timed (default: 192)")
    add("--seconds", type=float, default=60, help="least time for each count of cores (default 60)")
    cli.add_json(parser, "the rows")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    console.check_json(args.json)
    threads = torch.get_num_threads()
    try:
        rows = stream_rows(measured_rows(args), args.json)
    finally:
        torch.set_num_threads(threads)
    if args.json != "-":
        console.say(times_table(rows))


if __name__ == "__main__":
    cli.run(main)
