"""Explain a restored picture: the pixels that a window comes from, and the attention's keys.

Numbers go to standard output and to --json, figures to --out (extra `report`).
"""

import argparse
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.nn import functional as F

from acla import cli, console
from acla.analysis import plots
from acla.analysis.attribution import Observed, Scene, diffusion_index, local_attribution, observe
from acla.analysis.figures import write_figures
from acla.config import Task
from acla.data.degradations import draw_setting, generator_for, pair
from acla.data.image import load
from acla.errors import UsageError
from acla.models.serialization import Checkpoint, load_model
from acla.restore import photo
from acla.restore.colour import NetworkInput, check_mosaic

WINDOW_SIDE = 16  # restored pixels; the window of Gu and Dong


# The input


def find_scene(args: argparse.Namespace, network: Checkpoint) -> Scene:
    """The picture of the flags, degraded; of a large one the part around the window."""
    low, target, task = read_input(args.picture, network, args.as_is)
    window, query = place(args, low, target, task.scale)
    top, bottom = span(window[0], window[2], task.scale, low.shape[1], args.crop)
    left, right = span(window[1], window[2], task.scale, low.shape[2], args.crop)
    part = low[:, top:bottom, left:right].contiguous()
    if part.shape != low.shape:
        console.notice(
            f"input: {part.shape[1]}×{part.shape[2]} of {low.shape[1]}×{low.shape[2]} low-quality "
            "pixels, around the window; --crop changes it, and the diffusion index with it"
        )
    return Scene(part, top, left, window, query, task)


def read_input(path: Path, network: Checkpoint, as_is: bool) -> tuple[Tensor, Tensor, Task]:
    """(the network's input, the picture in which details are looked for, the task) of a clean
    picture, which is degraded, or of one that is degraded already. Raises AclaError."""
    task, channels = network.task, network.config.channels
    if as_is:
        source = photo.read(path, ycc=channels == 1)
        check_mosaic(source, task)
        low = NetworkInput(source, task, channels)[:, :, :]
        return low, low, task
    if task.until:  # a range: the setting that the file's name draws
        task = Task(task.name, draw_setting(task, generator_for(path.stem)))
    return *pair(load(path), task, generator_for(path.stem), channels), task


def place(
    args: argparse.Namespace, low: Tensor, target: Tensor, scale: int
) -> tuple[tuple[int, int, int], tuple[int, int]]:
    """(window, query) of the flags, or the window with the most varied detail of `target` and its
    centre, in restored pixels. Raises UsageError."""
    H, W = (scale * length for length in low.shape[1:])
    side = min(WINDOW_SIDE, H, W)
    if args.window:
        y, x, side = args.window
    else:
        unit = H // target.shape[1]  # restored pixels in one of the target
        corner = [unit * p for p in most_varied(target, side // unit)]
        corner = [p - side // 2 for p in args.at] if args.at else corner
        y, x = (min(max(p, 0), n - side) for p, n in zip(corner, (H, W), strict=True))
    query = tuple(args.at or (y + side // 2, x + side // 2))
    inside = min(y, x, *query) >= 0 and max(y + side, query[0] + 1) <= H
    if not (inside and side > 0 and max(x + side, query[1] + 1) <= W):
        raise UsageError(f"--at, --window: outside the restored picture, {H}×{W} pixels")
    return (y, x, side), query


def most_varied(picture: Tensor, side: int) -> tuple[int, int]:
    """The corner (y, x) of the square window of a picture [C,H,W] whose detail, what a mean over
    3×3 pixels takes away, has the highest variance; of equals the first."""
    gray = picture.double().mean(0)[None, None]
    smooth = F.avg_pool2d(F.pad(gray, [1] * 4, mode="replicate"), 3, 1)
    mean, square = (F.avg_pool2d((gray - smooth) ** power, side, 1) for power in (1, 2))
    variance = square - mean**2
    return divmod(int(variance.argmax()), variance.shape[-1])


def span(start: int, side: int, scale: int, length: int, crop: int) -> tuple[int, int]:
    """(first, last + 1) of crop/scale low-quality pixels around a window, along one side of the
    input; as many as there are, or as the window needs. The first is even, for Bayer mosaics."""
    first, behind = start // scale, -(-(start + side) // scale)
    count = min(max(crop // scale, behind - first), length)
    begin = min(max((first + behind) // 2 - count // 2, 0), length - count)
    begin -= begin % 2
    return begin, max(begin + count, behind)


# The result


def as_json(
    args: argparse.Namespace, scene: Scene, attribution: Tensor, observed: Observed
) -> dict[str, Any]:
    """The result as JSON holds it. Windows and queries are in restored pixels, keys and the part of
    the picture in low-quality pixels, of the whole picture."""
    keys = [
        {
            "position": position,
            "layer": layer,
            "y": (own.position[l, :, 0] + scene.top).tolist(),
            "x": (own.position[l, :, 1] + scene.left).tolist(),
            "weight": own.weight[l].tolist(),
            "kept": own.kept[l].tolist(),
        }
        for position, own in observed.keys.items()
        for l, layer in enumerate(list(observed.keys)[: len(own.weight)])
    ]
    return {
        "checkpoint": str(args.checkpoint),
        "picture": str(args.picture),
        "task": str(scene.task),
        "window": scene.window,
        "query": scene.query,
        "part": [scene.top, scene.left, *scene.low.shape[1:]],
        "diffusion_index": diffusion_index(attribution),
        "steps": args.steps,
        "kept": observed.kept,
        "keys": keys,
        "branches": observed.branches,
    }


def summary(result: dict[str, Any]) -> str:
    """The result as text."""
    y, x, side = result["window"]
    index = result["diffusion_index"]
    lines = [
        console.printable(f"{result['picture']}: {result['task']}, {result['checkpoint']}"),
        f"window ({y}, {x}), {side} restored pixels a side",
        "diffusion index " + ("none: the window is flat" if index is None else f"{index:.2f}"),
    ]
    if shares := {(row["position"], row["layer"]): row["share"] for row in result["kept"]}:
        positions = sorted({position for position, _ in shares})
        rows = [
            [str(p), *(f"{100 * shares[p, l]:.1f}" if l <= p else "" for l in positions)]
            for p in positions
        ]
        lines += ["", console.markdown(["keys kept, % of layer", *map(str, positions)], rows)]
    if result["branches"]:
        weights = " ".join(f"{weight:.3f}" for weight in result["branches"])
        lines.append(f"weight of the branch with attention, block by block: {weights}")
    return "\n".join(lines)


# The command


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = cli.parser("acla.analysis.explain", __doc__)
    add = parser.add_argument
    add("picture", type=Path, metavar="PICTURE", help="a clean picture")
    text = "the network, with its task"
    add("--checkpoint", type=Path, required=True, metavar="FILE", help=text)
    text = "the picture is degraded already; else it is degraded as evaluate.py does it, for the "
    add("--as-is", action="store_true", help=text + "network's task")
    where = parser.add_mutually_exclusive_group()
    text = "the window to explain, and its centre to show the keys of, in restored pixels "
    text += f"(default: {WINDOW_SIDE} a side, where detail varies most)"
    where.add_argument("--window", type=int, nargs=3, metavar=("Y", "X", "SIDE"), help=text)
    text = "the window around this pixel instead"
    where.add_argument("--at", type=int, nargs=2, metavar=("Y", "X"), help=text)
    text = "points on the attribution's path (default: 50)"
    add("--steps", type=int, default=50, metavar="N", help=text)
    text = "of larger pictures N restored pixels a side are looked at (default: 256)"
    add("--crop", type=int, default=256, metavar="N", help=text)
    add("--out", type=Path, metavar="DIR", help="write figures there")
    cli.add_json(parser, "the numbers")
    cli.add_overwrite(parser, "a figure")
    cli.add_device(parser)
    args = parser.parse_args(argv)
    if args.steps < 1:
        raise UsageError(f"--steps must be above 0, not {args.steps}")
    if args.out and (args.out / "attribution.png").exists() and not args.overwrite:
        raise UsageError(f"{args.out} holds attribution.png; --overwrite replaces the figures")
    return args


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    pyplot = plots.require_pyplot() if args.out else None
    device = cli.pick_device(args.device)
    network = load_model(args.checkpoint)
    scene = find_scene(args, network)
    if args.out:
        args.out.mkdir(parents=True, exist_ok=True)
    console.check_json(args.json)
    model, low = network.model.to(device).requires_grad_(False), scene.low.to(device)
    observed = observe(model, low, *scene.inner_query)
    if not observed.keys:
        attention = network.config.attention if network.config.positions else "none"
        console.notice(f"attention {attention}: samples no keys, so that there are none to show")
    attribution = local_attribution(model, low, scene.inner_window, args.steps)
    result = as_json(args, scene, attribution, observed)
    console.publish(summary(result), result, args.json)
    if args.out:
        write_figures(pyplot, args.out, scene, attribution, observed)


if __name__ == "__main__":
    cli.run(main)
