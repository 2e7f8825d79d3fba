"""The noise of α's gradient, by draws of the gates."""

from pathlib import Path

import pytest
import torch
from searching import SHORT, SMALL, elsewhere  # noqa: F401

import search
from acla.analysis import gate_noise
from acla.analysis.ranking import load_search


def test_the_gradient_of_two_draws_is_the_mean_over_opposite_gates(capsys, monkeypatch):
    search.main([*SMALL, *SHORT, "--out", "s"])
    capsys.readouterr()
    found = load_search(Path("s"), Path("../data"))
    pairs = gate_noise.alpha_gradients(found, 2, 3)
    assert torch.equal(pairs, gate_noise.alpha_gradients(found, 2, 3))  # all is as before
    first, draw = gate_noise.alpha_gradients(found, 1, 3), found.draw
    monkeypatch.setattr(found, "draw", lambda alpha, step, stream, _: draw(alpha, step, stream, 1))
    opposite = gate_noise.alpha_gradients(found, 1, 3)
    assert not torch.allclose(first, opposite)
    torch.testing.assert_close(pairs, (first + opposite) / 2, rtol=1e-3, atol=1e-3)
    gate_noise.main(["s", "--draws", "2", "--steps", "3"])
    row = capsys.readouterr().out.splitlines()[-1]
    assert float(row.split("|")[3]) == pytest.approx(pairs.std(0).mean().item(), abs=1e-3)
