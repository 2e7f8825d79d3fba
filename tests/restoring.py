"""Calls of the command, and networks that cost nothing and whose answer is known."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from acla.cli import run
from acla.config import ModelConfig, Task
from acla.models.backbones import Backbone
from acla.models.serialization import save_model
from acla.restore import __main__ as restore

CAR, NOISE = Task("car", 10), Task("denoise", 30)
MOSAIC, DOUBLE = Task("demosaic", 0), Task("sr", 2)


def tiny(task: Task, shift: float = 0.0, **fields: object) -> Backbone:
    """A fresh network: same-size ones add `shift` to every value, 0 makes them the identity."""
    size = {"blocks": 1, "width": 8, "attention": "none", "keys": 0}
    own = {"channels": task.channels, "scale": task.scale}
    torch.manual_seed(0)
    model = Backbone(ModelConfig(**{**size, **own, **fields})).eval()
    if task.scale == 1:
        torch.nn.init.constant_(model.tail[-1].bias, shift)
    return model


def write_network(path: Path, task: Task, shift: float = 0.0, **fields: object) -> Path:
    """The file of such a network."""
    path.parent.mkdir(parents=True, exist_ok=True)
    model = tiny(task, shift, **fields)
    save_model(path, model, model.config, task, {})
    return path


EXACT = ("--device", "cpu", "--precision", "fp32")  # the same bits on every machine


def call(*argv: object) -> None:
    restore.main([*EXACT, *map(str, argv)])


def failure(capsys: pytest.CaptureFixture, *argv: object) -> tuple[int, str]:
    """The exit status and the message of a call that must fail."""
    with pytest.raises(SystemExit) as stop:
        run(restore.main, [*EXACT, *map(str, argv)])
    return stop.value.code, capsys.readouterr().err


def stored(path: Path) -> np.ndarray:
    with Image.open(path) as picture:
        return np.asarray(picture)
