"""Compare searches with the ground truth of a small space.

    python -m acla.analysis.ranking truth.jsonl runs/search/seed-0 runs/search/seed-1

truth.jsonl is a file of `acla.analysis.truth`, the others are folders of search.py on the same
space, or files of --json. Tau is Kendall's, over all networks and among those with as many modules;
regret the dB lost against the best network of at most that cost, the mean over all costs. Chance is
the share of the ways to name the blocks by which the same searches have as much tau at equal cost.
`the truth` ranks by itself: the least regret of a choice among networks of one cost. `a seed of the
truth` ranks by one seed and is judged by the others alone, the searches by all."""

import argparse
import functools
import itertools
import json
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from scipy.stats import chi2, kendalltau

from acla import cli, console
from acla.analysis.results import mean_and_deviation
from acla.analysis.truth import read_truth
from acla.config import ModelConfig, SearchConfig, Task, format_positions, from_dict
from acla.distributed import Processes
from acla.errors import UsageError
from acla.files import Row, read_rows, write_atomically
from acla.models.serialization import load_state
from acla.search.architecture import even_spread
from acla.search.front import Positions, patch_psnr
from acla.search.loop import STATE, Search, SearchPlan, held_out, search_sets
from acla.training import trainer

Scores = Mapping[Positions, float]  # by network
EXACT = 5  # blocks, whose names are permuted in every way; of more, in as many ways at random


def mean_psnr(rows: Sequence[Row], seeds: set[int] | None = None) -> dict[Positions, float]:
    """PSNR in dB of every network, the mean over seeds (default: all)."""
    by_positions: dict[Positions, list[float]] = {}
    for row in rows:
        if seeds is None or row["seed"] in seeds:
            by_positions.setdefault(row["positions"], []).append(row["mean"])
    return {positions: statistics.mean(psnr) for positions, psnr in by_positions.items()}


def by_count(networks: Sequence[Positions]) -> list[list[Positions]]:
    """The networks in groups with as many modules, and so of one cost, the cheapest first."""
    ordered = sorted(networks, key=len)
    return [list(group) for _, group in itertools.groupby(ordered, key=len)]


def tau(scores: Scores, truth: Scores) -> tuple[float, float]:
    """Kendall's tau of the networks' scores with their PSNR: over all, and the mean over costs."""

    def of(networks: Sequence[Positions]) -> float:
        return kendalltau([scores[n] for n in networks], [truth[n] for n in networks]).statistic

    alike = [of(group) for group in by_count(list(truth)) if len(group) > 1]
    return of(list(truth)), float(np.nanmean(alike))


def chance(searches: Sequence[Scores], truth: Scores, blocks: int) -> float:
    """The share of the blocks' permutations that give the searches as much tau at equal cost."""

    def mean(order: Sequence[int]) -> float:
        renamed = {n: tuple(sorted(int(order[p - 1]) for p in n)) for n in truth}
        return statistics.mean(tau({n: s[renamed[n]] for n in truth}, truth)[1] for s in searches)

    rng, places = np.random.default_rng(0), range(1, blocks + 1)
    orders = list(itertools.permutations(range(1, min(blocks, EXACT) + 1)))
    if blocks > EXACT:
        orders = [places, *(rng.permutation(places) for _ in orders[1:])]
    least = mean(places) - 1e-9
    return statistics.mean(mean(order) >= least for order in orders)


def regret(choose: Callable[[list[Positions]], Positions], truth: Scores) -> float:
    """The dB that the networks chosen of each cost lose against the best of at most that cost, the
    mean over the costs. choose: takes the networks with as many modules."""
    best, lost = -np.inf, []
    for group in by_count(list(truth)):
        best = max(best, *(truth[n] for n in group))
        lost.append(best - truth[choose(group)])
    return statistics.mean(lost)


def deviations(rows: Sequence[Row]) -> dict[str, float]:
    """Standard deviations in dB among networks of one cost: between seeds, of a network's gain over
    the seed's mean; and between positions, of the mean over the seeds without what seeds add, and
    what they exceed in one case of 20 at most (chi-square, of the mean with what seeds add)."""
    seeds = sorted({row["seed"] for row in rows})
    by_seed = [mean_psnr(rows, {seed}) for seed in seeds]
    noise, total = [], []
    for group in by_count(list(by_seed[0])):
        psnr = np.array([[one[n] for n in group] for one in by_seed])
        psnr -= psnr.mean(1, keepdims=True)
        freedom = (len(seeds) - 1) * (len(group) - 1)
        if freedom:
            residual = ((psnr - psnr.mean(0)) ** 2).sum() / freedom
            noise += [residual] * (len(group) - 1)
            total += [psnr.mean(0).var(ddof=1)] * (len(group) - 1)
    between = max(0.0, float(np.mean(total) - np.mean(noise) / len(seeds)))
    most = sum(total) / chi2.ppf(0.05, len(total))
    spread = {"seeds": np.mean(noise), "positions": between, "at_most": most}
    return {name: float(variance) ** 0.5 for name, variance in spread.items()}


def pareto(truth: Scores) -> list[Positions]:
    """The best network of each cost that is better than all cheaper ones."""
    front: list[Positions] = []
    for group in by_count(list(truth)):
        best = max(group, key=truth.get)
        if not front or truth[best] > truth[front[-1]]:
            front.append(best)
    return front


def score_lines(
    by_method: Mapping[str, Sequence[Scores]], rows: Sequence[Row], blocks: int
) -> Iterator[list[str]]:
    """A row for each method: tau, tau at equal cost, its chance, regret; mean ± deviation."""
    truth, seeds = mean_psnr(rows), {row["seed"] for row in rows}
    for name, searches in by_method.items():
        taus = [(*tau(one, truth), regret(best_by(one), truth)) for one in searches]
        *ranked, lost = map(mean_and_deviation, zip(*taus, strict=True))
        yield [name, str(len(searches)), *ranked, f"{chance(searches, truth, blocks):.2f}", lost]
    if len(seeds) > 1:
        taus = []
        for seed in sorted(seeds):
            one, others = mean_psnr(rows, {seed}), mean_psnr(rows, seeds - {seed})
            taus.append((*tau(one, others), regret(best_by(one), others)))
        *ranked, lost = map(mean_and_deviation, zip(*taus, strict=True))
        yield ["a seed of the truth", str(len(seeds)), *ranked, "–", lost]
    least = regret(best_by(truth), truth)
    yield ["the truth", "–", "–", "–", "–", f"{least:.3f}"]
    even = regret(lambda group: even_spread(blocks, len(group[0])), truth)
    yield ["even positions", "–", "–", "–", "–", f"{even:.3f}"]
    psnr = [[truth[n] for n in group] for group in by_count(list(truth))]
    best = np.maximum.accumulate([max(group) for group in psnr])
    random = np.mean(best - [np.mean(group) for group in psnr])  # the expected regret
    yield ["random positions", "–", "–", "–", "–", f"{random:.3f}"]


def best_by(scores: Scores) -> Callable[[list[Positions]], Positions]:
    return lambda group: max(group, key=scores.__getitem__)


# Searches


def load_search(folder: Path, data: Path | None) -> Search:
    """The search of a folder at its last step. Raises AclaError."""
    path = folder / STATE
    tensors, values = load_state(path)
    kinds = {"task": Task, "model": ModelConfig, "search": SearchConfig}
    plan = SearchPlan(
        **{name: from_dict(kind, values["plan"][name]) for name, kind in kinds.items()}
    )
    search = Search(plan, search_sets(plan.search.train_set, data), Processes(torch.device("cpu")))
    trainer.load_state_tensors(search.parts, tensors, path)
    return search


def read_search(
    folder: Path, networks: Sequence[Positions], model: ModelConfig, data: Path | None
) -> dict[str, Scores]:
    """Scores of the networks by a search: the PSNR of its supernet on held-out patches, and of the
    paper's method the sum of α of the open positions. Raises AclaError, and UsageError for a search
    of another space."""
    search = load_search(folder, data)
    if search.plan.model != model:
        raise UsageError(f"{folder / STATE}: not a search of the truth's network")
    search.net.eval()
    score = functools.partial(patch_psnr, search.net, held_out(search), search.processes)
    psnr = {network: score(network).mean() for network in networks}
    if search.plan.search.method == "front":
        return {"front: supernet": psnr}
    alpha = search.net.alpha.tolist()
    sums = {network: sum(alpha[p - 1] for p in network) for network in networks}
    return {"paper: supernet": psnr, "paper: α": sums}


def write_search_scores(path: Path, by_method: Mapping[str, Sequence[Scores]]) -> None:
    """A line for each method and search: the name and [positions, score] of every network."""
    rows = [
        {"ranked by": name, "scores": [[n, float(score)] for n, score in scores.items()]}
        for name, searches in by_method.items()
        for scores in searches
    ]
    write_atomically(path, "".join(json.dumps(row) + "\n" for row in rows).encode())


def read_search_scores(path: Path) -> list[tuple[str, Scores]]:
    """What `write_search_scores` has written. Raises AclaError."""
    rows = read_rows(path, "a file of acla.analysis.ranking --json", ("ranked by", "scores"))
    return [(row["ranked by"], {tuple(n): score for n, score in row["scores"]}) for row in rows]


# The command


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = cli.parser("acla.analysis.ranking", __doc__)
    cli.add_common_flags(parser)
    parser.add_argument("truth", type=Path, metavar="FILE", help="of acla.analysis.truth")
    text = "of search.py's --out, of one seed, with the supernet's state; or a file of --json"
    parser.add_argument("folders", nargs="*", type=Path, metavar="DIR", help=text)
    text = "JSON lines to write: the scores of every search"
    parser.add_argument("--json", type=Path, metavar="FILE", help=text)
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    plan, rows = read_truth(args.truth)
    model = from_dict(ModelConfig, plan["model"])
    truth = mean_psnr(rows)
    if len(truth) < 2**model.blocks:
        raise UsageError(
            f"{args.truth} holds {len(truth)} of {2**model.blocks} networks: go on with it"
        )
    by_method: dict[str, list[Scores]] = {}
    for folder in args.folders:
        if folder.is_file():
            read = read_search_scores(folder)
        else:
            read = read_search(folder, list(truth), model, args.data).items()
        for name, scores in read:
            by_method.setdefault(name, []).append(scores)
    if args.json:
        write_search_scores(args.json, by_method)
    lines = score_lines(by_method, rows, model.blocks)
    head = ("ranked by", "searches", "tau", "tau at equal cost", "chance", "regret, dB")
    console.say(console.markdown(head, lines))
    console.say(
        "the best networks: "
        + "; ".join(f"{format_positions(n)} ({truth[n]:.3f} dB)" for n in pareto(truth))
    )
    if len({row["seed"] for row in rows}) > 1:
        spread = deviations(rows)
        console.say(
            f"standard deviation at equal cost: {spread['positions']:.3f} dB between positions "
            f"(at most {spread['at_most']:.3f}, 19 times of 20), {spread['seeds']:.3f} dB between "
            "seeds"
        )


if __name__ == "__main__":
    cli.run(main)
