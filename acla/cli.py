"""The command line of every script: flags, the device, exit status."""

import argparse
import dataclasses
import functools
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_origin

import torch

from acla.config import (
    OF_KEYS,
    OF_MASKS,
    PRESETS,
    RENAMED,
    SETTING_DEFAULT,
    SETTING_FLAG,
    TASKS,
    ModelConfig,
    Task,
    flag_of,
)
from acla.console import error, notice
from acla.errors import AclaError, Stopped, UsageError, out_of_memory
from acla.kernels import BACKENDS, output, why_not

DEVICES = ("auto", "cpu", "cuda")


def parser(module: str | None, description: str | None, **more: Any) -> argparse.ArgumentParser:
    """The empty parser of `python -m module` or of a script; its description keeps line breaks."""
    keep = argparse.RawDescriptionHelpFormatter
    prog = f"python -m {module}" if module else None
    return argparse.ArgumentParser(prog, description=description, formatter_class=keep, **more)


def add_device(parser: argparse.ArgumentParser) -> None:
    text = "where to compute (default: auto)"
    parser.add_argument("--device", choices=DEVICES, default="auto", help=text)


def add_common_flags(parser: argparse.ArgumentParser) -> None:
    """--device and --data, common to every script."""
    add_device(parser)
    text = "folder that holds the sets of pictures (default: the variable ACLA_DATA)"
    default = os.environ.get("ACLA_DATA") or None
    parser.add_argument("--data", type=Path, metavar="DIR", default=default, help=text)


def add_json(parser: argparse.ArgumentParser, content: str) -> None:
    """--json, the file that `console.publish` writes."""
    text = f"write {content} there; - is standard output"
    parser.add_argument("--json", metavar="FILE|-", help=text)


def add_overwrite(parser: argparse.ArgumentParser, name: str) -> None:
    """--overwrite, for `check_output`."""
    parser.add_argument("--overwrite", action="store_true", help=f"replace {name} if it is there")


def check_output(path: Path, overwrite: bool, *suffixes: str) -> None:
    """Refuse a file to write that has another suffix, no folder, or is there. Raises UsageError."""
    if suffixes and path.suffix.lower() not in suffixes:
        raise UsageError(f"{path}: the name must end in {' or '.join(suffixes)}")
    if not path.parent.is_dir():
        raise UsageError(f"{path}: there is no folder {path.parent}")
    if os.path.lexists(path) and not overwrite:
        raise UsageError(f"{path} is there already; --overwrite replaces it")


def add_run_flags(parser: argparse.ArgumentParser, out: Path, name: str) -> None:
    """The flags of a script that begins or resumes a run, called `name` in --help, in a folder, by
    default `out`: the common ones, the task, the preset, the folder."""
    add_common_flags(parser)
    add = parser.add_argument
    text = "network size and schedule (default: paper on a GPU, else tiny)"
    add("--preset", choices=PRESETS, help=text)
    add_task_flags(parser)
    text = f"folder of the run (default: {out})"
    add("--out", type=Path, metavar="DIR", default=out, help=text)
    add("--resume", action="store_true", help=f"go on with the {name} in --out")
    add("--epochs", type=int, help="length in epochs instead of --steps")


def notice_sample(args: argparse.Namespace) -> None:
    """Notice that a run without --train-set uses no pictures of --data."""
    if args.data and "train_set" not in args:
        notice(f"set sample: built in; --train-set NAME takes a set of {args.data}")


def pick_device(name: str) -> torch.device:
    """The device that --device names; auto takes the GPU if there is one. Raises UsageError."""
    if name == "cuda" and not torch.cuda.is_available():
        raise UsageError("--device cuda: no CUDA device is available; use --device cpu")
    backend = os.environ.get("ACLA_BACKEND") or "auto"
    if backend not in ("auto", *BACKENDS):
        known = ", ".join(BACKENDS)
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


def run(main: Callable[[list[str] | None], None], argv: list[str] | None = None) -> None:
    """Run a script: errors that the user can mend become one line and an exit status (1: the work
    failed, 2: the call was wrong), and `kernels.output` bears output that nobody reads."""
    output.run(run_open, main, argv)


def run_open(main: Callable[[list[str] | None], None], argv: list[str] | None) -> None:
    """`run`, but for output that nobody reads."""
    try:
        main(argv)
    except BrokenPipeError:
        raise
    except UsageError as cause:
        notice(f"error: {cause}")  # the same in every process
        sys.exit(2)
    except AclaError as cause:
        error(str(cause))
        sys.exit(1)
    except OSError as cause:
        where = f"{cause.filename}: " if cause.filename else ""
        error(f"{where}{cause.strerror or cause}; check the path, its rights and free space")
        sys.exit(1)
    except (MemoryError, RuntimeError) as cause:
        if not out_of_memory(cause):
            raise
        error("out of memory; a smaller --batch-size, --patch-size, --tile or --crop needs less")
        sys.exit(1)
    except Stopped as stopped:
        notice(str(stopped))
        sys.exit(stopped.status)
    except KeyboardInterrupt:
        notice("stopped; --resume goes on from the last checkpoint of a training or a search")
        sys.exit(130)


def parse_positions(text: str) -> tuple[int, ...]:
    """'2,7,10' → (2, 7, 10); '' or 'none' → ()."""
    try:
        return () if text in ("", "none") else tuple(int(part) for part in text.split(","))
    except ValueError as cause:
        message = f"wants positions, 2,7,10, or none, not {text!r}"
        raise argparse.ArgumentTypeError(message) from cause


def parse_range(number: type, form: str, wanted: str, text: str) -> tuple[float, int]:
    """'10' → (10, 0); '5-60' → (5, 60): a Task's setting and until."""
    parts = re.fullmatch(rf"({form})(?:(?<=\d)-(0*[1-9]\d*))?", text, re.ASCII)
    try:
        return number(parts[1]), int(parts[2] or 0)
    except (TypeError, ValueError) as cause:
        raise argparse.ArgumentTypeError(f"wants {wanted}, not {text!r}") from cause


def add_flags(parser: argparse.ArgumentParser, kind: type, skip: tuple[str, ...] = ()) -> None:
    """Add a flag for each field of a configuration, except those to skip, and its former names. A
    flag that is not given leaves no trace in the parsed arguments: a preset can fill it."""
    group = parser.add_argument_group((kind.__doc__ or kind.__name__).splitlines()[0].rstrip("."))
    for item in dataclasses.fields(kind):
        text, choices = item.metadata["help"], item.metadata["choices"]
        if text is None or item.name in skip:
            continue
        options: dict[str, Any] = {"action": argparse.BooleanOptionalAction}
        if item.type is not bool:
            value = parse_positions if get_origin(item.type) is tuple else item.type
            metavar = None if choices else item.name.upper()
            options = {"type": value, "choices": choices, "metavar": metavar}
        text += f" (default: {item.metadata['shown']})"
        flag, absent = flag_of(item.name), argparse.SUPPRESS
        group.add_argument(flag, dest=item.name, default=absent, help=text, **options)
        for old in (old for old, new in RENAMED.items() if new == item.name):
            add_alias(parser, flag_of(old), item.name, **options)


def add_alias(parser: argparse.ArgumentParser, flag: str, dest: str, **options: Any) -> None:
    """Add a flag's former name, which --help does not show."""
    options |= {"dest": dest, "default": argparse.SUPPRESS, "help": argparse.SUPPRESS}
    parser.add_argument(flag, **options)


def override(config: Any, args: argparse.Namespace) -> Any:
    """The configuration with the values of the given flags."""
    names = {item.name for item in dataclasses.fields(config)}
    return dataclasses.replace(config, **{k: v for k, v in vars(args).items() if k in names})


def override_length(config: Any, args: argparse.Namespace) -> Any:
    """`override`, with --epochs as an alternative to --steps. Raises UsageError."""
    config = override(config, args)
    if args.epochs is None:
        return config
    if "steps" in args:
        raise UsageError("--steps and --epochs say the same thing: give one of them")
    if args.epochs < 1:
        raise UsageError(f"--epochs must be above 0, not {args.epochs}")
    return dataclasses.replace(config, steps=args.epochs * config.epoch_steps)


def refuse_unused(args: argparse.Namespace, network: ModelConfig) -> None:
    """Refuse flags that change nothing in this network. Raises UsageError."""
    backbone, kind = network.backbone, network.kind
    grouped = backbone in ("rcan", "han")
    of_backbone = {"group_blocks": grouped, "residual_scale": backbone == "edsr"}
    of_backbone |= {"reduction": grouped or backbone in ("a2n", "a2n-m")}
    of_attention = dict.fromkeys(OF_KEYS, kind.keys > 0) | dict.fromkeys(OF_MASKS, kind.masked)
    for name, used in (of_backbone | of_attention).items():
        if name in args and not used and not (name == "keys" and args.keys == 0):
            where = f"--backbone {backbone}" if name in of_backbone else None
            where = where or f"--attention {network.attention}"
            raise UsageError(f"{flag_of(name)} changes nothing with {where}: leave it out")


def add_task_flags(parser: argparse.ArgumentParser, default: str = "car") -> None:
    """--task and the setting of each task. default: for --help, the task without these flags; a
    network or a set has its own setting too."""
    group = parser.add_argument_group("The task")
    group.add_argument("--task", choices=TASKS, help=f"what is restored (default: {default})")
    quality = functools.partial(parse_range, int, r"\d+", "a quality, 10, or a range, 5-60")
    level = functools.partial(parse_range, float, ".+?", "a noise level, 30, or a range, 0-55")
    settings = {
        "scale": (int, "sr: enlargement per side, 2, 3 or 4", 2),
        "sigma": (level, "denoise: noise in 8-bit levels, or a range, 0-55", 30),
        "q": (quality, "car: JPEG quality, 1 to 100, or a range, 5-60", 10),
    }
    for name, (kind, text, value) in settings.items():
        text += f" (default: {value if default in TASKS else default})"
        metavar = name.upper()
        group.add_argument(f"--{name}", dest=f"task_{name}", metavar=metavar, type=kind, help=text)


def task_from_flags(args: argparse.Namespace) -> Task | None:
    """The task of the flags, None without any. A setting implies its task: --q 20 is car."""
    given = {task: getattr(args, f"task_{flag}") for task, flag in SETTING_FLAG.items()}
    given = {task: value for task, value in given.items() if value is not None}
    names = {args.task} if args.task else set(given)
    if not names:
        return None
    (name, *more) = sorted(names)
    stray = [f"--{SETTING_FLAG[task]} belongs to --task {task}" for task in given if task != name]
    if more or stray:
        raise UsageError("; ".join(stray) + f"; this call is for --task {name}")
    setting = given.get(name, SETTING_DEFAULT[name])
    return Task(name, *(setting if isinstance(setting, tuple) else (setting,)))


def names_no_setting(args: argparse.Namespace, name: str) -> bool:
    """Whether the flags leave the setting of this task open: --task car without --q."""
    flag = SETTING_FLAG.get(name)
    return flag is None or getattr(args, f"task_{flag}") is None
