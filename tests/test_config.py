"""Configurations: what is accepted, what is refused and how, and flags made from fields."""

import argparse
import dataclasses
import json

import pytest

import search
import train
from acla import cli, config
from acla.config import ModelConfig, SearchConfig, Task, TrainConfig
from acla.errors import UsageError


def parse(*words: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    cli.add_task_flags(parser)
    cli.add_flags(parser, TrainConfig)
    cli.add_flags(parser, ModelConfig)
    parser.add_argument("--epochs", type=int)
    return parser.parse_args(words)


@pytest.mark.parametrize(
    ("words", "task"),
    [
        ([], None),
        (["--task", "car"], Task("car", 10)),
        (["--q", "20"], Task("car", 20)),
        (["--q", "5-60"], Task("car", 5, 60)),
        (["--task", "sr", "--scale", "3"], Task("sr", 3)),
        (["--sigma", "25"], Task("denoise", 25)),
        (["--sigma", "0.5"], Task("denoise", 0.5)),
        (["--sigma", "0-55"], Task("denoise", 0, 55)),
        (["--task", "demosaic"], Task("demosaic", 0)),
    ],
)
def test_flags_name_the_task(words, task):
    assert cli.task_from_flags(parse(*words)) == task


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--task", "sr", "--q", "10"], "--q belongs to --task car"),
        (["--q", "10", "--sigma", "10"], "belongs to --task"),
        (["--task", "sr", "--scale", "5"], "--scale must be 2, 3 or 4, not 5"),
        (["--task", "car", "--q", "0"], "--q must be a whole number of 1 to 100"),
        (["--q", "60-5"], "--q 5-60, not --q 60-5"),
        (["--q", "5-101"], "end at 100"),
        (["--sigma", "55-5"], "--sigma 55-5"),
        (["--sigma", "0"], "--sigma must be above 0"),
        (["--q", "101"], "--q must be a whole number of 1 to 100"),
        (["--sigma", "nan"], "--sigma must be above 0"),
        (["--sigma", "-1"], "--sigma must be above 0"),
    ],
)
def test_wrong_tasks_are_refused(words, message):
    with pytest.raises(UsageError, match=message):
        cli.task_from_flags(parse(*words))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"positions": (3, 2)}, "rise"),
        ({"positions": (2, 2)}, "rise"),
        ({"positions": (0, 2)}, "count from 1 to 16"),
        ({"positions": (17,)}, "count from 1 to 16"),
        ({"positions": (2.0,)}, "positions must be"),
        ({"residual_scale": float("nan")}, "--residual-scale must be finite"),
        ({"attention": "none", "positions": (1,)}, "takes no --positions"),
        ({"attention": "what"}, "known: none, cla, acla"),
        ({"keys": 0}, "--keys must be 1 to"),
        ({"attention": "cla-i", "keys": 0}, "--keys must be 1 to"),
        ({"attention": "nl"}, "nl samples no keys: leave out --keys 16"),
        ({"width": 10**9}, "--width must be 1 to"),
        ({"blocks": True}, "blocks must be"),
        ({"scale": 5}, "unknown scale"),
    ],
)
def test_wrong_networks_are_refused(fields, message):
    with pytest.raises(UsageError, match=message):
        ModelConfig(**fields)


@pytest.mark.parametrize(
    "fields",
    [{"steps": 0}, {"lr": float("nan")}, {"seed": -1}, {"clip": -1.0}, {"clip": float("inf")}],
)
def test_wrong_lengths_are_refused(fields):
    with pytest.raises(UsageError, match="must be"):
        TrainConfig(**fields)


def test_a_number_format_goes_with_mixed_precision():
    with pytest.raises(UsageError, match="--amp-dtype fp16 goes with --amp"):
        TrainConfig(amp_dtype="fp16")
    assert TrainConfig(amp=True, amp_dtype="fp16").amp


@pytest.mark.parametrize("fields", [{"lam": -0.1}, {"warmup": 1.0}, {"alpha_lr": 0.0}])
def test_wrong_searches_are_refused(fields):
    with pytest.raises(UsageError, match="must"):
        SearchConfig(**fields)


@pytest.mark.parametrize("text", ["", "10-", "-5", "a", "5-x", "5-0", "5-10-20", "1.5"])
def test_what_is_no_quality_is_refused(text, capsys):
    with pytest.raises(SystemExit):
        parse(f"--q={text}")
    assert "argument --q: wants a quality, 10, or a range, 5-60" in capsys.readouterr().err


@pytest.mark.parametrize("text", ["", "10-", "a", "5-x", "5-0", "5-10-20"])
def test_what_is_no_noise_level_is_refused(text, capsys):
    with pytest.raises(SystemExit):
        parse(f"--sigma={text}")
    assert "argument --sigma: wants a noise level, 30, or a range, 0-55" in capsys.readouterr().err


def test_a_range_of_qualities_covers_its_own():
    many = Task("car", 5, 60)
    assert (many.label, str(many), many.scale, many.channels) == ("q5-60", "car q5-60", 1, 1)
    assert many.covers(many)
    assert many.covers(Task("car", 5))
    assert many.covers(Task("car", 60))
    assert many.covers(Task("car", 10, 20))
    assert not many.covers(Task("car", 4))
    assert not many.covers(Task("car", 10, 61))
    assert not Task("car", 10).covers(many)
    assert not many.covers(Task("denoise", 10))
    with pytest.raises(UsageError, match="no setting of sr"):
        Task("sr", 2, 3)


@pytest.mark.parametrize("value", [Task("sr", 3), ModelConfig(positions=(2, 7)), TrainConfig()])
def test_configurations_survive_json(value):
    kept = json.loads(json.dumps(dataclasses.asdict(value)))
    assert config.from_dict(type(value), kept) == value


def test_json_with_missing_or_unknown_fields_is_refused():
    values = dataclasses.asdict(ModelConfig())
    with pytest.raises(UsageError, match="extra"):
        config.from_dict(ModelConfig, {**values, "extra": 1})
    values.pop("width")
    with pytest.raises(UsageError, match="width"):
        config.from_dict(ModelConfig, values)


def test_files_from_before_a_field_mean_its_default():
    values = dataclasses.asdict(Task("car", 20)) | {"until": 60.5}
    with pytest.raises(UsageError, match="a range ends in a whole number"):
        config.from_dict(Task, values)
    values.pop("until")
    assert config.from_dict(Task, values) == Task("car", 20)
    values = dataclasses.asdict(ModelConfig(width=24))
    del values["offset_radius"], values["mask_bias"]
    assert config.from_dict(ModelConfig, values) == ModelConfig(width=24)


def test_flags_override_the_preset_and_nothing_else():
    args = parse("--positions", "2,5", "--amp", "--batch-size", "4", "--scale", "2")
    network = cli.override(config.model_preset("tiny", Task("car", 10)), args)
    assert network.positions == (2, 5)
    assert network.scale == 1  # the task's, not a field's flag
    length = cli.override_length(config.train_preset("tiny"), args)
    assert (length.amp, length.ema, length.batch_size) == (True, False, 4)


def test_offsets_learn_at_ten_times_the_rate_where_training_is_short():
    assert {p: config.train_preset(p).offset_lr_mult for p in config.PRESETS} == {
        "paper": 1,
        "small": 10,
        "tiny": 10,
    }
    assert config.train_preset("paper") == TrainConfig()


def test_epochs_are_another_way_to_say_steps():
    length = cli.override_length(config.train_preset("tiny"), parse("--epochs", "3"))
    assert length.steps == 3 * length.epoch_steps
    with pytest.raises(UsageError, match="--steps and --epochs"):
        cli.override_length(length, parse("--epochs", "3", "--steps", "7"))


@pytest.mark.parametrize("preset", config.PRESETS)
@pytest.mark.parametrize(("name", "backbone"), list(config.PAPER_POSITIONS))
def test_the_papers_positions_fit_every_preset(preset, name, backbone):
    network = config.model_preset(preset, Task(name, config.SETTING_DEFAULT[name]), backbone)
    found = dataclasses.replace(network, positions=config.PAPER_POSITIONS[name, backbone])
    assert len(found.positions) in (4, 5)


@pytest.mark.parametrize("script", [train, search], ids=["train", "search"])
def test_former_flags_work_and_are_not_in_the_help(script, capsys):
    words = ["--rate", "1e-3", "--batch", "4", "--patch", "24", "--ring", "3", "--open-logit", "1"]
    values = {"lr": 1e-3, "batch_size": 4, "patch_size": 24, "offset_radius": 3, "mask_bias": 1}
    if script is train:
        words += ["--halve", "9", "--validate", "7", "--offset-rate", "5", "--inherit"]
        values |= {"lr_half_every": 9, "val_every": 7, "offset_lr_mult": 5, "init_supernet": True}
    else:
        words += ["--alpha-rate", "2e-3"]
        values |= {"alpha_lr": 2e-3}
    given = vars(script.parse(words))
    assert {name: given[name] for name in values} == values
    with pytest.raises(SystemExit):
        script.parse(["--help"])
    shown = capsys.readouterr().out
    assert not [word for word in words if word.startswith("--") and f"{word} " in shown]
