"""The C++ kernel under AddressSanitizer: whatever the offsets, it touches only its own memory."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PROGRAM = """
import itertools, torch
from acla.kernels import attend, attend_module, to_rows

torch.set_num_threads(2)
far = [0.0, 0.5, -1.0, 7.0, 1e9, -1e30, float("inf"), float("-inf"), float("nan")]
for (B, H, W, L, K, C), dtype in itertools.product(
    [(1, 1, 1, 1, 1, 1), (2, 9, 17, 3, 5, 3), (1, 8, 8, 2, 16, 96), (1, 3, 2, 1, 33, 17)],
    [torch.float32, torch.bfloat16, torch.float64],
):
    features = [to_rows(torch.randn(B, C, H, W, dtype=dtype)).requires_grad_() for _ in range(L)]
    points = torch.randn(B, H, W, L, 3, K) * 3
    places = torch.randint(len(far), (B, H, W, L, 2, K))
    points[..., :2, :] += torch.tensor(far)[places]
    points.requires_grad_()
    maps = [torch.randn(B, H + 2, W + 2, K, requires_grad=True) for _ in range(L)]
    gates = torch.ones(L, requires_grad=True)
    out = attend(features, points, maps, gates, seeds=torch.arange(B), backend="cpp")
    (out.aggregate.sum() + out.coverage.sum() + out.kept.sum()).backward()
    assert out.aggregate.isfinite().all()
    assert all(tensor.grad is not None for tensor in [*features, points, *maps, gates])
    if dtype != torch.bfloat16 or C % 2 == 0:
        rows = [f.detach() for f in features]
        weight, bias = torch.randn(C, L * 3 * K) * 9, points[0, 0, 0].detach().flatten()
        for masks in ((torch.randn(L, C, K), torch.randn(L, K)), (None, None)):
            given = weight, bias, *masks, torch.randn(L, C + 1, C), torch.randn(C)
            query = torch.randn(B, H, W, C, dtype=dtype)
            assert attend_module(query, rows, *given).isfinite().all()
print("clean")
"""


@pytest.mark.slow
def test_the_kernel_stays_inside_its_memory(tmp_path):
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("no g++")
    runtime = subprocess.run(
        [compiler, "-print-file-name=libasan.so"], capture_output=True, text=True, check=True
    ).stdout.strip()
    if not Path(runtime).is_file():
        pytest.skip("g++ has no AddressSanitizer")
    wrapper = tmp_path / "g++"
    flags = "-fsanitize=address -O1 -fno-inline"  # inlined, it compiles for a minute and more
    wrapper.write_text(f'#!/bin/sh\nunset LD_PRELOAD\nexec {compiler} "$@" {flags}\n')
    wrapper.chmod(0o755)
    environment = {
        **os.environ,
        "ACLA_CACHE": str(tmp_path),
        "CXX": str(wrapper),
        "LD_PRELOAD": runtime,
        "ASAN_OPTIONS": "detect_leaks=0",
    }
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.strip() == "clean"
    (built,) = tmp_path.rglob("*.so")
    assert b"__asan_report_load" in built.read_bytes()
