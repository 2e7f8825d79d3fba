"""What training and searching share: schedules, seeds, losses, folders, logs, states."""

import json
from pathlib import Path

import pytest
import torch
from PIL import Image

from acla.config import ModelConfig, Task
from acla.data import datasets
from acla.data.datasets import PatchSampler, Pictures
from acla.data.image import save
from acla.errors import AclaError, CheckpointError, DataError, PictureError, UsageError
from acla.models.factory import build_network
from acla.models.serialization import load_state, save_state
from acla.training import run_dir, trainer, validation


def test_the_rate_is_halved_on_time():
    rates = [trainer.halved(1e-4, step, 200) for step in (0, 199, 200, 599, 600)]
    assert rates == [1e-4, 1e-4, 5e-5, 2.5e-5, 1.25e-5]


def test_the_cosine_falls_from_the_rate_to_zero():
    rates = [trainer.cosine(2.0, step, 10) for step in range(11)]
    assert rates[0] == 2
    assert rates[5] == pytest.approx(1)
    assert rates[10] == pytest.approx(0)
    assert rates == sorted(rates, reverse=True)


def test_seeds_depend_on_everything_and_on_nothing_else():
    seeds = trainer.image_seeds(1, 2, range(8))
    assert seeds.dtype == torch.int64
    assert torch.equal(seeds, trainer.image_seeds(1, 2, range(8)))
    assert torch.equal(seeds[4:], trainer.image_seeds(1, 2, range(4, 8)))
    others = [trainer.image_seeds(*key) for key in [(0, 2, range(8)), (1, 3, range(8))]]
    others.append(trainer.image_seeds(1, 2, range(8), stream=1))
    assert len(set(torch.cat([seeds, *others]).tolist())) == 32
    gates = {trainer.gate_seed(0, 1), trainer.gate_seed(0, 2), trainer.gate_seed(0, 1, 1)}
    assert len(gates) == 3


def test_losses_are_on_0_to_255():
    restored, target = torch.zeros(2, 3), torch.full((2, 3), 2 / 255)
    assert trainer.restoration_loss("l1", restored, target) == pytest.approx(2)
    assert trainer.restoration_loss("mse", restored, target) == pytest.approx(4)


def test_the_psnr_loss_is_the_mean_of_the_pictures():
    target = torch.rand(3, 1, 5, 7)
    restored = target + torch.tensor([0.1, 0.01, 0.0]).view(3, 1, 1, 1)
    restored.requires_grad_()
    loss = trainer.restoration_loss("psnr", restored, target)
    assert loss.item() == pytest.approx(-(20 + 40 + 80) / 3, abs=1e-3)
    (gradient,) = torch.autograd.grad(loss, restored)
    assert gradient.isfinite().all()  # even where nothing is left to restore


def test_a_run_never_begins_over_another(tmp_path):
    assert run_dir.open_run(tmp_path / "new", "state", False) is None
    with pytest.raises(UsageError, match="holds no state"):
        run_dir.open_run(tmp_path, "state", True)
    (tmp_path / "model.safetensors").touch()  # another script's
    with pytest.raises(UsageError, match=r"already holds a network, model\.safetensors"):
        run_dir.open_run(tmp_path, "state", False)
    (tmp_path / "state").touch()
    with pytest.raises(UsageError, match=r"already holds a run.*--resume"):
        run_dir.open_run(tmp_path, "state", False)
    assert run_dir.open_run(tmp_path, "state", True) == tmp_path / "state"


def test_rows_after_the_checkpoint_are_taken_back(tmp_path):
    log = tmp_path / "log.jsonl"
    run_dir.drop_rows_after(log, 5)
    assert log.read_text() == ""
    for step in (5, 10, 15):
        run_dir.append_row(log, {"step": step})
    with open(log, "a") as file:
        file.write('{"step": 2')  # a row cut short by a kill
    run_dir.drop_rows_after(log, 10)
    assert [json.loads(line)["step"] for line in log.read_text().splitlines()] == [5, 10]


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path):
    run_dir.require_finite(1.0, 0, 5, tmp_path)
    for loss in (float("nan"), float("inf")):
        with pytest.raises(AclaError, match=f"{loss} between steps 10 and 20"):
            run_dir.require_finite(loss, 10, 20, tmp_path)


def test_the_first_step_that_diverged_and_its_pictures_are_named(tmp_path):
    pictures = Pictures([tmp_path / f"{name}.png" for name in "abcde"])
    sampler = PatchSampler(pictures, Task("demosaic", 0), patch=4, batch=2, seed=3)
    nan, inf = float("nan"), float("inf")
    run_dir.require_finite_steps([1.0, 2.0], inf, 12, sampler, "x")  # a perfect validation
    a, b = sampler.names(11)
    message = rf"loss is inf in step 12, patches 22 to 23, of {a}, {b}; .* x of 9"
    with pytest.raises(AclaError, match=message):
        run_dir.require_finite_steps([1.0, inf, nan], nan, 13, sampler, "x of 9")
    with pytest.raises(AclaError, match=r"validation is nan .* step 13, patches 24 to 25"):
        run_dir.require_finite_steps([1.0, 2.0], nan, 13, sampler, "x")
    many = PatchSampler(pictures, Task("demosaic", 0), patch=4, batch=20)
    with pytest.raises(AclaError, match=r"\.png and 4 more; "):
        run_dir.require_finite_steps([nan], 1.0, 1, many, "x")


def test_a_full_disk_is_reported_with_the_log(tmp_path, monkeypatch):
    def full_disk(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(run_dir, "open", full_disk, raising=False)
    with pytest.raises(OSError, match="No space left") as raised:
        run_dir.append_row(tmp_path / "log", {"step": 7})
    assert raised.value.filename == str(tmp_path / "log")


def test_rows_are_json_whatever_they_hold(tmp_path):
    run_dir.append_row(tmp_path / "log", {"psnr": float("inf")})
    assert json.loads((tmp_path / "log").read_text()) == {"psnr": None}


def test_a_bad_validation_picture_is_found_before_training(tmp_path):
    good, small, broken = (tmp_path / name for name in ("good.png", "small.png", "broken.png"))
    save(torch.rand(3, 40, 30), good)
    save(torch.rand(3, 4, 4), small)
    broken.write_bytes(b"no picture")
    assert len(validation.validation_set([good], Task("sr", 2), 3)) == 1
    with pytest.raises(DataError, match=r"small\.png: "):
        validation.validation_set([good, small], Task("sr", 2), 3)
    with pytest.raises(PictureError, match=r"broken\.png"):
        validation.validation_set([good, broken], Task("sr", 2), 3)


def test_a_few_pictures_may_be_enough(tmp_path, make_scene):
    for seed in range(3):
        Image.fromarray(make_scene(20, 24, seed=seed)).save(tmp_path / f"{seed}.png")
    pictures, task = Pictures(sorted(tmp_path.glob("*.png"))), Task("car", 10)
    model = build_network(ModelConfig(attention="none", keys=0, blocks=1, width=4, channels=1))
    every = validation.each_psnr(model, pictures, task, torch.device("cpu"))
    assert len(set(every)) == 3
    assert validation.each_psnr(model, pictures, task, torch.device("cpu"), 2) == every[:2]


def test_a_digest_notices_another_set(tmp_path):
    (tmp_path / "a").write_text("x")
    (tmp_path / "b").write_text("xy")
    both = datasets.fingerprint([tmp_path / "a", tmp_path / "b"])
    assert both == datasets.fingerprint([tmp_path / "b", tmp_path / "a"])
    assert both != datasets.fingerprint([tmp_path / "a"])
    (tmp_path / "b").write_text("xyz")
    assert both != datasets.fingerprint([tmp_path / "a", tmp_path / "b"])


def parts_of_a_run() -> dict:
    """A module, its optimiser, and a part that is not there; one parameter learns nothing."""
    model = torch.nn.Linear(3, 2)
    model.bias.requires_grad_(False)
    parameters = [model.bias, model.weight]
    return {"model": model, "optimizer": trainer.adam(parameters, 0.1), "none": None}


def test_packed_parts_come_back_to_the_bit(tmp_path):
    first, second = parts_of_a_run(), parts_of_a_run()
    for _ in range(3):
        first["model"](torch.ones(1, 3)).square().sum().backward()
        first["optimizer"].step()
    tensors = trainer.state_tensors(first)
    assert sorted(name for name in tensors if name.startswith("o")) == [
        f"optimizer.1.{name}" for name in ("exp_avg", "exp_avg_sq", "step")
    ]
    path = tmp_path / "state.safetensors"
    save_state(path, tensors, {"step": 3, "seconds": 0.0, "plan": {}, "data": {}})
    trainer.load_state_tensors(second, load_state(path)[0], path)
    for parts in (first, second):
        parts["optimizer"].zero_grad()
        parts["model"](torch.ones(1, 3)).square().sum().backward()
        parts["optimizer"].step()
    assert torch.equal(first["model"].weight, second["model"].weight)


@pytest.mark.parametrize(
    ("name", "tensor"),
    [
        ("model.weight", torch.ones(2)),
        ("model.more", torch.ones(2)),
        ("model.bias", None),
        ("none.x", torch.ones(1)),
        ("alone", torch.ones(1)),
        ("optimizer.1.step.x", torch.ones(2, 3)),
        ("optimizer.x.step", torch.tensor(1.0)),
        ("optimizer.1", torch.tensor(1.0)),
    ],
)
def test_tensors_of_another_run_are_refused_in_one_line(name, tensor):
    parts = parts_of_a_run()
    parts["model"](torch.ones(1, 3)).square().sum().backward()
    parts["optimizer"].step()
    tensors = {k: t.clone() for k, t in trainer.state_tensors(parts).items()} | {name: tensor}
    if tensor is None:
        del tensors[name]
    with pytest.raises(CheckpointError, match=r"^x/state: .*; start over with --out DIR$"):
        trainer.load_state_tensors(parts_of_a_run(), tensors, Path("x/state"))
