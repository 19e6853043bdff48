"""MetODS' memory: a matrix of fast weights that rewrites itself at every step."""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from esmeta import errors, kernels
from esmeta.agent.linear import orthogonal
from esmeta.agent.policy import PolicyConfig
from esmeta.options import options_class
from esmeta.rng import Rng
from esmeta.types import Params, State

_LAYERS = tuple(f"write.{i}.{leaf}" for i in range(2) for leaf in ("weight", "bias"))
_WRITE = {"linear": ("write.A",), "mlp": _LAYERS}
"""Parameters of the write rule, in the order of its tensors."""


class _Prepared(NamedTuple):
    rule: kernels.Rule
    W0: Tensor | None


@options_class
class PlasticConfig(PolicyConfig):
    """Options of a MetODS policy, on top of those that every policy has.

    ``depth`` rounds S of reading and writing per step; ``variant`` of the write (``base``:
    alpha v v^T, ``no-alpha``: v v^T, ``linear``: alpha v (A v)^T, ``mlp``: alpha v m(v)^T);
    ``init`` draws kappa, beta ~ N(0, 1e-2) (``paper``, for replication), or (``identity``, for
    quick runs) adds kappa[s, 0] += ``skip`` and 1 to kappa[s, s], beta[s, s-1], beta[s, s] for
    every round s, so that memory is kept and written from the start; ``w0`` is a parameter
    (``learned``), drawn for every trial (``sampled``), or drawn once (``fixed``); standard
    deviations of alpha and W0.
    """

    depth: int = 2
    variant: Literal["base", "no-alpha", "linear", "mlp"] = "base"
    init: Literal["identity", "paper"] = "identity"
    w0: Literal["learned", "sampled", "fixed"] = "learned"
    alpha_std: float = 1e-3
    w0_std: float = 1e-3
    skip: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        errors.positive_int("depth", self.depth)
        errors.finite_positive("alpha_std", self.alpha_std)
        errors.finite_positive("w0_std", self.w0_std)

    def memory(self) -> Plastic:
        return Plastic(self)


class Plastic:
    """Fast weights ``W [P, B, n, n]``, read and written ``depth`` times per step (kernels)."""

    def __init__(self, config: PlasticConfig) -> None:
        self.config = config
        self.size = config.neurons

    def init(self, rng: Rng) -> Params:
        """Parameters of one member: kappa, beta ``[S, S+1]``, alpha and W0 ``[n, n]``."""
        config, n, depth = self.config, self.size, self.config.depth
        draw = rng.numpy()

        def normal(std: float, *shape: int) -> Tensor:
            return torch.from_numpy(std * draw.standard_normal(shape)).to(torch.float32)

        params: Params = {}
        if config.variant != "no-alpha":
            params["alpha"] = normal(config.alpha_std, n, n)
        kappa, beta = normal(1e-2, depth, depth + 1), normal(1e-2, depth, depth + 1)
        used = torch.ones(depth, depth + 1, dtype=torch.float32, device="cpu").tril(diagonal=1)
        if config.init == "identity":
            rounds = torch.arange(depth, device="cpu")
            kappa[:, 0] += config.skip
            kappa[rounds, rounds + 1] += 1.0
            beta[rounds, rounds] += 1.0
            beta[rounds, rounds + 1] += 1.0
        params["kappa"], params["beta"] = kappa * used, beta * used
        if config.variant == "linear":
            params["write.A"] = torch.eye(n, dtype=torch.float32, device="cpu") + normal(1e-2, n, n)
        if config.variant == "mlp":
            for i in range(2):
                params[f"write.{i}.weight"] = orthogonal(rng.fold("write", i), n, n, 1.0)
                params[f"write.{i}.bias"] = torch.zeros(n, dtype=torch.float32, device="cpu")
        if config.w0 == "learned":
            params["W0"] = normal(config.w0_std, n, n)
        return params

    def explain(self, device: torch.device | str, requires_grad: bool) -> str:
        return kernels.explain(
            device, self.size, self.config.depth, requires_grad, self.config.variant
        )

    def _fixed_w0(self, like: Tensor) -> Tensor:
        index = torch.zeros(1, dtype=torch.int64, device=like.device)
        flat = Rng(0).fold("fixed W0").normal(index, self.size**2)
        return (self.config.w0_std * flat).reshape(1, self.size, self.size).to(like.dtype)

    def prepare(self, params: Params) -> _Prepared:
        kappa, w0 = params["kappa"], params.get("W0")
        write = tuple(params[name] for name in _WRITE.get(self.config.variant, ()))
        if self.config.w0 == "fixed":
            w0 = self._fixed_w0(kappa).expand(kappa.shape[0], -1, -1)
        rule = kernels.prepare(
            params.get("alpha"), kappa, params["beta"], write, variant=self.config.variant
        )
        return _Prepared(rule, w0)

    def initial_state(self, params: Params, batch: int, rng: Rng, index: Tensor) -> State:
        kappa, n = params["kappa"], self.size
        shape = (kappa.shape[0], batch, n, n)
        if self.config.w0 == "sampled":
            flat = rng.fold("sampled W0").normal(index, n * n) * self.config.w0_std
            start = flat.reshape(*index.shape, n, n).to(kappa.dtype).expand(shape).contiguous()
            return {"W": start, "W0": start}
        first = params["W0"] if self.config.w0 == "learned" else self._fixed_w0(kappa)
        return {"W": first.unsqueeze(1).expand(shape).contiguous()}

    def _start(self, prepared: _Prepared, state: State) -> Tensor:
        if prepared.W0 is None:
            return state["W0"]
        return prepared.W0.unsqueeze(1).expand_as(state["W"])

    def reset(self, prepared: _Prepared, state: State, new_trial: Tensor) -> State:
        start = self._start(prepared, state)
        return state | {"W": torch.where(new_trial[..., None, None], start, state["W"])}

    def step(
        self, prepared: _Prepared, state: State, x: Tensor, *, in_place: bool = False
    ) -> tuple[Tensor, State]:
        y, fast = kernels.step_prepared(prepared.rule, state["W"], x, in_place=in_place)
        return y, state | {"W": fast}

    def scan(
        self, prepared: _Prepared, state: State, x: Tensor, new_trial: Tensor | None
    ) -> tuple[Tensor, State]:
        start = None if new_trial is None else self._start(prepared, state)
        y, fast = kernels.scan_prepared(prepared.rule, state["W"], x, W0=start, new_trial=new_trial)
        return y, state | {"W": fast}


def composite_decay(beta: Tensor) -> Tensor:
    """b_S, the factor by which one step shrinks what W held before; ``beta [P, S, S+1]`` to [P]."""
    b = [torch.ones_like(beta[:, 0, 0])]
    for s in range(beta.shape[1]):
        b.append(sum((beta[:, s, j] * b[j] for j in range(s + 1)), torch.zeros_like(b[0])))
    return b[-1]
