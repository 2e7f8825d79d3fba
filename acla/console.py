"""What every script does the same way: common flags, the device, notices, exit status."""

import json
import math
import os
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from acla.errors import UsageError


def is_first() -> bool:
    """Whether this is the first of the processes that torchrun started: the one that speaks."""
    return os.environ.get("RANK", "0") == "0"


def notice(text: str) -> None:
    """Progress and notices go to standard error; results alone go to standard output."""
    if is_first():
        print(text, file=sys.stderr, flush=True)


def tell_error(text: str) -> None:
    """An error, on standard error, from whichever process met it."""
    where = "" if is_first() else f" in process {os.environ['RANK']}"
    print(f"error{where}: {text}", file=sys.stderr, flush=True)


def say(text: str) -> None:
    """A result, on standard output."""
    if is_first():
        print(text, flush=True)


def progress(steps: Iterable, **options: object) -> tqdm:
    """A progress bar on standard error; where that is a file, a line now and then."""
    often = 0.1 if sys.stderr.isatty() else 10
    options = {"disable": not is_first(), **options}
    return tqdm(steps, mininterval=often, file=sys.stderr, **options)


def check_json(where: str | None, made: Path | None = None) -> None:
    """Refuse a --json that cannot be written, before any work is done; - is standard output, and
    `made` a folder that is made in time. Raises UsageError."""
    if where in (None, "-"):
        return
    if not (Path(where).parent.is_dir() or Path(where).parent == made):
        raise UsageError(f"--json {where}: there is no folder {Path(where).parent}")
    if Path(where).is_dir():
        raise UsageError(f"--json {where}: that is a folder; name a file in it")


def publish(told: str | None, result: Any, where: str | None) -> None:
    """What a command found: as text (None: it is printed already) to standard output and as JSON to
    a file, --json FILE, or as JSON alone to standard output, --json -."""
    text = json.dumps(finite(result), indent=1, ensure_ascii=False, allow_nan=False)
    if where == "-":
        say(text)
        return
    if told is not None:
        say(told)
    if where:
        Path(where).write_text(text + "\n", encoding="utf-8")


def finite(value: Any) -> Any:
    """The value with null for what JSON cannot hold: the infinite PSNR of equal pictures."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def markdown(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table whose columns are aligned, so that it reads well as it is."""
    table = [list(head), *map(list, rows)]
    widths = [max(3, *map(len, column)) for column in zip(*table, strict=True)]
    table.insert(1, ["-" * width for width in widths])
    padded = ([c.ljust(w) for c, w in zip(line, widths, strict=True)] for line in table)
    return "\n".join(f"| {' | '.join(line)} |" for line in padded)


def printable(text: str) -> str:
    """The text in one line that every terminal can show: names of files may hold anything."""
    encoding = sys.stdout.encoding or "ascii"
    line = "".join(c if c.isprintable() else "?" for c in " ".join(text.split()))
    return line.encode(encoding, "replace").decode(encoding)
