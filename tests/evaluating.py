"""Calls of evaluate.py, and networks to score."""

import json
from pathlib import Path

import pytest
import torch

import evaluate
from acla.cli import run
from acla.config import ModelConfig, Task
from acla.models.backbones import Backbone
from acla.models.serialization import save_model


def results(capsys: pytest.CaptureFixture, *argv: object) -> list[dict]:
    """The results of evaluate.py, called in this process."""
    evaluate.main([*map(str, argv), "--device", "cpu", "--json", "-"])
    return json.loads(capsys.readouterr().out)["results"]


def failure(capsys: pytest.CaptureFixture, *argv: object) -> tuple[int, str]:
    """The exit status and the message of a call that must fail."""
    with pytest.raises(SystemExit) as stop:
        run(evaluate.main, [*map(str, argv)])
    return stop.value.code, capsys.readouterr().err


def write_network(path: Path, task: Task, **fields: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    size = {
        "blocks": 1,
        "width": 8,
        "attention": "none",
        "channels": task.channels,
        "scale": task.scale,
    }
    config = ModelConfig(**{**size, **fields})
    save_model(path, Backbone(config), config, task, {})
    return path
