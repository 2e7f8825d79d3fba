"""Measure the noise of α's gradient in a search of the paper's method, by draws of its gates.

    python -m acla.analysis.gate_noise runs/search --draws 1 2 --steps 80 --data DIR

At the supernet's last weights, with α at 0 as where the second stage begins: mean and standard
deviation of the gradient over steps, which differ in patches and gates; both the mean over α."""

import argparse
import dataclasses
from pathlib import Path

import torch

from acla import cli, console
from acla.analysis.ranking import load_search
from acla.search.loop import Search


def alpha_gradients(search: Search, draws: int, steps: int) -> torch.Tensor:
    """α's gradients [steps, J] in the first steps of the second stage, each with α at 0."""
    search.config = dataclasses.replace(search.plan.search, draws=draws)
    seen = []
    for step in range(steps):
        search.net.alpha.data.zero_()
        search.alpha_step(search.config.first_stage + step)
        seen.append(search.net.alpha.grad.clone())
    return torch.stack(seen)


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = cli.parser("acla.analysis.gate_noise", __doc__)
    cli.add_common_flags(parser)
    parser.add_argument("folder", type=Path, metavar="DIR", help="of search.py's --out, one seed")
    text = "draws a step to compare (default: 1 2)"
    parser.add_argument("--draws", type=int, nargs="+", default=(1, 2), metavar="N", help=text)
    text = "of each (default: 80)"
    parser.add_argument("--steps", type=int, default=80, metavar="N", help=text)
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    search, rows = load_search(args.folder, args.data), []
    for draws in args.draws:
        seen = alpha_gradients(search, draws, args.steps)
        mean, deviation = seen.mean(0).abs().mean(), seen.std(0).mean()
        rows.append([str(draws), f"{mean:.3f}", f"{deviation:.3f}"])
    console.say(console.markdown(("draws", "mean of α's gradient", "deviation"), rows))


if __name__ == "__main__":
    cli.run(main)
