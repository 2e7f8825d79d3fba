"""A training that is killed and stopped six times, during writes too, ends with the bits of one
that is not."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

from acla.models.serialization import load_model, load_state

ROOT = Path(__file__).parents[1]
KILLS = 6
# A process that has imported everything and computed nothing forks the trainings, so that each
# begins in no time. Every file takes a while to reach the disk, so that kills fall in writes too.
# Signals go to the workers as well, as a terminal and a batch system send them.
DRIVER = """
import os, random, signal, sys, time
from pathlib import Path

import torch

import train
from acla import cli

torch.set_num_threads(1)
signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job ignores it
torch.compiler.reset()  # imports what an optimiser's first step imports
kills, *words = sys.argv[1:]
rng, fsync = random.Random(0), os.fsync
state, resume = Path("killed/state.safetensors"), []
SIGNALS = signal.SIGKILL, signal.SIGINT, signal.SIGTERM

def slowly(file):
    time.sleep(0.01)
    fsync(file)

def begin(*words):
    child = os.fork()
    if not child:
        os.setpgid(0, 0)
        os.fsync = slowly
        sys.stderr = open(os.devnull, "w")
        try:
            cli.run(train.main, list(words))
        except SystemExit as exit:
            os._exit(exit.code)
        os._exit(0)
    return child

def end(child):
    assert os.waitpid(child, 0)[1] == 0

def seen():
    return state.stat().st_mtime_ns if state.exists() else None

def unfinished():
    return list(Path("killed").glob(".*.tmp"))

def wait_for_write(child):
    before = seen()
    while seen() == before:
        assert os.waitpid(child, os.WNOHANG) == (0, 0)
        time.sleep(0.001)

begun = time.monotonic()
end(begin(*words, "--out", "straight"))
interval = (time.monotonic() - begun) / 20
for kill in range(int(kills)):
    child = begin(*(resume or words), "--out", "killed")
    number = SIGNALS[kill % 3]
    for _ in range(rng.randrange(1, 3) if kill % 4 else 0):
        wait_for_write(child)
    time.sleep(rng.random() * 1.5 * interval)
    while number == signal.SIGKILL and kill and not unfinished():
        time.sleep(0.001)
    os.killpg(child, number)
    status = os.waitpid(child, 0)[1]
    assert number in (os.WTERMSIG(status), os.waitstatus_to_exitcode(status) - 128), status
    resume = ["--data", ".", "--workers", "1", "--resume"] if state.exists() else []
    print("killed", len(unfinished()), flush=True)
end(begin("--data", ".", "--workers", "1", "--out", "killed", "--resume"))
"""
RUN = "--task car --preset tiny --blocks 2 --width 8 --keys 3 --positions 1,2 --device cpu"
LENGTH = "--steps 40 --val-every 2 --batch-size 2 --patch-size 16 --lr-half-every 20"
ALL = "--ema --amp --clip 100 --workers 1 --train-set T --val-set V --data ."


@pytest.mark.slow
def test_kills_and_signals_change_no_bit(tmp_path, make_scene):
    for name in ("T/a", "T/b", "T/c", "V/v"):
        path = tmp_path / f"{name}.png"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(make_scene(40, 33, seed=ord(path.stem))).save(path)
    words = [*RUN.split(), *LENGTH.split(), *ALL.split()]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", DRIVER, str(KILLS), *words],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    left = [int(line.split()[1]) for line in done.stdout.splitlines() if line.startswith("killed")]
    assert len(left) == KILLS
    assert any(left)  # a kill fell in a write
    straight, killed = tmp_path / "straight", tmp_path / "killed"
    assert not list(killed.glob(".*.tmp"))
    (a, values), (b, others) = (load_state(f / "state.safetensors") for f in (straight, killed))
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert {**values, "seconds": 0} == {**others, "seconds": 0}
    for name in ("model.safetensors", "best.safetensors"):
        one, other = (load_model(folder / name) for folder in (straight, killed))
        kept, found = one.model.state_dict(), other.model.state_dict()
        assert all(torch.equal(kept[key], found[key]) for key in kept)
        assert one.info["step"] == other.info["step"]
    logs = [(folder / "train.jsonl").read_text().splitlines() for folder in (straight, killed)]
    one, other = ([{**json.loads(line), "seconds": 0} for line in log] for log in logs)
    assert one == other
    assert len(one) == 20
