"""What training and searching share: the run's folder, seeds, learning rates, losses,
validation."""

import argparse
import contextlib
import dataclasses
import json
import os
import signal
import threading
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import Any, Self

import numpy as np

from acla.cli import as_flag, names_no_setting, override, override_length, task_from_flags
from acla.config import TrainConfig, flag_name, from_dict
from acla.console import finite
from acla.data.datasets import PatchSampler
from acla.errors import NOT_VALID, AclaError, CheckpointError, DataError, Stopped, UsageError
from acla.files import write_atomically
from acla.models.serialization import ANEW, in_one_line

NAMED = 16  # pictures, at most, that a message names


# The run's folder


def open_run(folder: Path, state: str, resume: bool) -> Path | None:
    """The state file of the run to go on with, or None for a run that begins. Raises UsageError
    where there is nothing to resume, or something that beginning would overwrite."""
    found = folder / state
    if resume and not found.is_file():
        raise UsageError(f"--resume: {folder} holds no {state}; leave --resume out to begin")
    if resume:
        return found
    if found.is_file():
        raise UsageError(
            f"{folder} already holds a run: --resume goes on with it, --out DIR begins another"
        )
    if (folder / "model.safetensors").is_file():
        raise UsageError(
            f"{folder} already holds a network, model.safetensors, that this run would overwrite: "
            "move it away, or begin elsewhere with --out DIR"
        )
    return None


def append_row(path: Path, row: dict) -> None:
    """Add one JSON row to a log; what is not finite becomes null."""
    try:
        with open(path, "a", encoding="utf-8") as file:
            file.write(json.dumps(finite(row), allow_nan=False) + "\n")
    except OSError as error:
        error.filename = error.filename or str(path)  # a full disk does not say which file
        raise


def drop_rows_after(path: Path, step: int) -> None:
    """Take back the rows that an interrupted run logged after its last checkpoint, and a row it
    wrote in part."""
    kept = []
    for text in path.read_text(encoding="utf-8").splitlines() if path.is_file() else []:
        with contextlib.suppress(json.JSONDecodeError):
            if json.loads(text)["step"] <= step:
                kept.append(text + "\n")
    write_atomically(path, "".join(kept).encode())


def tensorboard() -> Any:
    """The class SummaryWriter. Raises UsageError where its package is missing."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise UsageError(
            f"--log needs TensorBoard ({error}): pip install '.[log]', or leave --log out"
        ) from error
    return SummaryWriter


class Log:
    """A run's rows from step `start` on: JSON lines in a file, and curves for TensorBoard in
    `board`, where that is given."""

    def __init__(self, path: Path, start: int, board: Path | None = None):
        self.path = path
        drop_rows_after(path, start)
        self.board = tensorboard()(board, purge_step=start + 1) if board else None

    def add(self, row: dict) -> None:
        append_row(self.path, row)
        if self.board:
            for name, value in row.items():
                if name not in ("step", "seconds"):
                    self.board.add_scalar(name, value, row["step"])
            self.board.flush()


def resumed_plan(kind: type, progress: dict, args: argparse.Namespace, path: Path) -> Any:
    """The plan [a dataclass of configurations] of an interrupted run, from its state in `path`.
    Flags may repeat it, and make it longer where the schedule allows that; any other change is
    refused. Raises CheckpointError, UsageError."""
    parts = {item.name: item.type for item in dataclasses.fields(kind)}
    try:
        plan = kind(
            **{name: from_dict(parts[name], part) for name, part in progress["plan"].items()}
        )
    except (*NOT_VALID, AttributeError, UsageError) as error:
        reason = in_one_line(error)
        raise CheckpointError(
            f"{path}: the plan inside is not valid or of another version: {reason}{ANEW}"
        ) from error
    for name, begun in progress["flags"].items():
        given = getattr(args, name, None)
        if given not in (None, begun):
            flag = "--lambda auto" if name == "auto" else f"--{flag_name(name)}"
            if begun is None:
                raise UsageError(f"--resume: the run was begun without {flag}: leave it out")
            raise UsageError(f"--resume: the run was begun with {flag} {begun}, not {given}")
    asked, task = task_from_flags(args), plan.task
    repeated = asked and asked.name == task.name and names_no_setting(args, task.name)
    if not repeated and asked not in (None, task):
        raise UsageError(f"--resume: the run is for {plan.task}, not for {asked}")
    for name in parts:
        before = getattr(plan, name)
        if name == "task":
            continue
        has_length = hasattr(before, "epoch_steps")
        after = override_length(before, args) if has_length else override(before, args)
        changed = [f for f in vars(before) if getattr(before, f) != getattr(after, f)]
        if (
            changed == ["steps"]
            and isinstance(before, TrainConfig)
            and after.steps >= progress["step"] + bool(progress.get("losses"))  # not yet validated
        ):
            plan = dataclasses.replace(plan, **{name: after})
        elif changed:
            flags = ", ".join(as_flag(f, getattr(before, f)) for f in changed)
            raise UsageError(f"--resume: the run goes on as it was begun, with {flags}")
    return plan


def require_same_data(progress: dict, data: dict[str, str]) -> None:
    """Refuse to go on with other pictures than the run began with. Raises DataError."""
    changed = [name for name in data if progress["data"].get(name) != data[name]]
    if changed:
        raise DataError(
            f"--resume: the pictures for {' and '.join(changed)} are not those the run began with: "
            "restore them (see --data), or begin anew with --out DIR"
        )


def require_finite(loss: float, first: int, last: int, folder: Path) -> None:
    """Stop a run whose loss diverged, before its weights are written. Raises AclaError."""
    if not np.isfinite(loss):
        raise AclaError(
            f"the loss is {loss} between steps {first} and {last}; the checkpoint in {folder} is "
            "from before: lower --lr and begin anew with --out DIR"
        )


def require_finite_steps(
    losses: Sequence[float], psnr: float | None, done: int, sampler: PatchSampler, kept: str
) -> None:
    """Stop a run where the loss of one of its last steps, up to `done`, or the validation after
    them, if there was one, diverged. Raises AclaError with the first such step, counted from 1, the
    patches that made it, counted from 0 through the run, their pictures, and `kept`, the last good
    checkpoint."""
    bad = [i for i, loss in enumerate(losses) if not np.isfinite(loss)]
    if not bad and (psnr is None or not np.isnan(psnr)):
        return
    step = done - len(losses) + bad[0] if bad else done - 1
    what = (
        f"the loss is {losses[bad[0]]}" if bad else f"the validation is {psnr} after a finite loss"
    )
    names = sampler.names(step)
    shown = ", ".join(names[:NAMED]) + (f" and {len(names) - NAMED} more" if names[NAMED:] else "")
    first = step * sampler.size
    raise AclaError(
        f"{what} in step {step + 1}, patches {first} to {first + sampler.size - 1}, of {shown}; "
        f"the last good checkpoint is {kept}: lower --lr, or --clip the gradient, and begin anew "
        "with --out DIR"
    )


ASKED = b"\nstopping after this step; once more stops at once\n"


class Stop:
    """A context in which the first SIGINT (Ctrl-C) or SIGTERM is only noted, as `asked`, for the
    work to stop where it loses nothing; the next one acts as ever. Signals that were ignored stay
    so. Where `noted` is false, and outside the main thread, none is noted."""

    def __init__(self, noted: bool = True):
        self.noted = noted and threading.current_thread() is threading.main_thread()
        self.asked: signal.Signals | None = None
        self.before: dict[int, object] = {}

    def __enter__(self) -> Self:
        for number in (signal.SIGINT, signal.SIGTERM) if self.noted else ():
            if signal.getsignal(number) not in (signal.SIG_IGN, None):
                self.before[number] = signal.signal(number, self.note)
        return self

    def __exit__(self, *error: object) -> None:
        while self.before:
            signal.signal(*self.before.popitem())

    def note(self, number: int, frame: FrameType | None) -> None:
        self.asked = signal.Signals(number)
        self.__exit__()
        os.write(2, ASKED)  # a print may be what was interrupted

    def at(self, step: int, state: Path) -> Stopped:
        """What to raise once the state of this step is written."""
        text = (
            f"{self.asked.name}: stopped after step {step}; --resume goes on from there ({state})"
        )
        return Stopped(self.asked, text)
