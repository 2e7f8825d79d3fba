"""arch.json, Table 9 and flags: which of them decides where the attention stands."""

import argparse
import json

import pytest

import train
from acla.architecture import Architecture, choose_network, paper_positions, read_architecture
from acla.config import ModelConfig, Task
from acla.errors import AclaError, UsageError

FOUND = Architecture(
    task=Task("car", 10),
    model=ModelConfig(width=24, blocks=6, keys=4, channels=1, positions=(1, 4)),
    lam=0.2,
    seed=3,
    alpha=(1.0, -1.0, -2.0, 0.5, -0.1, -3.0),
    cost=12345.0,
    patch=24,
)


def flags(*words: str) -> argparse.Namespace:
    return train.parse(list(words))


def test_arch_json_survives(tmp_path):
    path = tmp_path / "arch.json"
    path.write_text(FOUND.to_json())
    assert read_architecture(path) == FOUND
    keys = "task setting backbone attention positions keys lambda seed alpha cost cost_unit"
    assert set(keys.split()) <= json.loads(path.read_text()).keys()


@pytest.mark.parametrize(
    "change",
    [
        {"positions": [1]},
        {"keys": 5},
        {"task": "fly"},
        {"alpha": "x"},
        {"model": {"width": 3}},
        {"patch": None},
    ],
)
def test_an_arch_json_that_is_not_valid_names_the_file(tmp_path, change):
    path = tmp_path / "arch.json"
    path.write_text(json.dumps({**json.loads(FOUND.to_json()), **change}))
    with pytest.raises(AclaError, match=r"arch\.json"):
        read_architecture(path)


@pytest.mark.parametrize("text", ["", "[]", "{", "\x00\xff"])
def test_any_other_file_is_refused(tmp_path, text):
    path = tmp_path / "arch.json"
    path.write_text(text)
    with pytest.raises(AclaError, match="not a valid"):
        read_architecture(path)
    with pytest.raises(AclaError, match="no such file"):
        read_architecture(tmp_path / "missing.json")


def test_the_default_is_jpeg_10_at_table_9s_positions():
    task, network = choose_network(flags(), "tiny", None)
    assert task == Task("car", 10)
    assert network.positions == (2, 7, 10, 13, 14)
    assert (network.attention, network.keys, network.channels) == ("acla", 16, 1)


def test_what_was_found_decides_task_size_and_positions():
    task, network = choose_network(flags("--arch", "x"), "tiny", FOUND)
    assert (task, network) == (FOUND.task, FOUND.model)


def test_flags_decide_before_what_was_found():
    words = (
        "--arch",
        "x",
        "--preset",
        "tiny",
        "--attention",
        "cla",
        "--positions",
        "5",
        "--q",
        "30",
    )
    task, network = choose_network(flags(*words), "tiny", FOUND)
    assert task == Task("car", 30)
    assert (network.blocks, network.width) == (16, 16)  # the preset's, for it was asked for
    assert (network.attention, network.keys, network.positions) == ("cla", 8, (5,))


def test_no_attention_has_no_positions():
    _, network = choose_network(flags("--arch", "none"), "tiny", None)
    assert (network.attention, network.positions, network.keys) == ("none", (), 0)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--task", "sr"), "was searched for car q10"),
        (("--backbone", "rcan"), "was searched on edsr"),
        (("--channels", "3"), "by its protocol"),
        (("--arch", "none", "--attention", "cla"), "contradict"),
        (("--arch", "none", "--positions", "2"), "takes no --positions"),
    ],
)
def test_contradictions_are_refused(words, message):
    with pytest.raises(UsageError, match=message):
        choose_network(flags("--arch", "x", *words), "tiny", FOUND)


def test_positions_that_the_paper_lacks_are_refused_with_the_fix():
    with pytest.raises(UsageError, match="give --positions"):
        paper_positions(Task("denoise", 30), "rcan")
