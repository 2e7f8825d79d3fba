"""Several processes as torchrun starts them: the same weights and α as one with the same batch."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import search
import train
from acla.distributed import Processes, means
from acla.errors import UsageError
from acla.models.serialization import load_state

ROOT = Path(__file__).parents[1]
SMALL = ["--preset", "tiny", "--blocks", "2", "--width", "8", "--keys", "3", "--device", "cpu"]
SHORT = ["--batch-size", "4", "--patch-size", "12", "--steps", "4"]


def torchrun(script: str, *words: str, processes: int = 2) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", str(processes), str(ROOT / script), *words]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=300, check=False
    )


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("ACLA_DATA", raising=False)


def test_one_process_is_its_own_mean():
    alone = Processes(torch.device("cpu"))
    x = torch.tensor([1.0, 2.0], requires_grad=True)
    assert alone.first
    assert torch.equal(alone.mean(x), x.detach())
    assert means(alone, [x]) == [x]
    assert alone.all_rows({"a": 1}) == [{"a": 1}]


def test_a_batch_must_divide():
    with pytest.raises(UsageError, match="--batch-size 5 does not divide among 2 processes"):
        Processes(torch.device("cpu"), 0, 2).require_share(5)


@pytest.mark.slow
def test_two_processes_search_as_one():
    words = [*SMALL, *SHORT, "--epoch-steps", "4", "--warmup", "0.25", "--lambda", "5"]
    done = torchrun("search.py", *words, "--out", "two")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("positions:") == 1
    search.main([*words, "--out", "one"])
    (two, values), (one, _) = (load_state(Path(f, "supernet.safetensors")) for f in ("two", "one"))
    assert values["step"] == 4
    assert two.keys() == one.keys()
    assert one["supernet.alpha"].abs().min() > 0.1  # α moved, or the comparison says nothing
    torch.testing.assert_close(two["supernet.alpha"], one["supernet.alpha"], rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(two["supernet.density"], one["supernet.density"])
    for name in one:
        if name.startswith("supernet.backbone"):
            torch.testing.assert_close(two[name], one[name], rtol=1e-2, atol=2e-4, msg=name)


@pytest.mark.slow
def test_two_processes_train_as_one():
    words = [*SMALL, *SHORT, "--positions", "1,2", "--ema", "--clip", "10", "--val-every", "4"]
    done = torchrun("train.py", *words, "--out", "two")
    assert done.returncode == 0, done.stderr
    train.main([*words, "--out", "one"])
    (two, values), (one, others) = (
        load_state(Path(f, "state.safetensors")) for f in ("two", "one")
    )
    assert two.keys() == one.keys()
    assert values["val_psnr"] == pytest.approx(others["val_psnr"], rel=1e-2)
    for name in one:
        if name.startswith("model."):
            torch.testing.assert_close(two[name], one[name], rtol=1e-2, atol=2e-4, msg=name)
