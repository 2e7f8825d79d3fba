"""Conversion of published files: the same function for pictures in 0..1, no code run, errors of one
line."""

import os
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from published import NETWORKS, random_tensors
from safetensors.torch import save_file

from acla.checkpoint import convert, infer_config, main
from acla.cli import run
from acla.config import Task, model_preset
from acla.errors import CheckpointError, UsageError
from acla.models.factory import build_network
from acla.models.serialization import load_model

ROOT = Path(__file__).parents[1]
WIDTHS = {"edsr": 8, "rcan": 16, "han": 16, "a2n": 8, "a2n-m": 8}


@pytest.fixture
def publish(tmp_path):
    """Writes a published file, changed by a function of its tensors; returns (path, tensors)."""

    def write(kind="edsr", scale=2, change=lambda t: t, name="net.pt"):
        tensors = random_tensors(kind, scale, WIDTHS[kind])
        torch.save(change(tensors), tmp_path / name)
        return tmp_path / name, tensors

    return write


@pytest.mark.parametrize(
    ("kind", "scale"),
    [
        *(("edsr", scale) for scale in (2, 3, 4)),
        *(("rcan", scale) for scale in (2, 4)),
        ("han", 3),
        *(("a2n", scale) for scale in (2, 3, 4)),
        ("a2n-m", 2),
    ],
)
def test_the_function_is_the_published_one(publish, kind, scale):
    path, tensors = publish(kind, scale)
    network = convert(path, scale).double()
    exact = {name: tensor.double() for name, tensor in tensors.items()}
    for H, W in ((7, 5), (1, 1)):
        pictures = torch.rand(2, 3, H, W, dtype=torch.float64)
        with torch.no_grad():
            theirs = NETWORKS[kind](exact, 255 * pictures, scale)
            torch.testing.assert_close(network(pictures), theirs / 255, rtol=1e-6, atol=1e-6)
    size = {"blocks": 2, "width": WIDTHS[kind], "channels": 3, "scale": scale, "positions": ()}
    config = asdict(network.config)
    assert {name: config[name] for name in size} == size
    assert config["backbone"] == kind


@pytest.mark.parametrize(
    ("preset", "backbone", "change"),
    [
        ("paper", "edsr", {}),
        ("small", "edsr", {"blocks": 16}),
        ("paper", "rcan", {}),
        ("tiny", "rcan", {"reduction": 4}),
        ("paper", "a2n", {}),
        ("paper", "a2n-m", {"reduction": 8}),
    ],
)
def test_the_configuration_is_inferred_from_shapes(preset, backbone, change):
    config = replace(model_preset(preset, Task("sr", 2), backbone), **change, scale=1)
    config = replace(config, attention="none", keys=0)
    with torch.device("meta"):
        tensors = build_network(config).state_dict()
    assert infer_config(tensors, backbone.removesuffix("-m")) == config


def prefixed(prefix: str, tensors: dict) -> dict:
    return {prefix + name: tensor for name, tensor in tensors.items()}


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(lambda t: {"state_dict": t, "epoch": 3}, id="state_dict"),
        pytest.param(lambda t: {"model": {"state_dict": t}}, id="nested"),
        pytest.param(lambda t: {"params": prefixed("module.", t)}, id="parallel"),
        pytest.param(lambda t: prefixed("module._orig_mod.", t), id="compiled"),
        pytest.param(lambda t: {"state_dict": prefixed("model.", t)}, id="member"),
        pytest.param(
            lambda t: {"model": t, "psnr": np.float64(30.5), "k": np.int64(3)}, id="numpy"
        ),
    ],
)
def test_wrapped_tensors_are_unwrapped(publish, change):
    plain = convert(publish()[0]).state_dict()
    found = convert(publish(change=change)[0]).state_dict()
    assert all(torch.equal(found[name], plain[name]) for name in plain)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_tensors_of_half_the_size_become_float32(publish, dtype):
    found = convert(publish(change=lambda t: {n: v.to(dtype) for n, v in t.items()})[0])
    rounded = convert(publish(change=lambda t: {n: v.to(dtype).float() for n, v in t.items()})[0])
    pairs = zip(found.parameters(), rounded.parameters(), strict=True)
    assert all(torch.equal(one, other) for one, other in pairs)


def test_numbers_of_numpy_1_are_read(publish, tmp_path):
    """Its files name the function that makes them differently."""
    path, tensors = publish()
    plain = convert(path).state_dict()
    content = {"model": tensors, "psnr": np.float64(30.5)}
    torch.save(content, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    names = [f"cnumpy.{core}.multiarray\n".encode() for core in ("_core", "core")]
    whole = (tmp_path / "old.pt").read_bytes()
    assert whole.count(names[0]) == 1
    (tmp_path / "old.pt").write_bytes(whole.replace(*names))
    found = convert(tmp_path / "old.pt").state_dict()
    assert all(torch.equal(found[name], plain[name]) for name in plain)


def test_files_of_other_formats_are_read(publish, tmp_path):
    path, tensors = publish()
    plain = convert(path).state_dict()
    save_file(tensors, tmp_path / "net.safetensors")
    torch.save(tensors, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    for name in ("net.safetensors", "old.pt"):
        found = convert(tmp_path / name).state_dict()
        assert all(torch.equal(found[name], plain[name]) for name in plain)


class Evil:
    """Makes a folder when it is unpickled."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


@pytest.mark.parametrize("zipped", [False, True])
def test_code_in_a_file_is_refused_and_never_run(publish, tmp_path, zipped):
    path, tensors = publish()
    evil = {**tensors, "more": Evil(tmp_path / "ran")}
    torch.save(evil, path, _use_new_zipfile_serialization=zipped)
    with pytest.raises(CheckpointError, match=r"needs pickled code \(\w+\.mkdir\), which is never"):
        convert(path)
    assert not (tmp_path / "ran").exists()
    torch.save(torch.nn.Conv2d(1, 1, 1), path, _use_new_zipfile_serialization=zipped)
    with pytest.raises(CheckpointError, match=r"needs pickled code \(torch\.nn\."):
        convert(path)


def without(*parts):
    return lambda t: {n: v for n, v in t.items() if not any(part in n for part in parts)}


def with_value(name, change):
    return lambda t: {**t, name: change(t[name])}


def eight_times(t):
    parts = [(step, part) for step in (2, 4) for part in ("weight", "bias")]
    return t | {f"tail.0.{step}.{part}": t[f"tail.0.0.{part}"] for step, part in parts}


@pytest.mark.parametrize(
    ("kind", "change", "message"),
    [
        ("edsr", lambda t: {"fc.weight": t["head.0.weight"]}, "a tensor fc.weight; .* torch.save"),
        ("edsr", lambda t: {}, "no supported network; supported"),
        ("edsr", lambda t: [*t.values()], r"more than tensors.*; save its state_dict alone"),
        ("edsr", lambda t: {**t, "epoch": 3}, "more than tensors"),
        ("edsr", lambda t: {**t, 3: t["head.0.weight"]}, "more than tensors"),
        ("edsr", lambda t: {**t, "more": t["head.0.weight"].to_sparse()}, "more than tensors"),
        ("edsr", lambda t: {**t, "more": t["head.0.weight"].to("meta")}, "more than tensors"),
        ("edsr", lambda t: {**t, "more": t["head.0.weight"]}, "1 are unknown, .* more"),
        ("edsr", without("head.0.bias"), "1 tensors are missing"),
        ("edsr", without("head."), "names of EDSR"),
        ("edsr", with_value("head.0.weight", lambda v: v.sum()), "names of EDSR"),
        ("edsr", with_value("head.0.weight", lambda v: v[:, :2]), "channels 2"),
        ("edsr", with_value("body.0.body.0.weight", lambda v: v[:3]), r"body\.0\.body\.0\.weight"),
        ("edsr", with_value("head.0.bias", torch.Tensor.double), r"head\.0\.bias .*float64"),
        ("edsr", with_value("sub_mean.bias", lambda v: v / 255), r"pictures in 0\.\.1"),
        ("edsr", without("tail.0"), "×2 nor ×3 nor ×4"),
        ("rcan", eight_times, "×2 nor ×3 nor ×4"),
        ("rcan", without("conv_du"), "names of RCAN"),
        ("rcan", without("body.1.body.0."), "does not fit"),
        ("rcan", without("mean"), "4 tensors are missing"),
        ("han", without("csa.conv.weight"), "names of HAN"),
        ("han", with_value("csa.conv.weight", lambda v: v[..., :2]), r"csa\.kernel .*\[3, 3, 2\]"),
        ("a2n", without("ADM.0"), "names of A2N"),
        ("a2n", without("trunk_conv"), "names of A2N|does not fit"),
        ("a2n", with_value("att1.conv.weight", lambda v: v[:9]), r"tail\.0\.2\.conv\.weight"),
    ],
)
def test_other_contents_are_refused(publish, kind, change, message):
    path, _ = publish(kind, change=change)
    with pytest.raises(CheckpointError, match=message) as caught:
        convert(path, None if kind != "a2n" else 2)
    assert str(caught.value).startswith(f"{path}: ")
    assert "\n" not in str(caught.value)


def test_damaged_files_are_refused(publish, tmp_path):
    path, _ = publish("a2n", 4)
    whole = path.read_bytes()
    torch.save(random_tensors("a2n", 4, 8), path, _use_new_zipfile_serialization=False)
    old = path.read_bytes()
    generator = torch.Generator().manual_seed(1)
    cases = [b"", b"\x80\x02.", b"text"]
    cases += [w[: len(w) * k // 5] for w in (whole, old) for k in range(5)]
    for number in range(60):
        damaged = bytearray((whole, old)[number % 2])
        for place, value in torch.randint(0, 2048, (4, 2), generator=generator).tolist():
            damaged[place] = value % 256
        cases.append(bytes(damaged))
    messages = []
    for case in cases:
        path.write_bytes(case)
        try:
            convert(path)
        except CheckpointError as error:
            messages.append(str(error))
    assert not any("\n" in message for message in messages)
    assert len(messages) > len(cases) // 2
    with pytest.raises(CheckpointError, match="no such file"):
        convert(tmp_path / "none.pt")
    (tmp_path / "net.safetensors").write_bytes(whole)
    with pytest.raises(CheckpointError, match="not a whole"):
        convert(tmp_path / "net.safetensors")


@pytest.mark.parametrize(
    ("kind", "scale", "given", "message"),
    [
        ("a2n", 3, None, "--scale 2 or --scale 3"),
        ("a2n", 3, 4, "--scale 4: .* ×2 or ×3"),
        ("a2n", 4, 2, "--scale 2: .* ×4"),
        ("edsr", 3, 2, "--scale 2: .* ×3"),
    ],
)
def test_another_scale_is_refused(publish, kind, scale, given, message):
    with pytest.raises(UsageError, match=message):
        convert(publish(kind, scale)[0], given)


# Command


def test_the_command_writes_a_model_file(publish, tmp_path, capsys):
    path, _ = publish("rcan", 3)
    out = tmp_path / "out.safetensors"
    main(["import", str(path), str(out), "--scale", "3"])
    told = capsys.readouterr()
    result = load_model(out)
    params = sum(tensor.numel() for tensor in result.model.state_dict().values())
    assert told == (f"{out}: sr x3, rcan of 2 blocks × 16, {params:,} parameters\n", "")
    assert (result.task, result.config.group_blocks) == (Task("sr", 3), 2)
    assert result.info["imported"] == "net.pt"
    assert len(result.info["sha256"]) == 64
    pictures = torch.rand(1, 3, 4, 6)
    with torch.no_grad():
        assert torch.equal(result.model(pictures), convert(path)(pictures))


def status(*words) -> int:
    with pytest.raises(SystemExit) as caught:
        run(main, [str(word) for word in words])
    return caught.value.code


def test_nothing_is_overwritten(publish, tmp_path, capsys):
    path, _ = publish()
    out = tmp_path / "out.safetensors"
    out.write_text("mine")
    assert status("import", path, out) == 2
    assert out.read_text() == "mine"
    assert status("import", path, path, "--overwrite") == 2
    assert status("import", tmp_path / "none.pt", out, "--overwrite") == 1
    assert out.read_text() == "mine"
    assert capsys.readouterr().err.count("error: ") == 3
    main(["import", str(path), str(out), "--overwrite"])
    assert load_model(out).config.blocks == 2


def test_a_model_file_of_half_the_size_is_the_same_network_with_rounded_weights(publish, tmp_path):
    path = publish()[0]
    whole, half = tmp_path / "whole.safetensors", tmp_path / "half.safetensors"
    main(["import", str(path), str(whole)])
    main(["half", str(whole), str(half)])
    one, other = load_model(whole), load_model(half)
    assert (one.config, one.task, one.info) == (other.config, other.task, other.info)
    assert half.stat().st_size < 0.6 * whole.stat().st_size
    for a, b in zip(one.model.parameters(), other.model.parameters(), strict=True):
        assert torch.equal(a.half().float(), b)


def test_exit_status_of_wrong_calls_and_files(publish, tmp_path, capsys):
    path, _ = publish("a2n", 2)
    out = tmp_path / "out.safetensors"
    assert status() == 2
    assert status("import", path, out, "--scale", "8") == 2
    assert status("import", path, out) == 2
    assert status("import", path, tmp_path / "none" / "out.safetensors", "--scale", "2") == 2
    main(["import", str(path), str(out), "--scale", "2"])
    capsys.readouterr()
    assert status("import", out, tmp_path / "more.safetensors", "--scale", "2") == 1
    assert f"error: {out}: " in capsys.readouterr().err
    assert not Path(tmp_path, "more.safetensors").exists()
