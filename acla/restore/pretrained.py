"""The network for a task: a checkpoint by name, or the one of a folder that fits best."""

import re
from pathlib import Path

import torch

from acla.config import SETTING_FLAG, Task
from acla.errors import UsageError
from acla.models.serialization import Checkpoint, load_model

# In a clone of the repository, or in the installed package
PLACES = (Path(__file__).parents[2] / "weights", Path(__file__).parents[1] / "trained")
REACH = 5  # networks are picked for qualities this near to theirs: papers train at 10, 20, 30, 40


class Weights:
    """The networks that may be used, found when this is made, read when they are picked.

    checkpoint: the file of the only one. Without it, the files of PLACES for the task, by default
    JPEG artifacts, named task-setting-anything.safetensors: car-q10-acla.safetensors,
    car-q5-60-acla.safetensors. given: the task of the flags; it must be the network's. Raises
    UsageError, CheckpointError.
    """

    def __init__(self, checkpoint: Path | None, given: Task | None, device: torch.device) -> None:
        self.device = device
        self.kept: dict[Path, Checkpoint] = {}
        self.files: dict[Task, Path] = {}
        if checkpoint is None:
            self.find(given or Task("car"))
            return
        task = self.load(checkpoint).task
        if given and (given.name, given.scale) != (task.name, task.scale):
            raise UsageError(f"{checkpoint} was trained for {task}, not for {given}")
        self.files[task] = checkpoint

    def find(self, task: Task) -> None:
        """Fill `files` from PLACES: for car every quality, else the task's own setting."""
        setting = r"q(\d+)(?:-(\d+))?" if task.name == "car" else re.escape(task.label)
        name = re.compile("-".join(filter(None, (task.name, setting, r".*\.safetensors"))))
        for path in (path for place in PLACES for path in sorted(place.glob("*.safetensors"))):
            found = name.fullmatch(path.name)
            if found:
                numbers = [int(number) for number in found.groups() if number]
                try:
                    named = Task(task.name, *(numbers or [task.setting]))
                except UsageError as error:
                    raise UsageError(f"{path}: its name says what no task is: {error}") from error
                self.files.setdefault(named, path)
        if not self.files:
            flag = f"--task {task.name}"
            if task.name in SETTING_FLAG:
                flag += f" --{SETTING_FLAG[task.name]} {task.label.lstrip('xsigmaq')}"
            where = next((place for place in PLACES if place.is_dir()), PLACES[0])
            raise UsageError(
                f"no network for {task}: {where} holds none; train one (python train.py {flag} "
                "--out DIR) and name it: --checkpoint DIR/model.safetensors"
            )

    def load(self, path: Path) -> Checkpoint:
        """A network, on the device, read once."""
        if path not in self.kept:
            self.kept[path] = load_model(path)
            self.kept[path].model.to(self.device)
        return self.kept[path]

    def pick(self, quality: int | None) -> tuple[Path, Checkpoint, str | None]:
        """(file, network, notice if it is outside what it was trained for) for a picture of a JPEG
        quality; where that is not known, the network of the widest range. Raises UsageError where
        there is none and the quality is needed."""
        if quality is None:
            ranges = [task for task in self.files if task.until]
            if len(self.files) > 1 and not ranges:
                raise UsageError("not a JPEG, so that its quality is not known: give --q N")
            task = max(ranges or self.files, key=lambda task: task.until - task.setting)
            return self.files[task], self.load(self.files[task]), None
        task = min(self.files, key=lambda task: fitness(task, quality))
        notice = None
        if task.name == "car" and away(task, quality) > (0 if task.until else REACH):
            notice = f"JPEG quality {quality} is outside what the network was trained for ({task})"
        return self.files[task], self.load(self.files[task]), notice


def fitness(task: Task, quality: int) -> tuple[float, bool, float]:
    """What to sort networks by for a JPEG quality: how far it lies outside of what the network
    serves, whether the network is for many qualities, and how far it lies from those it was trained
    for."""
    far = away(task, quality)
    return max(far - REACH, 0), task.until > 0, far


def away(task: Task, quality: int) -> float:
    """How far a JPEG quality lies from those that a network was trained for; 0 for its own."""
    return max(task.setting - quality, quality - (task.until or task.setting), 0)
