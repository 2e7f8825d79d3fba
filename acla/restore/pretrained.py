"""The model for a task: a checkpoint, or the pretrained one that fits best."""

from pathlib import Path

import torch

from acla.config import SETTING_FLAG, Task
from acla.errors import UsageError
from acla.models.serialization import Checkpoint, load_model

# In the installed package, or in a clone of the repository
FOLDERS = (Path(__file__).parents[1] / "trained", Path(__file__).parents[2] / "weights")
FILES = {
    Task("car", 10): "car-q10-acla.safetensors",
    Task("car", 5, 60): "car-q5-60-acla.safetensors",
}
REACH = 5  # a model for one JPEG quality serves those this near: papers train at 10, 20, 30, 40


class PretrainedModels:
    """The candidates for a call: `files` by task; each is read when `pick` first chooses it.

    checkpoint: the only candidate. Without it, the pretrained models for the task, by default JPEG
    artifacts, there of every quality. task: that of the flags; it must be the checkpoint's. Raises
    UsageError, CheckpointError.
    """

    def __init__(self, checkpoint: Path | None, task: Task | None, device: torch.device) -> None:
        self.device = device
        self.loaded: dict[Path, Checkpoint] = {}
        if checkpoint is None:
            self.files = pretrained_files(task or Task("car"))
            return
        trained = self.load(checkpoint).task
        if task and (task.name, task.scale) != (trained.name, trained.scale):
            raise UsageError(f"{checkpoint} was trained for {trained}, not for {task}")
        self.files = {trained: checkpoint}

    def load(self, path: Path) -> Checkpoint:
        """A model, on the device, read once."""
        if path not in self.loaded:
            self.loaded[path] = load_model(path)
            self.loaded[path].model.to(self.device)
        return self.loaded[path]

    def pick(self, quality: int | None) -> tuple[Path, Checkpoint, str | None]:
        """(file, model, notice if it was trained for other qualities) for a picture of a JPEG
        quality; where that is not known, the model of the widest range. Raises UsageError where
        there is none and the quality is needed."""
        if quality is None:
            ranges = [task for task in self.files if task.until]
            if len(self.files) > 1 and not ranges:
                raise UsageError("not a JPEG, so that its quality is not known: give --q N")
            task = max(ranges or self.files, key=lambda task: task.until - task.setting)
            return self.files[task], self.load(self.files[task]), None
        task = min(self.files, key=lambda task: preference(task, quality))
        notice = None
        if task.name == "car" and distance(task, quality) > (0 if task.until else REACH):
            notice = f"JPEG quality {quality} is outside what the network was trained for ({task})"
        return self.files[task], self.load(self.files[task]), notice


def pretrained_files(task: Task) -> dict[Task, Path]:
    """The pretrained models for a task: for car of every quality, else those that cover its
    setting. Raises UsageError where there is none."""
    folder = next((folder for folder in FOLDERS if folder.is_dir()), FOLDERS[-1])
    fitting = [one for one in FILES if one.covers(task) or one.name == task.name == "car"]
    files = {one: folder / FILES[one] for one in fitting if (folder / FILES[one]).is_file()}
    if files:
        return files
    flag = f"--task {task.name}"
    if task.name in SETTING_FLAG:
        flag += f" --{SETTING_FLAG[task.name]} {task.value}"
    raise UsageError(
        f"no pretrained model for {task} in {folder}; train one (python train.py {flag} --out DIR) "
        "and name it: --checkpoint DIR/model.safetensors"
    )


def preference(task: Task, quality: int) -> tuple[float, bool, float]:
    """Sort key of a model for a JPEG quality: the distance beyond REACH, one quality before a
    range, the distance."""
    away = distance(task, quality)
    return max(away - REACH, 0), task.until > 0, away


def distance(task: Task, quality: int) -> float:
    """Distance of a JPEG quality from those that a model was trained for; 0 for its own."""
    return max(task.setting - quality, quality - (task.until or task.setting), 0)
