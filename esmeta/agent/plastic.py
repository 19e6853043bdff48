"""MetODS' memory: a matrix of fast weights that rewrites itself at every step."""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from esmeta import kernels
from esmeta.agent.linear import orthogonal
from esmeta.rng import Rng
from esmeta.types import Params, State

Variant = Literal["base", "no-alpha", "linear", "mlp"]
_LAYERS = tuple(f"write.{i}.{leaf}" for i in range(2) for leaf in ("weight", "bias"))
_WRITE = {"linear": ("write.A",), "mlp": _LAYERS}
"""Parameters of the write rule, in the order of its tensors."""


class _Prepared(NamedTuple):
    rule: kernels.Rule
    W0: Tensor | None


class Plastic:
    """Fast weights ``W [P, B, n, n]``, read and written ``depth`` times per step (kernels).

    ``init="paper"`` draws kappa, beta ~ N(0, 1e-2); ``"identity"`` adds kappa[s, 0] += ``skip``
    and 1 to kappa[s, s], beta[s, s-1], beta[s, s] for every round s, so that memory is kept and
    written from the start. ``w0`` is a parameter (``learned``), drawn for every trial
    (``sampled``), or drawn once (``fixed``); always N(0, ``w0_std``).
    """

    def __init__(
        self,
        neurons: int,
        depth: int,
        *,
        variant: Variant = "base",
        init: Literal["identity", "paper"] = "identity",
        w0: Literal["learned", "sampled", "fixed"] = "learned",
        alpha_std: float = 1e-3,
        w0_std: float = 1e-3,
        skip: float = 0.5,
    ) -> None:
        self.size = neurons
        self.depth = depth
        self.variant = variant
        self.identity = init == "identity"
        self.w0 = w0
        self.alpha_std = alpha_std
        self.w0_std = w0_std
        self.skip = skip

    def init(self, rng: Rng) -> Params:
        """Parameters of one member: kappa, beta ``[S, S+1]``, alpha and W0 ``[n, n]``."""
        n, depth = self.size, self.depth
        draw = rng.numpy()

        def normal(std: float, *shape: int) -> Tensor:
            return torch.from_numpy(std * draw.standard_normal(shape)).to(torch.float32)

        params: Params = {}
        if self.variant != "no-alpha":
            params["alpha"] = normal(self.alpha_std, n, n)
        kappa, beta = normal(1e-2, depth, depth + 1), normal(1e-2, depth, depth + 1)
        used = torch.ones(depth, depth + 1, dtype=torch.float32, device="cpu").tril(diagonal=1)
        if self.identity:
            rounds = torch.arange(depth, device="cpu")
            kappa[:, 0] += self.skip
            kappa[rounds, rounds + 1] += 1.0
            beta[rounds, rounds] += 1.0
            beta[rounds, rounds + 1] += 1.0
        params["kappa"], params["beta"] = kappa * used, beta * used
        if self.variant == "linear":
            params["write.A"] = torch.eye(n, dtype=torch.float32, device="cpu") + normal(1e-2, n, n)
        if self.variant == "mlp":
            for i in range(2):
                params[f"write.{i}.weight"] = orthogonal(rng.fold("write", i), n, n, 1.0)
                params[f"write.{i}.bias"] = torch.zeros(n, dtype=torch.float32, device="cpu")
        if self.w0 == "learned":
            params["W0"] = normal(self.w0_std, n, n)
        return params

    def explain(self, device: torch.device | str, requires_grad: bool) -> str:
        return kernels.explain(device, self.size, self.depth, requires_grad, self.variant)

    def _fixed_w0(self, like: Tensor) -> Tensor:
        index = torch.zeros(1, dtype=torch.int64, device=like.device)
        flat = Rng(0).fold("fixed W0").normal(index, self.size**2)
        return (self.w0_std * flat).reshape(1, self.size, self.size).to(like.dtype)

    def prepare(self, params: Params) -> _Prepared:
        kappa, w0 = params["kappa"], params.get("W0")
        write = tuple(params[name] for name in _WRITE.get(self.variant, ()))
        if self.w0 == "fixed":
            w0 = self._fixed_w0(kappa).expand(kappa.shape[0], -1, -1)
        rule = kernels.prepare(
            params.get("alpha"), kappa, params["beta"], write, variant=self.variant
        )
        return _Prepared(rule, w0)

    def initial_state(self, params: Params, batch: int, rng: Rng, index: Tensor) -> State:
        kappa, n = params["kappa"], self.size
        shape = (kappa.shape[0], batch, n, n)
        if self.w0 == "sampled":
            flat = rng.fold("sampled W0").normal(index, n * n) * self.w0_std
            start = flat.reshape(*index.shape, n, n).to(kappa.dtype).expand(shape).contiguous()
            return {"W": start, "W0": start}
        first = params["W0"] if self.w0 == "learned" else self._fixed_w0(kappa)
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
