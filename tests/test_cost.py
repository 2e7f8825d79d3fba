"""Eq. 12 and 13: one formula, in numbers, in expectation and against the paper's columns; every
attention against torch's counter."""

import itertools

import numpy as np
import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from acla.config import ATTENTIONS, ModelConfig
from acla.kernels import to_rows
from acla.models.backbones import build_module
from acla.models.cost import (
    attention_flops,
    full_attention_flops,
    head_count,
    module_flops,
    output_flops,
    pair_flops,
)

BASELINES = ("nl", "clnl", "se", "mha")


def network(attention: str, width: int, keys: int) -> ModelConfig:
    kept = keys if ATTENTIONS[attention].keys else 0
    return ModelConfig(attention=attention, width=width, keys=kept)


def test_one_pair_by_hand():
    n, c, k, kept = 6, 5, 4, 17
    assert pair_flops(n, c, k, kept, masked=False) == 2 * n * c * (c + 1 + 3 * k) + 6 * c * kept
    assert (
        pair_flops(n, c, k, kept, masked=True) == pair_flops(n, c, k, kept, False) + 2 * n * c * k
    )
    assert output_flops(n, c) == 2 * n * c * c


@pytest.mark.parametrize("m", [0, 1, 5])
@pytest.mark.parametrize("masked", [False, True])
def test_everything_open_is_the_closed_form(m, masked):
    kept = [np.full(j + 1, 6 * 4) for j in range(m)]
    summed = attention_flops(np.ones(m), 6, 5, 4, kept, masked)
    assert summed == full_attention_flops("acla" if masked else "cla", m, 6, 5, 4)


def test_probabilities_give_the_expected_cost():
    chance = np.array([0.2, 0.9, 0.5])
    rng = np.random.default_rng(0)
    kept = [rng.integers(0, 24, j + 1) for j in range(3)]
    expected = 0.0
    for gates in itertools.product((0, 1), repeat=3):
        s = np.array(gates)
        share = np.where(s == 1, chance, 1 - chance).prod()
        expected += share * attention_flops(s, 6, 5, 4, kept, True)
    assert attention_flops(chance, 6, 5, 4, kept, True) == pytest.approx(expected, rel=1e-12)


def test_cost_falls_with_every_gate_and_every_kept_key():
    gates = torch.full((3,), 0.5, dtype=torch.float64, requires_grad=True)
    kept = [torch.full((j + 1,), 9.0, dtype=torch.float64, requires_grad=True) for j in range(3)]
    attention_flops(gates, 6, 5, 4, kept, True).backward()
    assert (gates.grad > 0).all()
    assert all((count.grad > 0).all() for count in kept)


def test_the_papers_columns_in_multiply_adds():
    # Table 4, EDSR to EDSR+ACLA: the value and output convolutions make up the difference.
    n, c = 48 * 48, 256
    main = (15 * 2 * n * c * c + 5 * output_flops(n, c)) / 2e9
    assert main == pytest.approx(96.97 - 93.97, abs=0.03)


# Any attention

KINDS = [name for name in ATTENTIONS if name != "none"]


@pytest.mark.parametrize("attention", KINDS)
@pytest.mark.parametrize(("layers", "width", "H", "W"), [(1, 6, 1, 5), (3, 12, 7, 4)])
def test_multiply_adds_are_those_that_torch_counts(attention, layers, width, H, W):
    """To the operation, but for a mask unit, which runs on the zero border too, and for the one-hot
    channels of multi-head attention, which stand for additions."""
    config = network(attention, width, 4)
    query = torch.randn(1, width, H, W)
    rows = [to_rows(query)] * layers
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        build_module(config, layers)(query, rows)
    counted = counter.get_total_flops()
    if ATTENTIONS[attention].masked:
        counted -= layers * 2 * width * config.keys * ((H + 2) * (W + 2) - H * W)
    if attention == "mha":
        heads = head_count(width)
        channels = -(-(width // heads + H + W) // 8) * 8
        counted -= 4 * (H * W) ** 2 * (heads * channels - width)
    assert module_flops(attention, layers, H * W, width, config.keys) == counted


def test_the_cost_of_baselines_in_the_papers_network():
    """EDSR ×2's 256 channels at 48 × 48, four modules: by hand, in multiply-adds."""
    n, c = 48 * 48, 256
    four = {name: full_attention_flops(name, 4, n, c, 0) // 2 for name in BASELINES}
    assert four["nl"] == 4 * (2 * n * c * c + n * n * c)
    assert four["clnl"] == 4 * n * c * c + 10 * (n * c * c + n * n * c)
    assert four["mha"] == 4 * (4 * n * c * c + 2 * n * n * c + 2 * 33 * n * c)
    assert four["se"] == 4 * 2 * 256 * 16
