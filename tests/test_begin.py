"""train.py that begins with weights: of a trained network, or of the supernet."""

import hashlib
from pathlib import Path

import pytest
import torch
from running import SHORT, SMALL, rows

import search
import train
from acla.errors import CheckpointError, UsageError
from acla.models.serialization import load_model

pytestmark = pytest.mark.usefixtures("elsewhere")


def test_a_run_begins_with_the_weights_of_a_trained_backbone(small_sets, capsys):
    plain = [*SMALL[:6], "--arch", "none"]
    train.main([*plain, *SHORT, *small_sets, "--out", "plain"])
    begin = [*SMALL, *small_sets, "--init", "plain/model.safetensors", "--lr", "1e-12", "--ema"]
    train.main([*begin, *SHORT, "--out", "more"])
    assert "weights: plain/model.safetensors" in capsys.readouterr().err
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


def test_attention_modules_are_taken_whole_or_not_at_all(small_sets, capsys):
    train.main([*SMALL, *SHORT, *small_sets, "--lr", "1e-2", "--out", "one"])  # at 1 and 3
    trained = load_model(Path("one/model.safetensors")).model.state_dict()
    for flags, taken in (
        ((), (1, 3)),
        (("--positions", "1"), (1,)),
        (("--positions", "1,2,3"), (1,)),  # 3 refers to 2 as well
        (("--positions", "2,3"), ()),  # and here not to 1
        (("--keys", "4"), ()),
        (("--attention", "cla"), ()),
        (("--attention", "cla-k"), (1, 3)),
        (("--attention", "se", "--keys", "0"), ()),
    ):
        words = [*SMALL, *flags, *small_sets, *SHORT[:-4], "--steps", "1", "--val-every", "1"]
        words += ["--init", "one/model.safetensors", "--lr", "1e-12", "--seed", "5"]
        out = "-".join(["to", *flags]).replace(",", "")
        train.main([*words, "--out", out])
        written = load_model(Path(out, "model.safetensors"))
        begun = written.model.state_dict()
        for name in begun.keys() & trained.keys():
            whole = not name.startswith("attention.") or int(name.split(".")[1]) in taken
            fits = begun[name].shape == trained[name].shape
            near = fits and torch.allclose(begun[name], trained[name], rtol=0, atol=1e-9)
            assert near == whole, (flags, name)
        new = "is new" in capsys.readouterr().err
        assert new == (
            len(taken) < len(load_model(Path(out, "model.safetensors")).config.positions)
        )


def test_weights_of_another_backbone_are_refused(small_sets):
    train.main([*SMALL, *SHORT, *small_sets, "--out", "one"])
    begin = ["--init", "one/model.safetensors", *SHORT, *small_sets, "--out", "two"]
    with pytest.raises(CheckpointError, match="another backbone than the one to begin"):
        train.main([*SMALL, *begin, "--width", "16"])
    with pytest.raises(CheckpointError, match=r"residual_scale is 1\.0, not 0\.1"):
        train.main([*SMALL, *begin, "--residual-scale", "0.1"])
    with pytest.raises(UsageError, match="--init-supernet and --init"):
        train.main([*SMALL, *begin, "--init-supernet"])
    with pytest.raises(CheckpointError, match="no such file"):
        train.main([*SMALL, *begin, "--init", "none.safetensors"])


def test_a_run_begins_with_the_supernets_weights():
    search.main(
        [*SMALL[:-2], "--batch-size", "2", "--patch-size", "16", "--steps", "4", "--lambda", "0"]
    )
    supernet = load_model(Path("runs/search/model.safetensors"))
    still = ["--lr", "1e-30", "--batch-size", "2", "--patch-size", "16", "--steps", "1", "--ema"]
    train.main(["--init-supernet", *still])
    trained = load_model(Path("runs/train/model.safetensors"))
    assert trained.config == supernet.config
    ours, theirs = trained.model.state_dict(), supernet.model.state_dict()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
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
