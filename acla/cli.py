"""What every script does the same way: common flags, the device, notices, exit status."""

import argparse
import json
import math
import os
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from acla.config import PRESETS
from acla.errors import AclaError, UsageError
from acla.flags import add_task_flags
from acla.stopping import Stopped
from kernels import available_backends, why_not

DEVICES = ("auto", "cpu", "cuda")
NO_MEMORY = ("out of memory", "not enough memory", "can't allocate memory", "ALLOC_FAILED")


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


def add_common_flags(parser: argparse.ArgumentParser) -> None:
    """--device and --data, as every script understands them."""
    parser.add_argument(
        "--device", choices=DEVICES, default="auto", help="where to compute (default: auto)"
    )
    parser.add_argument(
        "--data",
        type=Path,
        metavar="DIR",
        default=os.environ.get("ACLA_DATA") or None,
        help="folder that holds the sets of pictures (default: the variable ACLA_DATA)",
    )


def add_run_flags(parser: argparse.ArgumentParser, out: Path, what: str) -> None:
    """The flags of a script that begins or resumes a run (`what`) in a folder, by default `out`:
    the common ones, the task, the preset, the folder."""
    add_common_flags(parser)
    parser.add_argument(
        "--preset", choices=PRESETS, help="size and length (default: paper on a GPU, tiny on a CPU)"
    )
    add_task_flags(parser)
    parser.add_argument("--out", type=Path, metavar="DIR", default=out, help=f"default: {out}")
    parser.add_argument("--resume", action="store_true", help=f"go on with the {what} in --out")
    parser.add_argument("--epochs", type=int, help="length in epochs instead of --steps")


def tell_of_sample(args: argparse.Namespace) -> None:
    """Say that the pictures below --data are not used where no set of them is named."""
    if args.data and "train_set" not in args:
        notice(f"set sample: built in; --train-set NAME takes a set of {args.data}")


def pick_device(name: str) -> torch.device:
    """The device that --device names; auto takes the GPU if there is one. Raises UsageError."""
    if name == "cuda" and not torch.cuda.is_available():
        raise UsageError("--device cuda: no CUDA device is available; use --device cpu")
    backend = os.environ.get("ACLA_BACKEND") or "auto"
    if backend not in ("auto", *available_backends()):
        known = ", ".join(available_backends())
        raise UsageError(f"ACLA_BACKEND names no backend: {backend!r}; known: {known}")
    gpu = name == "cuda" or (name == "auto" and torch.cuda.is_available())
    device = torch.device("cuda" if gpu else "cpu")
    reason = None if backend == "auto" else why_not(backend, torch.empty(0, device=device))
    if reason:
        raise UsageError(f"ACLA_BACKEND={backend} cannot run here: {reason}")
    return device


def pick_preset(name: str | None, device: torch.device) -> str:
    """The preset that --preset names, or the device's default, with a notice."""
    if name:
        return name
    preset = "paper" if device.type == "cuda" else "tiny"
    notice(f"preset {preset}: the default on {device.type}; --preset changes it")
    return preset


def require_pyplot() -> Any:
    """matplotlib.pyplot, drawing to files. Raises UsageError without matplotlib."""
    try:
        import matplotlib
    except ImportError as error:
        raise UsageError("figures need matplotlib: pip install '.[report]'") from error
    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


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


def out_of_memory(error: Exception) -> bool:
    """Whether an error says that memory ran out, on the GPU or not."""
    said = isinstance(error, RuntimeError) and any(sign in str(error) for sign in NO_MEMORY)
    return said or isinstance(error, MemoryError | torch.OutOfMemoryError)


def run(main: Callable[[list[str] | None], None], argv: list[str] | None = None) -> None:
    """Run a script: errors that the user can mend become one line and an exit status (1 the work
    failed, 2 the call was wrong)."""
    sys.stdout.reconfigure(errors="backslashreplace")  # σ must not end the work on any terminal
    try:
        main(argv)
    except UsageError as error:
        notice(f"error: {error}")  # every process was called the same way
        sys.exit(2)
    except AclaError as error:
        tell_error(str(error))
        sys.exit(1)
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        tell_error(f"{where}{error.strerror or error}; check the path, its rights and free space")
        sys.exit(1)
    except (MemoryError, RuntimeError) as error:
        if not out_of_memory(error):
            raise
        tell_error("out of memory; a smaller --batch, --patch or --tile needs less")
        sys.exit(1)
    except Stopped as stopped:
        notice(str(stopped))
        sys.exit(stopped.status)
    except KeyboardInterrupt:
        notice("stopped; --resume goes on from the last checkpoint of a training or a search")
        sys.exit(130)
