"""Prints digests of scores and training steps; with a word, under other defaults from the start."""

from __future__ import annotations

import hashlib
import sys

import torch
from torch import Tensor


def digest(tensor: Tensor) -> str:
    assert tensor.device.type == "cpu"
    return f"{tensor.dtype} {hashlib.sha256(tensor.detach().numpy().tobytes()).hexdigest()[:16]}"


def scores() -> dict[str, str]:
    """Returns of every policy."""
    import esmeta

    found = {}
    for task_name in ("pendulum", "maze"):
        task = esmeta.make_task(task_name, horizon=8)
        for name in ("metods", "rl2", "lstm", "mlp"):
            policy = esmeta.make_policy(name, task.spec, neurons=6, hidden=(4,))
            evaluator = esmeta.PopulationEvaluator(policy, task, trials=8)
            found[f"{task_name} {name}"] = digest(evaluator(policy.init(0, 3)).returns)
    return found


def steps() -> dict[str, str]:
    """Theta after a step of every kind of training."""
    from test_presets import tiny

    from esmeta.ranks.comm import SelfComm
    from esmeta.run import train
    from esmeta.tree import ravel

    found = {}
    names = "harlow-ppo maze-openes bandit-cmaes harlow-gru-a2c displacement-epg pendulum-metagenrl"
    for name in names.split():
        parts = train.build(tiny(name))
        state, _ = parts.optimizer.step(parts.state, parts.objective, SelfComm(), parts.rng)
        found[name] = digest(ravel(parts.optimizer.theta(state)))
    return found


def main() -> None:
    """In half precision on a device without memory, and afterwards as torch is delivered."""
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.bfloat16)
    torch.set_default_device("meta")
    print(scores() | steps())
    torch.set_default_dtype(torch.float32)
    torch.set_default_device(None)
    print(scores())


if __name__ == "__main__":
    sys.exit(main())
