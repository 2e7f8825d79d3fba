"""Every task of the pretrained models before and after, on a part of a built-in picture.

python docs/tasks.py docs/tasks.png
"""

import argparse
from pathlib import Path

import torch
from torch import Tensor

from acla.analysis.plots import require_pyplot
from acla.config import Task
from acla.data.datasets import find_set
from acla.data.degradations import pair
from acla.data.image import load, round_8bit, to_rgb
from acla.data.metrics import score
from acla.restore.inference import restore
from acla.restore.pretrained import PretrainedModels

PICTURE, TOP, LEFT, SIDE = "chelsea.png", 60, 100, 192  # the part, in pixels
EXAMPLES = {
    "JPEG of quality 10": Task("car", 10),
    "noise of σ 50": Task("denoise", 50),
    "a third of the size": Task("sr", 3),
    "Bayer mosaic": Task("demosaic", 0),
}


def before_and_after(task: Task) -> list[tuple[Tensor, float | None]]:
    """(picture [3, SIDE, SIDE], PSNR in dB) of the input, enlarged by repeating pixels, and of the
    restored picture; the original."""
    setting = None if task.scale > 1 else task.setting
    network = PretrainedModels(None, task, torch.device("cpu")).pick(setting, True).network
    path = next(path for path in find_set("sample", None) if path.name == PICTURE)
    clean = load(path)[:, TOP : TOP + SIDE, LEFT : LEFT + SIDE]
    generator = torch.Generator().manual_seed(0)
    low, target = pair(clean, task, generator, network.config.channels)
    restored = restore(network.model, low)
    large = low.repeat_interleave(task.scale, 1).repeat_interleave(task.scale, 2)
    scored = [(picture, score(picture, target, task)[0]) for picture in (large, restored)]
    return [*scored, (target, None)]


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path, metavar="OUT.png")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    out = parse(argv).out
    pyplot = require_pyplot()
    rows = {name: before_and_after(task) for name, task in EXAMPLES.items()}
    figure, axes = pyplot.subplots(
        3, len(rows), figsize=(2.2 * len(rows), 7.2), layout="constrained", squeeze=False
    )
    for column, (name, pictures) in zip(axes.T, rows.items(), strict=True):
        heads = name, "restored", "original"
        for axis, head, (picture, psnr) in zip(column, heads, pictures, strict=True):
            axis.imshow(round_8bit(to_rgb(picture)).permute(1, 2, 0), interpolation="nearest")
            axis.set_title(head + (f": {psnr:.2f} dB" if psnr else ""), size=10)
            axis.axis("off")
    figure.savefig(out, dpi=120, metadata={"Software": None})


if __name__ == "__main__":
    main()
