"""A run's folder: its log, networks and state; how to resume it; signals that end it."""

import argparse
import contextlib
import dataclasses
import json
import os
import signal
import threading
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType
from typing import Any, Self

import numpy as np

from acla.config import ModelConfig, Task, TrainConfig, flag_of, from_dict
from acla.console import finite
from acla.data.datasets import PatchSampler
from acla.distributed import Processes
from acla.errors import (
    NOT_VALID,
    AclaError,
    CheckpointError,
    DataError,
    Stopped,
    UsageError,
    one_line,
)
from acla.files import clear_temporary, provenance, write_atomically
from acla.models.serialization import START_OVER, save_model, save_state
from acla.training.trainer import Trainer

MODEL, BEST, STATE = "model.safetensors", "best.safetensors", "state.safetensors"
LOG = "train.jsonl"
WITH_RESUME = ("out", "data", "device", "workers", "steps", "log")  # flags
MAX_NAMES = 16  # of pictures in a message


# A training's folder


@dataclass(frozen=True)
class TrainPlan:
    """Everything that decides a training."""

    task: Task
    model: ModelConfig
    train: TrainConfig


@dataclass
class Progress:
    """What a state says of its training, beside the tensors: the plan and fingerprints of the
    pictures; steps and seconds; the last validation in dB and the best one with its step; the file
    of the initial weights."""

    plan: dict[str, Any]
    data: dict[str, str]
    step: int = 0
    seconds: float = 0.0
    val_psnr: float | None = None
    best: dict[str, Any] | None = None
    begun_with: dict[str, str] | None = None

    @classmethod
    def from_state(cls, values: dict[str, Any], path: Path) -> Self:
        """The progress in a state of this or an earlier version. Raises CheckpointError."""
        known = {item.name for item in dataclasses.fields(cls)}
        try:
            return cls(**{name: value for name, value in values.items() if name in known})
        except TypeError as error:
            raise CheckpointError(
                f"{path}: not a state of train.py: {error}{START_OVER}"
            ) from error


class RunFiles:
    """A run's folder and log after so many steps and seconds; the first process writes."""

    def __init__(self, folder: Path, log: str, step: int, seconds: float, writes: bool):
        self.folder, self.log, self.writes = folder, folder / log, writes
        self.start = time.monotonic() - seconds
        if writes:
            folder.mkdir(parents=True, exist_ok=True)
            clear_temporary(folder)
            drop_rows_after(self.log, step)

    @property
    def seconds(self) -> float:
        return round(time.monotonic() - self.start, 2)


class RunDir(RunFiles):
    """The files of a training from `progress` on. sampler: names the pictures of a step that
    diverged; curves: whether the log is for TensorBoard too."""

    def __init__(
        self,
        folder: Path,
        plan: TrainPlan,
        progress: Progress,
        processes: Processes,
        sampler: PatchSampler,
        curves: bool = False,
    ):
        super().__init__(folder, LOG, progress.step, progress.seconds, processes.first)
        self.plan, self.progress, self.sampler, self.curves = plan, progress, sampler, None
        self.info = {"train": progress.plan["train"], "data": progress.data}
        self.info |= {"begun_with": progress.begun_with, **provenance(processes.device)}
        if self.writes and curves:
            self.curves = tensorboard()(folder / "tensorboard", purge_step=progress.step + 1)

    def write(self, trainer: Trainer, step: int, psnr: dict[str, float] | None = None) -> None:
        """Write the state after `step` steps; with a validation before it the row of the log and
        the network, as the best one too if it is. A run killed in between resumes from the state
        before and writes the same again. Raises AclaError where the loss or the PSNR diverged."""
        losses, norms = trainer.statistics()
        value = psnr["val_psnr"] if psnr else None
        last_state = f"{self.folder / STATE} of step {self.progress.step}"
        require_finite_steps(losses, value, step, self.sampler, last_state)
        self.progress.step, self.progress.seconds = step, self.seconds
        if psnr:
            row = {"step": step, "loss": sum(losses) / len(losses), "lr": trainer.lr(step - 1)}
            row |= {"norm": sum(norms) / len(norms)} if norms else {}
            trainer.clear_statistics()
            self.write_network(trainer, row | psnr | {"seconds": self.progress.seconds})
        if self.writes:
            tensors, values = trainer.state()
            save_state(self.folder / STATE, tensors, asdict(self.progress) | values)

    def write_network(self, trainer: Trainer, row: dict[str, Any]) -> None:
        progress, names = self.progress, [MODEL]
        progress.val_psnr = row["val_psnr"]
        if progress.best is None or row["val_psnr"] > progress.best["val_psnr"]:
            progress.best = {"step": row["step"], "val_psnr": row["val_psnr"]}
            names.append(BEST)
        if not self.writes:
            return
        append_row(self.log, row)
        if self.curves:
            for name in row.keys() - {"step", "seconds"}:
                self.curves.add_scalar(name, row[name], row["step"])
            self.curves.flush()
        for name in names:
            network, info = trainer.result, self.info | row
            save_model(self.folder / name, network, self.plan.model, self.plan.task, info)


# Logs


def append_row(path: Path, row: dict) -> None:
    """Add one JSON row to a log; what is not finite becomes null."""
    try:
        with open(path, "a", encoding="utf-8") as file:
            file.write(json.dumps(finite(row), allow_nan=False) + "\n")
    except OSError as error:
        error.filename = error.filename or str(path)  # a full disk does not say which file
        raise


def drop_rows_after(path: Path, step: int) -> None:
    """Remove the rows that an interrupted run logged after its last state, and incomplete ones."""
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


# Resuming


def open_run(folder: Path, state: str, resume: bool) -> Path | None:
    """The state file of the run to resume, or None for a new run. Raises UsageError where there is
    nothing to resume, or something that a new run would overwrite."""
    path = folder / state
    if resume and not path.is_file():
        raise UsageError(f"--resume: {folder} holds no {state}; leave --resume out to begin")
    if resume:
        return path
    if path.is_file():
        raise UsageError(
            f"{folder} already holds a run: --resume goes on with it, --out DIR begins another"
        )
    if (folder / MODEL).is_file():
        raise UsageError(
            f"{folder} already holds a network, {MODEL}, that this run would overwrite: "
            "move it away, or begin elsewhere with --out DIR"
        )
    return None


def resumed_plan(kind: type, progress: dict, args: argparse.Namespace, path: Path) -> Any:
    """The plan [a dataclass of configurations] of an interrupted run, from its state in `path`; of
    a training with another length, if --steps gives one. args: None for a flag without a value.
    Raises CheckpointError, and UsageError for flags that would change the run."""
    parts = {item.name: item.type for item in dataclasses.fields(kind)}
    try:
        plan = kind(**{name: from_dict(parts[name], p) for name, p in progress["plan"].items()})
    except (*NOT_VALID, AttributeError, UsageError) as error:
        reason = one_line(error)
        raise CheckpointError(
            f"{path}: the plan inside is not valid or of another version: {reason}{START_OVER}"
        ) from error
    allowed = WITH_RESUME if "train" in parts else WITH_RESUME[:3]
    given = {name for name, value in vars(args).items() if value is not None}
    if other := sorted(given - {"resume", *allowed}):
        names = ", ".join(flag_of({"auto": "lam"}.get(n, n.removeprefix("task_"))) for n in other)
        raise UsageError(
            f"--resume goes on with the run as it was begun: leave out {names}; it takes "
            f"{', '.join(map(flag_of, allowed))}"
        )
    if "steps" not in given:
        return plan
    least = progress["step"] + bool(progress.get("losses"))  # a run ends with a validation
    if args.steps < least:
        raise UsageError(f"--steps {args.steps}: the run is at step {progress['step']}; give more")
    return dataclasses.replace(plan, train=dataclasses.replace(plan.train, steps=args.steps))


def require_same_data(progress: dict, data: dict[str, str]) -> None:
    """Refuse to resume with other pictures than the run began with. Raises DataError."""
    changed = [name for name in data if progress["data"].get(name) != data[name]]
    if changed:
        raise DataError(
            f"--resume: the pictures for {' and '.join(changed)} are not those the run began with: "
            "restore them (see --data), or start over with --out DIR"
        )


# Divergence


def require_finite(loss: float, first: int, last: int, folder: Path) -> None:
    """Stop a run whose loss diverged, before its weights are written. Raises AclaError."""
    if not np.isfinite(loss):
        raise AclaError(
            f"the loss is {loss} between steps {first} and {last}; the checkpoint in {folder} is "
            "from before: lower --lr and start over with --out DIR"
        )


def require_finite_steps(
    losses: Sequence[float], psnr: float | None, done: int, sampler: PatchSampler, last_state: str
) -> None:
    """Stop a run whose loss diverged in one of its last steps, up to `done`, or whose validation
    after them, if any, did. Raises AclaError with the first such step, counted from 1, its patches,
    counted from 0 through the run, their pictures, and `last_state`, the last good one."""
    bad = [i for i, loss in enumerate(losses) if not np.isfinite(loss)]
    if not bad and (psnr is None or not np.isnan(psnr)):
        return
    step = done - len(losses) + bad[0] if bad else done - 1
    value = (
        f"the loss is {losses[bad[0]]}" if bad else f"the validation is {psnr} after a finite loss"
    )
    names = sampler.names(step)
    more = f" and {len(names) - MAX_NAMES} more" if names[MAX_NAMES:] else ""
    first = step * sampler.size
    raise AclaError(
        f"{value} in step {step + 1}, patches {first} to {first + sampler.size - 1}, of "
        f"{', '.join(names[:MAX_NAMES])}{more}; the last good checkpoint is {last_state}: lower "
        "--lr, or --clip the gradient, and start over with --out DIR"
    )


# Signals

STOPPING = b"\nstopping after this step; once more stops at once\n"


class Stop:
    """A context in which the first SIGINT (Ctrl-C) or SIGTERM is only recorded, as `asked`, so that
    the run stops where it loses nothing; the next one acts as before. Ignored signals stay ignored.
    With `active` false, and outside the main thread, none is recorded."""

    def __init__(self, active: bool = True):
        self.active = active and threading.current_thread() is threading.main_thread()
        self.asked: signal.Signals | None = None
        self.handlers: dict[int, object] = {}

    def __enter__(self) -> Self:
        for number in (signal.SIGINT, signal.SIGTERM) if self.active else ():
            if signal.getsignal(number) not in (signal.SIG_IGN, None):
                self.handlers[number] = signal.signal(number, self.record)
        return self

    def __exit__(self, *error: object) -> None:
        while self.handlers:
            signal.signal(*self.handlers.popitem())

    def record(self, number: int, frame: FrameType | None) -> None:
        self.asked = signal.Signals(number)
        self.__exit__()
        os.write(2, STOPPING)  # the signal may have interrupted a print

    def at(self, step: int, state: Path) -> Stopped:
        """What to raise once the state of this step is written."""
        text = (
            f"{self.asked.name}: stopped after step {step}; --resume goes on from there ({state})"
        )
        return Stopped(self.asked, text)
