"""What it brings that members see the same tasks and random numbers: cosine to the true gradient.

    python tests/bench/common_numbers.py
    python tests/bench/common_numbers.py --preset harlow-openes

The gradient of a preset's fitness by mirrored sampling, estimated from a few pairs, against an
estimate from many. ``common``: all members share tasks, dynamics and action noise; ``pair``: the
two members of a pair share them; ``own``: every member has its own. Printed are mean cosines with
standard errors over repeats, at the first theta and after some training.
"""

from __future__ import annotations

import argparse
import math
import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch

from esmeta import PopulationEvaluator, ravel
from esmeta.ranks.comm import SelfComm
from esmeta.run import config as configs
from esmeta.run import train

KINDS = ("common", "pair", "own")
_CHUNK = 512  # pairs evaluated at once


def gradient(
    evaluator: PopulationEvaluator,
    theta: torch.Tensor,
    kind: str,
    pairs: int,
    draw: torch.Generator,
    sigma: float,
) -> torch.Tensor:
    """Raw antithetic estimate with tasks no other call sees."""
    total = torch.zeros_like(theta)
    for first in range(0, pairs, _CHUNK):
        count = min(_CHUNK, pairs - first)
        noise = torch.randn(count, theta.numel(), generator=draw)
        members = torch.stack([theta + sigma * noise, theta - sigma * noise], 1).flatten(0, 1)
        trials = evaluator.trials
        sets = {"common": 1, "pair": count, "own": 2 * count}[kind]
        base = int(torch.randint(2**30, (), generator=draw)) * 2  # even: twins stay together
        index = base + torch.arange(sets * trials).view(sets, trials)
        index = index.repeat_interleave(2 * count // sets, 0)
        returns = evaluator(members, index=index[0] if kind == "common" else index).mean()
        difference = (returns[::2] - returns[1::2]).to(torch.float32)
        total += difference @ noise
    return total


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--preset", default="bandit-openes")
    parser.add_argument("--generations", type=int, default=20, help="of training before the second")
    parser.add_argument("--pairs", type=int, default=64)
    parser.add_argument("--true-pairs", type=int, default=32768)
    parser.add_argument("--repeats", type=int, default=32)
    args = parser.parse_args()
    parts = train.build(configs.resolve(configs.load(args.preset)))
    evaluator = PopulationEvaluator(
        parts.objective.policy, parts.config.task.instance, trials=parts.config.trials
    )
    sigma = float(getattr(parts.config.optimizer.instance, "sigma", 0.1))
    state = parts.state
    for generations in (0, args.generations):
        for _ in range(generations):
            state, _ = parts.optimizer.step(state, parts.objective, SelfComm(), parts.rng)
        theta = ravel(parts.optimizer.theta(state)).flatten()
        draw = torch.Generator().manual_seed(0)
        true = gradient(evaluator, theta, "pair", args.true_pairs, draw, sigma)
        print(f"{args.preset}, D = {theta.numel()}, after {generations} generations")
        for kind in KINDS:
            cosines = torch.stack(
                [
                    torch.cosine_similarity(
                        gradient(evaluator, theta, kind, args.pairs, draw, sigma), true, dim=0
                    )
                    for _ in range(args.repeats)
                ]
            )
            error = float(cosines.std()) / math.sqrt(args.repeats)
            print(f"  {kind:<7} {float(cosines.mean()):.3f} +- {error:.3f}")


if __name__ == "__main__":
    main()
