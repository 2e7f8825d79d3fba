"""The model for a photo: a checkpoint, or the pretrained one that fits best."""

from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch

from acla.config import SETTING_FLAG, Task
from acla.errors import UsageError
from acla.models.serialization import Checkpoint, load_model, read_header

# In the installed package, or in a clone of the repository
FOLDERS = (Path(__file__).parents[1] / "trained", Path(__file__).parents[2] / "weights")
SETTINGS = {"car": "JPEG quality", "denoise": "noise level"}
UNKNOWN = {"car": "not a JPEG, so that its quality", "denoise": "the noise level"}
REACH = 5  # a model for one setting serves those this near: papers train at 10, 20, 30, 40


@dataclass(frozen=True)
class ModelFile:
    """A model file, its task and the channels of its pictures."""

    path: Path
    task: Task
    channels: int


class Choice(NamedTuple):
    """A model, why it was taken ("" if it was named), and a notice if it does not quite fit."""

    path: Path
    network: Checkpoint
    reason: str
    notice: str | None


class PretrainedModels:
    """The candidates for a call; each is read when `pick` first chooses it.

    checkpoint: the only candidate. Without it, the pretrained models for the task, by default JPEG
    artifacts, of every setting but the scale. task: that of the flags; it must be the checkpoint's.
    channels: of the pretrained models, by default any. Raises UsageError, CheckpointError.
    """

    def __init__(
        self,
        checkpoint: Path | None,
        task: Task | None,
        device: torch.device,
        channels: int | None = None,
    ) -> None:
        self.device = device
        self.loaded: dict[Path, Checkpoint] = {}
        self.named = checkpoint is not None
        if not self.named:
            self.candidates = candidates_for(task or Task("car"), channels)
            return
        network = self.load(checkpoint)
        if task and (task.name, task.scale) != (network.task.name, network.task.scale):
            raise UsageError(f"{checkpoint} was trained for {network.task}, not for {task}")
        self.candidates = [ModelFile(checkpoint, network.task, network.config.channels)]

    @property
    def task(self) -> Task:
        """That of the first candidate; the others differ in quality or noise level alone."""
        return self.candidates[0].task

    def load(self, path: Path) -> Checkpoint:
        """A model, on the device, read once."""
        if path not in self.loaded:
            self.loaded[path] = load_model(path)
            self.loaded[path].model.to(self.device)
        return self.loaded[path]

    def pick(self, setting: float | None, colour: bool) -> Choice:
        """The model for a picture of a JPEG quality or noise level, gray or in colour; where that
        is not known, the model of the widest range. Raises UsageError where there is none and the
        setting is needed."""
        name = self.task.name
        if setting is None:
            ranges = [one for one in self.candidates if one.task.until]
            if len(self.candidates) > 1 and not ranges and name in UNKNOWN:
                raise UsageError(f"{UNKNOWN[name]} is not known: give --{SETTING_FLAG[name]} N")
            chosen = max(ranges or self.candidates, key=lambda one: breadth(one, colour))
        else:
            chosen = min(self.candidates, key=lambda one: preference(one, setting, colour))
        notice, reason = None, f"--task {name}"
        if name in SETTINGS:
            label = SETTINGS[name]
            reason = f"{label} unknown" if setting is None else f"{label} {setting:g}"
            reason += ", colour" if colour else ", gray"
            own = chosen.task
            if setting is not None and distance(own, setting) > (0 if own.until else REACH):
                notice = f"{label} {setting:g} is outside what the network was trained for ({own})"
        return Choice(chosen.path, self.load(chosen.path), "" if self.named else reason, notice)


def folder() -> Path:
    """The one of FOLDERS that there is."""
    return next((folder for folder in FOLDERS if folder.is_dir()), FOLDERS[-1])


def shipped() -> list[ModelFile]:
    """The pretrained models, by name."""
    headers = {path: read_header(path) for path in sorted(folder().glob("*.safetensors"))}
    return [ModelFile(path, task, config.channels) for path, (config, task, _) in headers.items()]


def candidates_for(task: Task, channels: int | None) -> list[ModelFile]:
    """The pretrained models for a task, of every quality or noise level. Raises UsageError where
    there is none."""
    there = shipped()
    fitting = [
        one
        for one in there
        if (one.task.name, one.task.scale) == (task.name, task.scale)
        and channels in (None, one.channels)
    ]
    if fitting:
        return fitting
    flag = f"--task {task.name}"
    if task.name in SETTING_FLAG:
        flag += f" --{SETTING_FLAG[task.name]} {task.value}"
    tasks = ", ".join(dict.fromkeys(str(one.task) for one in there)) or "none"
    raise UsageError(
        f"no pretrained model for {task} in {folder()} (models there: {tasks}); train one (python "
        f"train.py {flag} --out DIR) and name it: --checkpoint DIR/model.safetensors"
    )


def breadth(candidate: ModelFile, colour: bool) -> tuple[bool, float]:
    """Sort key of a model where the setting is not known: the kind of picture, the range."""
    return (candidate.channels == 3) == colour, candidate.task.until - candidate.task.setting


def preference(
    candidate: ModelFile, setting: float, colour: bool
) -> tuple[float, bool, bool, float]:
    """Sort key of a model for a setting: the distance beyond a range, or beyond REACH of a setting,
    the other kind of picture, one setting within its reach before a range, the distance."""
    away, ranged = distance(candidate.task, setting), candidate.task.until > 0
    beyond = max(away - (0 if ranged else REACH), 0)
    return beyond, (candidate.channels == 3) != colour, ranged and not beyond, away


def distance(task: Task, setting: float) -> float:
    """Distance of a JPEG quality or noise level from those that a model was trained for; 0 for its
    own."""
    return max(task.setting - setting, setting - (task.until or task.setting), 0)
