"""Policies: unroll is step in a loop to the bit, inputs, sizes, initial values, heads."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from esmeta.agent import heads
from esmeta.agent.plastic import composite_decay
from esmeta.errors import UserError
from esmeta.policy import Policy, make_policy, policy_names
from esmeta.rng import Rng
from esmeta.tasks import make_task
from esmeta.tree import ravel
from esmeta.types import Continuous, Discrete, Params, PolicyOut, Spec, State, TimeStep

DISCRETE = Spec(obs_size=3, action=Discrete(3), horizon=20)
CONTINUOUS = Spec(obs_size=3, action=Continuous(2), horizon=20)
SMALL: dict[str, Any] = {"neurons": 5, "hidden": (7,), "head_hidden": 6}
# P, B, T: one and three members; one, few and many trials; up to 20 steps.
SHAPES = [(1, 1, 20), (3, 2, 7), (1, 5, 9), (3, 50, 3)]
VARIANTS = ("base", "no-alpha", "linear", "mlp")
MEMORIES = [
    ("metods", {"variant": variant, "w0": w0, "depth": depth, "alpha_std": 0.3, "w0_std": 0.3})
    for variant, w0, depth in itertools.product(
        VARIANTS, ("learned", "sampled", "fixed"), (1, 2, 4)
    )
] + [("rl2", {}), ("lstm", {}), ("mlp", {})]
ONE_OF_EACH = [memory for memory in MEMORIES if memory[1].get("depth", 2) == 2]
HEADS = [
    (DISCRETE, {}),
    (CONTINUOUS, {"std": "fixed", "std_value": 0.3}),
    (CONTINUOUS, {"std": "learned"}),
    (CONTINUOUS, {"std": "state", "extra": "time", "episode_input": True}),
]


def memory_id(memory: tuple[str, dict[str, Any]]) -> str:
    name, options = memory
    words = [str(options[k]) for k in ("variant", "w0", "depth") if k in options]
    return "-".join([name, *words])


def small(name: str, spec: Spec = DISCRETE, *, value: bool = True, **options: Any) -> Policy:
    return make_policy(name, spec, value=value, **(SMALL | options))


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def spread(policy: Policy, population: int, dtype: torch.dtype = torch.float32) -> Params:
    """Initial parameters with noise on every leaf, so that nothing is zero or small by chance."""
    draw = generator(3)
    return {
        name: (leaf + 0.3 * torch.randn(leaf.shape, generator=draw)).to(dtype)
        for name, leaf in policy.init(1, population).items()
    }


def recording(spec: Spec, length: int, population: int, batch: int) -> TimeStep:
    """Random time steps ``[T, P, B, ...]`` with new trials at the start and in between."""
    draw = generator(length)
    shape = (length, population, batch)
    flags = [torch.rand(shape, generator=draw) < 0.25 for _ in range(4)]
    return TimeStep(
        torch.randn(*shape, spec.obs_size, generator=draw),
        torch.randn(*shape, spec.action.size, generator=draw),
        torch.randn(shape, generator=draw),
        *flags,
    )


def row(ts: TimeStep, t: int) -> TimeStep:
    return TimeStep(*(leaf[t] for leaf in ts))


def loop(
    policy: Policy, params: Params, state: State, ts: TimeStep, start: int = 0
) -> tuple[PolicyOut, State]:
    outs = []
    for t in range(len(ts.reward)):
        out, state = policy.step(params, state, row(ts, t), start + t)
        outs.append(out)
    stacked = (None if x[0] is None else torch.stack(x) for x in zip(*outs, strict=True))
    return PolicyOut(*stacked), state


def assert_same_bits(one: tuple[PolicyOut, State], two: tuple[PolicyOut, State]) -> None:
    for name, a, b in zip(PolicyOut._fields, one[0], two[0], strict=True):
        assert (a is None) == (b is None), name
        # A standard deviation that does not depend on the step may stand without T.
        assert a is None or b is None or torch.equal(a, b.expand_as(a)), name
    assert one[1].keys() == two[1].keys()
    for name, leaf in one[1].items():
        assert torch.equal(leaf, two[1][name]), name


def assert_unroll_is_the_loop(
    policy: Policy, shape: tuple[int, int, int], dtype: torch.dtype
) -> None:
    population, batch, length = shape
    params = spread(policy, population, dtype)
    ts = recording(policy.spec, length, population, batch)
    state = policy.initial_state(params, batch, Rng(4))
    expected = loop(policy, params, state, ts)
    assert_same_bits(expected, policy.unroll(params, state, ts))
    assert all(out is None or out.dtype == dtype for out in expected[0])
    cut = length // 2
    first, middle = policy.unroll(params, state, TimeStep(*(leaf[:cut] for leaf in ts)))
    rest, last = policy.unroll(params, middle, TimeStep(*(leaf[cut:] for leaf in ts)), start=cut)
    assert expected[0].value is not None and first.value is not None and rest.value is not None
    assert torch.equal(expected[0].value, torch.cat([first.value, rest.value]))
    assert_same_bits((expected[0], last), expected)


@pytest.mark.parametrize("memory", MEMORIES, ids=memory_id)
def test_unroll_is_step_in_a_loop(memory: tuple[str, dict[str, Any]]) -> None:
    name, options = memory
    for dtype, shape in itertools.product((torch.float32, torch.float64), SHAPES):
        assert_unroll_is_the_loop(small(name, **options), shape, dtype)


@pytest.mark.parametrize("head", HEADS, ids=["discrete", "fixed", "learned", "state"])
@pytest.mark.parametrize("memory", ONE_OF_EACH, ids=memory_id)
def test_unroll_is_step_for_every_head(
    memory: tuple[str, dict[str, Any]], head: tuple[Spec, dict[str, Any]]
) -> None:
    name, options = memory
    spec, head_options = head
    policy = small(name, spec, **options, **head_options)
    for dtype, shape in ((torch.float32, (3, 5, 6)), (torch.float64, (1, 2, 5))):
        assert_unroll_is_the_loop(policy, shape, dtype)


@pytest.mark.parametrize("neurons", [20, 33])
@pytest.mark.parametrize("name", ["metods", "rl2", "lstm", "mlp"])
def test_unroll_is_step_at_usual_sizes(name: str, neurons: int) -> None:
    spec = make_task("harlow").spec
    policy = make_policy(name, spec, value=True, neurons=neurons)
    for shape in ((1, 50, 12), (2, 16, 6)):
        assert_unroll_is_the_loop(policy, shape, torch.float32)


@pytest.mark.parametrize("memory", ONE_OF_EACH, ids=memory_id)
def test_a_new_trial_forgets_and_only_that(memory: tuple[str, dict[str, Any]]) -> None:
    name, options = memory
    policy = small(name, **options)
    params = spread(policy, 2)
    ts = recording(policy.spec, 6, 2, 3)._replace(new_trial=torch.zeros(6, 2, 3, dtype=torch.bool))
    ts.new_trial[3, 1, 2] = True
    state = policy.initial_state(params, 3, Rng(4))
    out, _ = policy.unroll(params, state, ts)
    fresh, _ = policy.unroll(params, state, TimeStep(*(leaf[3:] for leaf in ts)))
    plain, _ = policy.unroll(params, state, ts._replace(new_trial=torch.zeros_like(ts.new_trial)))
    assert out.logits is not None and fresh.logits is not None and plain.logits is not None
    assert torch.equal(out.logits[3:, 1, 2], fresh.logits[:, 1, 2])
    changed = (out.logits != plain.logits).any(-1)
    assert bool(changed[3:, 1, 2].all()) == (name != "mlp")
    changed[3:, 1, 2] = False
    assert not changed.any()


@pytest.mark.parametrize("memory", ONE_OF_EACH, ids=memory_id)
def test_gradients_of_unroll_and_loop_agree(memory: tuple[str, dict[str, Any]]) -> None:
    name, options = memory
    policy = small(name, **options)
    params = spread(policy, 1, torch.float64)
    ts = recording(policy.spec, 5, 1, 3)
    grads = []
    for run in (loop, lambda p, *rest: p.unroll(*rest)):
        leaves = {k: v.clone().requires_grad_() for k, v in params.items()}
        out, _ = run(policy, leaves, policy.initial_state(leaves, 3, Rng(4)), ts)
        loss = out.logits.sin().sum() + out.value.cos().sum()  # type: ignore[union-attr]
        grads.append(torch.autograd.grad(loss, list(leaves.values()), allow_unused=True))
    for leaf, a, b in zip(params, *grads, strict=True):
        assert a is not None and b is not None, leaf
        assert torch.allclose(a, b, rtol=1e-9, atol=1e-11), leaf
    assert ("memory.W0" in params) == (options.get("w0") == "learned")


# --- what goes in ---------------------------------------------------------------------------


def test_input_layout() -> None:
    ts = recording(CONTINUOUS, 4, 2, 3)
    options = {"extra": "time", "episode_input": True, "reward_input_scale": 0.25}
    policy = small("mlp", CONTINUOUS, **options)
    for t, steps in ((7, row(ts, 0)), (torch.arange(4), ts)):
        shape = steps.reward.shape
        time = torch.as_tensor(t).reshape(-1, *[1] * (len(shape) - 1)) / 20 * torch.ones(shape)
        last = [steps.new_episode.float(), time.reshape(shape)]
        expected = torch.cat(
            [steps.obs, steps.prev_action]
            + [x.unsqueeze(-1) for x in (0.25 * steps.reward, *last)],
            dim=-1,
        )
        parts = policy.inputs.parts(steps, t, policy.spec.horizon)
        assert torch.equal(torch.cat(parts, -1), expected)
    steps = row(ts, 1)
    plain = [steps.obs, steps.prev_action, steps.reward.unsqueeze(-1)]
    for extra, more in (("none", []), ("bias", [torch.ones(2, 3, 1)])):
        policy = small("mlp", CONTINUOUS, extra=extra)
        got = torch.cat(policy.inputs.parts(steps, 3, policy.spec.horizon), -1)
        assert torch.equal(got, torch.cat([*plain, *more], dim=-1))
        assert got.shape[-1] == policy.input_size == policy.init()["embed.0.weight"].shape[1]


def used_scalars(policy: Policy) -> int:
    """Parameters without the entries l > s of kappa and beta, which exist only for the shape."""
    depth = policy.config.depth  # type: ignore[attr-defined]
    return policy.size - 2 * (depth * (depth + 1) - depth * (depth + 3) // 2)


def test_sizes_of_the_published_policies() -> None:
    harlow, maze = make_task("harlow").spec, make_task("maze").spec
    policy = make_policy("metods", harlow, neurons=20, depth=2, w0="learned")
    assert (policy.input_size, policy.size, used_scalars(policy)) == (12, 2626, 2624)
    policy = make_policy("metods", maze, value=True, neurons=200, depth=4, w0="learned")
    assert (policy.input_size, policy.size, used_scalars(policy)) == (15, 100_181, 100_169)
    for h in (16, 156):  # 156: 99,645, nearly MetODS's 100,169
        policy = make_policy("rl2", maze, value=True, neurons=h)
        gru = 512 + 3 * (32 * h + h * h + 2 * h) + (32 * h + 32 + 132) + (32 * h + 32 + 33)
        assert policy.size == gru
    assert ravel(policy.init(0, 2)).shape == (2, policy.size)


def test_names() -> None:
    assert policy_names() == ["lstm", "metods", "mlp", "rl2"]


# --- initial values -------------------------------------------------------------------------


@pytest.mark.parametrize("name", policy_names())
def test_a_member_does_not_depend_on_the_population(name: str) -> None:
    policy = small(name)
    five, three, other = policy.init(0, 5), policy.init(0, 3), policy.init(1, 3)
    for leaf in five:
        assert torch.equal(five[leaf][:3], three[leaf]), leaf
    vectors = torch.cat([ravel(five), ravel(other)])
    assert len(torch.unique(vectors, dim=0)) == 8


def gram_error(weight: Tensor, gain: float) -> float:
    rows, columns = weight.shape
    product = weight @ weight.T if rows <= columns else weight.T @ weight
    return float((product - gain**2 * torch.eye(min(rows, columns))).abs().max())


@pytest.mark.parametrize("name", policy_names())
def test_layers_are_orthogonal_with_their_gains(name: str) -> None:
    policy = small(name, hidden=(9, 7))
    params = {k: v[0] for k, v in policy.init(3).items()}
    gains = {"embed.0": 2**0.5, "embed.1": 2**0.5, "head.0": 2**0.5, "value.0": 2**0.5}
    gains |= {"head.1": 0.01, "value.1": 1.0}
    if name in ("metods", "mlp"):
        gains["embed.2"] = 2**0.5
    layers = {k.removesuffix(".weight") for k in params if k[:6] != "memory" and "weight" in k}
    assert layers == set(gains)
    for layer, gain in gains.items():
        assert gram_error(params[f"{layer}.weight"], gain) < 1e-5 * gain, layer
        assert not params[f"{layer}.bias"].any(), layer
    for gates in (3, 4):
        for leaf in ("memory.input.weight", "memory.hidden.weight"):
            if leaf in params and params[leaf].shape[1] == gates * 5:
                for block in params[leaf].chunk(gates, dim=1):
                    assert gram_error(block, 1.0) < 1e-5, leaf
    if name == "lstm":
        assert params["memory.hidden.bias"].tolist() == [0.0] * 5 + [1.0] * 5 + [0.0] * 10
    if name in ("rl2", "lstm"):
        assert not params["memory.input.bias"].any()


def test_squashed_embedding_and_learned_std() -> None:
    policy = small("metods", CONTINUOUS, squash_embedding=True, std="learned", std_value=0.3)
    params = policy.init(0)
    assert gram_error(params["embed.1.weight"][0], 1.0) < 1e-5
    assert torch.allclose(params["head.log_std"], torch.full((1, 2), math.log(0.3)))
    big = {k: 100 * v for k, v in params.items()}
    ts = recording(CONTINUOUS, 1, 1, 4)
    seen = {}
    step = policy.memory.step
    policy.memory.step = lambda p, s, x, **kw: seen.update(x=x) or step(p, s, x)  # type: ignore
    policy.step(big, policy.initial_state(big, 4), row(ts, 0))
    assert 0.9 < float(seen["x"].abs().max()) <= 1.0


def normal_error(sample: Tensor, std: float, mean: float = 0.0) -> float:
    """Largest deviation of mean and standard deviation, in standard errors."""
    count = sample.numel()
    error = std / count**0.5
    off_std = abs(float(sample.double().std()) - std) / (error / 2**0.5)
    return max(abs(float(sample.double().mean()) - mean) / error, off_std)


def test_initial_values_of_plastic_parameters() -> None:
    depth = 4
    used = torch.ones(depth, depth + 1, dtype=torch.bool).tril(1)
    options = {"depth": depth, "neurons": 8, "alpha_std": 2e-3, "w0_std": 3e-3, "skip": 0.5}
    paper = small("metods", variant="linear", init="paper", **options).init(0, 100)
    assert normal_error(paper["memory.kappa"][:, used], 1e-2) < 4
    assert normal_error(paper["memory.beta"][:, used], 1e-2) < 4
    assert normal_error(paper["memory.alpha"], 2e-3) < 4
    assert normal_error(paper["memory.W0"], 3e-3) < 4
    assert normal_error(paper["memory.write.A"] - torch.eye(8), 1e-2) < 4
    identity = small("metods", variant="mlp", init="identity", **options).init(0, 100)
    kappa, beta = torch.zeros(depth, depth + 1), torch.zeros(depth, depth + 1)
    for s in range(depth):  # the paper's round s + 1: entries l = 0 .. s + 1
        kappa[s, 0] += 0.5
        kappa[s, s + 1] += 1.0
        beta[s, s] += 1.0
        beta[s, s + 1] += 1.0
    assert normal_error((identity["memory.kappa"] - kappa)[:, used], 1e-2) < 4
    assert normal_error((identity["memory.beta"] - beta)[:, used], 1e-2) < 4
    for params in (paper, identity):
        for leaf in ("memory.kappa", "memory.beta"):
            assert not params[leaf][:, ~used].any()
    assert "memory.alpha" not in small("metods", variant="no-alpha").init()
    for i in range(2):
        assert gram_error(identity[f"memory.write.{i}.weight"][0], 1.0) < 1e-5
        assert not identity[f"memory.write.{i}.bias"].any()


def test_first_fast_weights() -> None:
    params = {}
    states = {}
    for w0 in ("learned", "sampled", "fixed"):
        policy = small("metods", w0=w0, neurons=8, w0_std=0.5)
        params[w0] = policy.init(0, 2)
        states[w0] = policy.initial_state(params[w0], 40, Rng(1))["W"]
        assert states[w0].shape == (2, 40, 8, 8)
        assert normal_error(states[w0][:1] if w0 == "sampled" else states[w0][:, 0], 0.5) < 4
        if w0 != "sampled":
            assert torch.equal(states[w0], states[w0][:, :1].expand(-1, 40, -1, -1))
    assert torch.equal(states["learned"][:, 0], params["learned"]["memory.W0"])
    assert torch.equal(states["fixed"][0], states["fixed"][1])
    assert torch.equal(states["sampled"][0], states["sampled"][1])  # members share their luck
    assert len(torch.unique(states["sampled"][0].flatten(1), dim=0)) == 40
    policy = small("metods", w0="sampled", neurons=8, w0_std=0.5)
    some = policy.initial_state(params["sampled"], 2, Rng(1), torch.tensor([[7, 30]]))["W"]
    assert torch.equal(some, states["sampled"][:, [7, 30]])
    other = policy.initial_state(params["sampled"], 40, Rng(2))["W"]
    assert not torch.isclose(other, states["sampled"]).any()


def test_composite_decay_is_what_a_step_leaves_of_w() -> None:
    policy = small("metods", depth=4)
    params = spread(policy, 3)
    W = torch.randn(3, 2, 5, 5, generator=generator())
    bound = policy.bind(params)
    _, state = policy.memory.step(bound.memory, {"W": W}, torch.zeros(3, 2, 5))
    decay = composite_decay(params["memory.beta"])
    assert torch.allclose(state["W"], decay[:, None, None, None] * W, rtol=1e-5, atol=1e-6)
    exact = small("metods", depth=3).init()["memory.beta"].round()
    assert composite_decay(exact).tolist() == [1.0]


# --- recurrent cells against torch ------------------------------------------------------------


@pytest.mark.parametrize("name", ["rl2", "lstm"])
def test_cells_equal_torch(name: str) -> None:
    policy = small(name, neurons=6, hidden=(7,))
    params = spread(policy, 1, torch.float64)
    n, p = 6, {k.removeprefix("memory."): v[0] for k, v in params.items() if k[:6] == "memory"}
    cell = (torch.nn.GRUCell if name == "rl2" else torch.nn.LSTMCell)(7, n, dtype=torch.float64)

    def reordered(leaf: Tensor) -> Tensor:
        if name == "rl2":  # both: reset, update, candidate
            return leaf
        i, f, o, g = leaf.chunk(4, dim=-1)  # torch: input, forget, g, output
        return torch.cat([i, f, g, o], dim=-1)

    with torch.no_grad():
        cell.weight_ih.copy_(reordered(p["input.weight"]).T)
        cell.weight_hh.copy_(reordered(p["hidden.weight"]).T)
        cell.bias_ih.copy_(reordered(p["input.bias"]))
        cell.bias_hh.copy_(reordered(p["hidden.bias"]))
    x = torch.randn(12, 1, 4, 7, generator=generator(), dtype=torch.float64)
    h = c = torch.zeros(4, n, dtype=torch.float64)
    state = policy.initial_state(params, 4)
    y, state = policy.memory.scan(policy.bind(params).memory, state, x, None)
    for t in range(12):
        if name == "rl2":
            h = cell(x[t, 0], h)
        else:
            h, c = cell(x[t, 0], (h, c))
        assert torch.allclose(y[t, 0], h, rtol=0, atol=1e-13)
    assert torch.equal(state["h"], y[-1])


# --- layers -----------------------------------------------------------------------------------


@pytest.mark.parametrize(("inputs", "outputs"), [(12, 32), (5, 5), (32, 1), (3, 8), (20, 2)])
def test_a_row_does_not_depend_on_its_batch(inputs: int, outputs: int) -> None:
    from esmeta.agent.linear import apply_mlp, bind_mlp

    # Float32 is compiled (test_dense.py).
    weight = torch.randn(6, inputs, outputs, generator=generator(), dtype=torch.float64)
    bias = torch.randn(6, outputs, generator=generator(1), dtype=torch.float64)
    layers = bind_mlp({"a.0.weight": weight, "a.0.bias": bias}, "a")
    x = torch.randn(6, 200, inputs, generator=generator(2), dtype=torch.float64)
    whole = apply_mlp(layers, x)
    torch.testing.assert_close(whole, x @ weight + bias.unsqueeze(1), rtol=1e-12, atol=1e-12)
    for rows in (1, 2, 7, 15, 16, 17, 24, 50, 199):
        assert torch.equal(apply_mlp(layers, x[:, :rows]), whole[:, :rows]), rows
    for low, high in ((0, 2), (1, 4), (4, 6)):
        part = bind_mlp({"a.0.weight": weight[low:high], "a.0.bias": bias[low:high]}, "a")
        assert torch.equal(apply_mlp(part, x[low:high]), whole[low:high])


# --- heads ------------------------------------------------------------------------------------


def discrete_out(logits: Tensor) -> PolicyOut:
    return PolicyOut(logits, None, None, None)


def test_actions_are_drawn_with_their_probabilities() -> None:
    logits = torch.tensor([[0.0, 1.0, -1.0, 2.0], [3.0, 0.0, 0.0, -9.0]])
    count = 40_000
    out = discrete_out(logits[:, None].expand(2, count, 4))
    noise = Rng(5).uniform(torch.arange(count).unsqueeze(0), 1).float()
    action = heads.sample(out, noise)
    assert action.shape == (2, count) and action.dtype == torch.int64
    for member in range(2):
        p = torch.softmax(logits[member].double(), dim=-1)
        seen = torch.bincount(action[member], minlength=4) / count
        assert ((seen - p).abs() <= 4 * (p * (1 - p) / count).sqrt() + 1e-12).all()
    ends = heads.sample(discrete_out(torch.zeros(1, 3, 4)), torch.tensor([[[0.0], [0.25], [1.0]]]))
    assert ends.tolist() == [[0, 1, 3]]  # 1.0 can come out of rounding to float32
    assert heads.mode(out)[:, 0].tolist() == [3, 0]


def test_gaussian_actions_have_their_moments() -> None:
    mean, std = torch.tensor([[[1.0, -2.0]]]), torch.tensor([[[0.5, 3.0]]])
    count = 40_000
    out = PolicyOut(None, mean.expand(1, count, 2), std.expand(1, count, 2), None)
    noise = Rng(6).normal(torch.arange(count).unsqueeze(0), 2).float()
    action = heads.sample(out, noise)[0]
    for k in range(2):
        assert normal_error(action[:, k], float(std[0, 0, k]), float(mean[0, 0, k])) < 4
    assert heads.noise_width(Continuous(2)) == 2 and heads.noise_width(Discrete(9)) == 1
    assert torch.equal(heads.mode(out), out.mean)


def test_log_prob_and_entropy_equal_torch_distributions() -> None:
    logits = torch.randn(5, 2, 3, 4, generator=generator(), dtype=torch.float64)
    action = torch.randint(0, 4, (5, 2, 3), generator=generator())
    oracle = torch.distributions.Categorical(logits=logits)
    out = discrete_out(logits)
    assert torch.allclose(heads.log_prob(out, action), oracle.log_prob(action), rtol=1e-12)
    assert torch.allclose(heads.entropy(out), oracle.entropy(), rtol=1e-12)
    mean = torch.randn(5, 2, 3, 4, generator=generator(), dtype=torch.float64)
    for width in (1, 4):  # one for all dimensions (fixed), or one each
        std = torch.rand(5, 2, 3, width, generator=generator(1), dtype=torch.float64) + 0.1
        out = PolicyOut(None, mean, std, None)
        normal = torch.distributions.Independent(
            torch.distributions.Normal(mean, std.expand_as(mean)), 1
        )
        raw = mean + 2 * std
        assert torch.allclose(heads.log_prob(out, raw), normal.log_prob(raw), rtol=1e-12)
        assert torch.allclose(heads.entropy(out), normal.entropy(), rtol=1e-12)


def test_standard_deviations_of_the_heads() -> None:
    ts = recording(CONTINUOUS, 1, 2, 3)
    stds = {}
    for std in ("fixed", "learned", "state"):
        policy = small("mlp", CONTINUOUS, std=std, std_value=0.3)
        params = policy.init(0, 2)
        out, _ = policy.step(params, {}, row(ts, 0))
        assert out.mean is not None and out.std is not None and out.logits is None
        assert out.mean.shape == (2, 3, 2)
        stds[std] = out.std
    assert torch.allclose(stds["fixed"], torch.tensor(0.3))
    assert torch.allclose(stds["learned"], torch.tensor(0.3))
    # exp of a nearly zero output: about 1, and not the same for all inputs.
    assert stds["state"].shape == (2, 3, 2) and ((stds["state"] - 1).abs() < 0.1).all()
    assert len(stds["state"].unique()) > 6
    for std, leaf in (("learned", "head.log_std"), ("state", "head.1.bias")):
        policy = small("mlp", CONTINUOUS, std=std)
        params = policy.init(0)
        params[leaf] -= 50
        least = policy.step(params, {}, row(recording(CONTINUOUS, 1, 1, 3), 0))[0].std
        assert least is not None and float(least.min()) == pytest.approx(1e-3)


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("metods", {"std_value": 0.0}, "std_value = 0.0"),
        ("metods", {"alpha_std": float("nan")}, "alpha_std = nan"),
        ("rl2", {"hidden": []}, r"hidden = \[\]"),
        ("lstm", {"squash_embedding": True}, "squash_embedding = true"),
        ("rl2", {"nurons": 3}, "policy.nurons.*'neurons'"),
    ],
)
def test_bad_options_are_refused(name: str, options: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        make_policy(name, DISCRETE, **options)
