"""train.py that begins with weights: of a trained network, or of the supernet."""

import hashlib
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from running import SHORT, SMALL, rows

import search
import train
from acla.config import ModelConfig, Task
from acla.errors import CheckpointError, UsageError
from acla.models.backbones import Backbone
from acla.models.serialization import compatible_weights, load_model, save_model

pytestmark = pytest.mark.usefixtures("elsewhere")


def test_a_run_begins_with_the_weights_of_a_trained_backbone(small_sets, capsys):
    plain, brief = [*SMALL[:6], "--arch", "none"], [*SHORT[:4], "--steps", "2", "--val-every", "2"]
    train.main([*plain, *brief, *small_sets, "--out", "plain"])
    begin = [*SMALL, *small_sets, "--init", "plain/model.safetensors", "--lr", "1e-12", "--ema"]
    train.main([*begin, *brief, "--out", "more"])
    said = capsys.readouterr().err
    assert "weights: plain/model.safetensors" in said
    assert "the attention behind 1, 3 is new" in said
    before, after = (
        load_model(Path(out, "model.safetensors")).model.state_dict() for out in ("plain", "more")
    )
    for name, tensor in before.items():
        torch.testing.assert_close(after[name], tensor, rtol=0, atol=1e-9)
    assert any(name.startswith("attention.") for name in after)
    # The modules are new and change nothing, so that the score is the backbone's
    assert rows("more")[-1]["val_psnr"] == pytest.approx(rows("plain")[-1]["val_psnr"], abs=1e-6)
    info = load_model(Path("more/model.safetensors")).info
    digest = hashlib.sha256(Path("plain/model.safetensors").read_bytes()).hexdigest()
    assert info["begun_with"] == {"file": "plain/model.safetensors", "sha256": digest}
    assert load_model(Path("plain/model.safetensors")).info["begun_with"] is None


@pytest.fixture
def trained() -> Backbone:
    """A network of random weights in one.safetensors, with modules at 1 and 3."""
    net = Backbone(ModelConfig(blocks=3, width=8, keys=3, positions=(1, 3), channels=1))
    for parameter in net.parameters():
        torch.nn.init.normal_(parameter)
    save_model(Path("one.safetensors"), net, net.config, Task("car", 10), {})
    return net


@pytest.mark.parametrize(
    ("change", "taken"),
    [
        ({}, "13"),
        ({"positions": (1,)}, "1"),
        ({"positions": (1, 2, 3)}, "1"),  # 3 refers to 2 as well
        ({"positions": (2, 3)}, ""),  # and here not to 1
        ({"keys": 4}, ""),
        ({"attention": "cla"}, ""),
        ({"attention": "cla-k"}, "13"),
        ({"attention": "se", "keys": 0}, ""),
    ],
    ids=str,
)
def test_attention_modules_are_taken_whole_or_not_at_all(trained, change, taken):
    config = replace(trained.config, **change)
    weights, task = compatible_weights(Path("one.safetensors"), config)
    assert task == Task("car", 10)
    assert {name.split(".")[1] for name in weights if name.startswith("attention.")} == set(taken)
    for name, tensor in trained.state_dict().items():
        whole = not name.startswith("attention.") or name.split(".")[1] in taken
        assert (name in weights) == whole
        assert not whole or torch.equal(weights[name], tensor)
    assert weights.keys() <= Backbone(config).state_dict().keys()


def test_weights_of_another_backbone_are_refused(trained, small_sets):
    begin = ["--init", "one.safetensors", *SHORT, *small_sets]
    with pytest.raises(CheckpointError, match="another backbone than the one to begin"):
        train.main([*SMALL, *begin, "--width", "16"])
    with pytest.raises(CheckpointError, match=r"residual_scale is 1\.0, not 0\.1"):
        train.main([*SMALL, *begin, "--residual-scale", "0.1"])
    with pytest.raises(UsageError, match="--init-supernet and --init"):
        train.main([*SMALL, *begin, "--init-supernet"])
    with pytest.raises(CheckpointError, match="no such file"):
        train.main([*SMALL, *begin, "--init", "none.safetensors"])


def test_a_run_begins_with_the_supernets_weights(small_sets):
    brief = ["--batch-size", "2", "--patch-size", "16", *small_sets]
    search.main([*SMALL[:-2], *brief[:6], *brief[-2:], "--steps", "4", "--lambda", "0"])
    supernet = load_model(Path("runs/search/model.safetensors"))
    still = ["--lr", "1e-30", "--steps", "1", "--ema", *brief]
    train.main(["--init-supernet", *still])
    trained = load_model(Path("runs/train/model.safetensors"))
    assert trained.config == supernet.config
    ours, theirs = trained.model.state_dict(), supernet.model.state_dict()
    assert all(torch.allclose(ours[n], theirs[n], rtol=0, atol=1e-20) for n in theirs)
    for words, message in (
        (
            ["--init-supernet", "--arch", "paper"],
            "--init-supernet goes with a searched architecture",
        ),
        (["--init-supernet", "--keys", "5"], "holds another network"),
    ):
        with pytest.raises(UsageError, match=message):
            train.main([*words, *still, "--out", "other"])
    assert not Path("other").exists()
