"""Restore a photo, or a folder of photos, with a trained network."""

import argparse
import dataclasses
import os
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from acla import photo
from acla.backbone import Backbone
from acla.checkpoint import Checkpoint
from acla.cli import DEVICES, notice, out_of_memory, pick_device, progress, run, say
from acla.colour import finished, network_input
from acla.config import Task
from acla.degrade import mosaic, pair
from acla.errors import AclaError, CheckpointError, PictureError, UsageError
from acla.flags import add_task_flags, task_from_flags
from acla.image import FORMATS
from acla.jobs import find_jobs, printable
from acla.photo import Photo
from acla.tiles import check_tile, starts, strips, within_memory
from acla.weights import Weights

# Side of the default tile per scale: the paper's networks need about 1.5 GB for one
TILE = {1: 384, 2: 192, 3: 128, 4: 128}


# One picture through a network


def restore(
    model: Backbone, picture: Tensor, tile: int | None = None, ensemble: bool = False
) -> Tensor:
    """Restore a picture [C,h,w] in 0..1 → [C,h·scale,w·scale], not rounded or clipped.

    tile: side of square tiles in low-quality pixels, 32 or more; None takes the picture whole.
    Neighbouring tiles share 32 pixels, or a third of smaller ones, where they blend. When memory
    runs out, again with tiles of half the side. ensemble: average over the 8 flips and rotations.
    The picture may lie on another device than the model.
    """
    check_tile(tile)

    def whole(tile: int | None) -> Tensor:
        return torch.cat(list(strips(model, picture, tile, ensemble)), 1)

    return within_memory(whole, tile, picture)


def restored_pair(
    network: Checkpoint,
    clean: Tensor,
    task: Task,
    generator: torch.Generator,
    tile: int | None = None,
    ensemble: bool = False,
) -> tuple[Tensor, Tensor]:
    """What a network makes of a clean picture [C,H,W] that was degraded, and what it should have
    made of it: prediction and target, both on the CPU. Raises CheckpointError for an answer that is
    not finite."""
    low, target = pair(clean, task, generator, network.config.channels)
    device = next(network.model.parameters()).device
    prediction = restore(network.model, low.to(device), tile, ensemble).cpu()
    if not torch.isfinite(prediction).all():
        raise CheckpointError("the network's output is not finite")
    return prediction, target


def check_ensemble(ensemble: bool, task: Task) -> None:
    """Refuse to turn a Bayer mosaic: turned, it is another pattern. Raises UsageError."""
    if ensemble and task.name == "demosaic":
        raise UsageError("--ensemble turns the picture, and a turned Bayer mosaic is another one")


# A photo through a network


def restore_photo(
    source: Photo,
    network: Checkpoint,
    tile: int | None = None,
    ensemble: bool = False,
    jpeg: bool = False,
    label: str = "",
    halve: bool = True,
) -> Photo:
    """The restored photo, with everything that the source carries.

    jpeg: it will be written as one, so that a JPEG's own Y, Cb, Cr stay what they are. label: what
    the progress bar says. halve: go on with smaller tiles when memory runs out. Raises
    CheckpointError for an answer that is not finite.
    """
    config, task = network.config, network.task
    picture = network_input(source, task, config.channels)
    around = photo.resized(source, config.scale)

    def whole(tile: int | None) -> np.ndarray:
        levels = np.empty_like(around.levels)
        rows = strips(network.model, picture, tile, ensemble)
        count = 1 if tile is None else len(starts(picture.shape[1], tile))
        top = 0
        for strip in progress(
            rows, desc=label, total=count, unit="row", leave=False, disable=count < 2
        ):
            if not torch.isfinite(strip).all():
                raise CheckpointError("the network's output is not finite")
            part = slice(top, top + strip.shape[1])
            levels[part] = finished(strip, around.levels[part], around.ycc, task, jpeg)
            top = part.stop
        return levels

    levels = within_memory(whole, tile, picture) if halve else whole(tile)
    return dataclasses.replace(around, levels=levels, ycc=source.ycc and jpeg)


def default_tile(scale: int, height: int, width: int) -> int | None:
    """The side of a tile where --tile names none: None, the picture whole, if it is no larger."""
    return TILE[scale] if height * width > TILE[scale] ** 2 else None


def check_mosaic(source: Photo, task: Task) -> None:
    """Refuse an ordinary photo where a Bayer mosaic is wanted. Raises PictureError."""
    if task.name != "demosaic":
        return
    stored = torch.from_numpy(np.array(source.levels, np.int32)).permute(2, 0, 1)
    if len(stored) != 3 or not torch.equal(mosaic(stored), stored):
        raise PictureError(
            "an ordinary photo; a demosaicing network wants a Bayer mosaic (G R over B G, missing "
            "samples zero) as evaluate.py --save-inputs writes it"
        )


# The command


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m acla.restore", description=__doc__)
    parser.add_argument("source", type=Path, metavar="IN", help="a photo, or a folder of them")
    parser.add_argument(
        "out", metavar="OUT", help="the file to write, whose suffix names its format, or a folder"
    )
    parser.add_argument(
        "--checkpoint",
        type=Path,
        metavar="FILE",
        help="the network (default: of the folder weights, by --task and the JPEG's quality)",
    )
    add_task_flags(parser, "the network's")
    parser.add_argument(
        "--tile",
        type=int,
        metavar="N",
        help=f"side of a tile in low-quality pixels (default: {TILE[1]} for photos with more "
        "pixels than that, less for super-resolution)",
    )
    parser.add_argument(
        "--ensemble", action="store_true", help="average over 8 flips and rotations: 8 times slower"
    )
    parser.add_argument(
        "--compare",
        action="store_true",
        help="also restore without tiles, whatever memory that needs, and print the difference",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace files that are there")
    parser.add_argument(
        "--suffix", metavar=".png", help="of the files written (default: as the names say)"
    )
    parser.add_argument(
        "--device", choices=DEVICES, default="auto", help="where to compute (default: auto)"
    )
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    check_tile(args.tile)
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise UsageError("photos are restored in one process: python, not torchrun")
    task = task_from_flags(args)
    if task and task.until:
        raise UsageError(
            f"--q {task.label[1:]}: a photo has one quality; give one, or leave --q out"
        )
    weights = Weights(args.checkpoint, task, pick_device(args.device))
    for task in weights.files:
        check_ensemble(args.ensemble, task)
    jobs = find_jobs(args.source, args.out, args.suffix, args.overwrite)
    for text in jobs.notices:
        notice(printable(text))
    failures = jobs.failures
    for number, (path, target) in enumerate(jobs.pairs, 1):
        label = printable(f"{number}/{len(jobs.pairs)} {path.name}")
        try:
            say(printable(run_job(path, target, weights, args, label)))
        except (AclaError, OSError, MemoryError, RuntimeError) as error:
            short = out_of_memory(error)
            if isinstance(error, RuntimeError) and not short:
                raise
            reason = "out of memory" if short else str(error)
            failures.append(reason if reason.startswith(str(path)) else f"{path}: {reason}")
    if failures:
        lines = [printable(text) for text in failures]
        if args.source.is_dir():
            lines.insert(0, f"{len(failures)} pictures could not be restored:")
        raise AclaError("\n  ".join(lines))


def run_job(
    path: Path, target: Path, weights: Weights, args: argparse.Namespace, label: str
) -> str:
    """Restore one photo and say what was written. Raises AclaError, OSError or MemoryError."""
    quality = photo.jpeg_quality(path) if args.task_q is None else args.task_q[0]
    file, network, outside = weights.pick(quality)
    source = photo.read(path, ycc=network.config.channels == 1)
    check_mosaic(source, network.task)
    tile = args.tile or default_tile(network.config.scale, *source.levels.shape[:2])
    jpeg = FORMATS[target.suffix.lower()] == "JPEG"
    restored = restore_photo(source, network, tile, args.ensemble, jpeg, label)
    target.parent.mkdir(parents=True, exist_ok=True)
    photo.save(restored, target)
    for text in [*([outside] if outside else []), *restored.notices]:
        notice(printable(f"{path}: {text}"))
    told = f"{target}: {network.task}, {file}"
    if not args.compare:
        return told
    if tile is None:
        return f"{told}, taken whole"
    return f"{told}, {difference(restored, source, network, args.ensemble, jpeg)}"


def difference(tiled: Photo, source: Photo, network: Checkpoint, ensemble: bool, jpeg: bool) -> str:
    """How far a result lies from the one without tiles, in levels of what is written."""
    try:
        whole = restore_photo(source, network, None, ensemble, jpeg, halve=False)
    except (MemoryError, RuntimeError) as error:
        if not out_of_memory(error):
            raise
        return "too little memory to take it whole and compare"
    apart = np.abs(tiled.levels.astype(np.int32) - whole.levels)
    top = np.iinfo(tiled.levels.dtype).max
    return f"tiles move {apart.max()} of {top} levels at most, {apart.mean():.2g} on average"


if __name__ == "__main__":
    run(main)
