"""States of runs that nobody meant: each is resumed or refused in one line, with no traceback."""

import json
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

import search
import train
from acla.cli import run
from acla.models.serialization import load_state, save_state

SMALL = [
    "--preset",
    "tiny",
    "--blocks",
    "2",
    "--width",
    "4",
    "--batch-size",
    "1",
    "--patch-size",
    "8",
]
LONG = -(10**400)


@pytest.fixture
def resumed(elsewhere, small_sets, capfd) -> Callable[..., str]:
    """Go on with a training whose state is spoilt: '' if it did, else its one line. Called with a
    function that spoils tensors and progress, or the bytes of the file."""
    begun = [
        *SMALL,
        *small_sets,
        "--attention",
        "none",
        "--ema",
        "--steps",
        "1",
        "--val-every",
        "1",
    ]
    train.main(begun)
    state = Path("runs/train/state.safetensors")
    whole = state.read_bytes()

    def call(spoil: Callable[..., object] | bytes) -> str:
        state.write_bytes(spoil if isinstance(spoil, bytes) else whole)
        if not isinstance(spoil, bytes):
            tensors, progress = load_state(state)
            spoil(tensors, progress)
            save_state(state, tensors, progress)
        return one_line(train.main, ["--resume", *small_sets, "--steps", "2"], state, capfd)

    call.whole = whole
    return call


def one_line(main: Callable, words: list[str], state: Path, capfd) -> str:
    """What a call that resumes says: '' if it went on, else the one line of its error, which leaves
    the state as it is."""
    before = state.read_bytes()
    capfd.readouterr()
    status = 0
    try:
        run(main, words)
    except SystemExit as stop:
        status = stop.code
    lines = capfd.readouterr().err.splitlines()
    said = [text for text in lines if text.startswith("error: ")]
    assert (status, len(said)) in ((0, 0), (1, 1))
    if status:
        assert said == lines[-1:]
        assert state.read_bytes() == before
    return "".join(said)


def put(*path: str, value: object) -> Callable[..., None]:
    """Set a value deep in the progress."""

    def spoil(tensors: dict, progress: dict) -> None:
        for name in path[:-1]:
            progress = progress[name]
        progress[path[-1]] = value

    return spoil


def test_a_state_s_progress_of_other_types_and_names(resumed):
    assert resumed(lambda *_: None) == ""
    progress = load_state(Path("runs/train/state.safetensors"))[1]
    odd = (None, True, -1, 0.5, LONG, "text", [], [[]], {}, {"x": LONG}, float("nan"))
    wanted = {"step", "seconds", "plan", "data", "flags", "scaler", "best", "val_psnr"}
    for name in wanted:
        assert f"the progress has no {name}" in resumed(lambda _, p, name=name: p.pop(name))
        for value in odd:
            said = resumed(put(name, value=value))
            fits = type(value) is type(progress[name])
            assert said.startswith("error: runs/train/state.safetensors: ") or fits, (name, value)
    met = {"losses", "norms"}
    for name in met:
        for value in (*odd, [LONG], [True], ["text"]):
            said = resumed(put(name, value=value))
            assert "the progress inside is not valid" in said or value == [], (name, value)
    for name in progress.keys() - wanted - met:  # notes
        assert resumed(put(name, value=[[]])) == ""
    assert "'more' is unknown" in resumed(put("more", value=1))


def test_a_state_s_plan_of_other_types_and_names(resumed):
    progress = load_state(Path("runs/train/state.safetensors"))[1]
    for part, values in progress["plan"].items():
        said = [resumed(lambda _, p, part=part: p["plan"].pop(part))]
        said += [resumed(put("plan", part, value=value)) for value in (None, 3, [], {}, LONG)]
        said += [resumed(put("plan", part, "more", value=1))]
        for name in values:
            said += [resumed(put("plan", part, name, value=odd)) for odd in ([[]], {}, LONG)]
        assert all(text.startswith("error: runs/train/state.safetensors: ") for text in said)
    assert "'more'" in resumed(put("plan", "more", value={}))
    assert "fields: two lines; begin anew" in resumed(put("plan", "task", "two\nlines", value=1))
    for huge in ({"width": 4096, "blocks": 256}, {"backbone": "han", "group_blocks": 256}):
        model = progress["plan"]["model"] | huge
        assert "does not fit its network" in resumed(put("plan", "model", value=model))
    assert "pictures for train" in resumed(put("data", value={}))
    assert "holds the gradient scaler" in resumed(put("scaler", value={"scale": 2.0}))


@pytest.mark.parametrize("part", ["model", "averaged", "optimizer", "another"])
def test_a_state_s_tensors_of_other_shapes_and_names(resumed, part):
    found = load_state(Path("runs/train/state.safetensors"))[0]
    own = [name for name in found if name.startswith(part)]
    for name in own[:4] + own[-4:]:
        for other in (
            torch.ones(3, 1, 2),
            found[name].reshape(-1)[:0],
            found[name].bool(),
            found[name].double(),
        ):
            said = resumed(lambda t, _, name=name, other=other: t.update({name: other}))
            assert f"error: runs/train/state.safetensors: {name} is torch." in said
        said = resumed(lambda t, _, name=name: t.pop(name))
        assert f"1 tensors are missing and 0 are unknown, for instance {name};" in said
    for name in ("", ".", ".x", ".-1.step", ".0", ".0.", ".0.step.x", ".999.step", ".two\nlines"):
        said = resumed(lambda t, _, name=part + name: t.update({name: torch.ones(())}))
        shown = (part + name).replace("\n", " ")
        assert f"0 tensors are missing and 1 are unknown, for instance {shown};" in said


def test_a_damaged_state(resumed):
    whole = resumed.whole
    (length,) = struct.unpack("<Q", whole[:8])
    rng = np.random.default_rng(3)
    cases = [whole[: len(whole) * part // 6] for part in range(6)]
    cases += [b"\0" * 4096, b"\xff" * 64, b"no state\n"]
    for _ in range(60):
        damaged = bytearray(whole)
        for place in rng.integers(0, 8 + length, rng.integers(1, 5)):
            damaged[place] = rng.integers(256)
        cases.append(bytes(damaged))
    header = json.loads(whole[8 : 8 + length])
    for text in ("{", "[1]", "[" * 100_000, "1e999", "null", "{}", '"text"', None):
        notes = {key: value for key, value in header["__metadata__"].items() if key != "progress"}
        header["__metadata__"] = notes | ({} if text is None else {"progress": text})
        data = json.dumps(header).encode()
        cases.append(struct.pack("<Q", len(data)) + data + whole[8 + length :])
    said = [resumed(case) for case in cases]
    assert all("the progress inside is not valid" in text for text in said[-8:])
    assert any("not a whole safetensors file" in text for text in said)


def test_a_state_of_a_search_is_no_less_checked(elsewhere, capfd):
    words = [*SMALL, "--keys", "2", "--steps", "2", "--epoch-steps", "1"]
    search.main(words)
    state = Path("runs/search/supernet.safetensors")
    whole = state.read_bytes()

    def said(spoil: Callable[..., object]) -> str:
        state.write_bytes(whole)
        tensors, progress = load_state(state)
        spoil(tensors, progress)
        save_state(state, tensors, progress)
        return one_line(search.main, ["--resume"], state, capfd)

    assert said(lambda *_: None) == ""
    for name in ("step", "seconds", "data", "plan"):
        assert f"the progress has no {name}" in said(lambda _, p, name=name: p.pop(name))
        for value in (None, "text", [], -1):
            assert "the progress inside is not valid" in said(put(name, value=value))
    for name in ("supernet.alpha", "weights.0.exp_avg", "alpha.0.step"):
        wrong = said(lambda t, _, name=name: t.update({name: torch.ones(7)}))
        assert f"{state}: {name} is torch.float32 [7], but the network's is" in wrong
        assert f"for instance {name}" in said(lambda t, _, name=name: t.pop(name))
    assert "for instance more.x" in said(lambda t, _: t.update({"more.x": torch.ones(7)}))
