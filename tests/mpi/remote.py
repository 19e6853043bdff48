"""Environments on all ranks against the same on one: every leaf of every step, bit for bit.

Run under mpirun, with a task of every class of environment; the worlds of rank 1 fail once in the
last one. With the argument ``idle`` the learner asks for nothing.
"""

from __future__ import annotations

import sys
import time

import torch
from torch import Tensor

import esmeta
from esmeta.envs.remote import Node, RemoteEnv
from esmeta.ranks.comm import MPIComm, install_excepthook, make_comm
from esmeta.rng import Rng
from esmeta.types import Discrete, Hosted, Task, Tasks

SHORT: dict[str, dict[str, object]] = {
    "faulty_env:Task": {"horizon": 9},
    "ant": {"horizon": 6, "episodes": 2},
    "bandit": {"horizon": 7},
    "gym": {"horizon": 24, "episodes": 2},
    "told": {  # of its task and split, on which all depends
        "id": "esmeta.envs.gymnasium_api:esmeta/DoubleIntegrator-v0",
        "task_key": "trial",
        "horizon": 6,
    },
    "harlow": {"horizon": 30, "presentations": 1},
    "maze": {"size": 4, "horizon": 12},
    "mixed": {"horizon": 4},
    "navigation": {"horizon": 12, "episodes": 2},
}
STEPS = 26  # of the others
# (P, B): cut along B, along P, fewer worlds than ranks, and a batch that outgrows the window.
SHAPES = ((1, 8), (7, 3), (1, 2), (2, 20))


def action(task: Task, shape: tuple[int, int], t: int) -> Tensor:
    draw = torch.Generator().manual_seed(t)
    if isinstance(task.spec.action, Discrete):
        return torch.randint(0, task.spec.action.n, shape, generator=draw)
    return 3 * torch.rand(*shape, task.spec.action.size, generator=draw) - 1.5


def tasks_of(task: Task, shape: tuple[int, int], own: bool) -> Tasks:
    if not own:
        return task.sample(shape[1], "train", Rng(1))
    parts = [task.sample(torch.arange(shape[1]) + 50 * p, "test", Rng(2)) for p in range(shape[0])]
    data = {name: torch.cat([part.data[name] for part in parts]) for name in parts[0].data}
    return Tasks(torch.cat([part.index for part in parts]), data)


def same(one: Tensor, two: Tensor) -> bool:
    return one.dtype == two.dtype and torch.equal(one.nan_to_num(-7), two.nan_to_num(-7))


def compare(task: Task, remote: RemoteEnv) -> int:
    count = 0
    for k, shape in enumerate(SHAPES):
        local = task.make_env("cpu")
        tasks = tasks_of(task, shape, own=k % 2 == 1)
        state, ts = local.reset(tasks, Rng(3 + k), shape[0])
        far, far_ts = remote.reset(tasks, Rng(3 + k), shape[0])
        for t in range(min(task.spec.horizon + 2, STEPS)):
            for name, leaf in ts._asdict().items():
                other = getattr(far_ts, name)
                assert same(leaf, other), (name, t, shape, leaf, other)
                count += leaf.numel()
            state, ts = local.step(state, action(task, shape, t))
            kept = far_ts.obs.clone()
            far, far_next = remote.step(far, action(task, shape, t))
            assert same(kept, far_ts.obs), "what was told before does not change"
            far_ts = far_next
            if t % 9 == 0:
                scores, far_scores = local.metrics(state), remote.metrics(far)
                assert sorted(scores) == sorted(far_scores)
                for name, values in scores.items():
                    assert same(values, far_scores[name]), (name, values, far_scores[name])
    return count


def refuses_what_was_left(task: Task, remote: RemoteEnv) -> None:
    tasks = task.sample(2, "train", Rng(0))
    old, _ = remote.reset(tasks, Rng(0))
    new, _ = remote.step(old, action(task, (1, 2), 0))
    for call in (lambda: remote.step(old, action(task, (1, 2), 0)), lambda: remote.metrics(old)):
        try:
            call()
        except RuntimeError as error:
            assert "were left" in str(error) and "cannot go back" in str(error)
        else:
            raise AssertionError("an old state was taken")
    remote.step(new, action(task, (1, 2), 1))


def follow(node: Node, task: Task) -> int:
    """All that a learner does with one task; returns how many numbers agreed."""
    first, second = node.task(task).make_env("cpu"), node.task(task).make_env("cpu")
    assert isinstance(first, Hosted) and node.task(task).spec == task.spec
    refuses_what_was_left(task, first)
    refuses_what_was_left(task, second)
    return compare(task, first)


def follow_fault(node: Node, task: Task) -> int:
    """A world of rank 1 fails in the third step: that is told here, and the next trials go on."""
    env = node.task(task).make_env("cpu")
    state, _ = env.reset(task.sample(8, "train", Rng(0)), Rng(0))
    done = 0
    try:
        for t in range(9):
            state, _ = env.step(state, action(task, (1, 8), t))
            done += 1
    except RuntimeError as error:
        print(f"told after {done} steps: {error}")
    return compare(task, env)


def make(name: str) -> Task:
    return esmeta.make_task("gym" if name == "told" else name, **SHORT.get(name, {}))


def main() -> None:
    comm = make_comm(timeout_s=600)
    install_excepthook(comm)
    assert isinstance(comm, MPIComm)
    if sys.argv[1:] == ["idle"]:
        node = Node(comm, 2, lambda: False)
        if node.learners is None:
            node.serve(esmeta.make_task("bandit"))
        while True:
            time.sleep(60)
    total, fault = 0, "faulty_env:Task"
    kinds = {type(make(name).make_env("cpu")): name for name in reversed(esmeta.task_names())}
    names = [*sorted(kinds.values()), "told", fault]
    for name in names:
        task = make(name)
        node = Node(comm, 600, lambda: False)
        if node.learners is None:
            assert node.serve(task) == 5
        else:
            total += (follow_fault if name == fault else follow)(node, task)
            node.close(5)
            node.close(6)  # changes nothing
    comm.barrier()
    if comm.rank == 0:
        print(f"ok {comm.size} ranks, {len(names)} kinds: {' '.join(names)}, {total} numbers")


main()
