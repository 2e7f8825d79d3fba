"""Pairs of input and output files: one photo, or a folder whose tree is kept below another."""

import mimetypes
import os
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from acla.console import plural
from acla.data.image import FORMATS, SUFFIXES
from acla.errors import DataError, UsageError
from acla.restore.photo import READ_SUFFIXES


@dataclass
class Jobs:
    """pairs: (photo, file to write); failures: one line for each file that cannot be done; notices:
    what was left out on purpose."""

    pairs: list[tuple[Path, Path]] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)
    notices: list[str] = field(default_factory=list)


def find_jobs(
    source: Path, goal: str, suffix: str | None, overwrite: bool, skip: bool = False
) -> Jobs:
    """What there is to do for a photo or a folder `source`; `goal` names a file or a folder.

    suffix: of the files written, by default that of the photo. Nothing that exists is written to
    without `overwrite`, and a photo that is read never; skip: what exists is no failure. Raises
    UsageError for an impossible pair of paths, DataError for a folder without pictures.
    """
    if suffix is not None and suffix.lower() not in FORMATS:
        raise UsageError(f"--suffix {suffix}: unknown; known: {', '.join(SUFFIXES)}")
    if not (source.is_file() or source.is_dir()):
        raise UsageError(f"{source}: there is no such file or folder")
    jobs, out = Jobs(), Path(goal)
    if source.is_dir():
        pictures = walk(source, out, jobs)
        targets = [out / path.relative_to(source) for path in pictures]
        if not pictures and not jobs.failures:
            raise DataError(f"{source}: no picture in this folder ({', '.join(SUFFIXES)})")
    else:
        pictures = [source]
        inside = out.is_dir() or goal.endswith(("/", os.sep))
        targets = [out / source.name if inside else out]
    if suffix:
        targets = [path.with_suffix(suffix) for path in targets]
    check_paths(source, out, targets)
    taken = Counter(targets)
    read = {os.path.realpath(path) for path in pictures}
    skipped = 0
    for path, target in zip(pictures, targets, strict=True):
        if target.suffix.lower() not in FORMATS:
            jobs.notices.append(
                f"{path}: left out, no {target.suffix} is written: try --suffix .png"
            )
        elif taken[target] > 1:
            jobs.failures.append(f"{path}: another picture would be written to {target} as well")
        elif os.path.realpath(target) in read:
            jobs.failures.append(f"{path}: {target} is a picture that is read")
        elif os.path.lexists(target) and skip:
            skipped += 1
        elif os.path.lexists(target) and not overwrite:
            jobs.failures.append(
                f"{path}: {target} is there already; --overwrite replaces it, --skip-existing "
                "leaves it"
            )
        else:
            jobs.pairs.append((path, target))
    if skipped:
        jobs.notices.append(f"{out}: skipped what is there already, {skipped} of {len(pictures)}")
    return jobs


def check_paths(source: Path, out: Path, targets: list[Path]) -> None:
    """Refuse paths that no file of the call could be written to. Raises UsageError."""
    if os.path.realpath(source) == os.path.realpath(out):
        raise UsageError(f"{source} and {out} are the same; results need a place of their own")
    if source.is_dir():
        if out.exists() and not out.is_dir():
            raise UsageError(f"{source} is a folder, but {out} is a file")
    elif targets[0].suffix.lower() not in FORMATS:
        raise UsageError(
            f"{targets[0]}: unknown suffix {targets[0].suffix!r}; known: {', '.join(SUFFIXES)} "
            "(a folder must be there, or its name end in a slash)"
        )


def walk(folder: Path, out: Path, jobs: Jobs) -> list[Path]:
    """The pictures of a tree, sorted, without hidden ones and without the folder `out`.

    Links to folders are not followed, links to files only where they stay in the tree.
    """

    def unreadable(error: OSError) -> None:
        jobs.failures.append(f"{error.filename}: {error.strerror}")

    root, own = Path(os.path.realpath(folder)), os.path.realpath(out)
    pictures, others = [], 0
    for here, folders, files in os.walk(folder, onerror=unreadable):
        inner = [Path(here) / name for name in sorted(folders) if not name.startswith(".")]
        jobs.notices += [f"{path}: a link, not followed" for path in inner if path.is_symlink()]
        folders[:] = [
            path.name for path in inner if not path.is_symlink() and os.path.realpath(path) != own
        ]
        for path in (Path(here) / name for name in sorted(files) if not name.startswith(".")):
            if path.suffix.lower() not in READ_SUFFIXES:
                if str(mimetypes.guess_type(path.name)[0]).startswith("image/"):  # HEIC, AVIF …
                    jobs.notices.append(
                        f"{path}: left out, no {path.suffix} is read: convert it to PNG or TIFF"
                    )
                else:
                    others += 1
            elif not Path(os.path.realpath(path)).is_relative_to(root):
                jobs.notices.append(f"{path}: a link that leaves {folder}, not followed")
            elif path.is_file():
                pictures.append(path)
            else:
                jobs.failures.append(f"{path}: no ordinary file")
    if others:
        jobs.notices.append(f"{folder}: left out, {plural(others, 'file')} of other formats")
    return pictures
