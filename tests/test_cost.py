"""Eq. 12 and 13: one formula, in numbers, in expectation and against the paper's columns."""

import itertools

import numpy as np
import pytest
import torch

from acla.cost import attention_flops, full_attention_flops, output_flops, pair_flops


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
    assert summed == full_attention_flops(m, 6, 5, 4, masked)


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
