"""A picture through a network: whole, in tiles, turned, with little memory."""

import platform
import re
import resource
import subprocess
import sys
from itertools import pairwise

import pytest
import torch

from acla.config import ModelConfig, Task
from acla.errors import AclaError, UsageError
from acla.models.backbones import Backbone
from acla.restore import inference
from acla.restore.inference import overlap, restore, tile_grid

NO_CUDA_MEMORY = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
NO_CPU_MEMORY = RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate")


def shallow(scale: int) -> Backbone:
    """A network that sees six pixels far: less than the eight that a tile's cut may show in."""
    net = Backbone(ModelConfig(blocks=1, width=4, attention="none", keys=0, scale=scale)).eval()
    for parameter in net.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.2)
    return net


def test_automatic_precision_is_the_devices_fast_one(monkeypatch):
    cpu, gpu, task = torch.device("cpu"), torch.device("cuda"), Task("denoise", 30)
    for bf16, amx, expected in ((0, 0, "fp32"), (1, 0, "bf16"), (0, 1, "bf16")):
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda yes=bf16: bool(yes))
        monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda yes=amx: bool(yes))
        assert inference.pick_precision("auto", cpu, task) == expected
        assert inference.pick_precision("auto", cpu, Task("demosaic", 0)) == "fp32"
    for capability, expected in (((9, 0), "fp16"), ((7, 0), "fp16"), ((6, 1), "fp32")):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _, c=capability: c)
        assert inference.pick_precision("auto", gpu, task) == expected
    assert inference.pick_precision("fp16", cpu, task) == "fp16"


@pytest.mark.parametrize("scale", [1, 2, 3, 4])
@pytest.mark.parametrize(
    ("H", "W"),
    [
        pytest.param(200, 131, id="odd-rectangle"),
        pytest.param(80, 7, id="exactly-a-tile-and-narrow"),
        pytest.param(81, 81, id="one-pixel-more-than-a-tile"),
        pytest.param(1, 190, id="one-row"),
    ],
)
def test_tiles_leave_no_seam(scale, H, W):
    net, picture = shallow(scale), torch.rand(3, H, W)
    torch.testing.assert_close(restore(net, picture, tile=80), restore(net, picture))


def test_a_picture_no_larger_than_a_tile_is_taken_whole():
    net, picture = shallow(2), torch.rand(3, 80, 33)
    torch.testing.assert_close(restore(net, picture, tile=80), restore(net, picture))


@pytest.mark.parametrize("length", [1, 33, 80, 81, 128, 129, 257, 399, 768])
@pytest.mark.parametrize(("tile", "shared"), [(32, 10), (80, 26), (96, 32), (256, 32)])
def test_tiles_are_few_and_even_and_share_enough(length, tile, shared):
    assert overlap(tile) == shared
    side, starts = tile_grid(length, tile)
    assert side <= min(tile, length)
    assert starts[0] == 0
    assert starts[-1] + side == length
    steps = [b - a for a, b in pairwise(starts)]
    assert all(0 < step <= side - shared for step in steps)
    assert not steps or max(steps) - min(steps) <= 1
    fewer = len(starts) - 1  # would not reach from end to end
    assert not steps or fewer * tile - (fewer - 1) * shared < length


def test_few_pixels_are_computed_twice():
    """A photo of 768×512 at the default tile: three tiles by two that share a border of 32."""
    (rows, tops), (columns, lefts) = tile_grid(512, 384), tile_grid(768, 384)
    assert (len(tops), len(lefts)) == (2, 3)
    assert rows * len(tops) * columns * len(lefts) < 1.16 * 512 * 768


def test_small_tiles_blend():
    """No network sees less than the quarter of ten pixels, so that a cut may show, but little."""
    net, picture = shallow(2), torch.rand(3, 70, 45)
    apart = restore(net, picture, tile=32) - restore(net, picture)
    assert apart.abs().mean() < 0.02 * picture.std()


def test_a_tile_that_is_all_border_is_refused():
    with pytest.raises(UsageError, match="--tile must be 32 pixels or more, not 31"):
        restore(shallow(1), torch.rand(3, 50, 50), tile=31)


# Turned


@pytest.mark.parametrize("scale", [1, 2])
@pytest.mark.parametrize("tile", [None, 80])
def test_ensemble_does_not_care_how_the_picture_lies(scale, tile):
    net, picture = shallow(scale), torch.rand(3, 49, 90)
    answer = restore(net, picture, tile, ensemble=True)
    for turn in (lambda x: torch.rot90(x, 1, (1, 2)), lambda x: x.flip(2), lambda x: x.mT):
        torch.testing.assert_close(restore(net, turn(picture), tile, ensemble=True), turn(answer))
    alone = restore(net, picture.mT).mT
    assert (alone - restore(net, picture)).abs().max() > 1e-3  # a lone network does care


def test_ensemble_is_the_mean_of_eight():
    net, picture = shallow(1), torch.rand(3, 9, 14)
    total = torch.zeros_like(picture)
    for turns in range(4):
        for mirror in (False, True):
            seen = torch.rot90(picture.flip(1) if mirror else picture, turns, (1, 2))
            back = torch.rot90(restore(net, seen), -turns, (1, 2))
            total += back.flip(1) if mirror else back
    torch.testing.assert_close(restore(net, picture, ensemble=True), total / 8)


# Memory


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc's settings")
def test_freed_features_are_used_again():
    """No page of a tensor as large as a tile's features comes anew from the kernel."""
    code = (
        "import resource, torch; from acla.restore.inference import keep_memory\n"
        "keep_memory(torch.device('cpu'))\n"
        "for _ in range(12): torch.ones(2**24)\n"
        "before = resource.getrusage(0).ru_minflt; torch.ones(2**24)\n"
        "print(resource.getrusage(0).ru_minflt - before)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 2**26 / resource.getpagesize() / 10


class Short(torch.nn.Module):
    """A network that has memory for pictures of few pixels alone."""

    def __init__(self, net: Backbone, most: int, error: Exception) -> None:
        super().__init__()
        self.net, self.config, self.most, self.error = net, net.config, most, error
        self.tried: list[int] = []

    def forward(self, pictures: torch.Tensor) -> torch.Tensor:
        self.tried.append(max(pictures.shape[2:]))
        if pictures.shape[2] * pictures.shape[3] > self.most:
            raise self.error
        return self.net(pictures)


@pytest.mark.parametrize(
    "error", [NO_CUDA_MEMORY, NO_CPU_MEMORY, MemoryError()], ids=["cuda", "cpu", "python"]
)
@pytest.mark.parametrize("tile", [None, 300])
def test_tiles_are_halved_when_memory_runs_out(capsys, error, tile):
    net, picture = shallow(2), torch.rand(3, 200, 400)
    short = Short(net, 100 * 100, error)
    answer = restore(short, picture, tile)
    torch.testing.assert_close(answer, restore(net, picture))
    told = re.findall(
        r"out of memory with (\d+) pixels a side; again with tiles of (\d+)",
        (capsys.readouterr().err),
    )
    sides = [400, 200, 100] if tile is None else [300, 150, 96]
    assert told == [(str(a), str(b)) for a, b in pairwise(sides)]


def test_too_little_memory_for_the_smallest_tile_is_one_line():
    with pytest.raises(AclaError, match="out of memory, even for 96 pixels a side"):
        restore(Short(shallow(1), 100, NO_CPU_MEMORY), torch.rand(3, 200, 200))


def test_other_errors_stop_at_once():
    broken = Short(shallow(1), 100, RuntimeError("shapes do not match"))
    with pytest.raises(RuntimeError, match="shapes do not match"):
        restore(broken, torch.rand(3, 200, 200))
    assert broken.tried == [200]
