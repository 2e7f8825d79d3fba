"""Batches made ahead by workers: the same bits for every number of them."""

import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from PIL import Image

from acla.config import Task
from acla.data import datasets
from acla.data.datasets import Loader, PatchSampler, Pictures, default_workers
from acla.errors import PictureError, UsageError

CPU = torch.device("cpu")


@pytest.fixture
def sampler(tmp_path, make_scene):
    for i in range(3):
        Image.fromarray(make_scene(40 + i, 50, seed=i)).save(tmp_path / f"{i}.png")
    # Memory for one picture: the others are decoded again and again
    return PatchSampler(Pictures(sorted(tmp_path.iterdir()), 7000), Task("car", 10), 12, 4)


@pytest.mark.parametrize("workers", [0, 1, 2])
@pytest.mark.parametrize("task", [Task("car", 10), Task("sr", 3)], ids=str)
def test_workers_change_no_bit(sampler, task, workers):
    sampler = PatchSampler(sampler.pictures, task, 12, 4)
    loader = Loader(sampler, CPU, workers)
    for step in [0, 1, 2, 2, *range(30, 40)]:  # in order, again, ahead
        for one, other in zip(loader.batch(step), sampler.batch(step), strict=True):
            assert torch.equal(one, other)


def test_each_worker_has_its_share_of_the_memory_for_pictures(sampler):
    def batch(step):
        return torch.tensor(os.getpid()), torch.tensor(sampler.pictures.memory)

    sampler.batch = batch
    workers, memory = zip(*map(Loader(sampler, CPU, 2).batch, range(4)), strict=True)
    assert len({os.getpid(), *map(int, workers)}) == 3
    assert {int(m) for m in memory} == {3500}
    assert sampler.pictures.memory == 7000


def test_workers_outlive_signals_and_end_with_their_loader(sampler):
    sampler.batch = lambda step: (torch.tensor(os.getpid()), torch.tensor(step))
    loader = Loader(sampler, CPU, 2)
    workers = {int(loader.batch(step)[0]) for step in range(2)}
    for worker in workers:
        os.kill(worker, signal.SIGINT)
        child = subprocess.run(["kill", "-TERM", str(worker)], check=False)  # not the parent
        assert child.returncode == 0
    assert {int(loader.batch(step)[0]) for step in range(2, 10)} == workers
    del loader
    deadline = time.monotonic() + 30
    while any(os.path.exists(f"/proc/{worker}") for worker in workers):
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_process_ends_while_its_workers_still_work():
    program = (
        "import torch; from acla.config import Task; from acla.data.datasets import *\n"
        "sampler = PatchSampler(Pictures(sample_set('val')), Task('car', 10), 12, 4)\n"
        "loader = Loader(sampler, torch.device('cpu'), 2); loader.batch(0)\n"
        "error = ValueError(); error.loader = loader; error.self = error; raise error"
    )
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 1
    assert done.stderr.endswith("ValueError\n")


def test_steps_in_any_order_keep_no_files_open(sampler):
    for workers, steps in ((0, 8), (1, 3)):
        loader = Loader(sampler, CPU, workers)
        loader.batch(0)
        before = len(os.listdir("/proc/self/fd"))
        for step in range(2, 2 + 2 * steps, 2):
            loader.batch(step)
        assert len(os.listdir("/proc/self/fd")) <= before + 2


@pytest.mark.parametrize("workers", [0, 2])
def test_an_unreadable_picture_is_named_in_one_line(sampler, workers):
    sampler.pictures.paths[1].write_bytes(b"no picture")
    with pytest.raises(PictureError, match=r"1\.png") as error:
        Loader(sampler, CPU, workers).batch(0)
    assert "\n" not in str(error.value)


def test_the_number_of_workers(monkeypatch):
    assert default_workers(CPU) == 0
    monkeypatch.setattr(datasets.os, "cpu_count", lambda: 6)
    assert default_workers(torch.device("cuda")) == 4
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert default_workers(torch.device("cuda")) == 3
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    assert default_workers(torch.device("cuda")) == 1
    with pytest.raises(UsageError, match="--workers must be 0 or more, not -1"):
        Loader(None, CPU, -1)
