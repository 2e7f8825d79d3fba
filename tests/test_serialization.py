"""Model and state files: equal to the bit, rebuilt from the file alone, refused with the reason."""

import json
import os
import re
from dataclasses import asdict, replace

import pytest
import torch
from safetensors.torch import save_file

from acla import files
from acla.config import ATTENTIONS, BACKBONES, ModelConfig, Task, from_dict
from acla.errors import CheckpointError
from acla.models import serialization
from acla.models.backbones import Backbone
from acla.models.factory import build_network
from acla.models.serialization import (
    Checkpoint,
    compatible_weights,
    load_model,
    load_state,
    save_model,
    save_state,
)

RUN = {"step": 3, "seconds": 0.5, "plan": {}, "data": {}}  # the progress of a search
SMALL = ModelConfig(blocks=3, width=8, group_blocks=1, reduction=2, keys=3, positions=(1, 3))


def random_network(**changes) -> Backbone:
    net = build_network(replace(SMALL, **changes)).eval()
    for parameter in net.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return net


@pytest.mark.parametrize(
    ("backbone", "attention", "scale"),
    [
        *((backbone, "acla", 1) for backbone in BACKBONES),
        *((backbone, "cla", 4) for backbone in BACKBONES),
        *(("edsr", attention, 2) for attention in ATTENTIONS),
    ],
)
def test_a_network_comes_back_to_the_bit(tmp_path, backbone, attention, scale):
    changes = {"positions": (), "keys": 0} if attention == "none" else {}
    changes |= {} if ATTENTIONS[attention].keys else {"keys": 0}
    net = random_network(backbone=backbone, attention=attention, scale=scale, **changes)
    path = tmp_path / "model.safetensors"
    task = Task("demosaic", 0) if scale == 1 else Task("sr", scale)
    save_model(path, net, net.config, task, {"step": 7})
    result = load_model(path)
    assert (result.config, result.task, result.info) == (net.config, task, {"step": 7})
    assert not result.model.training
    assert {n: p.requires_grad for n, p in result.model.named_parameters()} == {
        n: p.requires_grad for n, p in build_network(net.config).named_parameters()
    }
    pictures = torch.rand(1, 3, 7, 4)
    with torch.no_grad():
        assert torch.equal(result.model(pictures), net(pictures))


@pytest.mark.parametrize(
    ("backbone", "scale"), [*((b, 1) for b in BACKBONES), ("edsr", 2), ("rcan", 4), ("a2n", 2)]
)
def test_a_network_in_colour_begins_a_gray_one(tmp_path, backbone, scale):
    net = random_network(backbone=backbone, scale=scale, attention="none", positions=(), keys=0)
    for name, p in net.named_parameters():
        if "_mean." in name:  # the same for every channel
            p.data = torch.full_like(p, 0.3) if p.ndim == 1 else torch.eye(3)[..., None, None]
    task, path = Task("sr", scale) if scale > 1 else Task("demosaic", 0), tmp_path / "m.safetensors"
    save_model(path, net, net.config, task, {})
    config = replace(net.config, channels=1)
    weights, was = compatible_weights(path, config)
    gray = build_network(config).eval()
    gray.load_state_dict({**gray.state_dict(), **weights})
    for name, p in gray.named_parameters():
        if "_mean.bias" in name:
            p.data.fill_(0.3)
    pictures = torch.rand(2, 1, 7, 4)
    with torch.no_grad():
        expected = net(pictures.expand(-1, 3, -1, -1)).mean(1, keepdim=True)
        torch.testing.assert_close(
            gray(pictures), expected, rtol=0, atol=1e-4 * expected.abs().max().item()
        )
    assert was == task
    save_model(path, gray, config, task, {})
    with pytest.raises(CheckpointError, match="channels is 1, not 3"):
        compatible_weights(path, net.config)


def test_a_folder_in_the_form_of_the_hub_comes_back(tmp_path):
    net, task, folder = random_network(), Task("car", 5, 60), tmp_path / "new" / "car"
    Checkpoint(net, net.config, task, {"step": 7}).save_pretrained(str(folder))
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", "model.safetensors"]
    written = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    assert written["model_type"] == "acla"
    assert from_dict(ModelConfig, written["model"]) == net.config
    assert from_dict(Task, written["task"]) == task
    result = Checkpoint.from_pretrained(str(folder))
    assert (result.config, result.task, result.info) == (net.config, task, {"step": 7})
    pictures = torch.rand(1, 3, 7, 4)
    with torch.no_grad():
        assert torch.equal(result.model(pictures), net(pictures))


def test_what_is_no_folder_of_a_network_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match=r"somebody/net: .*snapshot_download"):
        Checkpoint.from_pretrained("somebody/net")
    with pytest.raises(CheckpointError, match=r"model\.safetensors: there is no such file"):
        Checkpoint.from_pretrained(tmp_path)


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


def test_a_wrong_file_s_error_names_the_right_one(written, tmp_path):
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
    "damage",
    [
        pytest.param(lambda data: data[: len(data) // 2], id="truncated"),
        pytest.param(lambda data: b"", id="empty"),
        pytest.param(lambda data: b"\xff" * 8 + data[8:], id="absurd-header-length"),
        pytest.param(lambda data: data[:8] + b"x" + data[9:], id="header-no-json"),
        pytest.param(lambda data: b"PK\x03\x04" + data, id="another-format"),
    ],
)
def test_a_damaged_file_is_refused(written, damage):
    written.write_bytes(damage(written.read_bytes()))
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
    with pytest.raises(CheckpointError, match="configuration"):
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
    rewrite(written, lambda t: {**t, "head.0.bias": torch.ones(8, dtype=torch.float64)})
    with pytest.raises(CheckpointError, match=r"head\.0\.bias is torch\.float64"):
        load_model(written)


@pytest.mark.parametrize("info", ["[1]", "null", "3", '"text"'])
def test_notes_that_are_no_object_are_refused(written, info):
    rewrite(written, info=info)
    with pytest.raises(CheckpointError, match="notes must be a JSON object"):
        load_model(written)


def test_more_blocks_than_tensors_are_refused_before_they_are_built(written, monkeypatch):
    monkeypatch.setattr(serialization, "build_network", lambda *_: pytest.fail("built"))
    config = replace(SMALL, backbone="rcan", blocks=256, group_blocks=256)
    rewrite(written, model=json.dumps(asdict(config)))
    with pytest.raises(CheckpointError, match=r"does not fit its network: \d+ tensors for 65536 "):
        load_model(written)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"step": None}, "step must be int, not NoneType"),
        ({"step": True}, "step must be int, not bool"),
        ({"step": 2**63}, "a number of 19 digits"),
        ({"data": {"deep": [-(10**400)]}}, "a number of 402 digits"),
        ({"seconds": "1"}, "seconds must be float, not str"),
        ({"plan": 3}, "plan must be dict, not int"),
    ],
)
def test_progress_of_another_kind_is_refused(tmp_path, change, reason):
    path = tmp_path / "state.safetensors"
    save_state(path, {}, {**RUN, **change})
    with pytest.raises(
        CheckpointError, match=rf"^{re.escape(str(path))}: .*{reason}; .*--out DIR$"
    ):
        load_state(path)


def test_only_temporary_files_of_killed_writes_are_removed(written):
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
