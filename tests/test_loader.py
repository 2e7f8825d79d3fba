"""Batches made ahead: the same bits for every number of workers."""

import json
import threading
import time

import pytest
import torch
from PIL import Image

from acla.analysis import loading
from acla.config import Task
from acla.data import datasets
from acla.data.datasets import Loader, PatchSampler, Pictures, default_workers
from acla.errors import PictureError, UsageError

CPU = torch.device("cpu")


@pytest.fixture
def sampler(tmp_path, make_scene):
    for i in range(3):
        Image.fromarray(make_scene(40 + i, 50, seed=i)).save(tmp_path / f"{i}.png")
    # Room for one picture: the others are decoded again and again
    return PatchSampler(Pictures(sorted(tmp_path.iterdir()), 7000), Task("car", 10), 12, 4)


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_workers_change_no_bit(sampler, workers):
    made = Loader(sampler, CPU, workers)
    for step in [0, 1, 2, 3, 3, 7, 8, 2, *range(30, 50)]:  # in order, again, ahead, back
        for one, other in zip(made.batch(step), sampler.batch(step), strict=True):
            assert torch.equal(one, other)


def test_batches_are_made_before_they_are_asked_for(sampler):
    asked, seen = sampler.batch, []

    def batch(step):
        seen.append((step, threading.current_thread() is threading.main_thread()))
        return asked(step)

    sampler.batch = batch
    made = Loader(sampler, CPU, 2)
    made.batch(0)
    made.pool.shutdown()
    assert sorted(seen) == [(step, False) for step in range(5)]


def test_threads_end_with_their_loader(sampler):
    before = threading.active_count()
    made = Loader(sampler, CPU, 3)
    made.batch(0)
    assert threading.active_count() > before
    del made
    deadline = time.monotonic() + 30
    while threading.active_count() > before:
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_an_unreadable_picture_is_named(sampler):
    sampler.pictures.paths[1].write_bytes(b"no picture")
    made = Loader(sampler, CPU, 2)
    with pytest.raises(PictureError, match=r"1\.png"):
        made.batch(0)


def test_how_many_workers(monkeypatch):
    assert default_workers(CPU) == 0
    monkeypatch.setattr(datasets.os, "cpu_count", lambda: 6)
    assert default_workers(torch.device("cuda")) == 4
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert default_workers(torch.device("cuda")) == 3
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    assert default_workers(torch.device("cuda")) == 1
    with pytest.raises(UsageError, match="--workers must be 0 or more, not -1"):
        Loader(None, CPU, -1)


def test_the_benchmark_prints_rows(capsys, monkeypatch):
    monkeypatch.setattr(loading, "training_step", lambda *_: lambda step: None)
    loading.main(["--preset", "tiny", "--device", "cpu", "--workers", "0", "2", "--batches", "1"])
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [row.get("workers") for row in rows] == [0, 2, None]
    assert all(row["patches_per_second"] > 0 for row in rows)


@pytest.mark.parametrize(("batches", "steps"), [(2, 2), (7, 5)])
def test_the_benchmark_trains_for_a_few_steps_at_most(batches, steps, monkeypatch):
    done = []
    monkeypatch.setattr(loading, "training_step", lambda *_: done.append)
    words = ["--preset", "tiny", "--device", "cpu", "--workers", "0"]
    loading.main([*words, "--batches", str(batches)])
    assert done == list(range(steps + 1))  # the first is not counted


def test_the_benchmark_wants_batches():
    for words in (["--batches", "0"], ["--workers", "0", "-1"]):
        with pytest.raises(UsageError, match="must be 1 or more, and --workers 0 or more"):
            loading.main(words)


def test_the_benchmark_trains(sampler):
    sampler = PatchSampler(sampler.pictures, Task("sr", 2), 4, 1)
    loading.training_step(Task("sr", 2), "tiny", sampler, CPU)(0)
