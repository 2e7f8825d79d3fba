"""The pretrained models: they load, match their names and the model card, and improve pictures."""

import pytest
from torch import Tensor

from acla.config import Task
from acla.data.datasets import find_set
from acla.data.degradations import enlarge, generator_for, pair
from acla.data.image import load, middle
from acla.data.metrics import score
from acla.models.serialization import load_model
from acla.restore import pretrained
from acla.restore.inference import restore
from acla.training.validation import MIDDLE_GRID, MIDDLE_SIDE

FOLDER = pretrained.FOLDERS[-1]
FILES = sorted(FOLDER.glob("*.safetensors"))


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_the_file_is_what_its_name_and_the_card_say(path):
    network = load_model(path)
    task = network.task
    colour = "rgb-" * (task.name == "car" and network.config.channels == 3)
    label = task.label.removeprefix("sigma")
    parts = [task.name, colour + label, network.config.attention]
    assert path.name == "-".join(filter(None, parts)) + ".safetensors"
    assert path.stat().st_size < 8 * 2**20
    card = (FOLDER / "README.md").read_text(encoding="utf-8")
    assert f"`{path.name}`" in card
    assert f"{sum(p.numel() for p in network.model.parameters()):,}" in card
    assert network.info["commit"] in card


def cleaner(path, task: Task) -> float:
    """What the network gains in dB over its input, enlarged for sr, on the middle of a sample
    picture with edges and little noise."""
    picture = find_set("sample", None, "test")[-1]
    network = load_model(path)
    clean: Tensor = middle(load(picture), MIDDLE_SIDE, MIDDLE_GRID)[:, 80:176, 80:176]
    low, target = pair(clean, task, generator_for(picture.stem), network.config.channels)
    restored = restore(network.model, low).cpu()
    low = enlarge(low, task.scale) if task.scale > 1 else low
    return score(restored, target, task)[0] - score(low, target, task)[0]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_pictures_become_better(path):
    task = load_model(path).task
    for setting in {task.setting or task.until, task.until or task.setting}:
        assert cleaner(path, Task(task.name, setting)) > 0.3
