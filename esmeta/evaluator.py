"""Score a population of meta-parameters on a set of tasks, in batches on one device."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from typing import Any

import numpy as np
import torch
from torch import Tensor

from esmeta import errors
from esmeta import rollout as loop
from esmeta.agent import heads
from esmeta.capture import Captured
from esmeta.envs.trimmed import TrimmedEnv
from esmeta.errors import EnvFailure, UserError, warn
from esmeta.options import plain
from esmeta.policy import Policy
from esmeta.rng import Rng
from esmeta.sharing import Turn
from esmeta.tasks import numbers_of
from esmeta.tree import unravel_shapes
from esmeta.types import BatchedEnv, Fitness, Hosted, Params, Task, Tasks

# Members per batch: enough to hide the cost of calling an operation, few enough for the cache.
_CACHE_FLOATS = 800_000
_GPU_FLOATS = 1 << 30
_TRIAL_TILE = 8

MAX_FAILED = 0.1
"""Share of trials whose environment may fail for good where scores are told."""

_HOSTED = Turn()
_Scores = tuple[Tensor, Tensor, dict[str, Tensor]]


class OwnEnv:
    """Has an environment of its ``task`` on its ``device``, made when it is first asked for.

    Copies and pickles make their own.
    """

    task: Task
    device: torch.device

    @property
    def env(self) -> BatchedEnv:
        known = vars(self)
        # Of two that two threads make at once one is dropped, before it has any simulators.
        if "env" not in known:
            known.setdefault("env", self.task.make_env(self.device))
        return known["env"]

    def room(self, wanted: int, each: int = 1) -> int:
        """How many of ``wanted`` may run at a time, if each takes ``each`` simulators: or all."""
        env = self.env
        return min(wanted, env.most_worlds // each) if isinstance(env, Hosted) else wanted

    def check_room(self, needed: int, why: str) -> None:
        """Refuse fewer simulators than are ``needed`` at a time; ``why`` says what for."""
        found = self.room(needed)
        if found < needed:
            raise UserError(
                f"task.most_worlds leaves {found} simulators: {why}; write task.most_worlds = "
                f"{needed}"
            )

    def whole_trials(self) -> AbstractContextManager[None]:
        """Lets one thread at a time run trials in simulators, from their beginning to their end.

        In the whole process: simulators of one kind are lent to whoever needs them next.
        """
        return _HOSTED if isinstance(self.env, Hosted) else nullcontext()

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "env"}


class PopulationEvaluator(OwnEnv):
    """Fitness of members ``[P, ...]``: each runs ``trials`` trials, all on the same tasks.

    Same seed and same task numbers give the same bits, for any ``chunk``, any split of members or
    trials over calls or ranks, and whatever the global random generators hold: batches are padded
    to at least two members and a multiple of eight trials, and every random number is addressed by
    (seed, task number).

    Copies, pickles and forked processes make environments of their own, and score the same. Threads
    may share an evaluator; where worlds are another library's, they take turns.

    Args:
        policy: what to run; see :func:`esmeta.make_policy`.
        task: the distribution of tasks; see :func:`esmeta.make_task`.
        trials: tasks per evaluation, the axis B.
        device: where to run, e.g. ``"cpu"`` or ``"cuda:0"``.
        chunk: members per batch; ``None`` chooses by the size of the policy.
        capture: whether rollouts are recorded as CUDA graphs and replayed, for tasks whose
            environment runs on the GPU.
    """

    def __init__(
        self,
        policy: Policy,
        task: Task,
        trials: int = 16,
        device: str | torch.device = "cpu",
        chunk: int | None = None,
        capture: bool = False,
    ) -> None:
        trials, chunk = plain(trials), plain(chunk)
        errors.positive_int("trials", trials, example=16)
        if chunk is not None:
            check_chunk(chunk)
        if policy.spec != task.spec:
            raise ValueError(
                f"the policy was made for {policy.spec}, the task has {task.spec}; "
                "make it with make_policy(name, task.spec)"
            )
        self.policy = policy
        self.task = task
        self.trials = trials
        self.device = torch.device(device)
        self.chunk = chunk
        self._hosted = isinstance(self.env, Hosted)  # makes it, so that errors come now
        if capture and self._hosted:
            raise UserError(
                f"capture = true: worlds of {type(self.env).__name__} are not stepped on the GPU; "
                "write objective.capture = false"
            )
        self.captured = Captured(self.device) if capture else None

    @property
    def size(self) -> int:
        """D, the number of meta-parameters of one member."""
        return self.policy.size

    def _members_per_batch(self, batch: int) -> int:
        if isinstance(self.env, Hosted):
            return max(1, min(self.env.most_worlds // batch, self.chunk or self.env.most_worlds))
        if self.chunk is not None:
            return self.chunk
        limit = _CACHE_FLOATS if self.device.type == "cpu" else _GPU_FLOATS
        return max(2, limit // (batch * max(self.policy.memory.size**2, 1)))

    def batches(self, population: int, batch: int) -> list[Tensor]:
        """The members of each batch of a population with ``batch`` trials: :func:`even_batches`."""
        return even_batches(population, self._members_per_batch(batch), self.device)

    def _tiles(self, batch: int) -> list[Tensor]:
        """The trials that are run at a time, int64: all, or as many as there may be simulators."""
        most = max(1, self.room(batch))
        if batch > most >= _TRIAL_TILE:
            most -= most % _TRIAL_TILE
        return list(torch.arange(batch, device="cpu").split(most))

    def members(self, params: Params | Tensor) -> Params:
        """A tree or flat vectors ``[P, D]`` as a tree on this evaluator's device."""
        return members_of(params, self.policy.shapes, self.device)

    def trial_set(self, index: Tensor, seed: int, split: str) -> tuple[Tasks, Rng]:
        """The tasks number ``index [B]`` (or ``[P, B]``) here, and the stream of their trials.

        Filled up with copies of the last one to a multiple of eight trials.
        """
        batch = index.shape[-1]
        padded = -(-batch // _TRIAL_TILE) * _TRIAL_TILE
        index = torch.cat([index, index[..., -1:].expand(*index.shape[:-1], padded - batch)], -1)
        index = index.reshape(-1, padded)
        tasks = self.place(self.task.sample(index.flatten(), split, Rng(seed).fold("tasks")))
        data = {
            name: leaf.reshape(*index.shape, *leaf.shape[2:]) for name, leaf in tasks.data.items()
        }
        tasks = Tasks(tasks.index.reshape(index.shape), data)
        return tasks, Rng(seed).fold("trials", split)

    @torch.no_grad()
    def __call__(
        self,
        params: Params | Tensor,
        seed: int = 0,
        split: str = "train",
        index: Tensor | Sequence[int] | np.ndarray | None = None,
        *,
        act: loop.Act = heads.sample,
        intervene: loop.Intervention | None = None,
        mark_failed: bool = False,
    ) -> Fitness:
        """Score members.

        ``params`` is a tree with leaves ``[P, ...]`` or flat vectors ``[P, D]``; ``split`` is
        ``"train"`` or ``"test"``; ``index`` (int64 ``[B]``, or ``[P, B]`` for tasks of each
        member's own) names the tasks by number, default 0..trials-1; ``act`` chooses actions
        (sampled by default); ``intervene`` changes memory or inputs before each step, for lesion
        controls. Trials whose simulator fails again and again raise
        :class:`esmeta.errors.EnvFailure`, or with ``mark_failed`` are NaN (see :func:`in_tiles`).
        Returns a :class:`Fitness` on the CPU.
        """
        tree = self.members(params)
        population = next(iter(tree.values())).shape[0]
        index = torch.arange(self.trials, device="cpu") if index is None else numbers_of(index)
        shared = index.ndim == 1
        if population == 0 or index.numel() == 0 or not (shared or len(index) == population):
            raise ValueError(
                f"there are {population} members and task numbers of shape {tuple(index.shape)}; "
                "pass at least one member, and index [B] or [P, B] with at least one number"
            )

        count = index.shape[-1]

        def score(tree: Params, index: Tensor, mark_failed: bool) -> Fitness:
            def tile(trials: Tensor) -> Fitness:
                return self._trials(tree, index[..., trials], seed, split, act, intervene)

            return in_tiles(tile, self._tiles(index.shape[-1]), mark_failed)

        with self.whole_trials():
            if population == 1 and shared and count > _TRIAL_TILE and not self._hosted:
                # One member is filled up to two in any case: each of them does half of the trials.
                twice = {name: leaf.expand(2, *leaf.shape[1:]) for name, leaf in tree.items()}
                halves = torch.cat([index, index[-1:]])[: count + count % 2].reshape(2, -1)
                with suppress(EnvFailure) if mark_failed else nullcontext():
                    scores = score(twice, halves, False)
                    return _map(scores, lambda leaf: leaf.reshape(1, -1)[:, :count])
            return score(tree, index, mark_failed)

    def _trials(
        self,
        tree: Params,
        index: Tensor,
        seed: int,
        split: str,
        act: loop.Act,
        intervene: loop.Intervention | None,
    ) -> Fitness:
        """Scores of all members on trials that are run at a time."""
        tasks, rng = self.trial_set(index, seed, split)
        population, count = len(next(iter(tree.values()))), index.shape[-1]
        simulated = count if isinstance(self.env, Hosted) else tasks.index.shape[1]
        parts = []
        for rows in self.batches(population, simulated):
            part = {name: leaf[rows] for name, leaf in tree.items()}
            mine = tasks if index.ndim == 1 else _rows(tasks, rows)
            own = int(rows[-1] - rows[0]) + 1  # the others repeat the last
            env: BatchedEnv = self.env
            if isinstance(env, Hosted):
                env = TrimmedEnv(env, own, count)
            scores = self._score(part, env, mine, rng, act, intervene)
            parts.append(_map(scores, lambda leaf, own=own: leaf[:own]))
        return join(parts, population, count)

    def place(self, tasks: Tasks) -> Tasks:
        """The same tasks on this evaluator's device."""
        return place_tasks(tasks, self.device)

    def _score(
        self,
        params: Params,
        env: BatchedEnv,
        tasks: Tasks,
        rng: Rng,
        act: loop.Act,
        intervene: loop.Intervention | None,
    ) -> Fitness:
        begin = loop.start(self.policy, params, env, tasks, rng)
        if self.captured is None or act is not heads.sample or intervene is not None:
            scores = self._whole(env, begin, act=act, intervene=intervene)
        else:
            scores = self.captured("score", self._again, params, *begin[1:5])
        returns, steps, metrics = scores
        metrics = {name: leaf.double().cpu() for name, leaf in metrics.items()}
        return Fitness(returns.cpu(), steps.cpu(), metrics)

    def _again(self, params: Params, *first: Any) -> _Scores:
        return self._whole(self.env, loop.Start(self.policy.bind(params), *first), ask=False)

    def _whole(self, env: BatchedEnv, begin: loop.Start, **how: Any) -> _Scores:
        """Returns, steps and metrics of whole trials, each ``[P, B]``."""
        collector = loop.Returns(*begin.ts.reward.shape, device=self.device)
        end = loop.rollout(self.policy, env, begin, collector, **how)
        return collector.returns, collector.steps, env.metrics(end.env_state)


def check_chunk(chunk: object) -> None:
    """Refuse batches of one member or agent."""
    if type(chunk) is not int or chunk < 2:
        raise UserError(
            f"chunk = {chunk!r}: must be at least 2 (a batch of one rounds differently); write for "
            "example chunk = 64"
        )


def on_device(leaves: Params, device: torch.device) -> Params:
    """The same leaves on ``device``."""
    return {name: leaf.to(device) for name, leaf in leaves.items()}


def members_of(
    params: Params | Tensor, shapes: dict[str, tuple[int, ...]], device: torch.device
) -> Params:
    """A tree, or flat vectors ``[P, D]``, as a tree with leaves ``[P, ...]`` on ``device``."""
    tree = unravel_shapes(params, shapes) if isinstance(params, Tensor) else params
    return on_device(tree, device)


def numbers_at(step: int | Tensor, trials: int) -> Tensor:
    """Tasks ``k trials .. (k + 1) trials - 1`` of step k, int64 ``[trials]``.

    ``[P, trials]`` where ``step`` int64 ``[P]`` is each member's own.
    """
    first = torch.as_tensor(step, dtype=torch.int64, device="cpu").unsqueeze(-1) * trials
    return first + torch.arange(trials, device="cpu")


def place_tasks(tasks: Tasks, device: torch.device) -> Tasks:
    """The same tasks on ``device``."""
    return Tasks(tasks.index.to(device), on_device(tasks.data, device))


def _rows(tasks: Tasks, members: Tensor) -> Tasks:
    return Tasks(tasks.index[members], {name: leaf[members] for name, leaf in tasks.data.items()})


def join(parts: list[Fitness], population: int, batch: int) -> Fitness:
    """The scores of all batches as one, without what they were filled up with."""
    return _map(_cat(parts, 0), lambda leaf: leaf[:population, :batch])


def _cat(parts: list[Fitness], axis: int) -> Fitness:
    if len(parts) == 1:
        return parts[0]
    metrics = {k: torch.cat([part.metrics[k] for part in parts], axis) for k in parts[0].metrics}
    returns, steps = ([part.returns for part in parts], [part.steps for part in parts])
    return Fitness(torch.cat(returns, axis), torch.cat(steps, axis), metrics)


def _map(scores: Fitness, change: Callable[[Tensor], Tensor]) -> Fitness:
    metrics = {name: change(leaf) for name, leaf in scores.metrics.items()}
    return Fitness(change(scores.returns), change(scores.steps), metrics)


def in_tiles(score: Callable[[Tensor], Fitness], tiles: list[Tensor], mark_failed: bool) -> Fitness:
    """Scores of trials, so many of them at a time, one set after the other.

    Args:
        score: numbers of trials, int64 ``[n]``, to their scores ``[P, n]``.
        tiles: the trials to run at a time.
        mark_failed: whether an environment that fails costs its trial alone; see :func:`_marked`.
    """
    parts = _marked(score, tiles) if mark_failed else [score(tile) for tile in tiles]
    return _cat(parts, 1)


def _marked(score: Callable[[Tensor], Fitness], tiles: list[Tensor]) -> list[Fitness]:
    """Scores ``[P, n]`` of trials, NaN for those whose environment fails however often it is run.

    A set of trials in which one failed is run again in halves. Where more than a tenth of all (and
    more than one, or the only one) fail, this is taken for a mistake in the environment, and
    raised.
    """
    total, failed = sum(map(len, tiles)), 0
    parts: list[Fitness | None] = []
    waiting = tiles[::-1]
    while waiting:
        trials = waiting.pop()
        try:
            parts.append(score(trials))
        except EnvFailure as error:
            traceback.clear_frames(error.__traceback__)  # which hold on to simulators
            if len(trials) > 1:
                waiting += trials.chunk(2)[::-1]
                continue
            failed += 1
            if failed == total or failed > max(1, MAX_FAILED * total):
                raise
            warn(f"{error}; this trial has no score (nan)")
            parts.append(None)
    known = next(part for part in parts if part is not None)
    none = _map(known, lambda leaf: leaf[:, :1] * (torch.nan if leaf.is_floating_point() else 0))
    return [none if part is None else part for part in parts]


def even_size(count: int, most: int) -> int:
    """The size of as few batches of ``count`` as there can be with ``most`` each."""
    return -(-count // -(-count // most))


def even_batches(count: int, most: int, device: torch.device) -> list[Tensor]:
    """Rows int64 of each batch of ``count``: all of one size of at least two, near ``most``.

    The last rows of a batch may repeat: a short one would be filled up with copies anyway.
    """
    own = even_size(count, most)
    return [
        torch.arange(first, first + max(2, own), device=device).clamp(
            max=min(first + own, count) - 1
        )
        for first in range(0, count, own)
    ]


def score_agents(
    score: Callable[[Tensor, Tensor], dict[str, Tensor]],
    population: int,
    index: Tensor,
    most: int,
    device: torch.device,
    mark_failed: bool,
) -> Fitness:
    """Scores ``[P, B]`` of P * B agents, each of which is one trial.

    Args:
        score: whose agents they are and the numbers of their lives, both int64 ``[n]`` with
            n >= 2, to scores ``[n]`` by name, with ``return`` and ``steps`` among them.
        population: P.
        index: numbers of the lives, int64 ``[B]``, or ``[P, B]`` for those of each member's own.
        most: how many are trained at a time.
        device: of the numbers.
        mark_failed: see :func:`in_tiles`.
    """
    trials = index.shape[-1]
    numbers = index.to(device).expand(population, trials).flatten()

    def row(agents: Tensor) -> Fitness:
        count = len(agents)
        rows = agents.expand(2) if count == 1 else agents  # one alone rounds differently
        table = score(rows // trials, numbers[rows])
        columns = {name: values[:count].unsqueeze(0).cpu() for name, values in table.items()}
        return Fitness(columns.pop("return"), columns.pop("steps"), columns)

    agents = torch.arange(len(numbers), device=device)
    tiles = list(agents.split(even_size(len(agents), most)))
    return _map(in_tiles(row, tiles, mark_failed), lambda leaf: leaf.reshape(population, trials))
