"""One picture through a network, whole and in tiles."""

from itertools import pairwise

import pytest
import torch

from acla.backbone import Backbone
from acla.config import ModelConfig
from acla.errors import UsageError
from acla.restore import OVERLAP, restore, starts


def shallow(scale: int) -> Backbone:
    """A network that sees six pixels far: less than the eight that a tile's cut may show in."""
    net = Backbone(ModelConfig(blocks=1, width=4, attention="none", keys=0, scale=scale)).eval()
    for parameter in net.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.2)
    return net


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


@pytest.mark.parametrize("length", [1, 80, 81, 128, 129, 399])
def test_neighbouring_tiles_share_enough(length):
    begin = starts(length, 80)
    assert begin[0] == 0
    assert begin[-1] == max(0, length - 80)
    assert all(0 < b - a <= 80 - OVERLAP for a, b in pairwise(begin))


def test_a_tile_that_is_all_overlap_is_refused():
    with pytest.raises(UsageError, match="--tile must be more than 64"):
        restore(shallow(1), torch.rand(3, 50, 50), tile=64)
