"""States that are damaged or another run's: each is resumed or refused in one line."""

import json
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from running import SHORT, SMALL

import search
import train
from acla.cli import run
from acla.models.serialization import load_state, save_state

pytestmark = pytest.mark.usefixtures("elsewhere")


def resume(main: Callable, words: list[str], state: Path, capfd) -> str:
    """Resume: '' if that succeeds, else the one line of the error, which leaves the state as it
    is."""
    before = state.read_bytes()
    capfd.readouterr()
    status = 0
    try:
        run(main, ["--resume", *words])
    except SystemExit as exit:
        status = exit.code
    lines = capfd.readouterr().err.splitlines()
    errors = [text for text in lines if text.startswith("error: ")]
    assert (status, len(errors)) in ((0, 0), (1, 1))
    if status:
        assert errors == lines[-1:]
        assert errors[0].startswith(f"error: {state}: ")
        assert state.read_bytes() == before
    return "".join(errors)


@pytest.fixture
def resumed(small_sets, capfd) -> Callable[..., str]:
    """Resume a training from its state after a change: a function of tensors and progress, or the
    bytes of the file."""
    words = [*SMALL, *SHORT, *small_sets, "--attention", "none", "--keys", "0", "--ema"]
    words[words.index("--positions") + 1] = "none"
    train.main([*words, "--steps", "1"])
    state = Path("runs/train/state.safetensors")
    whole = state.read_bytes()

    def call(change: Callable[..., object] | bytes) -> str:
        state.write_bytes(change if isinstance(change, bytes) else whole)
        if not isinstance(change, bytes):
            tensors, progress = load_state(state)
            change(tensors, progress)
            save_state(state, tensors, progress)
        return resume(train.main, [*small_sets[-2:], "--steps", "1"], state, capfd)

    return call


def test_what_is_missing_or_of_another_type_is_refused(resumed):
    assert resumed(lambda *_: None) == ""
    for name in ("step", "seconds", "plan", "data"):
        assert f"the progress has no {name}" in resumed(lambda _, p, name=name: p.pop(name))
        assert "not valid" in resumed(lambda _, p, name=name: p.update({name: None}))
    for part in ("task", "model", "train"):
        assert resumed(lambda _, p, part=part: p["plan"].pop(part))
        for value in (None, 3, [], {}, -(10**400)):
            assert resumed(lambda _, p, part=part, value=value: p["plan"].update({part: value}))
    assert "'more'" in resumed(lambda _, p: p["plan"].update(more={}))
    assert "two lines" in resumed(lambda _, p: p["plan"]["task"].update({"two\nlines": 1}))


def test_tensors_of_another_run_are_refused(resumed):
    tensors = load_state(Path("runs/train/state.safetensors"))[0]
    for part in ("model", "averaged", "optimizer", "another"):
        own = [name for name in tensors if name.startswith(part)]
        for name in own[:1] + own[-1:] if part != "optimizer" else ():
            assert resumed(lambda t, _, name=name: t.update({name: torch.ones(3, 1, 2)}))
            assert resumed(lambda t, _, name=name: t.pop(name))
        for name in ("", ".x", ".-1.step.x", ".two\nlines"):
            assert resumed(lambda t, _, name=part + name: t.update({name: torch.ones(())}))


def test_a_damaged_file_is_resumed_or_refused(resumed):
    whole = Path("runs/train/state.safetensors").read_bytes()
    (length,) = struct.unpack("<Q", whole[:8])
    rng = np.random.default_rng(3)
    cases = [whole[: len(whole) * part // 4] for part in range(4)] + [b"\0" * 4096, b"no state\n"]
    for _ in range(12):
        damaged = bytearray(whole)
        for place in rng.integers(0, 8 + length, rng.integers(1, 5)):
            damaged[place] = rng.integers(256)
        cases.append(bytes(damaged))
    header = json.loads(whole[8 : 8 + length])
    for text in ("{", "[1]", "[" * 100_000, "null", "{}", '"text"'):
        header["__metadata__"]["progress"] = text
        data = json.dumps(header).encode()
        cases.append(struct.pack("<Q", len(data)) + data + whole[8 + length :])
    errors = [resumed(case) for case in cases]
    assert all("the progress inside is not valid" in text for text in errors[-6:])
    assert any("not a whole safetensors file" in text for text in errors)


def test_a_state_of_a_search_is_no_less_checked(capfd, small_sets):
    words = [*SMALL[:-2], *SHORT[:-2], "--steps", "1"]
    search.main([*words, "--epoch-steps", "1"])
    state = Path("runs/search/supernet.safetensors")
    whole = state.read_bytes()

    def after(change: Callable[..., object]) -> str:
        state.write_bytes(whole)
        tensors, progress = load_state(state)
        change(tensors, progress)
        save_state(state, tensors, progress)
        return resume(search.main, [], state, capfd)

    assert after(lambda *_: None) == ""
    for name in ("step", "seconds", "data"):
        assert f"the progress has no {name}" in after(lambda _, p, name=name: p.pop(name))
    for name in ("supernet.alpha", "supernet.density"):
        assert after(lambda t, _, name=name: t.update({name: torch.ones(7)}))
    assert "more.x" in after(lambda t, _: t.update({"more.x": torch.ones(7)}))
    Path("runs/train").mkdir()
    Path("runs/train/state.safetensors").write_bytes(whole)
    other = Path("runs/train/state.safetensors")
    assert "plan inside is not valid" in resume(train.main, [], other, capfd)
