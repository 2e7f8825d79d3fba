"""Output: notices and errors to standard error, results to standard output or JSON."""

import json
import math
import os
import sys
from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, TextIO

from tqdm import tqdm

from acla.errors import UsageError
from acla.kernels.cache import why_not_written


def is_first() -> bool:
    """Whether this is the first process of torchrun, the one that prints."""
    return os.environ.get("RANK", "0") == "0"


def notice(text: str) -> None:
    """Print a notice on standard error."""
    if is_first():
        show(text, sys.stderr)


def error(text: str) -> None:
    """Print an error on standard error, in any process."""
    where = "" if is_first() else f" in process {os.environ['RANK']}"
    print(f"error{where}: {text}", file=sys.stderr, flush=True)


def say(text: str) -> None:
    """Print a result on standard output."""
    if is_first():
        show(text, sys.stdout)


def show(text: str, file: TextIO) -> None:
    """Print a line, above the progress bar of a terminal."""
    bars = tqdm.external_write_mode(file) if sys.stderr.isatty() else nullcontext()
    with bars:
        print(text, file=file, flush=True)


def progress(steps: Iterable | None, **options: object) -> tqdm:
    """A progress bar on standard error; in a file, a line every 10 seconds."""
    seconds = 0.1 if sys.stderr.isatty() else 10
    options = {"disable": not is_first(), **options}
    return tqdm(steps, mininterval=seconds, file=sys.stderr, **options)


def check_json(where: str | None) -> None:
    """Refuse a --json that cannot be written; - is standard output. Raises UsageError."""
    if reason := why_not_written(where):
        raise UsageError(f"--json {where}: {reason}")


def publish(shown: str | None, result: Any, where: str | None) -> None:
    """Print a result as text (None: printed already) and write it as JSON to a file, --json FILE;
    or print the JSON alone, --json -."""
    text = json.dumps(finite(result), indent=1, ensure_ascii=False, allow_nan=False)
    text = text.encode(errors="backslashreplace").decode()  # file names may hold any bytes
    if where == "-":
        say(text)
        return
    if shown is not None:
        say(shown)
    if where:
        Path(where).write_text(text + "\n", encoding="utf-8")


def finite(value: Any) -> Any:
    """The value with null for numbers that JSON lacks: the infinite PSNR of equal pictures."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def markdown(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table with aligned columns."""
    table = [list(head), *map(list, rows)]
    widths = [max(3, *map(len, column)) for column in zip(*table, strict=True)]
    table.insert(1, ["-" * width for width in widths])
    padded = ([c.ljust(w) for c, w in zip(line, widths, strict=True)] for line in table)
    return "\n".join(f"| {' | '.join(line)} |" for line in padded)


def plural(count: int, noun: str) -> str:
    """1 picture, 2 pictures."""
    return f"{count} {noun}" + "s" * (count != 1)


def printable(text: str) -> str:
    """The text in one line that any terminal can show, even a file name with control characters."""
    encoding = sys.stdout.encoding or "ascii"
    line = "".join(c if c.isprintable() else "?" for c in " ".join(text.split()))
    return line.encode(encoding, "replace").decode(encoding)
