"""Attention modules changed in one way at a time."""

import json

import pytest
import torch
from torch import nn

from acla.analysis import variants
from acla.config import ModelConfig, TrainConfig
from acla.distributed import Processes
from acla.errors import UsageError
from acla.scripts import train
from acla.training.trainer import Trainer

NETWORK = ModelConfig(blocks=2, width=4, attention="acla", keys=16, positions=(1, 2))
CONFIG = TrainConfig(steps=4, mask_noise=False)
FLAGS = ["--preset", "small", "--task", "demosaic", "--blocks", "8", "--width", "4", "--steps", "2"]
FLAGS += ["--batch-size", "2", "--patch-size", "16", "--val-every", "2", "--device", "cpu"]


def new_trainer() -> Trainer:
    """Of a network with no weights at zero, so that every part has a gradient."""
    trainer = Trainer(NETWORK, CONFIG, Processes(torch.device("cpu")))
    for parameter in trainer.model.parameters():
        if parameter.requires_grad and not parameter.any():
            nn.init.normal_(parameter, std=0.1)
    return trainer


def part(trainer: Trainer, name: str) -> torch.Tensor:
    """A parameter of the last module; of `points`, the weight of offsets or logits."""
    module = trainer.model.attention["2"]
    if name in ("offsets", "logits"):
        points = module.points.weight.detach().unflatten(0, (module.layers, 3, module.keys))
        return points[:, :2] if name == "offsets" else points[:, 2]
    return module.get_parameter(name).detach().clone()


def moved(name: str, **factors: float) -> torch.Tensor:
    """What a step does to a part."""
    trainer = new_trainer()
    generator = torch.Generator().manual_seed(0)
    low, target = torch.rand(2, 2, 3, 12, 12, generator=generator)
    variants.scale_updates(trainer, **factors)
    before = part(trainer, name).clone()
    trainer.step(0, range(2), low, target)
    return part(trainer, name) - before


@pytest.mark.parametrize("name", ["offsets", "logits", "value", "output.weight", "mask"])
@pytest.mark.parametrize(
    ("factors", "expected"),
    [
        ({"offsets": 10.0, "logits": 0.5}, {"offsets": 10.0, "logits": 0.5}),
        ({"linear": 3.0}, {"value": 3.0, "output.weight": 3.0}),
        ({"warmup": 1.0}, dict.fromkeys(("offsets", "logits", "value", "mask"), 0.25)),
    ],
)
def test_factors_scale_the_updates_of_their_parts_alone(name, factors, expected):
    plain = moved(name)
    assert plain.abs().max() > 0
    share = expected.get(name, 0.25 if "warmup" in factors else 1)
    torch.testing.assert_close(moved(name, **factors), share * plain, rtol=1e-3, atol=1e-9)


def test_decay_shrinks_weights():
    apart = moved("value", decay=100.0) - moved("value")
    expected = -100 * CONFIG.lr * part(new_trainer(), "value")
    torch.testing.assert_close(apart, expected, rtol=1e-3, atol=1e-7)


@torch.no_grad()
def test_a_query_times_255_has_the_points_of_weights_times_255():
    low, trainer = torch.rand(1, 3, 12, 12), new_trainer()
    plain = trainer.model.eval()(low)
    variants.change_query(trainer, lambda query: 255 * query)
    changed = trainer.model(low)
    assert not torch.equal(plain, changed)
    for module in trainer.model.attention.values():
        module.change = lambda query: query
        module.points.weight *= 255
    torch.testing.assert_close(trainer.model(low), changed, rtol=1e-3, atol=1e-3)


def test_a_normalised_query_ignores_scale_and_mean():
    query = torch.rand(2, 5, 3, 4)
    one = variants.normalised(query)
    torch.testing.assert_close(one.mean(1), torch.zeros(2, 3, 4), rtol=0, atol=1e-5)
    torch.testing.assert_close(variants.normalised(100 * query + 3), one, rtol=1e-2, atol=1e-2)


def test_keys_begin_on_neighbours_and_a_wide_ring():
    trainer = new_trainer()
    variants.near_and_wide(trainer)
    offsets = trainer.model.attention["2"].points.bias.detach().unflatten(0, (2, 3, 16))[0, :2]
    assert {tuple(o) for o in offsets[:, :8].T.tolist()} == {
        (y, x) for y in (-1, 0, 1) for x in (-1, 0, 1) if (y, x) != (0, 0)
    }
    torch.testing.assert_close(offsets[:, 8:].norm(dim=0), torch.full((8,), variants.WIDE_RADIUS))


def test_the_command_trains_the_chosen_variants_beside_none(tmp_path, capsys):
    rows = tmp_path / "rows.jsonl"
    chosen = ["--variants", "h from 0.01,8 keys", "--out", str(tmp_path / "out")]
    variants.main([*chosen, "--json", str(rows), *FLAGS])
    written = [json.loads(line) for line in rows.read_text().splitlines()]
    assert [row["network"] for row in written] == ["none", "h from 0.01", "8 keys"]
    assert len({row["val_psnr"] for row in written}) == 3
    assert f"| {written[2]['ms_48x48']:.1f} " in capsys.readouterr().out


@pytest.mark.parametrize("flags", [["--variants", "other"], ["--ema", "--variants", "warm-up"]])
def test_refused_calls(tmp_path, flags):
    with pytest.raises(UsageError, match=flags[0]):
        variants.main([*flags, "--out", str(tmp_path), *FLAGS])


def test_every_variant_has_a_network_and_trains():
    low, target = torch.rand(2, 2, 3, 12, 12)
    for flags, change in variants.VARIANTS.values():
        plan = train.plan_from_flags(train.parse([*FLAGS, *flags.split()]), "small")
        assert plan.model.blocks == 8
        if change:
            trainer = new_trainer()
            change(trainer)
            trainer.step(0, range(2), low, target)
            assert trainer.losses[0].isfinite()
