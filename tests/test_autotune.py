"""Tile sizes and their choice, with a timer that needs no GPU."""

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")

from acla.kernels import autotune, launch

ROOT = Path(__file__).resolve().parents[1]
BAD_TILE = '{"GPU": {"_plan float32": [32, 0, 4], "key": [24, 0, 4]}}'
CPU_SIZE = (1, 4, 4, 64, 2, 16)


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    """Nobody's saved choices but those of the test."""
    monkeypatch.setenv("ACLA_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(launch, "REPOSITORY_COPY", tmp_path / "repository.json")
    launch.choose_config.cache_clear()
    yield
    launch.choose_config.cache_clear()


@pytest.fixture
def calls():
    return autotune.trace(autotune.problem(CPU_SIZE, torch.bfloat16, "cpu"), run=False)


def find(calls, name):
    return next(call for call in calls if call.name == name)


def test_a_trace_launches_every_kernel_and_runs_none(calls):
    assert {call.name for call in calls} == set(launch.CONFIGS)
    assert not torch.are_deterministic_algorithms_enabled()


def test_without_a_saved_choice_the_first_configuration_is_taken(calls):
    for call in calls:
        chosen = launch.choose_config("GPU", call.name, launch.call_key(call))
        assert chosen == launch.CONFIGS[call.name][0]


def test_the_fastest_is_chosen_and_a_tie_goes_to_the_first(calls):
    seen = []

    def timer(run):  # microseconds, or anything
        _, (config, _) = run.func, run.args
        seen.append(config)
        return abs(config.warps - 8)

    tried = autotune.tune(calls, 32, timer)
    for call in calls:
        config = next(iter(tried[launch.call_key(call)]))
        listed = autotune.candidates(call, 32)
        least = min(abs(other.warps - 8) for other in listed)
        assert config == next(c for c in listed if abs(c.warps - 8) == least)
    assert set(seen) >= set(launch.CONFIGS["_plan"])


def test_a_kernel_that_is_launched_twice_is_timed_as_a_whole(calls):
    times = iter([5, 1, 5, 1, 1, 1, 9, 9, 9, 9])  # of each configuration, forward and backward
    plans = [call for call in calls if call.name == "_plan"][:2]
    (tried,) = autotune.tune(plans, 32, lambda run: next(times)).values()
    assert next(iter(tried.items())) == (launch.CONFIGS["_plan"][2], 2)


def test_processes_share_the_compilations(monkeypatch):
    compiled = []
    monkeypatch.setattr(
        launch.Launch, "compile", lambda call, config, lanes: compiled.append((call.name, config))
    )
    kinds = [((16, 48, 48, 64, 5, 16), torch.float32), ((1, 9, 9, 64, 5, 16), torch.float32)]
    shares = [autotune.compile_share(i, 3, kinds, torch.device("cpu")) for i in range(3)]
    calls = autotune.trace(autotune.problem((1, 4, 4, 64, 5, 16), torch.float32, "cpu"), run=False)
    everything = Counter((c.name, config) for c in calls for config in autotune.candidates(c, 1))
    assert Counter(compiled) == everything
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_choices_are_saved_and_the_users_come_first(calls, tmp_path):
    call = find(calls, "_aggregate")
    key = launch.call_key(call)
    assert key == "aggregate bfloat16 K16 C64 small"
    autotune.save_choices(launch.REPOSITORY_COPY, "GPU", {key: [32, 32, 4], "other": [8, 64, 2]})
    assert launch.choose_config("GPU", call.name, key) == (32, 32, 4)
    assert launch.choose_config("another GPU", call.name, key) == launch.CONFIGS[call.name][0]
    autotune.save_choices(launch.user_copy(), "GPU", {key: [16, 128, 4]})
    assert launch.choose_config("GPU", call.name, key) == (16, 128, 4)
    autotune.save_choices(launch.REPOSITORY_COPY, "Another", {key: [16, 64, 4]})
    saved = json.loads(launch.REPOSITORY_COPY.read_text())
    assert saved["GPU"] == {key: [32, 32, 4], "other": [8, 64, 2]}
    assert not [p for p in tmp_path.rglob("*") if p.is_file() and p.suffix != ".json"]


@pytest.mark.parametrize(
    "text", ["", "{", "[1]", '{"GPU": [1]}', '{"GPU": {"key": [1, 2]}}', BAD_TILE]
)
def test_a_file_that_is_no_table_is_ignored(calls, text):
    launch.user_copy().parent.mkdir(parents=True)
    launch.user_copy().write_text(text)
    assert launch.choose_config("GPU", "_plan", "key") == launch.CONFIGS["_plan"][0]


@pytest.mark.parametrize("lanes", [32, 64])
@pytest.mark.parametrize(
    ("dtype", "C"), [(torch.float32, 8), (torch.float32, 96), (torch.bfloat16, 64)]
)
def test_every_thread_of_a_gather_loads_sixteen_bytes(lanes, dtype, C):
    inputs = autotune.problem((1, 4, 4, C, 2, 4), dtype, "cpu")
    for call in autotune.trace(inputs, run=False):
        if call.name in ("_aggregate", "_dots", "_scatter"):
            for config in launch.CONFIGS[call.name]:
                tile = call.blocks(config, lanes)
                size = tile["BLOCK_N"] * tile["BLOCK_C"] * dtype.itemsize
                assert size >= 16 * lanes * config.warps


@pytest.mark.parametrize(
    ("C", "most", "block"),
    [(1, 64, 1), (3, 64, 4), (24, 64, 32), (96, 64, 32), (256, 64, 64), (40, 64, 16)],
)
def test_channel_blocks_leave_few_lanes_idle(C, most, block):
    assert launch.channel_block(C, most) == block


def test_choices_do_not_depend_on_the_pictures_height_and_width(calls):
    keys = {launch.call_key(call) for call in calls}
    other = autotune.trace(autotune.problem((1, 5, 7, 64, 2, 16), torch.bfloat16, "cpu"), run=False)
    assert {launch.call_key(call) for call in other} == keys


def test_the_grid_covers_everything_once(calls):
    call = find(calls, "_aggregate")._replace(grid=(35, 2, 3))
    call.arguments["C"] = 96
    tile = call.blocks(launch.Config(16, 64, 1), 32)
    assert tile == {"BLOCK_N": 16, "BLOCK_C": 32}
    assert call.programs(tile) == (3 * 3, 2, 3)
    sums = find(calls, "_sum_maps")._replace(grid=(50, 1, 1))
    assert sums.programs(sums.blocks(launch.Config(16, 0, 1), 32)) == (50, 1, 1)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_explains_itself(capsys):
    assert autotune.main([]) == 1
    assert "There is no GPU" in capsys.readouterr().err


@pytest.fixture
def no_home(monkeypatch):
    """As in a container whose user is a bare number."""
    for name in ("ACLA_CACHE", "XDG_CACHE_HOME", "HOME"):
        monkeypatch.delenv(name, raising=False)

    def nobody(number):
        raise KeyError(number)

    monkeypatch.setattr("pwd.getpwuid", nobody)


def test_without_a_home_the_kernels_run_with_other_choices(no_home, calls):
    key = launch.call_key(calls[0])
    assert launch.choose_config("GPU", calls[0].name, key) == launch.CONFIGS[calls[0].name][0]
    launch.choose_config.cache_clear()
    autotune.save_choices(launch.REPOSITORY_COPY, "GPU", {key: [16, 0, 2]})
    assert launch.choose_config("GPU", calls[0].name, key) == (16, 0, 2)


def test_where_nothing_can_be_saved_nothing_is_tuned(no_home, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert autotune.main([]) == 2
    assert "cannot be written; name a file with --out" in capsys.readouterr().err


def test_sizes_and_types_can_be_chosen(capsys):
    options = autotune.parse(["--sizes", "1x2x3x4x5x6,2x8x8x16x1x8", "--dtypes", "bfloat16"])
    assert options.sizes == [(1, 2, 3, 4, 5, 6), (2, 8, 8, 16, 1, 8)]
    assert options.dtypes == ["bfloat16"]
    for wrong in ("1x2x3", "1x2x3x4x5x0", "a"):
        with pytest.raises(SystemExit):
            autotune.parse(["--sizes", wrong])
        assert f"wants BxHxWxCxLxK, 1x48x48x64x5x16, not '{wrong}'" in capsys.readouterr().err


@pytest.mark.parametrize("words", [["autotune", "--show"], ["bench", "--help"]], ids=" ".join)
def test_a_reader_may_leave_early(words):
    command = [sys.executable, "-m", f"acla.kernels.{words[0]}", *words[1:]]
    reader, writer = os.pipe()
    os.close(reader)
    options = {"cwd": ROOT, "env": os.environ | {"PYTHONUNBUFFERED": ""}, "check": False}
    done = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, **options)
    os.close(writer)
    assert (done.returncode, done.stderr) == (141, b"")


def test_show_needs_no_gpu(capsys):
    assert autotune.main(["--show"]) == 0
    assert f"aggregate: {tuple(launch.CONFIGS['_aggregate'][0])}" in capsys.readouterr().out
