"""Exported networks give what the networks give, at sizes they were not exported at."""

import json
import re
import sys

import pytest
import torch
from restoring import DOUBLE, write_network

from acla import export
from acla.config import Task
from acla.errors import AclaError, UsageError
from acla.models.serialization import load_model, save_model

GRAY = Task("car", 10)


@pytest.fixture
def write(tmp_path):
    """Writes the file of a network whose attention has every part at work."""

    def file(task: Task = GRAY, **fields: object):
        path = write_network(tmp_path / "net.safetensors", task, blocks=2, **fields)
        network = load_model(path)
        generator = torch.Generator().manual_seed(3)
        for name, tensor in network.model.state_dict().items():
            if name.startswith(("attention.", "tail.")):
                noise = torch.randn(tensor.shape, generator=generator)
                tensor.add_(noise * (2 if name.endswith("points.bias") else 0.2))
        save_model(path, network.model, network.config, task, {})
        return path

    return file


def packages() -> None:
    for name in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(name, reason=f"no package {name} (extra onnx)")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("task", "fields"),
    [
        (GRAY, {"attention": "acla", "keys": 3, "positions": (1, 2)}),
        (DOUBLE, {"attention": "cla", "keys": 2, "positions": (2,)}),
    ],
    ids=["masked", "enlarging"],
)
def test_onnx_gives_what_the_network_gives(tmp_path, capsys, write, task, fields):
    packages()
    import onnxruntime

    path = write(task, **fields)
    out = tmp_path / "net.onnx"
    export.main([str(path), str(out)])
    assert str(out) in capsys.readouterr().out
    network = load_model(path)
    session = onnxruntime.InferenceSession(out)
    for B, H, W in ((1, 1, 1), (3, 5, 38), (1, 31, 2)):
        pictures = torch.rand(B, network.config.channels, H, W)
        (restored,) = session.run(None, {"pictures": pictures.numpy()})
        with torch.no_grad():
            wanted = network.model(pictures)
            shut = torch.zeros(len(network.config.positions))
            plain, _ = network.model.forward_with_counts(pictures, gates=shut)
        torch.testing.assert_close(torch.from_numpy(restored), wanted, rtol=0, atol=1e-4)
        assert (wanted - plain).abs().max() > 1e-3  # the attention does something
    assert str(export.__file__).encode() not in out.read_bytes()
    told = session.get_modelmeta().custom_metadata_map
    assert json.loads(told["config"])["keys"] == fields["keys"]
    assert json.loads(told["task"])["name"] == task.name


def test_a_network_that_differs_is_not_written(tmp_path, monkeypatch, write):
    packages()
    monkeypatch.setattr(export, "to_onnx", lambda network: b"")
    monkeypatch.setattr(export, "loaded", lambda data, suffix: lambda x: x * torch.nan)
    with pytest.raises(AclaError, match=r"net\.safetensors: exported, it is off by nan at 1×17×24"):
        export.main([str(write()), str(tmp_path / "net.onnx")])
    assert not (tmp_path / "net.onnx").exists()


def test_wrong_calls_name_the_fix(tmp_path, monkeypatch, write):
    path, out = write(), tmp_path / "net.onnx"
    with pytest.raises(UsageError, match=r"must end in \.onnx or \.pt2"):
        export.main([str(path), str(tmp_path / "net.bin")])
    out.write_text("mine")
    with pytest.raises(UsageError, match="--overwrite replaces it"):
        export.main([str(path), str(out)])
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(UsageError, match=r"pip install '\.\[onnx\]'"):
        export.main([str(path), str(out), "--overwrite"])
    assert out.read_text() == "mine"


@pytest.mark.slow
def test_torch_export_gives_what_the_network_gives(tmp_path, capsys, write):
    """The operator is registered, so that torch's own programs need nothing of ours but it."""
    path, out = write(attention="acla", keys=3, positions=(1, 2)), tmp_path / "net.pt2"
    export.main([str(path), str(out)])
    apart = re.findall(r"(\S+) at \d×\d+×\d+", capsys.readouterr().out)
    assert len(apart) == 3
    assert max(map(float, apart)) < 1e-6
    told = {"task": "", "config": ""}
    loaded = torch.export.load(out, extra_files=told).module()
    pictures = torch.rand(3, 1, 7, 33)
    torch.testing.assert_close(
        loaded(pictures), load_model(path).model(pictures), rtol=0, atol=1e-6
    )
    assert json.loads(told["config"])["keys"] == 3
