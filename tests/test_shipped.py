"""The pretrained models: they load, match their names and the model card, and improve pictures."""

import pytest
import torch
from torch import Tensor

from acla.data.datasets import find_set
from acla.data.degradations import generator_for, pair
from acla.data.image import load
from acla.data.metrics import score
from acla.models.serialization import load_model
from acla.restore import pretrained
from acla.restore.inference import restore
from acla.training.validation import middle

FOLDER = pretrained.FOLDERS[-1]
FILES = sorted(FOLDER.glob("*.safetensors"))


def test_the_table_names_every_file():
    models = pretrained.PretrainedModels(None, None, torch.device("cpu"))
    assert sorted(models.files.values()) == FILES
    assert all(load_model(path).task == task for task, path in models.files.items())


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_the_file_is_what_its_name_and_the_card_say(path):
    network = load_model(path)
    assert path.name.startswith(f"car-{network.task.label}-{network.config.attention}")
    assert path.stat().st_size < 8 * 2**20
    card = (FOLDER / "README.md").read_text(encoding="utf-8")
    assert f"`{path.name}`" in card
    assert f"{sum(p.numel() for p in network.model.parameters()):,}" in card
    assert network.info["commit"] in card


def cleaner(path, q: int) -> float:
    """What the network gains in dB over JPEG on the middle of a sample picture."""
    (picture, *_) = find_set("sample", None, "val")
    network = load_model(path)
    clean: Tensor = middle(load(picture))[:, :96, :96]
    task = type(network.task)("car", q)
    low, target = pair(clean, task, generator_for(picture.stem))
    restored = restore(network.model, low).cpu()
    return score(restored, target, task)[0] - score(low, target, task)[0]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_pictures_become_better(path):
    task = load_model(path).task
    for q in {int(task.setting), task.until or int(task.setting)}:
        assert cleaner(path, q) > 0.3
