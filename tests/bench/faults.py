"""Failures of a random rank at a random generation: exit, message, orphans, and going on.

    python tests/bench/faults.py --repeats 20 --json faults.json

Every repeat lets one of the ranks raise, hang, call sys.exit or be killed (SIGKILL) inside a
generation of a small bandit run by openes, waits for the end of the job, and goes on with another
number of ranks. Seconds run from the failure to the end of the last process. The limit of the
collectives is set to 2 s; a killed rank is run under ``esmeta.launch``, which has to name it.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import sys
import tempfile
from collections import Counter
from dataclasses import asdict
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from fault_runs import GENERATIONS, LIMIT_S, Outcome, fail_and_resume, uninterrupted
from faulty import KINDS


def table(outcomes: list[Outcome], ranks: int) -> str:
    """A line per kind of failure."""
    head = f"{'failure':<8} {'n':>3} {'exit codes':<14} {'max s':>6} {'limit s':>7} "
    lines = [head + f"{'named':>7} {'orphans':>7} {'same theta':>10}"]
    for kind in KINDS:
        rows = [o for o in outcomes if o.kind == kind]
        if not rows:
            continue
        codes = ", ".join(f"{c} x{n}" for c, n in sorted(Counter(o.code for o in rows).items()))
        lines.append(
            f"{kind:<8} {len(rows):>3} {codes:<14} {max(o.latency_s for o in rows):>6.2f} "
            f"{LIMIT_S + 5:>7.1f} {sum(o.named for o in rows):>4}/{len(rows)} "
            f"{sum(o.orphans for o in rows):>7} {sum(o.equal for o in rows):>7}/{len(rows)}"
        )
    resumed = Counter(o.resumed_on for o in outcomes)
    shown = ", ".join(f"{n} on {m}" for m, n in sorted(resumed.items()))
    return "\n".join([*lines, f"{ranks} ranks; went on with other numbers of ranks: {shown}"])


def good(outcome: Outcome) -> bool:
    """Whether a failure ended as it must."""
    in_time = outcome.latency_s <= LIMIT_S + 5
    ended = outcome.code != 0 and in_time and outcome.orphans == 0
    return ended and outcome.named and outcome.equal


def main() -> int:
    """Print the table; returns 1 if anything was not as it must be."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--repeats", type=int, default=20, help="of each kind (default 20)")
    parser.add_argument("--ranks", type=int, default=4, help="ranks of the run that fails (4)")
    parser.add_argument("--seed", type=int, default=None, help="of the random choices")
    parser.add_argument("--json", type=Path, help="write all outcomes here")
    args = parser.parse_args()
    choose = random.Random(args.seed)
    outcomes = []
    print(f"load {os.getloadavg()}")
    with tempfile.TemporaryDirectory(prefix="esmeta-faults-") as name:
        folder = Path(name)
        expected = uninterrupted(folder)
        for repeat in range(args.repeats):
            for kind in KINDS:
                rank, generation = choose.randrange(args.ranks), choose.randrange(GENERATIONS)
                others = [n for n in range(1, args.ranks + 2) if n != args.ranks]
                outcome = fail_and_resume(
                    folder, kind, rank, generation, args.ranks, choose.choice(others), expected
                )
                outcomes.append(outcome)
                if not good(outcome):
                    print(f"repeat {repeat}: {outcome}", flush=True)
    print(table(outcomes, args.ranks))
    if args.json:
        rows = [{k: v for k, v in asdict(o).items() if k != "stderr"} for o in outcomes]
        args.json.write_text(json.dumps(rows, indent=1) + "\n")
    return 0 if all(map(good, outcomes)) else 1


if __name__ == "__main__":
    sys.exit(main())
