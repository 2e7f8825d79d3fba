"""The front of a supernet, cost against PSNR: modules sampled fairly in training, then backward
elimination with the shared weights. (Ours, not the paper's.)"""

import functools
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from acla import console
from acla.distributed import Processes
from acla.kernels.timing import paired
from acla.search.architecture import SIDE, Candidate, macs
from acla.search.supernet import Supernet
from acla.training.trainer import LEAST_MSE, draw_seed

PATCHES = 48  # held-out ones, at least, that score a network
AT_ONCE = 16  # of them
SECONDS = 0.3  # of timing a network
Pairs = Sequence[tuple[Tensor, Tensor]]  # degraded and clean patches, AT_ONCE each
Positions = tuple[int, ...]


def fair_gates(modules: int, seed: int, step: int, device: torch.device) -> Tensor:
    """Gates [J] of a step: those that an even step opens, the next one shuts, so that every module
    is trained equally. The number of open ones is uniform in 0..J, so that small networks are
    trained as often as large ones."""
    rng = np.random.default_rng(draw_seed(seed, 3, step // 2) % 2**64)
    order, count = rng.permutation(modules), rng.integers(modules + 1)
    is_open = order[:count] if step % 2 == 0 else order[count:]
    return torch.from_numpy(np.isin(np.arange(modules), is_open)).float().to(device)


@torch.no_grad()
def patch_psnr(
    net: Supernet, pairs: Pairs, processes: Processes, positions: Positions
) -> np.ndarray:
    """PSNR in dB [n] of the patches of all processes, with modules at these positions only."""
    network, psnr = net.derive(positions).eval(), []  # faster than the supernet with gates
    for low, target in pairs:
        mse = (network(low).clamp(0, 1) - target).square().mean((1, 2, 3))
        psnr += (-10 * (mse + LEAST_MSE).log10()).tolist()
    return np.concatenate([rows["psnr"] for rows in processes.all_rows({"psnr": psnr})])


def eliminate(
    positions: Positions, psnr: Callable[[Positions], np.ndarray]
) -> list[tuple[Positions, np.ndarray]]:
    """From all positions to none, each time without the one whose absence costs the least PSNR: the
    networks and their PSNR. Networks with as many modules cost the same."""
    chain = [(positions, psnr(positions))]
    for _ in console.progress(positions, unit="module", desc="eliminate"):
        fewer = [tuple(p for p in positions if p != gone) for gone in positions]
        scored = [(candidate, psnr(candidate)) for candidate in fewer]
        positions, _ = best = max(scored, key=lambda one: one[1].mean())
        chain.append(best)
    return chain


def search_front(
    net: Supernet, pairs: Pairs, processes: Processes, cost: str, budget: float | None
) -> tuple[Candidate, tuple[Candidate, ...]]:
    """The chosen network and the front, the cheapest first: no network of it has another one beside
    it that is cheaper and not worse. Chosen is the best one within `budget` multiply-adds, or
    without one the cheapest whose PSNR is within a standard error of the best, patch by patch.
    cost: macs, or ms as measured here."""
    net.eval()
    chain = eliminate(net.config.positions, functools.partial(patch_psnr, net, pairs, processes))
    times: list[float | None] = [None] * len(chain)
    if cost == "ms":
        own = latencies([net.derive(positions) for positions, _ in chain])
        times = processes.all_rows({"ms": own})[0]["ms"]
    every = [
        Candidate(positions, float(psnr.mean()), macs(net.config, len(positions)), ms)
        for (positions, psnr), ms in zip(chain, times, strict=True)
    ]
    by_cost = sorted(every, key=lambda one: (getattr(one, cost), -one.psnr))
    front: list[Candidate] = []
    for one in by_cost:
        if not front or one.psnr > front[-1].psnr:
            front.append(one)
    if budget is not None:
        fitting = [one for one in every if one.macs <= budget]
        return max(fitting, key=lambda one: one.psnr), tuple(front)
    scores = dict(chain)
    best = max(scores.values(), key=np.mean)
    lost = {one: best - scores[one.positions] for one in front}
    cheapest = next(o for o in front if lost[o].mean() <= lost[o].std() / len(best) ** 0.5)
    return cheapest, tuple(front)


def latencies(networks: Sequence[torch.nn.Module]) -> list[float]:
    """Milliseconds of each network for a 48×48 picture, the medians of calls in turns."""
    device = next(networks[0].parameters()).device
    picture = torch.rand(1, networks[0].config.channels, SIDE, SIDE, device=device)
    works = [functools.partial(network.eval(), picture) for network in networks]
    with torch.no_grad():
        times = paired(works, device.type, SECONDS * len(works))
    return [round(float(np.median(each)), 4) for each in times]
