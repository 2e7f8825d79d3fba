"""What every script does the same way: common flags, the device, notices, exit status."""

import argparse
import dataclasses
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_origin

import torch

from acla.config import (
    DEFAULT_KEYS,
    MASKED,
    PRESETS,
    RENAMED,
    SETTING_DEFAULT,
    SETTING_FLAG,
    TASKS,
    ModelConfig,
    Task,
    flag_name,
)
from acla.console import notice, tell_error
from acla.errors import AclaError, Stopped, UsageError, out_of_memory
from kernels import available_backends, why_not

DEVICES = ("auto", "cpu", "cuda")


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
        tell_error("out of memory; a smaller --batch-size, --patch-size or --tile needs less")
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
    except ValueError as error:
        wanted = f"wants positions, 2,7,10, or none, not {text!r}"
        raise argparse.ArgumentTypeError(wanted) from error


def parse_quality(text: str) -> tuple[int, int]:
    """'10' → (10, 0); '5-60' → (5, 60): a Task's setting and until."""
    found = re.fullmatch(r"(\d+)(?:-(0*[1-9]\d*))?", text, re.ASCII)
    if not found:
        raise argparse.ArgumentTypeError(f"wants a quality, 10, or a range, 5-60, not {text!r}")
    return int(found[1]), int(found[2] or 0)


def add_flags(parser: argparse.ArgumentParser, kind: type, but: tuple[str, ...] = ()) -> None:
    """Add a flag for each field of a configuration, but for the named ones. A flag that is not
    given leaves no trace in the parsed arguments, so that a preset can fill it."""
    group = parser.add_argument_group((kind.__doc__ or kind.__name__).splitlines()[0].rstrip("."))
    for item in dataclasses.fields(kind):
        if item.metadata["help"] is None or item.name in but:
            continue
        how: dict[str, Any] = {"action": argparse.BooleanOptionalAction}
        if item.type is not bool:
            choices = item.metadata["choices"]
            how = {
                "type": parse_positions if get_origin(item.type) is tuple else item.type,
                "choices": choices,
                "metavar": None if choices else item.name.upper(),
            }
        group.add_argument(
            f"--{flag_name(item.name)}",
            dest=item.name,
            default=argparse.SUPPRESS,
            help=f"{item.metadata['help']} (default: {item.metadata['shown']})",
            **how,
        )
        for old in (old for old, new in RENAMED.items() if new == item.name):
            add_alias(parser, f"--{flag_name(old)}", item.name, **how)


def add_alias(parser: argparse.ArgumentParser, flag: str, dest: str, **how: Any) -> None:
    """Add a flag's former name, which --help does not show."""
    parser.add_argument(flag, dest=dest, default=argparse.SUPPRESS, help=argparse.SUPPRESS, **how)


def as_flag(name: str, value: Any) -> str:
    """A field of a configuration as the flag that says it: --positions 1,3 or --no-ema."""
    flag = flag_name(name)
    if value is False:
        return f"--no-{flag}"
    if isinstance(value, tuple):
        value = ",".join(map(str, value)) or "none"
    return f"no --{flag}" if value == "" else f"--{flag}" if value is True else f"--{flag} {value}"


def override(config: Any, args: argparse.Namespace) -> Any:
    """The configuration with the flags that were given in place of the preset's values."""
    names = {item.name for item in dataclasses.fields(config)}
    return dataclasses.replace(config, **{k: v for k, v in vars(args).items() if k in names})


def override_length(config: Any, args: argparse.Namespace) -> Any:
    """`override`, and --epochs as another way to say --steps."""
    config = override(config, args)
    if args.epochs is None:
        return config
    if "steps" in args:
        raise UsageError("--steps and --epochs say the same thing: give one of them")
    if args.epochs < 1:
        raise UsageError(f"--epochs must be above 0, not {args.epochs}")
    return dataclasses.replace(config, steps=args.epochs * config.epoch_steps)


def refuse_unused(args: argparse.Namespace, network: ModelConfig) -> None:
    """Refuse flags that nothing in this network listens to. Raises UsageError."""
    backbone, attention = network.backbone, network.attention
    grouped = backbone in ("rcan", "han")
    heard = dict.fromkeys(("keys", "offset_radius", "offset_lr_mult"), attention in DEFAULT_KEYS)
    heard |= dict.fromkeys(("mask_bias", "mask_temperature"), attention in MASKED)
    heard |= {"group_blocks": grouped, "residual_scale": backbone == "edsr"}
    heard |= {"reduction": grouped or backbone in ("a2n", "a2n-m")}
    for name, does in heard.items():
        if name in args and not does and not (name == "keys" and args.keys == 0):
            of_backbone = name in ("group_blocks", "residual_scale", "reduction")
            where = f"--backbone {backbone}" if of_backbone else f"--attention {attention}"
            raise UsageError(f"--{flag_name(name)} changes nothing with {where}: leave it out")


def add_task_flags(parser: argparse.ArgumentParser, usual: str = "car") -> None:
    """--task and the setting of each task. usual: the task where none is named, for --help."""
    group = parser.add_argument_group("The task")
    group.add_argument("--task", choices=TASKS, help=f"what is restored (default: {usual})")
    group.add_argument(
        "--scale",
        dest="task_scale",
        metavar="SCALE",
        type=int,
        help="sr: enlargement per side, 2, 3 or 4 (default: 2)",
    )
    group.add_argument(
        "--sigma",
        dest="task_sigma",
        metavar="SIGMA",
        type=float,
        help="denoise: noise in 8-bit levels (default: 30)",
    )
    group.add_argument(
        "--q",
        dest="task_q",
        metavar="Q",
        type=parse_quality,
        help="car: JPEG quality, 1 to 100, or a range that pictures draw theirs from, 5-60 "
        "(default: 10)",
    )


def task_from_flags(args: argparse.Namespace) -> Task | None:
    """The task that the flags name, or None if they name none. A setting alone names its task: --q
    20 is car."""
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
    return Task(name, *(setting if name in given and name == "car" else (setting,)))


def names_no_setting(args: argparse.Namespace, name: str) -> bool:
    """Whether the flags leave the setting of this task open: --task car without --q."""
    flag = SETTING_FLAG.get(name)
    return flag is None or getattr(args, f"task_{flag}") is None
