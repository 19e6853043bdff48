"""What snippets are drawn over: whole episodes as in MetaGenRL's release, or steps."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import fields, replace
from typing import Any

import pytest
import torch
from lived import window
from torch import Tensor

from esmeta.errors import UserError
from esmeta.learners import offpolicy_reinforce, td3
from esmeta.objectives import metagenrl
from esmeta.rl.off_policy import OffPolicy, ReplayLearner, ReplayOptions
from esmeta.rl.replay import Over, Replay
from esmeta.rng import Rng
from esmeta.rollout import Trajectory
from esmeta.tasks import make_task
from esmeta.types import Continuous, Spec

torch.set_num_threads(1)
SPEC = Spec(obs_size=3, action=Continuous(2, -2.0, 2.0), horizon=100)
TASK = make_task("pendulum", horizon=100, episode_steps=50)
DRAWS = 20_000


def lived(
    ends: Tensor, terminated: Tensor | None = None, actions: int = 2, low: int = 0
) -> Trajectory:
    """Steps with episodes that end where ``ends [P, T]``; rewards are their numbers from ``low``.

    Observations are 3 numbers that depend on the step's own.
    """
    agents, length = ends.shape
    g = torch.Generator().manual_seed(0)
    obs = torch.randn(agents, 151, 3, generator=g)[:, low : low + length + 1]
    action = torch.randn(agents, length, actions, generator=g).clamp(-2, 2)
    number = torch.arange(low, low + length, dtype=torch.float32).repeat(agents, 1)
    none = torch.zeros_like(ends) if terminated is None else terminated
    return window(obs, action, number, none, ends)


def full(ends: Tensor, capacity: int, terminated: bool = False) -> Replay:
    """A replay of such steps, given ten at a time."""
    replay = Replay.empty(len(ends), capacity, SPEC, "cpu")
    for low in range(0, ends.shape[1], 10):
        over = ends[:, low : low + 10]
        replay = replay.add(lived(over, over if terminated else None, low=low))
    return replay


def begun(window: Trajectory) -> Trajectory:
    """The same as the first steps of a trial."""
    new_trial = window.ts.new_trial.clone()
    new_trial[0] = True
    return window._replace(ts=window.ts._replace(new_trial=new_trial))


def drawn(
    replay: Replay, rng: Rng, index: Tensor, count: int, length: int, over: Over
) -> tuple[Tensor, Tensor]:
    """Rewards of snippets, and what is inside, ``[P, count, length]``."""
    data = replay.draw(rng, index, count, length, SPEC, over)
    inside = data.constants["inside"].unflatten(1, (count, length))
    return data.trajectory.reward.movedim(0, 2), inside


def whole(ends: Sequence[bool], capacity: int) -> list[tuple[int, int]]:
    """First and last steps of the episodes that lie whole in the newest ``capacity`` steps."""
    found, first = [], 0
    for step, over in enumerate(ends):
        if over:
            found.append((first, step))
            first = step + 1
    return [(a, b) for a, b in found if a >= len(ends) - capacity]


@pytest.mark.parametrize("capacity", [200, 40, 23])
def test_every_whole_episode_is_as_likely_and_every_place_in_it(capacity: int) -> None:
    """Against the list of the release (``ReplayBuffer.sample_time_batch`` in ``model.py``)."""
    g = torch.Generator().manual_seed(3)
    ends = torch.rand(3, 150, generator=g) < torch.tensor([[0.05], [0.2], [0.5]])
    replay, index, length = full(ends, capacity, True), torch.tensor([4, 7, 9]), 4
    reward, inside = drawn(replay, Rng(2), index, DRAWS, length, "episodes")
    for p in range(3):
        there = whole(ends[p].tolist(), capacity)
        assert len(there) > 1
        expected: dict[tuple[int, int], float] = defaultdict(float)
        for first, last in there:
            room = max(last - first + 2 - length, 1)
            for k in range(room):
                expected[first + k, min(last - first + 1, length)] += 1 / len(there) / room
        got = Counter(
            zip(reward[p, :, 0].int().tolist(), inside[p].sum(dim=1).tolist(), strict=True)
        )
        assert got.keys() == expected.keys()
        for where, share in expected.items():
            assert abs(got[where] / DRAWS - share) < 5 * (share / DRAWS) ** 0.5
        steps_in_a_row = reward[p, :, :1] + torch.arange(length)
        assert torch.equal(reward[p][inside[p]], steps_in_a_row[inside[p]])


def test_agents_without_a_whole_episode_draw_over_steps() -> None:
    ends = torch.zeros(2, 30, dtype=torch.bool)
    ends[1, 9] = True
    replay = Replay.empty(2, 50, SPEC, "cpu").add(lived(ends))
    index = torch.tensor([0, 1])
    over, plain = (drawn(replay, Rng(0), index, 500, 5, how)[0] for how in ("episodes", "steps"))
    assert torch.equal(over[0], plain[0])
    assert over[1].max() == 9 and plain[1].max() == 29


def test_a_cut_ends_an_episode_and_what_follows_a_trial_is_none() -> None:
    ends = torch.tensor([[False] * 6, [False, False, True, True, True, True]])
    replay = Replay.empty(2, 50, SPEC, "cpu").add(lived(ends))
    assert replay.episodes.added.tolist() == [0, 1]
    last = lived(torch.ones(2, 1, dtype=torch.bool), torch.tensor([[True], [False]]))
    replay = replay.add(begun(last))
    assert replay.episodes.last[:, 0].tolist() == [5, 2]
    assert replay.episodes.added.tolist() == [2, 1], "a terminal state ends one of a single step"


def test_an_episode_whose_first_steps_are_gone_is_not_whole() -> None:
    ends = torch.zeros(2, 40, dtype=torch.bool)
    ends[0, 4] = ends[:, 34] = True
    replay = full(ends, 32)
    assert (replay.episodes.added - replay.episodes.oldest).tolist() == [0, 0]
    again = replay.add(lived(ends[:, :10]))
    assert (again.episodes.added - again.episodes.oldest).tolist() == [1, 0]
    again = again.add(begun(lived(ends[:, :1])))
    assert (again.episodes.added - again.episodes.oldest).tolist() == [2, 1]


@pytest.mark.parametrize("capacity", [200, 40])
def test_a_replay_that_was_stored_draws_the_same(capacity: int) -> None:
    ends = torch.rand(3, 150, generator=torch.Generator().manual_seed(3)) < 0.2
    replay, empty = full(ends, capacity, True), Replay.empty(3, capacity, SPEC, "cpu")
    again = empty.filled([rows.clone() for rows in replay.kept()], replay.added)
    for _ in range(2):
        one, two = (drawn(r, Rng(1), torch.arange(3), 300, 4, "episodes") for r in (replay, again))
        assert torch.equal(one[1], two[1]) and one[1].any()
        assert torch.equal(one[0][one[1]], two[0][two[1]])
        replay, again = (r.add(lived(ends, ends)) for r in (replay, again))


# --- who draws over what --------------------------------------------------------------------


def state_with(learner: ReplayLearner, later: float, whole: int = 12) -> OffPolicy:
    """Agents with an episode of ``whole`` steps and one that is not over, ``later`` in it."""
    ends = torch.zeros(2, 40, dtype=torch.bool)
    ends[:, whole - 1] = True
    steps = lived(ends, actions=learner.agent.spec.action.size)
    steps.ts.obs[whole:] += later
    steps.ts.reward[whole + 1 :] += later
    state = learner.init(Rng(0), torch.arange(2))
    return state._replace(replay=state.replay.add(steps))


@pytest.mark.parametrize("over", ["episodes", "steps"])
@pytest.mark.parametrize("whole", [3, 12])
@pytest.mark.parametrize("learner", ["control", "td3", "metagenrl"])
def test_every_draw_of_a_learner_is_over_what_its_option_says(
    learner: str, whole: int, over: Any
) -> None:
    """Over episodes nobody sees the episode that has not ended, over steps all do."""
    sizes: dict[str, Any] = {"hidden": (8,), "capacity": 64, "batch": 8, "update_after": 20}
    objective = None
    if learner == "metagenrl":
        config = metagenrl.Objective(
            **sizes, snippets=over, snippet=5, extra=8, agents=2, period=10, steps=50
        )
        objective = config.make(None, TASK, trials=2, seed=0, device="cpu")
        loss, trained = objective.network.loss(objective.init(0)), config.learner(TASK, None)
    else:
        kind = offpolicy_reinforce.Learner if learner == "control" else td3.Learner
        snippet: dict[str, Any] = {"snippet": 5} if learner == "control" else {}
        trained, loss = kind(**sizes, snippets=over, period=10, **snippet).make(SPEC, 100)
    results: list[list[Tensor]] = []
    for later in (0.0, 1.0):
        state = state_with(trained, later, whole)
        critics = trained.critic_step(state, Rng(4), max(1, loss.snippet)).params
        policies = trained.policy_step(state, loss, Rng(4)).params
        results.append([critics["q1.0.weight"], policies["policy.0.weight"]])
        if objective is not None:
            lives, alpha = objective.environments[0], objective.init(0)
            results[-1].append(objective._value(lives, state, alpha))
    assert len(results[0]) == 2 + (learner == "metagenrl")
    for one, two in zip(*results, strict=True):
        assert torch.equal(one, two) == (over == "episodes")


def shared(learner: ReplayLearner) -> ReplayOptions:
    """The options that every learner from a replay has."""
    names = [field.name for field in fields(ReplayOptions)]
    return ReplayOptions(**{name: getattr(learner.options, name) for name in names})


def test_the_control_has_the_critics_of_metagenrl() -> None:
    """As many transitions of the same snippets per step, by the same rules: the same bits."""
    sizes: dict[str, Any] = {"hidden": (8,), "capacity": 90, "batch": 6, "update_after": 20}
    config = metagenrl.Objective(**sizes, snippet=5, extra=8, agents=2, period=10, steps=50)
    network = config.make(None, TASK, trials=2, seed=0, device="cpu").network
    control, reinforce = offpolicy_reinforce.Learner(**sizes, snippet=5, period=10).make(
        TASK.spec, TASK.spec.horizon
    )
    learner = config.learner(TASK, None)
    for delay in (9, 2):  # 8 rounds: policies have taken no step, or four each on its own loss
        after = []
        for one, loss in ((learner, network.loss(network.init(Rng(0)))), (control, reinforce)):
            sizes_of = replace(shared(one), delay=delay)
            one = replace(one, options=sizes_of, start=control.start)
            after.append(one.rounds(state_with(one, 0.0), loss, Rng(3), 8))
        for name, leaf in after[0].params.items():
            same = torch.equal(leaf, after[1].params[name])
            assert same == (delay == 9), name
        one, two = (learner.critic_step(state_with(learner, 0.0), Rng(3).fold("replay", 0), n)
                    for n in (5, 1))  # fmt: skip
        first = learner.rounds(state_with(learner, 0.0), reinforce, Rng(3), 1).params["q1.0.bias"]
        assert torch.equal(first, one.params["q1.0.bias"]), "snippets as long as the policy's"
        assert not torch.equal(first, two.params["q1.0.bias"])
    # Everything else that the two are made of is the same too.
    one, two = (replace(x, agent=None, options=shared(x), start=0) for x in (learner, control))
    assert one == two and learner.agent.shapes == control.agent.shapes
    assert learner.agent.distribution == control.agent.distribution


def test_numbers_and_words_of_the_options_are_checked() -> None:
    for kind in (td3.Learner, offpolicy_reinforce.Learner, metagenrl.Objective):
        with pytest.raises(UserError, match="snippets = 'trials'.*episodes, steps"):
            kind(snippets="trials")  # type: ignore[arg-type]
        with pytest.raises(UserError, match="critic_batch = -1"):
            kind(critic_batch=-1)
        with pytest.raises(UserError, match="snippet = 0"):
            kind(snippet=0)


@pytest.mark.parametrize(("given", "count"), [(0, 6 * 5), (12, 12)])
@pytest.mark.parametrize("over", ["episodes", "steps"])
def test_critics_see_as_many_transitions_as_policies(
    over: Any, given: int, count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    kind = offpolicy_reinforce.Learner(batch=6, critic_batch=given, snippets=over, snippet=5)
    learner, _ = kind.make(SPEC, 2000)
    drawn, draw = [], ReplayLearner.draw

    def spy(self: Any, state: Any, rng: Rng, snippets: int, length: int) -> Any:
        drawn.append(snippets * length)
        return draw(self, state, rng, snippets, length)

    monkeypatch.setattr(ReplayLearner, "draw", spy)
    learner.critic_step(state_with(learner, 0.0), Rng(0), 5)
    assert drawn == [-(-count // 5) * 5 if over == "episodes" else count]
