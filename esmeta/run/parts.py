"""What a configuration names, built: the one composition root, of training and of scoring."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from esmeta.errors import UserError

if TYPE_CHECKING:
    from esmeta.envs.remote import Node
    from esmeta.rng import Rng
    from esmeta.run.config import Config
    from esmeta.types import Optimizer, Params, RunObjective


@dataclass
class Parts:
    """Everything that a config names, built for training."""

    config: Config
    objective: RunObjective
    scored: RunObjective
    """The objective that theta is scored by: of the task without training aids."""
    optimizer: Optimizer
    theta: Params
    rng: Rng
    state: Any
    """The optimizer's first state; making it finds sizes that do not fit before files are made."""


def make_objective(config: Config, device: str = "cpu") -> RunObjective:
    """The objective of a config, tied to its task and, if it has one, its policy."""
    task, policy = config.task.instance, None
    if config.policy.instance is not None:
        value = config.optimizer.instance.gradient
        policy = config.policy.instance.make(task.spec, value=value)
    return config.objective.instance.make(
        policy, task, trials=config.trials, seed=config.run.seed, device=device
    )


def build(config: Config, ranks: int = 1, node: Node | None = None) -> Parts:
    """Build what a resolved config names, for a number of ranks; ``node`` runs environments."""
    import torch

    from esmeta.rng import Rng
    from esmeta.run.scoring import scored_config

    torch.set_num_threads(config.run.threads)
    device = _device(config.run.device)
    here = config
    if node is not None:
        remote = replace(config.task, instance=node.task(config.task.instance))
        here = replace(config, task=remote)
    optimizer: Optimizer = config.optimizer.instance
    objective = make_objective(here, device)
    of = scored_config(here)
    scored = objective if of is here else make_objective(of, device)
    optimizer.check(objective, ranks)
    theta = {k: v.to(device) for k, v in objective.init(config.run.seed).items()}
    if objective.policy is not None:
        objective.policy.bind(theta)  # kernels for new sizes are compiled before clocks run
    rng = Rng(config.run.seed).fold("optimizer")
    return Parts(config, objective, scored, optimizer, theta, rng, optimizer.init(theta, rng))


def _device(name: str) -> str:
    import torch

    from esmeta.ranks.launched import local_rank

    if name == "cpu":
        return name
    found = torch.cuda.device_count()
    number = name.partition(":")[2]
    if found == 0 or (number and int(number) >= found):
        raise UserError(
            f"run.device = {name!r}: this machine has {found} CUDA devices; write --device cpu"
        )
    # Ranks of one machine share its GPUs in turn.
    return name if number else f"cuda:{local_rank() % found}"
