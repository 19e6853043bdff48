"""Environments whose worlds are simulated by all ranks of a machine, for one rank that learns.

The learner holds policy and optimizer, with the whole batch in one policy core. Every rank of its
machine, the learner too, simulates a share of the P x B worlds, cut along the longer of the two
axes; actions and time steps lie in one shared-memory window, so that a step costs two flags and no
message. A world does not depend on its batch mates, so that the numbers are those of one process.

What a rank that serves raises is raised on the learner, with the rank and its traceback. A rank
that hangs is named after the learner's time limit.
"""

from __future__ import annotations

import functools
import os
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NoReturn

import numpy as np
import torch
from torch import Tensor

from esmeta.envs._shard import Shard
from esmeta.errors import EnvError, EnvFailure, UserError
from esmeta.ranks.comm import EXIT_USER_ERROR, MPIComm
from esmeta.ranks.transport import poll
from esmeta.ranks.wire import share
from esmeta.rng import Rng
from esmeta.sharing import HostedState, Turn, check_newest, one_at_a_time
from esmeta.tasks import aids, published, task_groups
from esmeta.types import Reference, Spec, Task, Tasks, TimeStep

_MAKE, _RESET, _STEP, _SCORE, _SEND_SCORES, _CLOSE = range(1, 7)
_NAMES = {_MAKE: "make_env", _RESET: "reset", _STEP: "step", _SCORE: "metrics", _CLOSE: "close"}
_WORDS = 8  # int64 per row: a cache line of its own for each rank
_TEXT = 4096  # bytes of a traceback
# How long a rank that serves is quick to answer: between two updates the learner needs the core.
_ALERT_S = 0.1


_FAULTS: list[type[Exception]] = [RuntimeError, UserError, EnvError, EnvFailure]
"""What the learner raises for a rank that failed; the first one stands for all bugs."""


class _Elsewhere(Exception):
    """The traceback of another rank."""


class Node:
    """The ranks of one machine. Rank 0 of them learns, and asks the others to serve.

    Args:
        comm: :class:`esmeta.ranks.comm.MPIComm` of all ranks of the job; all must make a Node.
        limit_s: how long (seconds) a rank that serves waits for the learner.
        stop_wanted: whether this rank was told to stop; a learner is told so by those that serve.
    """

    def __init__(self, comm: Any, limit_s: float, stop_wanted: Callable[[], bool]) -> None:
        assert isinstance(comm, MPIComm), f"ranks of {comm} share no memory"
        self._here = comm.of_this_machine()
        self._limit_s, self._stop_wanted = limit_s, stop_wanted
        self.learners = comm.among(self._here.rank == 0)
        """Communicator of the learners of all machines; None on ranks that serve."""
        rows = self._here.size + 1
        memory, self._sync = self._here.shared_memory(8 * _WORDS * rows + _TEXT * rows)
        numbers = np.frombuffer(memory[: 8 * _WORDS * rows], dtype=np.int64).reshape(rows, _WORDS)
        # A row of each rank: number of the last command it did (negative: that failed), whether it
        # was told to stop. The last row: number of the command, what, of which environment, and
        # whether to make it of the published task.
        self._ranks, self._command = numbers[:-1], numbers[-1]
        self._text = np.frombuffer(memory[8 * _WORDS * rows :], dtype=np.uint8).reshape(rows, _TEXT)
        self._shards: list[Shard] = []
        self._closed = False
        self.turn, self._process = Turn(), os.getpid()

    def __reduce__(self) -> NoReturn:
        raise UserError(
            "worlds of other ranks (run.remote_envs) cannot be copied or pickled, as their ranks "
            "serve this process alone; copy what is made of the task itself"
        )

    def lead_or_serve(self, task: Task, learn: Callable[[MPIComm], int], threads: int = 1) -> int:
        """``learn(learners)`` on the rank that learns, :meth:`serve` on the others.

        Returns the exit code of ``learn`` on all of them. An error of the user's ends all ranks
        alike; any other is left to the hook that ends the job.
        """
        if self.learners is None:
            torch.set_num_threads(threads)
            return self.serve(task)
        try:
            code = learn(self.learners)
        except UserError:
            self.close(EXIT_USER_ERROR)
            raise
        self.close(code)
        return code

    @property
    def ranks(self) -> int:
        """Ranks of this machine."""
        return self._here.size

    def task(self, task: Task) -> RemoteTask:
        """The same task, with environments that all ranks of this machine simulate."""
        return RemoteTask(task, self)

    def stop_wanted(self) -> bool:
        """Whether any rank of this machine was told to stop."""
        self._sync()
        return bool(self._ranks[:, 1].any())

    # --- the learner ---------------------------------------------------------------------------

    @one_at_a_time
    def make(self, task: Task, as_published: bool) -> tuple[int, Shard]:
        """A new environment on all ranks: its number, and this rank's share of it.

        The ranks that serve know the task of training alone, and derive the published one.
        """
        number = len(self._shards)
        self._command[3] = as_published
        self.ask(_MAKE, number, lambda: self._shards.append(Shard(self._here, task)))
        return number, self._shards[number]

    @one_at_a_time
    def ask(
        self,
        what: int,
        number: int,
        own: Callable[[], None],
        meet: Callable[[], None] | None = None,
    ) -> None:
        """Have every rank do its part of something, this one too, and wait for all of them.

        ``meet`` are the collectives that all ranks come to before.
        """
        if os.getpid() != self._process:
            raise UserError(
                "worlds of other ranks (run.remote_envs) cannot be used in a forked process, as "
                "their ranks serve the process that made them; write run.remote_envs = false"
            )
        self._command[1:3] = what, number
        self._sync()
        self._command[0] += 1
        self._sync()
        if meet is not None:
            meet()
        try:
            own()
        finally:
            # Also after an error here: the next command must not overtake this one.
            self._wait_for_all(_NAMES.get(what, "metrics"))
        failed = [rank for rank in range(1, self._here.size) if self._ranks[rank, 0] < 0]
        if failed:
            self._raise(failed)

    def _wait_for_all(self, operation: str) -> None:
        assert self.learners is not None
        number, others = self._command[0], self._ranks[1:, 0]
        start = time.monotonic()

        def done() -> bool:
            self._sync()
            return bool((np.abs(others) == number).all())

        in_time = poll(done, self.learners.timeout_s, alert_s=_ALERT_S)
        waited = time.monotonic() - start
        self.learners.waited_s += waited
        if not in_time:
            missing = [1 + int(k) for k in np.flatnonzero(np.abs(others) != number)]
            self._here.label = self.learners.label
            raise self._here.too_late(operation, waited, missing)

    def _raise(self, failed: list[int]) -> NoReturn:
        """Raise what ranks that serve did: a bug first, else an error of an environment."""
        rank = min(failed, key=lambda rank: self._ranks[rank, 2])
        kind = _FAULTS[self._ranks[rank, 2]]
        if kind is RuntimeError:
            raise RuntimeError("\n".join(map(self._last_words, failed)))
        line, _, text = self._said(rank).partition("\n")
        raise kind(f"{line} (on rank {self._here.names[rank]})") from _Elsewhere(text)

    def _said(self, rank: int) -> str:
        return self._text[rank].tobytes().rstrip(b"\0").decode(errors="replace")

    def _last_words(self, rank: int) -> str:
        name = self._here.names[rank]
        return f"rank {name} failed while it served environments:\n{self._said(rank)}"

    def share(self, payload: dict[str, Any] | None) -> dict[str, Any]:
        """The learner's plain data on every rank of this machine."""
        if self.learners is not None:
            self._here.timeout_s = self.learners.timeout_s
            self._here.label = self.learners.label
        found = share(self._here, payload)
        assert found is not None
        return found

    def close(self, code: int) -> None:
        """Let the ranks that serve leave with exit code ``code``; a second call does nothing."""
        if not self._closed:
            self._closed = True
            self.ask(_CLOSE, code, lambda: None)

    # --- the ranks that serve ------------------------------------------------------------------

    def serve(self, task: Task) -> int:
        """Simulate what the learner asks for until it closes; returns its exit code."""
        done = 0
        while True:
            what, number = self._next(done)
            if what == _CLOSE:
                self._ranks[self._here.rank, 0] = done + 1
                self._sync()
                if number == EXIT_USER_ERROR:
                    raise UserError("the learner was refused, and says why")
                return number
            self._meet(what, number)
            ok = self._try(what, number, task)
            done += 1
            self._ranks[self._here.rank, 0] = done if ok else -done
            self._sync()

    def _next(self, done: int) -> tuple[int, int]:
        def asked() -> bool:
            self._ranks[self._here.rank, 1] = self._stop_wanted()
            self._sync()
            return bool(self._command[0] > done)

        start = time.monotonic()
        if not poll(asked, self._limit_s, alert_s=_ALERT_S):
            self._here.label = f"command {done}"
            raise self._here.too_late("serving", time.monotonic() - start, [0])
        return int(self._command[1]), int(self._command[2])

    def _meet(self, what: int, number: int) -> None:
        """The collectives of a command; what may fail comes after them."""
        self._here.timeout_s = self._limit_s
        if what == _RESET:
            self._payload = self.share(None)
            self._shards[number].share_out(tuple(self._payload["shape"]))
        elif what == _SEND_SCORES:
            self._shards[number].gather_scores(self.share(None)["names"])

    def _try(self, what: int, number: int, task: Task) -> bool:
        try:
            if what == _MAKE:
                wanted = published(task) if self._command[3] else task
                self._shards.append(Shard(self._here, wanted))
            elif what == _RESET:
                got = self._payload
                self._shards[number].reset(Tasks(got["index"], got["data"]), got["key"])
            elif what == _STEP:
                self._shards[number].step()
            elif what == _SCORE:
                self._shards[number].score()
        except Exception as error:  # noqa: BLE001 - whatever it is, the learner raises it
            fault = next((k for k, kind in enumerate(_FAULTS) if type(error) is kind), 0)
            line = f"{error}\n".encode()[: _TEXT // 2] if fault else b""
            said = line + traceback.format_exc().encode()[len(line) - _TEXT :]
            self._ranks[self._here.rank, 2] = fault
            self._text[self._here.rank] = 0
            self._text[self._here.rank, : len(said)] = np.frombuffer(said, dtype=np.uint8)
            return False
        return True


class RemoteEnv:
    """A :class:`esmeta.types.BatchedEnv` on all ranks of a machine; made by :meth:`Node.task`."""

    def __init__(
        self, node: Node, task: Task, device: torch.device | str, as_published: bool = False
    ) -> None:
        self._node, self._device = node, device
        self._number, self._shard = node.make(task, as_published)
        self.most_worlds = self._shard.most_worlds
        self._state = HostedState(0, 0)
        self.turn = node.turn  # commands of all its environments come one after the other

    @one_at_a_time
    def reset(self, tasks: Tasks, rng: Rng, population: int = 1) -> tuple[HostedState, TimeStep]:
        """Begin the trials on all ranks; the trials before them are given up."""
        shape = (population, tasks.index.shape[1])
        index = tasks.index.cpu()
        data = {name: leaf.cpu() for name, leaf in tasks.data.items()}

        def meet() -> None:
            parts = {"index": index, "data": data, "key": rng.key, "shape": list(shape)}
            self._node.share(parts)
            self._shard.share_out(shape)

        self._state = HostedState(self._state.trials + 1, 0)
        own = functools.partial(self._shard.reset, Tasks(index, data), rng.key)
        self._node.ask(_RESET, self._number, own, meet)
        return self._state, self._told()

    @one_at_a_time
    def step(self, state: HostedState, action: Tensor) -> tuple[HostedState, TimeStep]:
        """Step all worlds, each rank its share."""
        self._check(state)
        self._shard.buffers.action[:] = action.detach().cpu().numpy()
        self._state = HostedState(state.trials, state.step + 1)
        self._node.ask(_STEP, self._number, self._shard.step)
        return self._state, self._told()

    @one_at_a_time
    def metrics(self, state: HostedState) -> dict[str, Tensor]:
        """The task's own scores, float32 ``[P, B]``."""
        self._check(state)
        self._node.ask(_SCORE, self._number, self._shard.score)
        names = sorted(self._shard.scores)
        if not names:
            return {}
        found: dict[str, Tensor] = {}

        def meet() -> None:
            self._node.share({"names": names})
            found.update(self._shard.gather_scores(names))

        self._node.ask(_SEND_SCORES, self._number, lambda: None, meet)
        return {name: leaf.to(self._device) for name, leaf in found.items()}

    def close(self) -> None:
        """Close this rank's worlds; the other ranks close theirs when the learner ends."""
        self._shard.close()

    def _told(self) -> TimeStep:
        return TimeStep(*(leaf.to(self._device) for leaf in self._shard.tell()))

    def _check(self, state: HostedState) -> None:
        check_newest(state, self._state, "the ranks")


@dataclass(frozen=True)
class RemoteTask:
    """A task whose environments are simulated by all ranks of the machine."""

    task: Task
    node: Node
    as_published: bool = False

    def groups(self, index: Tensor, split: str) -> Tensor:
        """Which trials share randomness."""
        return task_groups(self.task, index, split)

    def aids(self) -> dict[str, tuple[Any, Any]]:
        """Training aids of the task that are in use."""
        return aids(self.task)

    def published(self) -> RemoteTask:
        """The published task, simulated by the same ranks; itself if it is one."""
        task = published(self.task)
        return self if task == self.task else RemoteTask(task, self.node, as_published=True)

    @property
    def spec(self) -> Spec:
        return self.task.spec

    @property
    def reference(self) -> Reference:
        return self.task.reference

    def sample(self, batch: int | Tensor, split: str, rng: Rng) -> Tasks:
        return self.task.sample(batch, split, rng)

    def make_env(self, device: torch.device | str) -> RemoteEnv:
        """Environments on the ranks' CPUs; tensors for the learner on ``device``."""
        return RemoteEnv(self.node, self.task, device, self.as_published)
