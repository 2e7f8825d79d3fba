"""Photos before and after restoring, on a page with a divider to drag: one HTML file that needs no
network (extra `report`).

What browsers show goes into the page byte for byte, with its EXIF (camera, place);
anything else becomes a PNG of 8 bits."""

import argparse
import base64
import io
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from scipy.ndimage import uniform_filter

from acla import cli, console
from acla.console import printable
from acla.data.image import SUFFIXES, opened, rgb_to_ycc
from acla.errors import DataError, PictureError, UsageError
from acla.files import write_atomically
from acla.restore import photo
from acla.restore.jobs import Jobs, walk
from acla.restore.photo import Photo

TEMPLATE = Path(__file__).with_name("gallery.html")
LIMIT = 256 << 20  # bytes of all pictures as the page holds them; making it takes four times that
MIME = {"JPEG": "image/jpeg", "PNG": "image/png", "WEBP": "image/webp"}  # every browser's
NOTICED = 0.4  # mean change in levels, about twice what rounding RGB makes of no change
REGION = 256  # side of the region that changed most, in pixels


class Picture(NamedTuple):
    """A picture of the page: its name there, size in pixels, data URI, and a note on it."""

    name: str
    width: int
    height: int
    uri: str
    note: str


class Pair(NamedTuple):
    """Two pictures, what changed in words, and the middle of the region that changed most, 0..1."""

    before: Picture
    after: Picture
    marks: list[str]
    x: float
    y: float


def find_pairs(before: Path, after: Path) -> Jobs:
    """The pairs (before, after) of two photos, or of two trees by relative path without suffix.

    Of several pictures of one stem, equal names make a pair, and of the rest one before and one
    after. notices: also what has no partner. Raises UsageError for a folder and a file.
    """
    if before.is_dir() != after.is_dir():
        raise UsageError(f"{before} and {after}: give two photos or two folders")
    if not before.is_dir():
        return Jobs([(before, after)])
    jobs = Jobs()
    old, new = by_stem(before, after, jobs), by_stem(after, before, jobs)
    for stem in sorted(old.keys() | new.keys()):
        ours, theirs = ({p.name: p for p in paths.get(stem, [])} for paths in (old, new))
        jobs.pairs += [(ours.pop(name), theirs.pop(name)) for name in sorted(ours.keys() & theirs)]
        if len(ours) == len(theirs) == 1:
            jobs.pairs.append((*ours.values(), *theirs.values()))
        else:
            rest = (*ours.values(), *theirs.values())
            jobs.notices += [f"{path}: no partner" for path in rest]
    return jobs


def by_stem(folder: Path, other: Path, jobs: Jobs) -> dict[Path, list[Path]]:
    """The pictures of a tree without the folder `other`, by relative path without suffix."""
    paths: dict[Path, list[Path]] = {}
    for path in walk(folder, other, jobs):
        paths.setdefault(path.relative_to(folder).with_suffix(""), []).append(path)
    return paths


# Pictures of the page


def embedded(path: Path, root: Path, note: str) -> tuple[Picture, Photo]:
    """A photo below `root` as the page holds it, upright: the file byte for byte where every
    browser shows it as acla.restore.photo reads it, else a PNG. Raises PictureError, which names
    it."""
    seen = photo.read(path)
    with opened(path, photo.READABLE) as picture:
        kind = picture.format
        _, orientation = photo.read_exif(picture, [])
    # Notices name CMYK, several frames and EXIF that a browser might read otherwise
    odd = seen.notices or orientation != 1 or seen.levels.dtype != np.uint8 or kind not in MIME
    kind, data = ("PNG", to_png(seen)) if odd else (kind, path.read_bytes())
    uri = f"data:{MIME[kind]};base64,{base64.b64encode(data).decode()}"
    height, width = seen.levels.shape[:2]
    for text in seen.notices:
        console.notice(printable(f"{path}: {text}"))
    return Picture(str(path.relative_to(root)), width, height, uri, note), seen


def to_png(seen: Photo) -> bytes:
    """The bytes of a PNG of 8 bits with the photo's alpha and ICC profile, without its EXIF."""
    levels = photo.in_8_bits(seen.levels)
    alpha = None if seen.alpha is None else photo.in_8_bits(seen.alpha)
    file = io.BytesIO()
    photo.to_pillow(levels, False, alpha).save(file, "PNG", icc_profile=seen.icc or None)
    return file.getvalue()


def compared(old: Photo, new: Photo) -> tuple[list[str], float, float]:
    """What changed, in words, and the middle (x, y) of the region that changed most, 0..1."""
    height, width = new.levels.shape[:2]
    scale = width / old.levels.shape[1]
    planes = [
        photo.to_pillow(photo.in_8_bits(one.levels), False, None)
        .convert("RGB")
        .resize((width, height), Image.Resampling.BICUBIC)
        for one in (old, new)
    ]
    change = np.subtract(*(np.asarray(plane, np.float32) for plane in planes)).transpose(2, 0, 1)
    ycc = rgb_to_ycc(torch.from_numpy(change) / 255)
    ycc[1:] -= 128 / 255
    luma, *chroma = (255 * ycc).abs().mean((1, 2)).tolist()
    means = {"brightness": luma, "colour": sum(chroma) / 2}
    marks = [f"enlarged ×{scale:g}"] if scale != 1 else []
    marks += [f"{name} {mean:.1f} levels" for name, mean in means.items() if mean > NOTICED]
    moved = uniform_filter(np.abs(change).mean(0), (min(REGION, height), min(REGION, width)))
    y, x = np.unravel_index(moved.argmax(), moved.shape)
    if not change.any():
        y, x = height / 2, width / 2
    marks = marks or ["hardly changed" if change.any() else "unchanged"]
    return marks, round(float(x) / width, 4), round(float(y) / height, 4)


def embed(jobs: Jobs, before: Path, after: Path, log: list[str]) -> tuple[list[Pair], list[str]]:
    """The pairs that fit on a page, in their order, and the names of the others. log: lines of
    acla.restore. What cannot be read is left out, with a notice. Raises PictureError where that is
    all, DataError for a pair that differs in proportion, UsageError where none fits."""
    roots = [root if root.is_dir() else root.parent for root in (before, after)]
    shown, others, unreadable, total = [], [], [], 0
    for paths in console.progress(jobs.pairs, desc="page", unit="pair", leave=False):
        try:
            quality = photo.jpeg_quality(paths[0])
            notes = [f"JPEG quality {quality}" if quality else "", logged(paths[1], log)]
            (old, first), (new, second) = map(embedded, paths, roots, notes)
        except PictureError as error:
            unreadable.append(printable(str(error)))
            continue
        if old.width * new.height != new.width * old.height:
            raise DataError(
                f"{paths[0]} is {old.width}×{old.height} pixels (width × height), {paths[1]} is "
                f"{new.width}×{new.height}: a restored picture has the same proportion"
            )
        size = len(old.uri) + len(new.uri)
        if total + size > LIMIT:
            others.append(old.name)
            continue
        total += size
        shown.append(Pair(old, new, *compared(first, second)))
    if not shown and not others:
        raise PictureError("\n  ".join(unreadable))
    for text in unreadable:
        console.notice(f"left out: {text}")
    if not shown:
        raise UsageError(
            f"{jobs.pairs[0][0]}: no pair fits on a page of {LIMIT / 2**20:g} MiB; JPEGs are "
            "smaller (acla.restore --suffix .jpg)"
        )
    return shown, others


def logged(path: Path, log: list[str]) -> str:
    """What acla.restore said of a photo that it wrote."""
    head = f"{printable(str(path))}: "
    return next((line.removeprefix(head) for line in log if line.startswith(head)), "")


# The command


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = cli.parser("acla.analysis.gallery", __doc__)
    parser.add_argument("before", type=Path, metavar="BEFORE", help="a photo, or a folder of them")
    parser.add_argument("after", type=Path, metavar="AFTER", help="the same, restored")
    parser.add_argument("out", type=Path, metavar="OUT.html", help="the page to write")
    text = "what acla.restore printed, with the models"
    parser.add_argument("--log", type=Path, metavar="FILE", help=text)
    cli.add_overwrite(parser, "OUT.html")
    args = parser.parse_args(argv)
    cli.check_output(args.out, args.overwrite, ".html", ".htm")
    return args


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    try:
        import jinja2
    except ImportError as error:
        raise UsageError("pages need jinja2: pip install '.[report]'") from error
    jobs = find_pairs(args.before, args.after)
    for text in [*jobs.failures, *jobs.notices]:
        console.notice(printable(text))
    if not jobs.pairs:
        raise DataError(
            f"no picture of {args.before} ({', '.join(SUFFIXES)}) is in {args.after} too; by its "
            "path, but for the suffix, as python -m acla.restore writes it"
        )
    log = args.log.read_text(encoding="utf-8").splitlines() if args.log else []
    shown, others = embed(jobs, args.before, args.after, log)
    if others:
        names = ", ".join(others)
        console.notice(printable(f"too large for the page, left out, {len(others)}: {names}"))
    # Names of files may hold anything: markup is escaped, what is no text becomes ?
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined)
    template = environment.from_string(TEMPLATE.read_text(encoding="utf-8"))
    page = template.render(pairs=shown, others=others).encode("utf-8", "replace")
    write_atomically(args.out, page)
    console.say(printable(f"written: {args.out}: pairs {len(shown)}, {len(page) / 2**20:.1f} MiB"))


if __name__ == "__main__":
    cli.run(main)
