"""Restore a photo, or a folder of photos, with a trained network."""

import argparse
import functools
import os
import signal
from collections.abc import Callable
from pathlib import Path

import numpy as np

from acla import cli
from acla.config import SETTING_FLAG, Task
from acla.console import notice, plural, printable, say
from acla.data.image import FORMATS
from acla.data.jpeg import Cells
from acla.errors import AclaError, Stopped, UsageError, out_of_memory
from acla.models.serialization import Checkpoint
from acla.restore import inference, photo
from acla.restore.colour import check_mosaic, restore_photo
from acla.restore.jobs import find_jobs
from acla.restore.photo import Photo
from acla.restore.pretrained import REACH, Choice, PretrainedModels
from acla.restore.progress import PixelBar, Sizes, announce, sizes_of

BEST_AGAIN = 94  # quality; restored, better JPEGs may lose more as JPEGs than they gained
BLIND = Task("denoise", 0, 55)  # without --sigma

# The command


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = cli.parser("acla.restore", __doc__)
    add = parser.add_argument
    add("source", type=Path, metavar="IN", help="a photo, or a folder of them")
    text = "the file to write, whose suffix names its format, or a folder"
    add("out", metavar="OUT", help=text)
    text = "the network (default: a pretrained model, by --task, the JPEG's quality and --sigma)"
    add("--checkpoint", type=Path, metavar="FILE", help=text)
    cli.add_task_flags(parser, "the network's")
    side = inference.TILE[1]
    text = f"side of a tile in low-quality pixels (default: {side} for photos of more than "
    text += f"{side}×{side} pixels, less for super-resolution)"
    add("--tile", type=int, metavar="N", help=text)
    text = "average over 8 flips and rotations: 8 times slower"
    add("--ensemble", action="store_true", help=text)
    text = "also restore without tiles, whatever memory that needs, and print the difference"
    add("--compare", action="store_true", help=text)
    text = "keep a JPEG's answer within what the file says of its photo (default: yes, unless "
    text += "--q names another quality than the file's)"
    add("--project", action=argparse.BooleanOptionalAction, default=True, help=text)
    text = "number format of the network (default: auto, the device's fastest)"
    add("--precision", choices=inference.PRECISIONS, default="auto", help=text)
    existing = parser.add_mutually_exclusive_group()
    existing.add_argument("--overwrite", action="store_true", help="replace files that are there")
    text = "leave out photos whose result is there"
    existing.add_argument("--skip-existing", action="store_true", help=text)
    add("--suffix", metavar=".png", help="of the files written (default: as the names say)")
    cli.add_device(parser)
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    inference.check_tile(args.tile)
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise UsageError("photos are restored in one process: python, not torchrun")
    task = cli.task_from_flags(args)
    args.asked = bool(task or args.checkpoint)
    if task and task.until:
        flag = SETTING_FLAG[task.name]
        raise UsageError(
            f"--{flag} {task.value}: a photo has one of them: give it, or leave --{flag} out"
        )
    if task and task.name == "denoise" and args.task_sigma is None:
        task = BLIND
    models = PretrainedModels(args.checkpoint, task, cli.pick_device(args.device))
    inference.keep_memory(models.device)
    inference.check_ensemble(args.ensemble, models.task)
    jobs = find_jobs(args.source, args.out, args.suffix, args.overwrite, args.skip_existing)
    for text in jobs.notices:
        notice(printable(text))
    targets = dict(jobs.pairs)
    sizes = sizes_of(
        targets,
        lambda path: not why_left(path, targets[path], photo.jpeg_quality(path), models, args),
    )
    if sizes:
        foresee(sizes, models, args)
    bar = PixelBar(sizes)
    failures = jobs.failures + restore_all(jobs.pairs, models, args, bar)
    if failures:
        lines = [printable(text) for text in failures]
        if args.source.is_dir():
            lines.insert(0, f"{plural(len(failures), 'picture')} could not be restored:")
        raise AclaError("\n  ".join(lines))


def choose_model(
    path: Path, quality: int | None, models: PretrainedModels, args: argparse.Namespace
) -> Choice:
    """The model for a photo, of this JPEG quality. Raises UsageError, PictureError."""
    setting = {"car": quality, "denoise": args.task_sigma and args.task_sigma[0]}
    return models.pick(setting.get(models.task.name), photo.in_colour(path))


def why_left(
    path: Path, target: Path, own: int | None, models: PretrainedModels, args: argparse.Namespace
) -> str:
    """Why a photo, of this JPEG quality, is left as it is, "" if it is restored. Raises UsageError,
    PictureError."""
    if args.asked:
        return ""
    if own is None or (args.project and not photo.has_cells(path)):
        return "not a JPEG" + " with Y" * (own is not None)
    chosen = choose_model(path, own, models, args)
    task = chosen.network.task
    if args.project and own > (task.until or task.setting + REACH):  # it may lose
        return f"of quality {own}, and {chosen.path.stem} is for {task}"
    if args.project and own > BEST_AGAIN and FORMATS[target.suffix.lower()] == "JPEG":
        return f"of quality {own}, and a second JPEG of it may be worse than the first, but no PNG"
    return ""


def foresee(sizes: Sizes, models: PretrainedModels, args: argparse.Namespace) -> None:
    """Announce how long the photos will take with the network of the first one."""
    path = next(iter(sizes))
    quality = args.task_q[0] if args.task_q else photo.jpeg_quality(path)
    try:
        network = choose_model(path, quality, models, args).network
    except UsageError:
        return  # each photo says why
    precision = inference.pick_precision(args.precision, models.device, network.task)
    with inference.computing_in(precision, models.device):
        announce(network.model, sizes, args.tile, args.ensemble)


def restore_all(
    pairs: list[tuple[Path, Path]],
    models: PretrainedModels,
    args: argparse.Namespace,
    bar: PixelBar,
) -> list[str]:
    """Restore photos one after another, and say what was written. Returns a line for each that
    failed."""
    failures = []
    with bar.bar:
        for number, (path, target) in enumerate(pairs, 1):
            bar.begin(path, printable(f"{number}/{len(pairs)} {path.name}"))
            result = None
            try:
                result = run_job(path, target, models, args, bar.advance)
            except KeyboardInterrupt:
                bar.bar.close()
                done = f"{number - 1} of {len(pairs)}"
                text = f"stopped, {done} done; --skip-existing goes on from there"
                raise Stopped(signal.SIGINT, text) from None
            except BrokenPipeError:  # a notice that nobody reads
                raise
            except (AclaError, OSError, MemoryError, RuntimeError) as error:
                short = out_of_memory(error)
                if isinstance(error, RuntimeError) and not short:
                    raise
                reason = "out of memory" if short else str(error)
                failures.append(reason if reason.startswith(str(path)) else f"{path}: {reason}")
            bar.end(restored=result is not None)
            if result:
                say(printable(result))
    return failures


def run_job(
    path: Path,
    target: Path,
    models: PretrainedModels,
    args: argparse.Namespace,
    advance: Callable[[float], object],
) -> str:
    """Restore one photo and say what was written. Raises AclaError, OSError or MemoryError."""
    own = photo.jpeg_quality(path)
    quality = own if args.task_q is None else args.task_q[0]
    target.parent.mkdir(parents=True, exist_ok=True)
    if why := why_left(path, target, own, models, args):
        return leave(path, target, why)
    chosen = choose_model(path, quality, models, args)
    network = chosen.network
    cells = photo.read_cells(path) if args.project and own and quality == own else None
    ycc = network.config.channels == 1 or network.task.name == "car"
    source = photo.read(path, ycc)
    # A good JPEG, written at quality 95, would lose more than it gained
    source.quality = max(95, min(100, (own or 0) + 10))
    check_mosaic(source, network.task)
    tile = args.tile or inference.default_tile(network.config.scale, *source.levels.shape[:2])
    jpeg = FORMATS[target.suffix.lower()] == "JPEG"
    cells = cells if network.task.name == "car" else None
    precision = inference.pick_precision(args.precision, models.device, network.task)
    with inference.computing_in(precision, models.device):
        restored = restore_photo(source, network, tile, args.ensemble, jpeg, advance, cells=cells)
    photo.save(restored, target)
    print_notices(path, [*([chosen.notice] if chosen.notice else []), *restored.notices])
    result = f"{target}: {network.task}, {args.checkpoint or chosen.path.stem}"
    result += f" ({chosen.reason})" * bool(chosen.reason)
    result += f", {precision}" * (precision != "fp32")
    if not args.compare:
        return result
    if tile is None:
        return f"{result}, taken whole"
    with inference.computing_in(precision, models.device):
        return f"{result}, {difference(restored, source, network, args.ensemble, jpeg, cells)}"


def leave(path: Path, target: Path, why: str) -> str:
    """Write a photo as it is, and say why. Raises PictureError."""
    notices, what = photo.copy(path, target).notices, "it"
    if photo.FRAMES in notices:
        notices.remove(photo.FRAMES)
        what = "its first frame"
    why += f", so {what} is left as it is; --task, --q or --checkpoint restores it"
    print_notices(path, [why, *notices])
    return f"{target}: not restored"


def print_notices(path: Path, notices: list[str]) -> None:
    """Print notices about a photo."""
    for text in notices:
        notice(printable(f"{path}: {text}"))


def difference(
    tiled: Photo,
    source: Photo,
    network: Checkpoint,
    ensemble: bool,
    jpeg: bool,
    cells: Cells | None,
) -> str:
    """How far a result lies from the one without tiles, in levels of what is written."""
    try:
        whole = restore_photo(
            source, network, None, ensemble, jpeg, smaller_tiles=False, cells=cells
        )
    except (MemoryError, RuntimeError) as error:
        if not out_of_memory(error):
            raise
        return "too little memory to take it whole and compare"
    apart = np.abs(tiled.levels.astype(np.int32) - whole.levels)
    top = np.iinfo(tiled.levels.dtype).max
    return f"tiles move {apart.max()} of {top} levels at most, {apart.mean():.2g} on average"


command = functools.partial(cli.run, main)  # acla-restore

if __name__ == "__main__":
    command()
