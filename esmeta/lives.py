"""Trials that are run in windows: lives that can be left, stored, and gone on with.

A life is one trial per task of a member. Between two windows the parameters may change; memory,
environment, time step and which trials go on are kept. Nothing is computed here: the loop is
:func:`esmeta.rollout.rollout`, the batches are those of :class:`esmeta.PopulationEvaluator`, so
that lives have the same bits for any chunk and any split of members over calls or ranks.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from esmeta import rollout as loop
from esmeta.errors import UserError
from esmeta.evaluator import PopulationEvaluator, join
from esmeta.tree import leaves_of, with_leaves
from esmeta.types import BatchedEnv, Fitness, Hosted, Params, State, TimeStep


def check_can_be_left(env: BatchedEnv) -> None:
    """Refuse worlds that cannot be gone back to after others were run in between."""
    if isinstance(env, Hosted):
        raise UserError(
            f"worlds of {type(env).__name__} cannot be left and gone back to, as lives are: write "
            "objective.name = 'return' with optimizer.name = 'openes' or 'ppo', run.remote_envs = "
            "false, or another task"
        )


class _Part(NamedTuple):
    """One batch: ``rows [R]`` of the population, where their trials are, and their noise."""

    rows: Tensor
    end: loop.End
    noise: Tensor


@dataclass(frozen=True)
class Lives:
    """The lives of ``population`` members, all in life number ``life`` after ``t`` steps of it."""

    life: int
    t: int
    population: int
    parts: tuple[_Part, ...]


class TrialLives:
    """Begins, advances, saves and restores lives whose tasks are addressed by the life's number.

    Life k is lived on training tasks ``k * trials .. (k + 1) * trials - 1`` of ``seed``, by all
    members, with the randomness of those tasks.
    """

    def __init__(self, evaluator: PopulationEvaluator, seed: int) -> None:
        self.evaluator = evaluator
        self.seed = seed

    @property
    def steps(self) -> int:
        """Steps of a whole life: the horizon of the task."""
        check_can_be_left(self.evaluator.env)
        return self.evaluator.policy.spec.horizon

    @torch.no_grad()
    def begin(self, params: Params | Tensor, life: int) -> Lives:
        """Members ``[P, ...]`` (or flat ``[P, D]``) at the first step of life number ``life``."""
        evaluator = self.evaluator
        tree = evaluator.members(params)
        population = next(iter(tree.values())).shape[0]
        tasks, rng = self._trials(life)
        parts = []
        for rows in evaluator.batches(population, tasks.index.shape[1]):
            part = {name: leaf[rows] for name, leaf in tree.items()}
            _, state, env_state, ts, noise, t, _ = loop.start(
                evaluator.policy, part, evaluator.env, tasks, rng
            )
            end = loop.End(state, env_state, ts, t, torch.ones_like(ts.new_trial))
            parts.append(_Part(rows, end, noise))
        return Lives(life, 0, population, tuple(parts))

    @torch.no_grad()
    def advance(self, lives: Lives, params: Params | Tensor, steps: int) -> tuple[Lives, Fitness]:
        """Live on for ``steps`` steps (at most to the end) with ``params``.

        ``lives`` stays as it is. The :class:`Fitness` is that of the window alone: rewards earned
        and steps taken in it, ``[P, trials]``; the task's metrics belong to whole trials and are
        left out.
        """
        evaluator = self.evaluator
        tree = evaluator.members(params)
        until = min(lives.t + steps, self.steps)
        parts, scores = [], []
        for rows, end, noise in lives.parts:
            part = {name: leaf[rows] for name, leaf in tree.items()}
            begin = loop.go_on(evaluator.policy, part, end, noise)
            kept = loop.Returns(*end.active.shape, device=end.active.device)
            end = loop.rollout(evaluator.policy, evaluator.env, begin, kept, until=until)
            parts.append(_Part(rows, end, noise))
            scores.append(Fitness(kept.returns.cpu(), kept.steps.cpu()))
        fitness = join(scores, lives.population, evaluator.trials)
        return replace(lives, t=until, parts=tuple(parts)), fitness

    def save(self, lives: Lives) -> State:
        """Lives as plain tensors ``[P, ...]``: index them by rows to choose members.

        What the environment derives from the tasks alone (tables, maps) is left out: ``restore``
        makes it again. Saving needs an environment whose state is made of tensors.
        """
        saved = [self._save_part(part, lives.life) for part in lives.parts]
        whole = {name: torch.cat([part[name] for part in saved]) for name in saved[0]}
        chosen = {name: leaf[: lives.population].cpu() for name, leaf in whole.items()}
        life, t = (
            torch.full((lives.population,), number, dtype=torch.int64, device="cpu")
            for number in (lives.life, lives.t)
        )
        return {"life": life, "t": t, **chosen}

    def restore(self, saved: State) -> Lives:
        """The inverse of :meth:`save`; goes on bit for bit as if never stored.

        The members must be in the same life and at the same step of it; a ``ValueError`` says so.
        """
        for name in ("life", "t"):
            if len(saved[name].unique()) != 1:
                raise ValueError(
                    f"{name} = {saved[name].unique().tolist()}: lives that are restored together "
                    f"must have one {name}; restore each group by itself"
                )
        population, life = len(saved["life"]), int(saved["life"][0])
        evaluator, (tasks, rng) = self.evaluator, self._trials(life)
        noise = loop.action_noise(evaluator.policy, tasks.index, rng)
        parts = []
        for rows in evaluator.batches(population, tasks.index.shape[1]):
            env_state, _ = evaluator.env.reset(tasks, rng, len(rows))
            part = {name: leaf.to(noise.device)[rows] for name, leaf in saved.items()}
            parts.append(_Part(rows, _restored(part, env_state), noise))
        return Lives(life, int(saved["t"][0]), population, tuple(parts))

    def _trials(self, life: int) -> Any:
        first = life * self.evaluator.trials
        index = torch.arange(first, first + self.evaluator.trials, device="cpu")
        return self.evaluator.trial_set(index, self.seed, "train")

    def _save_part(self, part: _Part, life: int) -> State:
        rows, end = len(part.rows), part.end
        tasks, rng = self._trials(life)
        # A leaf that is as long for one member more is not the members'.
        other, _ = self.evaluator.env.reset(tasks, rng, rows + 1)
        steps = torch.full((rows,), end.t, dtype=torch.int64, device="cpu")
        saved = {"steps": steps, "active": end.active}
        saved |= {f"memory.{name}": leaf for name, leaf in end.state.items()}
        saved |= {f"ts.{name}": leaf for name, leaf in end.ts._asdict().items()}
        pairs = zip(leaves_of(end.env_state), leaves_of(other), strict=True)
        for number, (leaf, reference) in enumerate(pairs):
            if leaf.ndim == 0:
                saved[f"env.{number}"] = leaf.expand(rows)
            elif leaf.shape[0] != reference.shape[0]:
                saved[f"env.{number}"] = leaf
        return saved


def _restored(saved: State, env_state: Any) -> loop.End:
    def named(prefix: str) -> State:
        return {k.removeprefix(prefix): v for k, v in saved.items() if k.startswith(prefix)}

    leaves = leaves_of(env_state)
    for number, leaf in named("env.").items():
        # A number that all trials of a batch share is a clock. Batches stop early where all their
        # trials have ended, and what has ended stays so: the latest clock serves them all.
        shared = leaves[int(number)].ndim == 0
        leaves[int(number)] = leaf.max() if shared else leaf
    return loop.End(
        state=named("memory."),
        env_state=with_leaves(env_state, leaves),
        ts=TimeStep(**named("ts.")),
        t=int(saved["steps"].max()),
        active=saved["active"],
    )
