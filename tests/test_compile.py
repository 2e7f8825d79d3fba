"""Ahead-of-time compilation, which needs no GPU."""

import json
from collections import Counter

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")

from acla.kernels import autotune, compile, launch


def job_of(kernel, target="sm_80", dtype=torch.float32, config=None, C=64):
    """The compilation of a kernel's default, or of another configuration."""
    calls = autotune.trace(autotune.problem((1, 4, 4, C, 2, 16), dtype, "cpu"), run=False)
    call = next(call for call in calls if call.name == kernel)
    return compile.job_of(call, target, config or launch.CONFIGS[kernel][0])


@pytest.mark.slow
def test_every_kernel_compiles_for_three_gpus_without_spills_or_narrow_loads(monkeypatch, capsys):
    every = compile.jobs

    def fewer(*arguments):
        """In bf16 for one GPU only."""
        jobs = every(*arguments)
        return [job for job in jobs if job.target == "sm_90" or "bf16" not in job.variant]

    monkeypatch.setattr(compile, "CHANNELS", compile.CHANNELS[:1])
    monkeypatch.setattr(compile, "jobs", fewer)
    assert compile.main(["--quick", "--workers", "1", "--json", "-"]) == 0
    rows = json.loads(capsys.readouterr().out)
    names = {name.strip("_") for name in launch.CONFIGS}
    pairs = {(row["kernel"], row["target"]) for row in rows}
    assert pairs == {(name, target) for name in names for target in compile.TARGETS}
    gathers = [row for row in rows if row["kernel"] in ("aggregate", "dots")]
    assert {row["load"] for row in gathers} == {16}
    assert not any(row["spills"] for row in rows)
    assert all(0 < row["registers"] <= 255 for row in rows)


@pytest.mark.slow
def test_strides_of_one_compile_too():
    calls = autotune.trace(autotune.problem((1, 1, 1, 1, 3, 1), torch.float32, "cpu"), run=False)
    for call in (call for call in calls if {"strides", "points_strides"} & call.arguments.keys()):
        config = launch.CONFIGS[call.name][0]
        assert compile.compile_job(compile.job_of(call, "sm_90", config)).registers > 0


def test_a_picture_of_another_size_compiles_nothing():
    """With 16 keys and a multiple of 16 channels."""

    def signatures(B, H, W):
        inputs = autotune.problem((B, H, W, 64, 3, 16), torch.float32, "cpu")
        calls = autotune.trace(inputs, run=False)
        jobs = [compile.job_of(call, "sm_90", launch.CONFIGS[call.name][0]) for call in calls]
        return [(job.kernel, job.signature, job.constants, job.attributes) for job in jobs]

    first, *others = (signatures(*size) for size in ((1, 48, 48), (3, 5, 7), (2, 1, 1), (1, 6, 3)))
    assert all(other == first for other in others)


def test_the_full_list_holds_every_configuration():
    todo = compile.jobs(["sm_80"], quick=False)
    compiled = {(job.kernel, job.config) for job in todo}
    for kernel, configs in launch.CONFIGS.items():
        assert {config for name, config in compiled if name == kernel} == set(configs)


@pytest.mark.parametrize("target", ["sm_90", "gfx942"])
def test_narrow_loads_are_found(target):
    job = job_of("_aggregate", target)
    assert compile.compile_job(job).problem == ""
    addresses = {path: a for path, a in job.attributes.items() if len(path) == 1}
    row = compile.compile_job(job._replace(attributes=addresses))  # features may start anywhere
    assert row.load < 16
    assert "bytes at a time" in row.problem


def test_spills_are_found():
    row = compile.compile_job(job_of("_aggregate", config=launch.Config(128, 64, 1)))
    assert row.spills > 0
    assert "spills" in row.problem


def test_a_gather_loads_rows_whole_without_barriers_or_atomics():
    row = compile.compile_job(job_of("_aggregate", "sm_90"))
    assert row.loads.startswith("4/")  # four corners of one row to a thread
    assert (row.barriers, row.atomics) == (0, 0)
    assert row.floor == 10  # 64 channels of 4 corners: 8 multiply-adds and 2 loads of a warp
    assert row.floor < row.per_key < row.instructions / 4


def test_atomics_are_counted():
    row = compile.compile_job(job_of("_scatter", "sm_90"))
    assert row.atomics == 4


def test_instructions_of_a_key_are_those_of_the_loop():
    config = launch.Config(16, 32, 4)
    gather = job_of("_aggregate", config=config)  # of two chunks of channels, each by a program
    code = compile.Code(40, 0, ["IADD3"] * 100, [(10, 49)], Counter())
    assert code.per_key(gather) == 2 * 40 / 4
    dots = job_of("_dots", config=config, C=256)  # eight chunks in a loop, five wide loads each
    wide = ["IADD3"] * 20 + ["LDG.E.128"] * 5 + ["FFMA"] * 75
    assert code._replace(operations=wide, loops=[(15, 34), (10, 49)]).per_key(dots) == 45
    wide[25:30] = ["LDG.E.128"] * 5  # unrolled once: four trips
    assert code._replace(operations=wide, loops=[(15, 34), (10, 49)]).per_key(dots) == 25
    plan = job_of("_plan", config=launch.Config(32, 0, 8))
    assert code._replace(loops=[]).per_key(plan) == 100 * 8 / (32 * 16)
    spread = job_of("_sum_rows", config=launch.Config(8, 64, 2))  # a loop to each corner
    assert code._replace(loops=[(0, 9), (20, 29), (40, 49), (60, 69)]).per_key(spread) == 10


def test_a_problem_is_named_and_fails(monkeypatch, capsys):
    name, tile, counts = ("sm_80", "aggregate", "fp32 C64"), (16, 64, 4), (350, 47.0, 10.0, 0)
    good = compile.Compiled(*name, *tile, 72, 0, 0, 16, *counts, "8/2/10", 0, "")
    bad = good._replace(target="gfx942", spills=3, problem="spills 3")
    monkeypatch.setattr(compile, "jobs", lambda targets, quick: [])
    monkeypatch.setattr(compile, "compile_all", lambda todo, workers: [good, bad])
    assert compile.main([]) == 1
    shown = capsys.readouterr()
    assert shown.err == "gfx942 aggregate fp32 C64 16 64 4: spills 3\n"
    assert shown.out.splitlines()[0].split() == list(compile.Compiled._fields)
    assert len(shown.out.splitlines()) == 3


def test_rows_that_could_not_be_written_are_told_of_first(tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped:
        compile.main(["--json", str(tmp_path / "none" / "rows.json")])
    assert stopped.value.code == 2
    assert "there is no folder" in capsys.readouterr().err


def test_unknown_targets_are_refused(capsys):
    with pytest.raises(SystemExit) as stopped:
        compile.main(["--target", "sm_80,voodoo"])
    assert stopped.value.code == 2
    assert "unknown target voodoo; known: sm_80,sm_90,gfx942" in capsys.readouterr().err
