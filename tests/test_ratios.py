"""The benchmark's ratios: each line's number, its target, and whether it is met."""

import pytest

from kernels.ratios import ratios

CPU, GPU = "cpu x86_64", "NVIDIA H100 80GB HBM3"


def row(backend, ms, device=CPU, C=64, which="forward", keep=0.5, **others):
    size = {"device": device, "dtype": "float32", "B": 1, "L": 5, "K": 16, "H": 48, "W": 48}
    return {**size, "C": C, "keep": keep, "backend": backend, "pass": which, "ms_p50": ms, **others}


def operator(device, ours, **options):
    names = {"grid_sample per layer": 30.0, "grid_sample per key": 40.0, "conv3x3": 1.0, **ours}
    return [row(name, ms, device, **options) for name, ms in names.items()]


@pytest.mark.parametrize(
    ("device", "backend", "which", "C", "target"),
    [
        (CPU, "cpp", "forward", 64, 15),
        (CPU, "cpp", "forward", 128, 20),
        (CPU, "cpp", "forward", 256, 20),
        (CPU, "cpp", "both", 64, 35),
        (CPU, "torch", "forward", 64, 5),
        (CPU, "torch", "both", 64, 8),
        (GPU, "triton", "forward", 64, 10),
        (GPU, "triton", "both", 64, 5),
    ],
)
def test_times_grid_sample(device, backend, which, C, target):
    for times, met in ((target, "met"), (target * 0.98, "missed")):
        rows = operator(device, {backend: 30 / times}, which=which, C=C)
        (line,) = ratios(rows)
        assert line.startswith(f"1×48×48, C {C}, {which}: {backend} is {times:.1f}× as fast as")
        assert f"grid_sample (target: {target} or more, {met})" in line


@pytest.mark.parametrize(("device", "backend"), [(CPU, "cpp"), (GPU, "torch")])
def test_what_has_no_target_gets_none(device, backend):
    (line,) = ratios(operator(device, {backend: 1.0}, C=8))
    assert "30.0×" in line
    assert "target" not in line


def test_times_deform_conv_has_a_target_on_gpus_forward():
    ours = {"triton": 2.0, "deform_conv2d": 32.0}
    assert "16.0× as deform_conv2d (target: 15 or more, met)" in ratios(operator(GPU, ours))[0]
    assert "16.0× as deform_conv2d, 0.50×" in ratios(operator(GPU, ours, which="both"))[0]


@pytest.mark.parametrize(
    ("device", "which", "name", "target"),
    [
        (CPU, "network", "edsr-32x256", 1.06),
        (CPU, "network", "edsr-16x64", 1.25),
        (CPU, "network", "rcan-10x20x64", 1.05),
        (GPU, "replay", "edsr-32x256", 1.1),
        (GPU, "replay", "edsr-16x64", 1.1),
    ],
)
def test_networks(device, which, name, target):
    for time, met in ((target, "met"), (target + 0.01, "missed")):
        rows = [
            row(name, 1.0, device, which=which),
            row(f"{name} + acla", time, device, which=which),
        ]
        (line,) = ratios(rows)
        assert f"takes {time:.3f} of {name}'s time" in line
        assert f"(target: {target} or less, {met})" in line
        assert ("under graph replay" in line) == (which == "replay")


def test_a_network_that_is_launched_piece_by_piece_has_no_target_on_gpus():
    rows = [row("edsr-16x64", 1.0, GPU, which="network")]
    rows.append(row("edsr-16x64 + acla", 2.0, GPU, which="network"))
    assert ratios(rows) == ["edsr-16x64 + acla takes 2.000 of edsr-16x64's time (less is better)"]


def test_sparsity():
    for time, met in ((0.45, "met"), (0.5, "missed")):
        rows = [row("cpp", 1.0, keep=1.0), row("cpp", 0.7), row("cpp", time, keep=0.25)]
        (line,) = ratios(rows)
        assert f"with 25% of the keys takes {time:.2f} of its time with all" in line
        assert f"(target: 0.45 or less, {met})" in line


def test_supernet_memory():
    rows = [row("supernet step", 9.0, which="both", peak_mb=100.0)]
    rows.append(row("grid_sample, saved tensors of 136 pairs", None, which="both", peak_mb=1600.0))
    (line,) = ratios(rows)
    assert line.startswith("a supernet step needs 1/16.0 of grid_sample")
    assert line.endswith("(target: 1/15 or less, met)")


def test_skipping_shut_modules():
    rows = [row("supernet step, half shut, all computed", 8.0, which="both", peak_mb=100.0)]
    rows.append(row("supernet step, half shut, skipped", 2.0, which="both", peak_mb=50.0))
    (line,) = ratios(rows)
    assert "takes 0.25 of its time and 0.50 of its memory" in line


def test_shares_of_the_floor():
    rows = [row("triton", 0.03, GPU, floor_ms=0.012)]
    rows.append(row("triton", 0.11, GPU, which="both", floor_ms=0.052))
    forward, backward = ratios(rows)
    assert "forward, 50% of the keys: triton reaches 0.40 of the floor, 0.0120 ms" in forward
    assert forward.endswith("(target: 0.5 or more, missed)")
    assert "backward, 50% of the keys: triton reaches 0.50 of the floor, 0.0400 ms" in backward
    assert backward.endswith("(target: 0.35 or more, met)")


def test_without_a_floor_or_the_forward_row_there_is_no_share():
    assert ratios([row("triton", 0.03, GPU)]) == []
    assert ratios([row("triton", 0.1, GPU, which="both", floor_ms=0.05)]) == []
