"""arch.json, Table 9 and flags: which of them decides where the attention stands."""

import argparse
import dataclasses
import json
from pathlib import Path

import pytest

import train
from acla.config import PAPER_POSITIONS, ModelConfig, Task
from acla.errors import AclaError, UsageError
from acla.search.architecture import (
    Architecture,
    choose_network,
    even_spread,
    paper_positions,
    read_architecture,
)

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
        {"seed": float("inf")},
    ],
)
def test_an_arch_json_that_is_not_valid_names_the_file(tmp_path, change):
    path = tmp_path / "arch.json"
    path.write_text(json.dumps({**json.loads(FOUND.to_json()), **change}))
    with pytest.raises(AclaError, match=r"arch\.json"):
        read_architecture(path)


@pytest.mark.parametrize("text", ["", "[]", "{", "\x00\xff", "[" * 100_000])
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


def test_baselines_do_not_stand_where_a_search_put_acla(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    train.SEARCHED.parent.mkdir(parents=True)
    train.SEARCHED.write_text(FOUND.to_json())
    for words, positions in (
        ((), (1, 4)),
        (("--attention", "acla+se"), (1, 4)),
        (("--attention", "cla-i"), (1, 4)),
        (("--attention", "cla"), (4, 8, 12, 16)),
        (("--attention", "nl"), (4, 8, 12, 16)),
        (("--attention", "none"), ()),
        (("--attention", "nl", "--arch", str(train.SEARCHED)), (1, 4)),  # asked for by name
    ):
        plan = train.plan_from_flags(flags(*words), "tiny")
        assert plan.model.positions == positions, words


def test_what_was_recorded_can_still_be_read():
    recorded = Path(train.__file__).parent / "results" / "search-car-q10"
    found = [read_architecture(path) for path in sorted(recorded.glob("seed-*/arch.json"))]
    assert [one.model.positions for one in found] == [(3, 4, 5), (3, 8), ()]


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
        (("--arch", "none", "--attention", "cla"), "contradict"),
        (("--arch", "none", "--positions", "2"), "takes no --positions"),
    ],
)
def test_contradictions_are_refused(words, message):
    with pytest.raises(UsageError, match=message):
        choose_network(flags("--arch", "x", *words), "tiny", FOUND)


@pytest.mark.parametrize("attention", ["acla", "cla-i", "acla+se"])
@pytest.mark.parametrize("arch", [(), ("--arch", "paper")], ids=["no-arch", "paper"])
def test_what_the_paper_searched_stands_where_table_9_says(attention, arch):
    for (task, backbone), positions in PAPER_POSITIONS.items():
        words = (*arch, "--task", task, "--backbone", backbone, "--attention", attention)
        assert choose_network(flags(*words), "tiny", None)[1].positions == positions


@pytest.mark.parametrize("attention", ["cla", "cla-k", "nl", "clnl", "se", "mha"])
@pytest.mark.parametrize("arch", [(), ("--arch", "paper")], ids=["no-arch", "paper"])
def test_the_others_stand_evenly(attention, arch):
    def chosen(*words):
        return choose_network(flags("--attention", attention, *arch, *words), "tiny", None)[1]

    network = chosen("--task", "sr")
    assert network.positions == (8, 16, 24, 32)
    assert network.keys == {"cla": 8, "cla-k": 16}.get(attention, 0)
    assert chosen().positions == (4, 8, 12, 16)
    assert chosen("--blocks", "40").positions == (10, 20, 30, 40)
    assert chosen("--blocks", "4").positions == (1, 2, 3, 4)
    assert chosen("--positions", "5").positions == (5,)
    assert chosen("--backbone", "rcan").positions == (2, 5, 8, 10)
    with pytest.raises(UsageError, match="do not fit 3 blocks: give --positions, or --blocks 4"):
        chosen("--blocks", "3")


@pytest.mark.parametrize("blocks", range(4, 257))
def test_even_positions_rise_to_the_last_block(blocks):
    positions = even_spread(blocks, 4)
    assert ModelConfig(blocks=blocks, positions=positions).positions == positions
    assert len(positions) == 4
    assert positions[-1] == blocks
    gaps = [b - a for a, b in zip((0, *positions), positions, strict=False)]
    assert max(gaps) - min(gaps) <= 1


@pytest.mark.parametrize("attention", ["cla", "cla-k", "acla+se", "clnl", "mha"])
def test_a_files_positions_are_for_every_attention(attention):
    words = ("--arch", "x", "--attention", attention)
    _, network = choose_network(flags(*words), "tiny", FOUND)
    assert (network.attention, network.positions) == (attention, (1, 4))
    nothing = dataclasses.replace(FOUND, model=dataclasses.replace(FOUND.model, positions=()))
    assert choose_network(flags(*words), "tiny", nothing)[1].positions == ()


def test_a_file_says_which_attention_was_searched():
    model = dataclasses.replace(FOUND.model, attention="cla", keys=5)
    found = dataclasses.replace(FOUND, model=model)
    assert choose_network(flags("--arch", "x"), "tiny", found)[1] == model


@pytest.mark.parametrize("attention", ["nl", "clnl", "se", "mha"])
def test_keys_are_refused_where_none_are_sampled(attention):
    words = ("--attention", attention, "--keys", "8")
    with pytest.raises(UsageError, match=f"{attention} samples no keys: leave out --keys 8"):
        choose_network(flags(*words), "tiny", None)


def test_positions_that_the_paper_lacks_are_refused_with_the_fix():
    with pytest.raises(UsageError, match="give --arch none, --positions"):
        paper_positions(Task("denoise", 30), "rcan")
