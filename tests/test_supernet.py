"""The supernet: gates, expected cost, and the derived network."""

from dataclasses import replace
from itertools import accumulate

import pytest
import torch

from acla.config import ATTENTIONS, ModelConfig
from acla.errors import UsageError
from acla.kernels.timing import allocations
from acla.models import backbones
from acla.models.gumbel import draw_gates, expected_gates, position_seeds
from acla.search.supernet import Supernet

SMALL = ModelConfig(blocks=4, width=6, group_blocks=1, reduction=2, keys=3, channels=1)


def random_supernet(**changes) -> Supernet:
    torch.manual_seed(0)
    net = Supernet(replace(SMALL, **changes)).double()
    for parameter in net.weights:
        torch.nn.init.normal_(parameter, std=0.3)
    return net


@pytest.mark.parametrize("backbone", ["edsr", "rcan"])
@pytest.mark.parametrize(
    "positions", [(), (1,), (4,), (1, 3), (2, 3, 4), (1, 2, 3, 4)], ids=lambda p: f"open-{p}"
)
def test_the_derived_network_is_the_supernet_with_shut_gates(backbone, positions):
    net = random_supernet(backbone=backbone).eval()
    gates = torch.tensor([float(p in positions) for p in range(1, 5)], dtype=torch.float64)
    pictures = torch.rand(2, 1, 7, 5, dtype=torch.float64)
    derived = net.derive(positions).double().eval()
    assert derived.config.positions == positions
    with torch.no_grad():
        restored, kept = net(pictures, gates)
        expected, derived_kept = derived.forward_with_counts(pictures)
    torch.testing.assert_close(restored, expected)
    for position, count in derived_kept.items():
        layers = [p - 1 for p in positions if p <= position]
        assert torch.equal(kept[position][:, layers], count)
    with_gradient = net(pictures, gates.clone().requires_grad_())[0]
    torch.testing.assert_close(with_gradient, expected)


def test_open_positions_are_those_above_zero():
    net = random_supernet()
    net.alpha.data = torch.tensor([0.0, 0.1, -0.1, 5.0]).double()
    assert net.open_positions() == (2, 4)
    assert draw_gates(net.alpha, None, 1.0).tolist() == [0, 1, 0, 1]


def test_drawn_gates_are_hard_and_open_as_often_as_expected():
    alpha = torch.tensor([-2.0, 0.0, 1.0], requires_grad=True)
    drawn = torch.stack([draw_gates(alpha, seed, 0.3) for seed in range(4000)])
    assert set(drawn.unique().tolist()) == {0.0, 1.0}
    torch.testing.assert_close(drawn.mean(0), expected_gates(alpha), atol=0.03, rtol=0)
    drawn.sum().backward()
    assert (alpha.grad > 0).all()


def test_a_gates_gradient_is_the_sigmoids_at_tau():
    alpha = torch.tensor([0.4, -0.7], dtype=torch.float64, requires_grad=True)
    gates = draw_gates(alpha, None, 0.5)
    assert gates.tolist() == [1, 0]
    (slope,) = torch.autograd.grad(gates.sum(), alpha)
    soft = (alpha / 0.5).sigmoid()
    torch.testing.assert_close(slope, soft * (1 - soft) / 0.5)


def test_shut_modules_do_not_run_without_a_gradient_and_do_with_one():
    net = random_supernet()
    gates = torch.tensor([0.0, 1.0, 0.0, 1.0], dtype=torch.float64)
    pictures = torch.rand(1, 1, 5, 4, dtype=torch.float64)
    assert sorted(net(pictures, gates)[1]) == [2, 4]
    gates.requires_grad_()
    restored, kept = net(pictures, gates)
    assert sorted(kept) == [1, 2, 3, 4]
    restored.square().sum().backward()
    assert gates.grad.all()


def test_cost_reaches_alpha_and_the_masks():
    net = random_supernet()
    pictures = torch.rand(2, 1, 5, 4, dtype=torch.float64)
    _, kept = net(pictures, torch.ones(4, dtype=torch.float64))
    net.cost(kept, 20).log().backward()
    assert (net.alpha.grad > 0).all()
    biases = [net.backbone.attention[str(p)].mask_bias.grad for p in range(1, 5)]
    assert all((bias > 0).any() for bias in biases)


def test_cost_of_hard_gates_is_that_of_the_derived_network_alone():
    net = random_supernet()
    pictures = torch.rand(2, 1, 5, 4, dtype=torch.float64)
    gates = torch.tensor([1.0, 0.0, 0.0, 1.0], dtype=torch.float64)
    with torch.no_grad():
        supernet_cost = net.cost(net(pictures, gates)[1], 20, gates)
        derived = net.derive((1, 4)).double()
        small = Supernet(replace(SMALL, blocks=2)).double()
        counts = dict(enumerate(derived.forward_with_counts(pictures)[1].values(), 1))
        alone = small.cost(counts, 20, torch.ones(2, dtype=torch.float64))
    torch.testing.assert_close(supernet_cost, alone)


def test_skipped_modules_count_with_the_density_they_last_had():
    net = random_supernet()
    pictures = torch.rand(2, 1, 5, 4, dtype=torch.float64)
    with torch.no_grad():
        _, kept = net(pictures, torch.ones(4, dtype=torch.float64))
        met = net.cost(kept, 20)
        assert 0 < net.density.tril().sum() < 10
        torch.testing.assert_close(net.cost({}, 20), met)


def test_fixed_weights_get_no_gradient_and_mean_shifts_never_learn():
    net = random_supernet()
    before = [p.requires_grad for p in net.parameters()]
    with net.weights_fixed():
        net(torch.rand(1, 1, 4, 4).double(), draw_gates(net.alpha, 1, 1.0))[0].sum().backward()
    assert all(p.grad is None for p in net.weights)
    assert net.alpha.grad is not None
    assert [p.requires_grad for p in net.parameters()] == before


def test_modules_draw_different_noise():
    seeds = torch.tensor([1, 2**62, -5])
    assert position_seeds(None, 3) is None
    drawn = {tuple(position_seeds(seeds, p).tolist()) for p in range(1, 40)}
    assert len(drawn) == 39


@pytest.mark.parametrize("limit", [0, float("inf")], ids=["recomputed", "kept"])
def test_recomputing_changes_no_gradient(limit):
    grads = []
    for each in (limit, float("inf")):
        net = random_supernet()
        net.backbone.sample_limit = each
        gates = draw_gates(net.alpha, 3, 1.0)
        restored, kept = net(torch.linspace(0, 1, 40).view(2, 1, 5, 4).double(), gates)
        (restored.square().sum() + net.cost(kept, 20).log()).backward()
        grads.append([p.grad for p in net.parameters()])
    for ours, theirs in zip(*grads, strict=True):
        assert (ours is None) == (theirs is None)
        if ours is not None:
            torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


@pytest.mark.parametrize("limit", [0, float("inf")], ids=["recomputed", "kept"])
def test_a_layers_rows_are_made_once_and_shared_by_all_modules(monkeypatch, limit):
    made, given = [], []

    def to_rows(feature):
        made.append(kernels_to_rows(feature))
        return made[-1]

    kernels_to_rows = backbones.to_rows
    monkeypatch.setattr(backbones, "to_rows", to_rows)
    net = random_supernet()
    net.backbone.sample_limit = limit
    for module in net.backbone.attention.values():
        module.register_forward_pre_hook(lambda module, arguments: given.append(arguments[1]))
    net(torch.rand(1, 1, 5, 4).double(), torch.ones(4).double())[0].sum().backward()
    assert len(made) == 4
    assert {len(rows) for rows in given} == {1, 2, 3, 4}
    assert all(ours is theirs for rows in given for ours, theirs in zip(rows, made, strict=False))


def backward_memory(modules: int, hold: bool = False) -> tuple[list[int], int, int]:
    """What the backward pass of a step takes and gives back, in bytes; the bytes of one layer's
    gradient, which no other tensor has; and those of the parameters' gradients, which remain.
    `hold`: keep every pair's gradient of its layer, as nobody should."""
    side, width = 16, 4
    config = ModelConfig(blocks=modules, width=width, keys=3, channels=1)
    net, held = Supernet(config), []

    def watch(module, arguments):
        query, rows, *others = arguments
        rows = tuple(row.view_as(row) for row in rows)
        for row in rows[1:]:  # the first depends on no gate, but on the weights alone
            row.register_hook(lambda gradient: held.append(gradient.clone()))
        return query, rows, *others

    if hold:
        for module in net.backbone.attention.values():
            module.register_forward_pre_hook(watch)
    for parameter in net.weights:
        torch.nn.init.normal_(parameter, std=0.1)
    restored, _ = net(torch.rand(1, 1, side, side), torch.ones(modules, requires_grad=True))
    loss = restored.square().sum()
    # The graph is retained: what forward saved is not given back, and does not hide what is taken.
    changes = allocations(lambda: loss.backward(retain_graph=True))
    parameters = sum(p.grad.nbytes for p in net.parameters() if p.grad is not None)
    return changes, (side + 2) ** 2 * width * 4, parameters


def live(changes: list[int], size: int) -> int:
    """Tensors of exactly this size that were there at once, at most."""
    signs = ((change > 0) - (change < 0) for change in changes if abs(change) == size)
    return max(accumulate(signs))


def test_backward_adds_up_one_gradient_per_layer_beside_those_of_one_module():
    for modules in (4, 8, 16):
        pairs = modules * (modules + 1) // 2
        changes, size, _ = backward_memory(modules)
        assert changes.count(size) >= pairs  # every pair has a gradient for its layer
        assert live(changes, size) <= 2 * modules
    changes, size, _ = backward_memory(16, hold=True)
    assert live(changes, size) >= 16 * 15 // 2  # so would it show if they were all there


def test_backward_memory_grows_with_the_modules_not_with_the_pairs():
    peaks = []
    for modules in (4, 8, 16):
        changes, _, parameters = backward_memory(modules)
        peaks.append(max(accumulate(changes)) - parameters)
    growth = (peaks[2] - peaks[1]) / (peaks[1] - peaks[0])
    assert growth < 2.6  # 2 for a straight line, 4 for a parabola


@pytest.mark.parametrize("attention", [name for name in ATTENTIONS if name not in ("cla", "acla")])
def test_what_cannot_be_searched_is_refused(attention):
    keys = ATTENTIONS[attention].keys
    with pytest.raises(UsageError, match="a search is for cla and acla, not for --attention"):
        Supernet(replace(SMALL, attention=attention, keys=keys))
