"""The steps of a search: what they find where the answer is known, and what they agree with."""

import pytest
import torch
from torch import nn

from acla.config import ModelConfig, SearchConfig, Task
from acla.data.datasets import Loader, sample_set
from acla.distributed import Processes
from acla.models.cost import full_attention_flops
from acla.models.gumbel import draw_gates
from acla.search.loop import ALPHA, WEIGHTS, Search, SearchPlan, Sets, gate_report, temperature
from acla.training import trainer

ALONE = Processes(torch.device("cpu"))


def make_search(blocks: int = 3, width: int = 8, keys: int = 3, **how) -> Search:
    options = {"steps": 6, "batch_size": 2, "patch_size": 16, "warmup": 0.5, "lam": 0.02, **how}
    model = ModelConfig(blocks=blocks, width=width, keys=keys, channels=1)
    plan = SearchPlan(Task("car", 10), model, SearchConfig(**options))
    return Search(plan, Sets(sample_set("train"), sample_set("val")), ALONE)


class Forgets(nn.Module):
    """A block that loses everything."""

    def forward(self, x):
        return torch.zeros_like(x)


class Shifted:
    """Noise, and the same noise four pixels to the right: farther than the convolutions see."""

    indices = range(4)

    def __init__(self, seed: int):
        self.seed = seed

    def batch(self, step):
        generator = torch.Generator().manual_seed(1000 * self.seed + step)
        low = torch.rand(4, 1, 16, 16, generator=generator)
        return low, low.roll(4, dims=3)


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1])
def test_a_search_opens_the_positions_that_alone_can_help(seed):
    # Blocks 2 and 4 forget everything. What the answer needs is in block 1's features alone, and
    # what is read of them behind blocks 1 to 3 is forgotten again: position 4 must read layer 1.
    search = make_search(
        blocks=4,
        keys=16,
        steps=300,
        batch_size=4,
        lr=5e-3,
        alpha_lr=0.08,
        warmup=0.6,
        lam=10.0,  # the noise's MSE is in the thousands
        seed=seed,
    )
    for block in (1, 3):
        search.net.backbone.body[block] = Forgets()
    search.loaders = [Loader(Shifted(2 * seed + stream), ALONE.device) for stream in range(2)]
    for step in range(search.plan.search.steps):
        search.step(step)
    assert search.net.open_positions() == (1, 4)
    assert search.net.alpha.abs().min() > 1


def test_a_weight_step_computes_open_modules_only():
    search = make_search()
    seen = []
    for position, module in search.net.backbone.attention.items():
        module.register_forward_hook(lambda *_, position=position: seen.append(int(position)))
    for step in range(6):
        gates = draw_gates(search.net.alpha.detach(), trainer.gate_seed(0, step, WEIGHTS), 1.0)
        seen.clear()
        search.weight_step(step)
        assert seen == [j for j, s in enumerate(gates.tolist(), 1) if s]
    assert seen != [1, 2, 3]  # or the draws were all open, and the test says nothing


def test_each_kind_of_step_changes_its_own_parameters():
    search = make_search()
    names = dict(search.net.backbone.named_parameters())
    before = {name: p.detach().clone() for name, p in names.items()}
    search.alpha_step(4)
    assert all(torch.equal(p, before[name]) for name, p in names.items())
    assert (search.net.alpha != 0).all()
    alpha = search.net.alpha.detach().clone()
    search.weight_step(4)
    assert torch.equal(search.net.alpha, alpha)
    assert any(not torch.equal(p, before[name]) for name, p in names.items())


def test_each_kind_of_step_draws_its_own_gates_and_patches(monkeypatch):
    search = make_search()
    drawn, taken = [], []
    draw, batch = Search.draw, Search.batch
    monkeypatch.setattr(Search, "draw", lambda *a: drawn.append(a[2:4]) or draw(*a))
    monkeypatch.setattr(Search, "batch", lambda *a: taken.append(a[1:]) or batch(*a))
    search.step(4)  # of the second stage
    assert drawn == taken == [(4, WEIGHTS), (4, ALPHA)]
    seeds = [trainer.gate_seed(0, 4, stream) for stream in (WEIGHTS, ALPHA)]
    assert seeds[0] != seeds[1]


def test_draws_come_in_pairs_of_opposite_noise():
    alpha = torch.zeros(200)
    one, other, third = (
        Search.draw(make_search(warmup=0.0), alpha, 0, ALPHA, draw) for draw in range(3)
    )
    assert torch.equal(one, 1 - other)
    assert not torch.equal(one, third)
    search = make_search(draws=3)
    seen = []
    search.net.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[1].tolist()))
    search.alpha_step(4)
    assert len(seen) == 3


def test_the_loss_is_mse_plus_lambda_log_cost():
    search = make_search(lam=7.0)
    low, target, seeds = search.batch(0, WEIGHTS)
    gates = search.draw(search.net.alpha.detach(), 0, WEIGHTS)
    restored, kept = search.net(low, gates, seeds)
    mse = ((restored - target) * 255).square().mean()
    loss = mse + 7.0 * search.net.cost(kept, 16 * 16).log()
    seen = search.weight_step(0)
    assert seen[0] == pytest.approx(mse.item(), rel=1e-6)
    assert seen[1] == pytest.approx(loss.item(), rel=1e-6)


def test_tau_falls_in_the_second_stage_only():
    how = SearchConfig(steps=10, warmup=0.5, tau=2.0, tau_end=0.1)
    taus = [temperature(how, step) for step in range(10)]
    assert taus[:6] == [2.0] * 6
    assert taus == sorted(taus, reverse=True)
    assert taus[-1] == pytest.approx(0.1)


def test_gates_end_decided_where_little_noise_is_left():
    search = make_search(blocks=4, steps=10, gate_noise_end=0.05)
    alpha = torch.linspace(-1, 1, len(search.net.alpha))
    search.net.alpha.data.copy_(alpha)
    assert torch.equal(search.alpha_at(5), alpha)  # the second stage begins with all the noise
    end = search.alpha_at(9).detach()
    torch.testing.assert_close(end, alpha / 0.05)
    torch.testing.assert_close(search.draw(end, 9, WEIGHTS), (alpha > 0).float())
    shown = gate_report(search, 9)["gates"]
    assert all(min(chance, 1 - chance) < 0.01 for chance in shown)
    assert shown == pytest.approx((alpha / 0.05).sigmoid().tolist())


def test_patches_for_weights_and_alpha_never_share_a_seed():
    for seed in range(3):
        samplers = [loader.sampler for loader in make_search(seed=seed).loaders]
        assert [s.seed for s in samplers] == [2 * seed + WEIGHTS, 2 * seed + ALPHA]


@pytest.mark.parametrize("width", [16, 128])
def test_predicted_cost_is_what_the_flop_counter_counts_on_the_derived_network(width):
    net = make_search(width=width, keys=16).net
    with_attention, without = net.derive((1, 3)), net.derive(())
    pictures = torch.rand(1, 1, 48, 48)

    def count(model):
        # As in training: at inference g and h are folded into one matrix, which is cheaper.
        with torch.utils.flop_counter.FlopCounterMode(display=False) as counter:
            model.train()(pictures)
        return counter.get_total_flops()

    predicted = full_attention_flops("acla", 2, 48 * 48, width, 16)
    counted = count(with_attention) - count(without)
    assert counted == pytest.approx(predicted, rel=0.01)
