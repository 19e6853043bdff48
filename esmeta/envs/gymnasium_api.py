"""Every task of esmeta as a Gymnasium environment; importing this module registers them.

    import gymnasium, esmeta.envs.gymnasium_api
    env = gymnasium.make("esmeta/Maze-v0", size=8)
    envs = gymnasium.make_vec("esmeta/Maze-v0", num_envs=64, size=8)

``gymnasium.make("esmeta.envs.gymnasium_api:esmeta/Maze-v0")`` imports it by itself. Options are the
fields of the task, by name or in a table: ``gymnasium.make("esmeta/Gym-v0", options={"id":
"Acrobot-v1"})``, where ``gymnasium.make`` has an ``id`` of its own; ``split`` is ``"train"``,
``"validation"`` or ``"test"``.

One episode of Gymnasium's is one trial. Trial number k after ``reset(seed=s)`` is the trial number
k that a :class:`esmeta.PopulationEvaluator` runs with ``seed=s``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import gymnasium
import numpy as np
import torch
from gymnasium import spaces
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space
from torch import Tensor

from esmeta.errors import UserError
from esmeta.options import plain
from esmeta.rng import Rng
from esmeta.tasks import check_int, check_split, make_task, renderer, task_names
from esmeta.types import BatchedEnv, Discrete, Hosted, Spec, Task, TimeStep


def _spaces(spec: Spec) -> tuple[spaces.Box, spaces.Discrete | spaces.Box]:
    seen = spaces.Box(-np.inf, np.inf, (spec.obs_size,), np.float32)
    if isinstance(spec.action, Discrete):
        return seen, spaces.Discrete(spec.action.n)
    action = spec.action
    return seen, spaces.Box(action.low, action.high, (action.size,), np.float32)


class _Source(NamedTuple):
    """Trials by number, as :meth:`esmeta.PopulationEvaluator.trial_set` makes them."""

    task: Task
    split: str
    seed: int

    def begin(self, env: BatchedEnv, numbers: np.ndarray) -> tuple[Any, TimeStep]:
        root = Rng(self.seed)
        tasks = self.task.sample(torch.from_numpy(numbers), self.split, root.fold("tasks"))
        return env.reset(tasks, root.fold("trials", self.split))


def _action(spec: Spec, given: Any, count: int) -> Tensor:
    """Actions ``[1, count]`` or ``[1, count, A]``; a ``ValueError`` for what no policy gives."""
    if isinstance(spec.action, Discrete):
        numbers = np.asarray(given)
        whole = numbers.shape == (count,) and np.issubdtype(numbers.dtype, np.integer)
        if not whole or numbers.min() < 0 or numbers.max() >= spec.action.n:
            raise ValueError(
                f"action is {given!r}; it must be {'one number' if count == 1 else 'numbers'} from "
                f"0 to {spec.action.n - 1}: take it from env.action_space.sample()"
            )
        return torch.from_numpy(numbers.astype(np.int64)).unsqueeze(0)
    values = np.array(given, dtype=np.float32)  # a copy: the caller may go on to write into it
    if values.shape != (count, spec.action.size):
        raise ValueError(
            f"action has the shape {values.shape[count == 1 :]}; it must have "
            f"{spec.action.size} numbers, from {spec.action.low} to {spec.action.high}"
        )
    return torch.from_numpy(values).unsqueeze(0)


def _metrics(env: BatchedEnv, state: Any) -> dict[str, np.ndarray]:
    return {name: values[0].double().numpy() for name, values in env.metrics(state).items()}


def _close(env: BatchedEnv) -> None:
    if isinstance(env, Hosted):
        env.close()


def _only(options: Mapping[str, Any] | None, *allowed: str) -> dict[str, Any]:
    """The options of a reset, all of them known."""
    unknown = set(options or {}) - set(allowed)
    if unknown:
        raise ValueError(
            f"options has {sorted(unknown)}; this environment knows "
            f"{' and '.join(map(repr, allowed)) or 'no options'}"
        )
    return plain(dict(options or {}))


def _make(task: str, options: Mapping[str, Any] | None, more: Mapping[str, Any]) -> Task:
    """The task with the fields in ``options`` and ``more``; one that is given twice is refused."""
    if options is not None and not isinstance(options, Mapping):
        raise ValueError(
            f"options is {options!r}; it must be a table of the task's fields: write for example "
            'options={"horizon": 100}'
        )
    for name in set(options or {}) & set(more):
        raise ValueError(
            f"{name!r} is given twice, as {more[name]!r} and in options; write it once"
        )
    return make_task(task, **{**(options or {}), **more})


class TaskEnv(gymnasium.Env[np.ndarray, Any]):
    """One trial at a time of a task.

    The trial's end is ``terminated`` or ``truncated``. ``info["new_episode"]`` marks the first
    observation of each episode inside the trial; the info of its last step has ``"metrics"``, the
    task's own scores. ``reset(options={"trial": k})`` plays trial number k, else the next one; with
    ``"split"`` in the options, that one is of another split.

    Args:
        task: name of the task.
        split: ``"train"``, ``"validation"`` or ``"test"``.
        render_mode: ``"rgb_array"``, for tasks that can be drawn, or None.
        options: a table with fields of the task, any of them.
        more: fields of the task by name, but for the names that ``gymnasium.make`` takes itself.
    """

    metadata: dict[str, Any] = {"render_modes": ["rgb_array"], "render_fps": 10}

    def __init__(
        self,
        task: str,
        *,
        split: str = "train",
        render_mode: str | None = None,
        options: Mapping[str, Any] | None = None,
        **more: Any,
    ) -> None:
        check_split(split)
        self._task, self._split = _make(task, options, more), split
        self._env = self._task.make_env("cpu")
        self._state: Any = None
        self._number = -1
        self._draw = renderer(self._task)
        modes = ["rgb_array"] if self._draw else []
        self.metadata = self.metadata | {"render_modes": modes}
        if render_mode is not None and render_mode not in modes:
            raise ValueError(
                f"render_mode is {render_mode!r}; task {task!r} has {modes or 'no picture'}: leave "
                "it out or write one of these"
            )
        self.render_mode = render_mode
        self.observation_space, self.action_space = _spaces(self._task.spec)

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[np.ndarray, dict[str, Any]]:
        """Begin the trial number 0 of a new seed, the next one, or ``options["trial"]``."""
        seed = plain(seed)
        super().reset(seed=seed)
        self._number = 0 if seed is not None else self._number + 1
        known = _only(options, "trial", "split")
        split = known.get("split", self._split)
        check_split(split)
        if "trial" in known:
            check_int("trial", known["trial"], 0, 2**40)
            self._number = known["trial"]
        source = _Source(self._task, split, self.np_random_seed or 0)
        self._state, ts = source.begin(self._env, np.array([self._number]))
        return ts.obs[0, 0].numpy().copy(), {"new_episode": True}

    def step(self, action: Any) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        """One environment step of the trial."""
        if self._state is None:
            raise gymnasium.error.ResetNeeded("the first trial has not begun: call env.reset()")
        given = _action(self._task.spec, np.asarray(action)[None], 1)
        self._state, ts = self._env.step(self._state, given)
        over = bool(ts.new_trial)
        info: dict[str, Any] = {"new_episode": bool(ts.new_episode)}
        if over:
            scores = _metrics(self._env, self._state)
            info["metrics"] = {name: float(values[0]) for name, values in scores.items()}
        ends = (over and bool(ts.terminated), over and bool(ts.truncated))
        return ts.obs[0, 0].numpy().copy(), float(ts.reward), *ends, info

    def close(self) -> None:
        """Close the simulators of the task, where it has some."""
        self._state = None
        _close(self._env)

    def render(self) -> np.ndarray | None:  # type: ignore[override]
        """The trial as it stands, uint8 ``[height, width, 3]``."""
        if self.render_mode is None or self._draw is None:
            return None
        return self._draw(self._state, 0, 0)


class _Group:
    """Trials that began together: their environment, its state, and which slots they fill."""

    def __init__(
        self, source: _Source, env: BatchedEnv, slots: np.ndarray, numbers: np.ndarray
    ) -> None:
        self.env = env
        self.slots = slots
        self.alive = np.ones(len(slots), dtype=bool)
        self.state, self.first = source.begin(env, numbers)


class TaskVectorEnv(VectorEnv):
    """``num_envs`` trials in one batch, in this process.

    A trial that ends is followed by another in the same step (``AutoresetMode.SAME_STEP``): its
    last observation is in ``infos["final_obs"]``, its metrics in ``infos["final_info"]``. Slot i
    plays the trials i, num_envs + i, 2 num_envs + i, .. of the seed. Trials that end together go on
    as one batch; where lengths differ, the batch falls apart into as many as there are starts.
    """

    metadata: dict[str, Any] = {"render_modes": [], "autoreset_mode": AutoresetMode.SAME_STEP}

    def __init__(
        self,
        task: str,
        num_envs: int = 1,
        *,
        split: str = "train",
        render_mode: str | None = None,
        options: Mapping[str, Any] | None = None,
        **more: Any,
    ) -> None:
        num_envs = plain(num_envs)
        check_int("num_envs", num_envs, 1, 1_000_000)
        check_split(split)
        if render_mode is not None:
            raise ValueError(f"render_mode is {render_mode!r}; vectors are not drawn: leave it out")
        self._task, self._split = _make(task, options, more), split
        first = self._task.make_env("cpu")
        if isinstance(first, Hosted) and first.most_worlds < num_envs:
            raise UserError(
                f"num_envs is {num_envs}, but the trials of all run at once, and most_worlds is "
                f"{first.most_worlds}: write most_worlds={num_envs}"
            )
        self.num_envs = num_envs
        self.single_observation_space, self.single_action_space = _spaces(self._task.spec)
        self.observation_space = batch_space(self.single_observation_space, num_envs)
        self.action_space = batch_space(self.single_action_space, num_envs)
        self._groups: list[_Group] = []
        self._free: list[BatchedEnv] = [first]
        self._obs = np.zeros((num_envs, self._task.spec.obs_size), dtype=np.float32)
        self._begun = np.zeros(num_envs, dtype=np.int64)

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[np.ndarray, dict[str, Any]]:
        """Begin new trials everywhere; with a seed, its trials from number 0 on."""
        seed = plain(seed)
        if seed is not None and not isinstance(seed, int):
            raise ValueError(f"seed is {seed!r}; trials have numbers under one seed: write seed=0")
        super().reset(seed=seed)
        _only(options)
        if seed is not None:
            self._begun[:] = 0
        self._source = _Source(self._task, self._split, self.np_random_seed or 0)
        self._free += [group.env for group in self._groups]
        self._groups = []
        self._begin(np.arange(self.num_envs))
        return self._obs.copy(), self._info(np.ones(self.num_envs, dtype=bool))

    def _begin(self, slots: np.ndarray) -> None:
        """The next trials of some slots, as one group."""
        env = self._free.pop() if self._free else self._task.make_env("cpu")
        numbers = self._begun[slots] * self.num_envs + slots
        self._begun[slots] += 1
        group = _Group(self._source, env, slots, numbers)
        self._groups.append(group)
        self._obs[slots] = group.first.obs[0].numpy()

    def _info(self, new_episode: np.ndarray) -> dict[str, Any]:
        return {"new_episode": new_episode, "_new_episode": np.ones(self.num_envs, dtype=bool)}

    def step(
        self, actions: Any
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, dict[str, Any]]:
        """One step of every slot."""
        if not self._groups:
            raise gymnasium.error.ResetNeeded("no trial has begun: call envs.reset()")
        given = _action(self._task.spec, actions, self.num_envs)
        reward = np.zeros(self.num_envs, dtype=np.float64)
        terminated, truncated, new_episode = np.zeros((3, self.num_envs), dtype=bool)
        metrics: dict[str, np.ndarray] = {}
        for group in self._groups:
            group.state, ts = group.env.step(group.state, given[:, group.slots])
            mine = group.slots[group.alive]
            over = ts.new_trial[0].numpy()[group.alive]
            self._obs[mine] = ts.obs[0].numpy()[group.alive]
            reward[mine] = ts.reward[0].numpy()[group.alive]
            terminated[mine] = ts.terminated[0].numpy()[group.alive] & over
            truncated[mine] = ts.truncated[0].numpy()[group.alive] & over
            new_episode[mine] = ts.new_episode[0].numpy()[group.alive]
            if over.any():
                for name, values in _metrics(group.env, group.state).items():
                    row = metrics.setdefault(name, np.full(self.num_envs, np.nan))
                    row[mine[over]] = values[group.alive][over]
                group.alive[group.alive] = ~over
        ended = terminated | truncated
        infos = self._ends(ended, metrics) if ended.any() else {}
        return self._obs.copy(), reward, terminated, truncated, self._info(new_episode) | infos

    def close_extras(self, **kwargs: Any) -> None:
        """Close the simulators of the task, where it has some."""
        for env in [*self._free, *(group.env for group in self._groups)]:
            _close(env)
        self._groups = []

    def _ends(self, ended: np.ndarray, metrics: dict[str, np.ndarray]) -> dict[str, Any]:
        """Begin the next trials where some ended; what Gymnasium keeps of those."""
        final = np.full(self.num_envs, None, dtype=object)
        for slot in np.flatnonzero(ended):
            final[slot] = self._obs[slot].copy()
        self._free += [group.env for group in self._groups if not group.alive.any()]
        self._groups = [group for group in self._groups if group.alive.any()]
        self._begin(np.flatnonzero(ended))
        scores: dict[str, Any] = dict(metrics) | {f"_{name}": ended.copy() for name in metrics}
        return {
            "final_obs": final,
            "_final_obs": ended.copy(),
            "final_info": {"metrics": scores, "_metrics": ended.copy()},
            "_final_info": ended.copy(),
        }


def environment_id(task: str) -> str:
    """Gymnasium's id of a task: ``esmeta/AntDir-v0`` of ``ant_dir``."""
    return f"esmeta/{''.join(word.capitalize() for word in task.split('_'))}-v0"


def register() -> None:
    """Register all tasks under the namespace ``esmeta``; a second call changes nothing."""
    for task in task_names():
        if environment_id(task) not in gymnasium.registry:
            gymnasium.register(
                environment_id(task),
                entry_point=f"{__name__}:{TaskEnv.__name__}",
                vector_entry_point=f"{__name__}:{TaskVectorEnv.__name__}",
                kwargs={"task": task},
            )


register()
