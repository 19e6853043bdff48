"""An EvoTorch searcher on an esmeta task, alone or over MPI ranks.

    python docs/examples/evotorch_searcher.py
    mpirun -n 2 python docs/examples/evotorch_searcher.py

Meta-trains MetODS on two-armed bandits by EvoTorch's SNES. Every rank runs the same search and
evaluates its part of each population; only scores travel. The last line, a hash of what was
learned, is the same on any number of ranks.
"""

import sys

import torch
from evotorch.algorithms import SNES
from evotorch.logging import StdOutLogger

import esmeta
from esmeta.ranks.comm import install_excepthook, make_comm
from esmeta.tree import theta_sha256


def main(generations: int) -> None:
    """Search, then score the centre on held-out tasks."""
    torch.set_num_threads(1)  # one per rank
    comm = make_comm()
    install_excepthook(comm)  # a rank that raises ends the job instead of leaving it to hang

    task = esmeta.make_task("bandit")
    policy = esmeta.make_policy("metods", task.spec, neurons=8, w0="sampled")
    evaluator = esmeta.PopulationEvaluator(policy, task, trials=16)
    problem = esmeta.evotorch_problem(evaluator, comm, seed=0)
    searcher = SNES(problem, popsize=64, stdev_init=0.1)

    # Hooks run on every rank; what they return joins the status. Loggers write on one.
    searcher.after_step_hook.append(lambda: {"stdev_mean": searcher.status["stdev"].mean().item()})
    if comm.rank == 0:
        StdOutLogger(searcher, interval=5)
    searcher.run(generations)

    # Not status["best"], which is the luckiest evaluation of the run.
    center = searcher.status["center"].as_subclass(torch.Tensor).unsqueeze(0)
    heldout = evaluator(center, split="test", index=torch.arange(256)).returns
    if comm.rank == 0:
        print(f"held-out return {heldout.mean():.3f}")
        print(f"theta {theta_sha256(esmeta.unravel(center, policy))}")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 50)
