"""The README's figure: a JPEG before and after, and the network that restored it.

    python docs/figure.py docs/figure.png

The picture is of the built-in set `sample`, the network weights/car-q10-acla.safetensors; the PSNR
is that of the whole picture, as `python evaluate.py --dataset sample --q 10` prints it.
"""

import argparse
from pathlib import Path

import matplotlib
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Circle, FancyBboxPatch, PathPatch
from matplotlib.path import Path as Curve
from torch import Tensor

from acla.config import Task
from acla.data.datasets import find_set
from acla.data.degradations import pair
from acla.data.image import load
from acla.data.metrics import score
from acla.models.serialization import load_model
from acla.restore.inference import restore

WEIGHTS = Path(__file__).parents[1] / "weights" / "car-q10-acla.safetensors"
PICTURE, TOP, LEFT, SIDE = "camera.png", 84, 188, 128  # the crop, in pixels
ZOOM, GAP, TITLE, DRAWING = 4, 16, 46, 400  # pixels of the figure
WIDTH, HEIGHT = 3 * SIDE * ZOOM + 4 * GAP, TITLE + SIDE * ZOOM + DRAWING
INK, PALE, LINE = "#1f2933", "#e4e7eb", "#7b8794"
EXPLANATION = (
    "At every pixel, a module (coloured) samples 16 keys in each layer that an arc comes from; "
    "a mask decides which of them it reads"
)
COLOURS = ("#0077b6", "#2a9d8f", "#e9a700", "#e76f51", "#9b2f6f")  # one a module


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path, metavar="OUT.png")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    out = parse(argv).out
    network = load_model(WEIGHTS)
    path = next(path for path in find_set("sample", None) if path.name == PICTURE)
    task = Task("car", 10)
    degraded, original = pair(load(path), task, torch.Generator())
    with torch.inference_mode():
        restored = restore(network.model, degraded)
    titles = [
        f"JPEG, quality 10: {score(degraded, original, task)[0]:.2f} dB",
        f"restored: {score(restored, original, task)[0]:.2f} dB",
        "original",
    ]

    matplotlib.rcParams.update({"font.family": "DejaVu Sans", "font.size": 15, "text.color": INK})
    figure = Figure(figsize=(WIDTH / 100, HEIGHT / 100), dpi=100, facecolor="white")
    for column, picture in enumerate((degraded, restored, original)):
        draw_crop(figure, column, picture, titles[column])
    axes = figure.add_axes((0, 0, 1, DRAWING / HEIGHT))
    axes.set(xlim=(0, WIDTH), ylim=(0, DRAWING))
    axes.axis("off")
    draw_network(axes, network.config.blocks, network.config.positions)
    figure.savefig(out, metadata={"Software": None})


def draw_crop(figure: Figure, column: int, picture: Tensor, title: str) -> None:
    """The crop of a gray picture [1,H,W] in 0..1, every pixel ZOOM × ZOOM."""
    side = SIDE * ZOOM
    left = GAP + column * (side + GAP)
    axes = figure.add_axes((left / WIDTH, DRAWING / HEIGHT, side / WIDTH, side / HEIGHT))
    crop = picture[0, TOP : TOP + SIDE, LEFT : LEFT + SIDE]
    axes.imshow(crop, cmap="gray", vmin=0, vmax=1, interpolation="nearest")
    axes.axis("off")
    figure.text(left / WIDTH, 1 - 32 / HEIGHT, title, size=17, weight="bold")


def draw_network(axes: Axes, blocks: int, positions: tuple[int, ...]) -> None:
    """The network from left to right; above it, what every attention module reads."""
    y, block, step, gap = 124, 46, 55, 42
    draw_box(axes, GAP, y, 66, "JPEG")
    draw_box(axes, 102, y, 66, "head")
    skip, x = 177.0, 186.0
    features: list[float] = []  # where the features of the insert positions leave their blocks
    for number in range(1, blocks + 1):
        draw_box(axes, x, y, block, str(number), PALE if number not in positions else "#c5ccd4")
        x += step
        if number in positions:
            colour = COLOURS[len(features) % len(COLOURS)]
            features.append(x - step + block + 7)
            module = x - step + block + 33
            for feature in features:
                draw_arc(axes, feature, module, y, colour)
            axes.add_patch(Circle((module, y), 13, facecolor=colour, edgecolor="white", lw=2))
            x += gap
    axes.plot(features, [y] * len(features), "o", color=INK, ms=6, zorder=4)
    draw_box(axes, x, y, 62, "conv")
    draw_skip(axes, skip, x + 82, y, 52, "skip")
    draw_box(axes, x + 104, y, 62, "tail")
    draw_skip(axes, 92, x + 186, y, 88, "skip: the network learns the difference")
    draw_box(axes, x + 208, y, 96, "restored")
    axes.plot([GAP, x + 208], [y, y], color=LINE, lw=2, zorder=0)
    title = f"EDSR with ACLA behind blocks {', '.join(map(str, positions))}"
    axes.text(WIDTH / 2, DRAWING - 42, title, ha="center", size=17, weight="bold")
    axes.text(WIDTH / 2, DRAWING - 72, EXPLANATION, ha="center", size=14)


def draw_box(
    axes: Axes, x: float, y: float, width: float, text: str, colour: str = "white"
) -> None:
    """A box that begins at x, in the middle of the line."""
    style = {"facecolor": colour, "edgecolor": LINE, "lw": 1.5, "zorder": 3}
    style["boxstyle"] = "round,pad=0,rounding_size=6"
    axes.add_patch(FancyBboxPatch((x, y - 26), width, 52, **style))
    axes.text(x + width / 2, y, text, ha="center", va="center_baseline", zorder=4)


def draw_arc(axes: Axes, start: float, end: float, y: float, colour: str) -> None:
    """From a feature on the line to the module that reads it; the farther, the higher."""
    top = y + 50 + 0.2 * (end - start)
    points = [(start, y), (start, top), (end, top), (end, y)]
    curve = Curve(points, [Curve.MOVETO, Curve.CURVE4, Curve.CURVE4, Curve.CURVE4])
    axes.add_patch(PathPatch(curve, facecolor="none", edgecolor=colour, lw=2.2, zorder=2))


def draw_skip(axes: Axes, start: float, end: float, y: float, depth: float, text: str) -> None:
    """A connection below the line that is added at its end."""
    axes.plot([start, start, end, end], [y, y - depth, y - depth, y], color=LINE, lw=2, zorder=0)
    axes.plot([end], [y], "o", color="white", mec=LINE, mew=1.5, ms=19, zorder=3)
    axes.text(end, y, "+", ha="center", va="center_baseline", size=17, zorder=4)
    middle = {"ha": "center", "va": "center"}
    axes.text((start + end) / 2, y - depth, text, size=13, backgroundcolor="w", **middle)


if __name__ == "__main__":
    main()
