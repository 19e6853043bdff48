"""Gradients from partial unrolls, compared: full-episode ES, NRES, PES, and plain truncation.

The inner loop is MetODS' plastic memory in float64: W is read, written and scored at every step
(it must recall the input of three steps ago), from parameters that a perturbation changes. Theta
is held fixed, so every estimator has one true mean: the gradient of the smoothed return of the
whole episode, measured here by full-episode ES on noise of its own. Two thetas: a first one, where
all windows pull alike, and the one after some steps of full-episode ES, where most of a run takes
place: what is good for early windows is then bad for late ones. Printed for each estimator:

* cosine and length of its mean against that gradient (the cosine of two full-episode estimates of
  the same size, in the first row, is the best that can be seen);
* total variance (sum over coordinates) of what one antithetic pair says in a life, over the
  squared gradient. At one theta, NRES says in a life what full-episode ES says;
* ``staggered``: the same for a single generation of nres and pes at the same environment steps.
  Every window comes from another pair then. Where windows pull alike that is less; where they pull
  against each other it is more, but the pairs are the same in the next generations, so that it
  cancels over T / K of them and the variance of a life is what remains for a slow theta.

Run from the root of the repository: ``python tests/bench/nres.py`` (minutes; ``--pairs``).
"""

from __future__ import annotations

import argparse
import json
import math
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from esmeta import kernels

HORIZON, NEURONS, TRIALS, DEPTH, DELAY, SIGMA = 64, 8, 2, 1, 3, 0.02
CHUNK = 1000
"""Pairs that are unrolled at once."""


class Loop:
    """The plastic loop; theta is alpha, kappa, beta, W0 and a read-out, flat ``[D]``."""

    def __init__(self) -> None:
        draw = torch.Generator().manual_seed(0)
        n, rows = NEURONS, DEPTH * (DEPTH + 1)
        self.shapes = [(n, n), (DEPTH, DEPTH + 1), (DEPTH, DEPTH + 1), (n, n), (n,)]
        unit = torch.zeros(2, DEPTH, DEPTH + 1, dtype=torch.float64)
        unit[0, 0, 0], unit[0, 0, 1] = 0.5, 1.0
        unit[1, 0, 0], unit[1, 0, 1] = 0.9, 1.0
        stds = [0.3, 0.0, 0.0, 0.1, 0.3]
        parts = [
            std * torch.randn(math.prod(shape), generator=draw, dtype=torch.float64)
            for std, shape in zip(stds, self.shapes, strict=True)
        ]
        parts[1], parts[2] = unit[0].reshape(rows), unit[1].reshape(rows)
        self.theta = torch.cat(parts)
        self.x = 0.7 * torch.randn(HORIZON, TRIALS, n, generator=draw, dtype=torch.float64)

    def returns(self, members: Tensor, steps: int) -> Tensor:
        """Returns ``[P, T / steps]`` of windows; ``members [windows or 1, P, D]``."""
        sizes = [math.prod(shape) for shape in self.shapes]
        windows, fast, scores = HORIZON // steps, None, []
        for window in range(windows):
            theta = members[min(window, len(members) - 1)]
            parts = theta.split(sizes, dim=1)
            alpha, kappa, beta, start, read = (
                part.reshape(-1, *shape) for part, shape in zip(parts, self.shapes, strict=True)
            )
            if fast is None:
                fast = start.unsqueeze(1).expand(-1, TRIALS, -1, -1).contiguous()
            total = torch.zeros(len(theta), dtype=torch.float64)
            for t in range(window * steps, (window + 1) * steps):
                v = self.x[t].expand(len(theta), -1, -1)
                y, fast = kernels.plastic_step(fast, v, alpha, kappa, beta)
                wanted = self.x[t - DELAY, :, 0] if t >= DELAY else torch.zeros(TRIALS)
                total -= (((y * read.unsqueeze(1)).sum(-1) - wanted) ** 2).mean(1)
            scores.append(total)
        return torch.stack(scores, 1)


@dataclass
class Moments:
    """Sums over pairs of one estimator: of the life's gradient, and of every window's."""

    size: int
    windows: int

    def __post_init__(self) -> None:
        self.count = 0
        self.mean = torch.zeros(self.size, dtype=torch.float64)
        self.squares = 0.0
        self.by_window = torch.zeros(self.windows, self.size, dtype=torch.float64)
        self.squares_by_window = torch.zeros(self.windows, dtype=torch.float64)

    def add(self, gradients: Tensor) -> None:
        """Gradients ``[pairs, windows, D]`` of the windows of each pair's life."""
        self.count += len(gradients)
        life = gradients.sum(1)
        self.mean += life.sum(0)
        self.squares += float((life**2).sum())
        self.by_window += gradients.sum(0)
        self.squares_by_window += (gradients**2).sum((0, 2))

    def result(self, truth: Tensor) -> dict[str, float]:
        mean = self.mean / self.count
        norm = float((truth**2).sum())
        variance = self.squares / self.count - float((mean**2).sum())
        means = self.by_window / self.count
        apart = self.squares_by_window / self.count - (means**2).sum(1)
        return {
            "cosine": float(torch.cosine_similarity(mean, truth, dim=0)),
            "length": float(mean.norm() / truth.norm()),
            "variance": variance / norm,
            "staggered": float(apart.sum()) / norm,
        }


def measure(loop: Loop, kind: str, steps: int, pairs: int, seed: int) -> Moments:
    """Gradient estimates of ``pairs`` antithetic pairs, each over one life."""
    draw = torch.Generator().manual_seed(seed)
    windows, size = HORIZON // steps, len(loop.theta)
    fresh = windows if kind in ("pes", "truncated") else 1
    moments = Moments(size, windows)
    for begin in range(0, pairs, CHUNK):
        count = min(CHUNK, pairs - begin)
        eps = torch.randn(fresh, count, size, generator=draw, dtype=torch.float64)
        members = torch.cat([loop.theta + SIGMA * eps, loop.theta - SIGMA * eps], dim=1)
        plus, minus = loop.returns(members, steps).chunk(2)
        weight = (plus - minus) / (2 * SIGMA)
        if kind == "pes":
            eps = eps.cumsum(0)
        moments.add(weight.unsqueeze(-1) * eps.transpose(0, 1).expand(-1, windows, -1))
    return moments


def trained(loop: Loop, updates: int) -> Loop:
    """The same loop after Adam steps along full-episode ES of 64 pairs."""
    after, first, second = Loop(), torch.zeros_like(loop.theta), torch.zeros_like(loop.theta)
    for update in range(1, updates + 1):
        moments = measure(after, "full", HORIZON, 64, seed=1000 + update)
        gradient = moments.mean / moments.count
        first = 0.9 * first + 0.1 * gradient
        second = 0.99 * second + 0.01 * gradient**2
        scale = (second / (1 - 0.99**update)).sqrt() + 1e-8
        after.theta = after.theta + 0.01 * first / (1 - 0.9**update) / scale
    return after


def table(loop: Loop, pairs: int, lengths: list[int]) -> list[dict[str, float | str | int]]:
    """All estimators on ``pairs`` pairs each; noise of its own for each of them."""
    reference = measure(loop, "full", HORIZON, pairs, seed=1)
    truth = reference.mean / reference.count
    rows = [("full-episode ES", HORIZON, measure(loop, "full", HORIZON, pairs, 2).result(truth))]
    seed = 3
    for steps in lengths:
        for kind in ("nres", "pes", "truncated"):
            rows.append((kind, steps, measure(loop, kind, steps, pairs, seed).result(truth)))
            seed += 1
    full = rows[0][2]["variance"]
    return [
        {"estimator": kind, "steps": steps, **numbers, "over_full": numbers["variance"] / full,
         "staggered_over_full": numbers["staggered"] / full}
        for kind, steps, numbers in rows
    ]  # fmt: skip


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--pairs", type=int, default=20_000, help="antithetic pairs per estimator")
    parser.add_argument("--updates", type=int, default=150, help="before the second table")
    parser.add_argument("--json", type=Path, help="write the rows there too")
    args = parser.parse_args()
    torch.set_num_threads(1)
    first = Loop()
    print(
        f"plastic loop, T = {HORIZON}, D = {len(first.theta)}, sigma = {SIGMA}, {args.pairs} pairs "
        "each; '/ full': over full-episode ES at equal steps"
    )
    blocks = {"at first": first, f"after {args.updates} updates": trained(first, args.updates)}
    tables = {}
    for name, loop in blocks.items():
        score = float(loop.returns(loop.theta[None, None], HORIZON))
        tables[name] = table(loop, args.pairs, [HORIZON // 4, HORIZON // 16])
        print(
            f"\n{name} (return {score:.1f})\n{'estimator':16}{'K':>4}{'cosine':>9}{'length':>9}"
            f"{'variance':>10}{'/ full':>8}{'staggered':>11}{'/ full':>8}"
        )
        for row in tables[name]:
            print(
                f"{row['estimator']:16}{row['steps']:>4}{row['cosine']:>9.4f}"
                f"{row['length']:>9.3f}{row['variance']:>10.1f}{row['over_full']:>8.2f}"
                f"{row['staggered']:>11.1f}{row['staggered_over_full']:>8.2f}"
            )
    if args.json:
        args.json.write_text(json.dumps(tables, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
