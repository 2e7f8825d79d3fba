"""Several processes as torchrun starts them: the same weights and α as one with the same batch."""

import contextlib
import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import scene
from PIL import Image

import evaluate
import search
import train
from acla.distributed import Processes, means
from acla.errors import UsageError
from acla.models.serialization import load_state

ROOT = Path(__file__).parents[1]
SMALL = ["--preset", "tiny", "--blocks", "2", "--width", "8", "--keys", "3", "--device", "cpu"]
SMALL += ["--batch-size", "4", "--patch-size", "12", "--steps", "4", "--data", "."]
WORDS = {
    "search": [*SMALL, "--train-set", "T", "--epoch-steps", "4", "--warmup", "0.25", "--lambda"],
    "train": [*SMALL, "--train-set", "T", "--val-set", "V", "--positions", "1,2", "--ema"],
    "evaluate": ["--dataset", "T", "--sigma", "25", "--baseline", "--data", ".", "--device", "cpu"],
}
WORDS["search"] += ["5"]
WORDS["evaluate"] += ["--json"]
WORDS["train"] += ["--clip", "10", "--val-every", "4"]
# All scripts one after the other, in two processes that import once, each with a port of its own,
# since the store of the script before may still listen. (torchrun sets the same variables.)
DRIVER = """
import json, os, runpy, sys
for script, words, port in json.loads(sys.argv[1]):
    os.environ["MASTER_PORT"] = port
    sys.argv = [script, *words]
    runpy.run_path(script, run_name="__main__")
"""


def free_ports(count: int) -> list[str]:
    """Different ports that nothing listens on."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("localhost", 0))
        return [str(one.getsockname()[1]) for one in sockets]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the results of two processes, two*, and of one, one*."""
    folder = tmp_path_factory.mktemp("runs")
    for i, name in enumerate([*(f"T/{i}" for i in range(10)), "V/v"]):
        (folder / name).parent.mkdir(exist_ok=True)
        Image.fromarray(scene(40, 33, seed=i)).save(folder / f"{name}.png")
    out = {"search": ["--out", "two-search"], "train": ["--out", "two-train"]}
    calls = [
        (str(ROOT / f"{name}.py"), [*words, *out.get(name, ["two.json"])], port)
        for (name, words), port in zip(WORDS.items(), free_ports(len(WORDS)), strict=True)
    ]
    command = [sys.executable, "-c", DRIVER, json.dumps(calls)]
    own = {
        **os.environ,
        "MASTER_ADDR": "localhost",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(ROOT),
    }
    options = {"cwd": folder, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    ranks = [{"WORLD_SIZE": "2", "RANK": rank, "LOCAL_RANK": rank} for rank in "01"]
    both = [subprocess.Popen(command, env=own | rank, **options) for rank in ranks]
    try:
        said = [one.communicate(timeout=500) for one in both]
    finally:
        for one in both:
            one.kill()
    assert [one.returncode for one in both] == [0, 0], said
    assert [out.count("positions:") for out, _ in said] == [1, 0]
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        search.main([*WORDS["search"], "--out", "one-search"])
        train.main([*WORDS["train"], "--out", "one-train"])
        evaluate.main([*WORDS["evaluate"], "one.json"])
    return folder


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
def test_two_processes_search_as_one(runs):
    states = [load_state(runs / f"{n}-search/supernet.safetensors") for n in ("two", "one")]
    (two, values), (one, _) = states
    assert values["step"] == 4
    assert two.keys() == one.keys()
    assert one["supernet.alpha"].abs().min() > 0.1  # α moved, or the comparison says nothing
    torch.testing.assert_close(two["supernet.alpha"], one["supernet.alpha"], rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(two["supernet.density"], one["supernet.density"])
    require_near(two, one, "supernet.backbone")


@pytest.mark.slow
def test_two_processes_train_as_one(runs):
    states = [load_state(runs / f"{n}-train/state.safetensors") for n in ("two", "one")]
    (two, values), (one, others) = states
    assert two.keys() == one.keys()
    assert values["val_psnr"] == pytest.approx(others["val_psnr"], rel=1e-2)
    require_near(two, one, "model.")


@pytest.mark.slow
def test_two_processes_evaluate_as_one(runs):
    both = [json.loads((runs / f"{name}.json").read_text())["results"] for name in ("two", "one")]
    rows = [[(i["name"], i["psnr"], i["ssim"]) for i in row["images"]] for (row,) in both]
    assert rows[0] == rows[1]
    assert len(rows[0]) == 10


def require_near(two: dict, one: dict, part: str) -> None:
    """Tensors of this part are equal, to rounding that grows with the steps."""
    for name in one:
        if name.startswith(part):
            torch.testing.assert_close(two[name], one[name], rtol=1e-2, atol=2e-4, msg=name)
