"""Checkpoints: equal to the bit, rebuilt from the file alone, refused with the reason."""

import json
import os
import re
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from published import random_tensors
from safetensors.torch import save_file

from acla import files
from acla.config import BACKBONES, ModelConfig, Task
from acla.errors import CheckpointError
from acla.models import serialization
from acla.models.backbones import Backbone
from acla.models.factory import build_network
from acla.models.serialization import load_model, load_state, save_model, save_state

ROOT = Path(__file__).parents[1]
RUN = {"step": 3, "seconds": 0.5, "plan": {}, "data": {}}  # the progress of a search
TRAINED = {"flags": {}, "scaler": {}, "val_psnr": 30.0, "best": {"step": 3, "val_psnr": 30.0}}
SMALL = ModelConfig(blocks=3, width=8, group_blocks=1, reduction=2, keys=3, positions=(1, 3))


def random_network(**changes) -> Backbone:
    net = build_network(replace(SMALL, **changes)).eval()
    for parameter in net.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return net


@pytest.mark.parametrize("backbone", BACKBONES)
@pytest.mark.parametrize("scale", [1, 2])
def test_a_network_comes_back_to_the_bit(tmp_path, backbone, scale):
    net = random_network(backbone=backbone, scale=scale)
    path = tmp_path / "model.safetensors"
    task = Task("sr", 2) if scale == 2 else Task("demosaic", 0)
    save_model(path, net, net.config, task, {"step": 7})
    found = load_model(path)
    assert (found.config, found.task, found.info) == (net.config, task, {"step": 7})
    assert not found.model.training
    assert {n: p.requires_grad for n, p in found.model.named_parameters()} == {
        n: p.requires_grad for n, p in build_network(net.config).named_parameters()
    }
    pictures = torch.rand(1, 3, 7, 4)
    with torch.no_grad():
        assert torch.equal(found.model(pictures), net(pictures))


def test_a_state_comes_back_to_the_bit(tmp_path):
    tensors = {"a": torch.randn(3, 2), "b.step": torch.tensor(3.0), "c": torch.arange(4)}
    save_state(tmp_path / "state.safetensors", tensors, RUN)
    found, progress = load_state(tmp_path / "state.safetensors")
    assert progress == RUN
    assert found.keys() == tensors.keys()
    assert all(torch.equal(found[name], tensors[name]) for name in tensors)


@pytest.fixture
def written(tmp_path):
    net = random_network()
    path = tmp_path / "model.safetensors"
    save_model(path, net, net.config, Task("denoise", 30), {})
    return path


def test_the_wrong_file_is_told_from_the_right_one(written, tmp_path):
    save_state(tmp_path / "state.safetensors", {"a": torch.ones(1)}, {})
    with pytest.raises(CheckpointError, match=r"holds a state.*wanted is model\.safetensors"):
        load_model(tmp_path / "state.safetensors")
    with pytest.raises(CheckpointError, match=r"holds a model.*wanted is state\.safetensors"):
        load_state(written)
    save_file({"a": torch.ones(1)}, tmp_path / "foreign.safetensors")
    with pytest.raises(CheckpointError, match=r"not one of ours.*wanted is model\.safetensors"):
        load_model(tmp_path / "foreign.safetensors")
    with pytest.raises(CheckpointError, match="no such file"):
        load_model(tmp_path / "missing.safetensors")
    with pytest.raises(CheckpointError, match=r"that is a folder; .* model\.safetensors in it"):
        load_model(tmp_path)
    torch.save({"a": torch.ones(1)}, tmp_path / "published.pt")
    with pytest.raises(CheckpointError, match=r"python -m acla\.checkpoint import"):
        load_model(tmp_path / "published.pt")


@pytest.mark.parametrize(
    "spoil",
    [
        pytest.param(lambda data: data[: len(data) // 2], id="truncated"),
        pytest.param(lambda data: b"", id="empty"),
        pytest.param(lambda data: b"\xff" * 8 + data[8:], id="absurd-header-length"),
        pytest.param(lambda data: data[:8] + b"x" + data[9:], id="header-no-json"),
        pytest.param(lambda data: b"PK\x03\x04" + data, id="another-format"),
    ],
)
def test_a_broken_file_is_refused(written, spoil):
    written.write_bytes(spoil(written.read_bytes()))
    with pytest.raises(CheckpointError, match="not a whole safetensors file"):
        load_model(written)


def rewrite(path, tensors=None, **header):
    found, old = serialization.read_tensors(path, "model")
    save_file(found if tensors is None else tensors(found), path, metadata={**old, **header})


@pytest.mark.parametrize(
    "model",
    [
        *("{}", "[]", "{", "null"),
        json.dumps({"width": 10**12}),
        json.dumps(asdict(SMALL) | {"residual_scale": 10**400}),
    ],
    ids=["empty", "list", "broken", "null", "width-alone", "400-digits"],
)
def test_a_configuration_that_is_not_valid_is_refused(written, model):
    rewrite(written, model=model)
    with pytest.raises(CheckpointError, match="configuration inside is not valid"):
        load_model(written)


def test_a_network_of_another_scale_than_its_task_is_refused(tmp_path):
    net = random_network(scale=2)
    save_model(tmp_path / "model.safetensors", net, net.config, Task("sr", 3), {})
    with pytest.raises(CheckpointError, match="a network for ×2 with the task sr x3"):
        load_model(tmp_path / "model.safetensors")


def test_tensors_must_be_the_networks(written):
    rewrite(written, lambda t: {**t, "more": torch.ones(1)})
    with pytest.raises(CheckpointError, match="1 are unknown, for instance more"):
        load_model(written)
    rewrite(written, lambda t: {k: v for k, v in t.items() if k not in ("more", "head.0.bias")})
    with pytest.raises(CheckpointError, match="1 tensors are missing"):
        load_model(written)
    rewrite(written, lambda t: {**t, "head.0.bias": torch.ones(9)})
    with pytest.raises(CheckpointError, match=r"head\.0\.bias is torch\.float32 \[9\]"):
        load_model(written)
    rewrite(written, lambda t: {**t, "head.0.bias": torch.ones(8, dtype=torch.float16)})
    with pytest.raises(CheckpointError, match=r"head\.0\.bias is torch\.float16"):
        load_model(written)


@pytest.mark.parametrize("info", ["[1]", "null", "3", '"text"'])
def test_notes_that_are_no_object_are_refused(written, info):
    rewrite(written, info=info)
    with pytest.raises(CheckpointError, match="not valid: the notes must be a JSON object, not "):
        load_model(written)


def test_more_blocks_than_tensors_are_refused_before_they_are_built(written, monkeypatch):
    monkeypatch.setattr(serialization, "build_network", lambda *_: pytest.fail("built"))
    config = replace(SMALL, backbone="rcan", blocks=256, group_blocks=256)
    rewrite(written, model=json.dumps(asdict(config)))
    with pytest.raises(CheckpointError, match=r"does not fit its network: \d+ tensors for 65536 "):
        load_model(written)
    with pytest.raises(CheckpointError, match=r"1 tensors for 65536 blocks; begin anew with --out"):
        serialization.require_network(
            config, {"model.a": torch.ones(1), "b": torch.ones(1)}, written
        )


def test_a_state_s_network_is_compared_before_memory_is_taken_for_it(tmp_path):
    tensors = {f"model.{name}": t for name, t in random_network().state_dict().items()}
    serialization.require_network(SMALL, {**tensors, "averaged.x": torch.ones(1)}, tmp_path)
    wide = replace(SMALL, width=4096, keys=1024)
    with pytest.raises(CheckpointError, match=r"model\.\S+ is torch\.float32 .*; begin anew with"):
        serialization.require_network(wide, tensors, tmp_path)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"step": None}, "step must be int, not NoneType"),
        ({"step": True}, "step must be int, not bool"),
        ({"step": -1}, "step must be 0 or more, not -1"),
        ({"step": 2**63}, "a number of 19 digits"),
        ({"data": {"deep": [-(10**400)]}}, "a number of 402 digits"),
        ({"seconds": "1"}, "seconds must be float, not str"),
        ({"data": []}, "data must be dict, not list"),
        ({"plan": 3}, "plan must be dict, not int"),
        ({"more": 3}, "'more' is unknown"),
        ({"seen": [1.0]}, "seen must be two sums"),
        ({"seen": [1.0, "2"]}, "seen must be a list of numbers"),
        ({"seen": [1.0, 2.0], "count": -1}, "count must be a number of steps, 0 or more"),
        ({"seen": [1.0, 2.0], "count": 0.5}, "count must be a number of steps, 0 or more"),
        ({"plan": {"train": 0}}, "the progress has no flags"),
        ({"plan": {"train": 0}, **TRAINED, "flags": []}, "flags must be dict, not list"),
        ({"plan": {"train": 0}, **TRAINED, "scaler": 1}, "scaler must be dict, not int"),
        ({"plan": {"train": 0}, **TRAINED, "best": None}, "best must be dict, not NoneType"),
        ({"plan": {"train": 0}, **TRAINED, "best": {"step": 3}}, "best has no val_psnr"),
        ({"plan": {"train": 0}, **TRAINED, "val_psnr": "inf"}, "val_psnr must be float, not str"),
        ({"plan": {"train": 0}, **TRAINED, "step": 0}, "best must be NoneType, not dict"),
        ({"plan": {"train": 0}, **TRAINED, "more": 1}, "'more' is unknown"),
        ({"plan": {"train": 0}, **TRAINED, "losses": 1.0}, "losses must be a list of numbers"),
        ({"plan": {"train": 0}, **TRAINED, "best": None, "losses": [1.0]}, "best must be dict"),
        ({"plan": {"train": 0}, **TRAINED, "count": 1}, "'count' is unknown"),
    ],
)
def test_progress_of_another_kind_is_refused(tmp_path, change, reason):
    path = tmp_path / "state.safetensors"
    save_state(path, {}, {**RUN, **change})
    said = f"{path}: the progress inside is not valid: {reason}"
    with pytest.raises(CheckpointError, match=f"^{re.escape(said)}.*; begin anew with --out DIR$"):
        load_state(path)


def test_progress_of_a_training_is_read(tmp_path):
    path = tmp_path / "state.safetensors"
    row = {"loss": 1.0, "lr": 0.1, "norm": 2.0, "val_psnr_Set5": 29.0, "begun_with": None}
    begun = {"step": 0, "best": None}
    stopped = {"losses": [1.0], "norms": [2.0]}
    for change in ({}, begun, stopped):
        progress = {**RUN, "plan": {"train": {}}, **TRAINED, **row, **change}
        save_state(path, {}, progress)
        assert load_state(path)[1] == progress
    early = {**RUN, "plan": {"train": {}}, "flags": {}, "scaler": {}, "best": None, **stopped}
    for progress in (early, {**RUN, "seen": [1.0, 2.0], "count": 3}):
        save_state(path, {}, progress)
        assert load_state(path)[1] == progress


def test_what_killed_writes_left_is_removed_and_nothing_else(written):
    folder = written.parent
    kept = [".hidden", ".notes.tmp", "model.1.tmp", written.name]
    for name in [*kept[:-1], ".state.safetensors.123.tmp", ".train.jsonl.4.tmp"]:
        (folder / name).touch()
    files.clear_temporary(folder)
    assert sorted(path.name for path in folder.iterdir()) == sorted(kept)


def test_a_failed_write_leaves_the_old_file_whole(written, monkeypatch):
    before = written.read_bytes()

    def full_disk(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(OSError, match="No space left"):
        save_model(written, random_network(), SMALL, Task("denoise", 30), {})
    assert written.read_bytes() == before
    assert list(written.parent.iterdir()) == [written]


def test_the_command_imports_a_published_file(tmp_path):
    source, out = tmp_path / "a2n.pt", tmp_path / "a2n.safetensors"
    torch.save(random_tensors("a2n", 3, 8), source)
    command = [sys.executable, "-m", "acla.checkpoint", "import", source, out]
    done = subprocess.run([*command, "--scale", "3"], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith(f"{out}: sr x3, a2n of 2 blocks × 8, ")
    assert load_model(out).task == Task("sr", 3)
