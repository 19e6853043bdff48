"""Speed of the plastic recurrence: esmeta's kernels, the naive loop and its compiled form.

    python tests/bench/plastic.py
    python tests/bench/plastic.py --device cuda --json plastic.json

One process, which keeps freed memory as a training run does; on a CPU one thread and CPU seconds.
Every contender's results are compared with the float64 reference before the clock starts, and each
repeat times all contenders in an order that rotates. Rates are environment steps of single trials
per second, medians over repeats.

* ``esmeta``: prepared steps, in place as a rollout makes them, and ``plastic_scan``.
* ``torch``: the same shortcut in torch operations (what runs in float64).
* ``naive``: Algorithm 1 as printed, eager; ``compiled``: the same under ``torch.compile``, which
  needs a C++ compiler; its first call is not timed.
* ``jax``: the naive recursion under jit, vmap and lax.scan, where jax is installed.
* ``GRU``: torch's GRU of the same width over the same sequence, which is what RL2 pays.

``gradient`` is forward and backward of 100 steps; bytes kept for it are counted for esmeta and for
autograd through the naive loop.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
    os.environ.setdefault(name, "1")

from esmeta.run.cli import prepare_process  # noqa: E402

# As every training run does; all contenders profit.
prepare_process()

import torch  # noqa: E402
from torch import Tensor  # noqa: E402

from esmeta import kernels  # noqa: E402
from esmeta.kernels._recurrence import advance, constants  # noqa: E402

STEPS = 100


class Size(NamedTuple):
    """``members`` P, ``trials`` B, neurons n, depth S."""

    members: int
    trials: int
    neurons: int
    depth: int


CPU = (Size(256, 16, 20, 2), Size(1, 128, 20, 4), Size(1, 128, 100, 4), Size(8, 16, 200, 4))
CPU_GRADIENT = (Size(1, 64, 20, 2), Size(1, 16, 100, 2))
GPU = (Size(1, 16384, 20, 4), Size(1, 8192, 64, 4), Size(1, 4096, 100, 4), Size(1, 2048, 200, 4))
GPU_GRADIENT = (Size(1, 2048, 20, 4), Size(1, 512, 100, 4), Size(1, 512, 200, 4))


class Inputs(NamedTuple):
    """Parameters, fast weights ``[P, B, n, n]`` (transposed memory) and x ``[T, P, B, n]``."""

    alpha: Tensor
    kappa: Tensor
    beta: Tensor
    W: Tensor
    x: Tensor


def inputs(size: Size, steps: int, device: str) -> Inputs:
    """Random parameters near the identity whose memory neither fades nor explodes."""
    rng = torch.Generator().manual_seed(0)
    P, B, n, S = size

    def normal(scale: float, *shape: int) -> Tensor:
        return (scale * torch.randn(*shape, generator=rng)).to(device)

    kappa, beta = normal(0.02, P, S, S + 1), normal(0.02, P, S, S + 1)
    rounds = torch.arange(S)
    kappa[:, rounds, rounds + 1] += 1
    beta[:, rounds, rounds] = 0.97
    W = normal(0.5 / n**0.5, P, B, n, n).mT
    return Inputs(normal(0.02, P, n, n), kappa, beta, W, normal(1.0, steps, P, B, n))


def esmeta_steps(i: Inputs, count: int) -> tuple[Tensor, Tensor]:
    """A loop of prepared steps, as a rollout makes them: in place from the second one on."""
    prepared, W, y = kernels.prepare(*i[:3]), i.W, i.x[0]
    for t in range(count):
        y, W = kernels.step_prepared(prepared, W, i.x[t % len(i.x)], in_place=t > 0)
    return y, W


def torch_steps(i: Inputs, count: int) -> tuple[Tensor, Tensor]:
    """The shortcut in torch operations."""
    k, w_t, y = constants(kernels.prepare(*i[:3])), i.W.mT.contiguous(), i.x[0]
    for t in range(count):
        y, w_t, _ = advance(k, w_t, i.x[t % len(i.x)])
    return y, w_t.mT


def loop_steps(step: Callable[..., Any], i: Inputs, count: int) -> tuple[Tensor, Tensor]:
    """A loop of ``step(W, v, alpha, kappa, beta)``."""
    W, y = i.W.contiguous(), i.x[0]
    for t in range(count):
        y, W = step(W, i.x[t % len(i.x)], *i[:3])
    return y, W


def scan(i: Inputs, count: int) -> tuple[Tensor, Tensor]:
    """One call for the whole sequence."""
    return kernels.plastic_scan(i.W, i.x[:count], *i[:3])


def gru(size: Size, i: Inputs) -> Callable[[int], Any]:
    """A GRU of the same width on the same inputs, ``[T, P B, n]``."""
    net = torch.nn.GRU(size.neurons, size.neurons).to(i.x.device)
    return lambda count: net(i.x[:count].flatten(1, 2))


def jax_scan(size: Size, i: Inputs) -> Callable[[int], Any] | None:
    """The naive recursion compiled by JAX, on JAX's own default device; None without JAX."""
    try:
        import jax
        import jax.numpy as jnp
    except ImportError:
        return None
    alpha, kappa, beta = (jnp.asarray(t[0].cpu().numpy()) for t in i[:3])
    W = jnp.asarray(i.W[0].cpu().numpy())
    x = jnp.asarray(i.x[:, 0].cpu().numpy())

    def step(W: Any, v: Any) -> tuple[Any, Any]:
        matrices, posts = [W], [v]
        for s in range(size.depth):
            posts.append(jnp.tanh(matrices[-1] @ posts[-1]) * kappa[s, s + 1])
            posts[-1] += sum(kappa[s, k] * posts[k] for k in range(s + 1))
            new = sum(beta[s, k] * matrices[k] for k in range(s + 1))
            outer = posts[s][:, None] * posts[s][None, :]
            matrices.append(new + beta[s, s + 1] * alpha * outer)
        return matrices[-1], posts[-1]

    run = jax.jit(jax.vmap(lambda W, x: jax.lax.scan(step, W, x), in_axes=(0, 1)))
    return lambda count: jax.block_until_ready(run(W, x[:count]))


def median_rates(
    contenders: dict[str, tuple[Callable[[int], Any], int]], size: Size, device: str, repeats: int
) -> dict[str, float]:
    """Environment steps per second of ``call(count)``, interleaved."""
    clock = time.process_time if device == "cpu" else time.perf_counter
    names, seconds = list(contenders), {name: [] for name in contenders}
    for repeat in range(repeats + 1):
        for shift in range(len(names)):
            name = names[(repeat + shift) % len(names)]
            call, count = contenders[name]
            _wait(device)
            start = clock()
            call(count)
            _wait(device)
            if repeat:  # the first one warms up
                seconds[name].append((clock() - start) / count)
    trials = size.members * size.trials
    return {name: trials / statistics.median(times) for name, times in seconds.items()}


def _wait(device: str) -> None:
    if device != "cpu":
        torch.cuda.synchronize(device)


def error(got: tuple[Tensor, Tensor], want: tuple[Tensor, Tensor]) -> float:
    """Largest difference relative to the largest value, over y and W."""
    pairs = zip(got, want, strict=True)
    return max(float((g.double() - w).abs().max() / w.abs().max()) for g, w in pairs)


@torch.no_grad()
def forward(size: Size, device: str, repeats: int, compiled: bool) -> dict[str, Any]:
    """Rates of all contenders for single steps and for scans."""
    i = inputs(size, STEPS, device)
    exact = Inputs(*(t.double() for t in i))
    reference = kernels.plastic_reference
    want = loop_steps(reference, exact, 3)
    step = {
        "esmeta": functools.partial(esmeta_steps, i),
        "torch": functools.partial(torch_steps, i),
        "naive": functools.partial(loop_steps, reference, i),
    }
    if compiled:
        step["compiled"] = functools.partial(loop_steps, torch.compile(reference), i)
    errors = {name: error(call(3), want) for name, call in step.items()}
    errors["scan"] = error(_last(scan(i, 3)), want)
    calls: dict[str, tuple[Callable[[int], Any], int]] = {n: (c, 30) for n, c in step.items()}
    calls["scan"] = (functools.partial(scan, i), STEPS)
    calls["GRU"] = (gru(size, i), STEPS)
    peer = jax_scan(size, i) if size.members == 1 else None
    if peer is not None:
        calls["jax"] = (peer, STEPS)
    assert max(errors.values()) < 1e-5, errors
    return {"rates": median_rates(calls, size, device, repeats), "errors": errors}


def _last(result: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    return result[0][-1], result[1]


def gradient(size: Size, device: str, repeats: int) -> dict[str, Any]:
    """Rates of forward and backward over 100 steps, and bytes kept for the backward pass."""
    i = Inputs(*(t.detach().requires_grad_() for t in inputs(size, STEPS, device)))

    def backward(call: Callable[[int], Any]) -> Callable[[int], None]:
        return lambda count: call(count)[0].sum().backward()

    def naive(count: int) -> tuple[Tensor, Tensor]:
        W, ys = i.W, []
        for t in range(count):
            y, W = kernels.plastic_reference(W, i.x[t], *i[:3])
            ys.append(y)
        return torch.stack(ys), W

    calls = {"esmeta": functools.partial(scan, i), "naive": naive, "GRU": gru(size, i)}
    kept = {name: _kept(lambda call=call: call(STEPS)) for name, call in calls.items()}
    rates = median_rates(
        {n: (backward(c), STEPS) for n, c in calls.items()}, size, device, max(2, repeats // 2)
    )
    return {"rates": rates, "bytes_kept": kept}


def _kept(call: Callable[[], Any]) -> int:
    kept: dict[int, int] = {}
    alive: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        alive.append(tensor)  # a freed storage could give its address to the next one and hide it
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        call()
    return sum(kept.values())


def show(kind: str, size: Size, result: dict[str, Any]) -> None:
    """One line per contender, with esmeta's (for sequences: the scan's) rate over it."""
    rates = result["rates"]
    print(f"\n{kind}: P={size.members} B={size.trials} n={size.neurons} S={size.depth}")
    for name, rate in rates.items():
        own = rates.get("scan", rates["esmeta"]) if name in ("GRU", "jax") else rates["esmeta"]
        extra = f"{result['errors'][name]:9.1e}" if name in result.get("errors", {}) else ""
        if "bytes_kept" in result:
            extra = f"{result['bytes_kept'][name] / 1e6:8.1f} MB kept"
        print(f"  {name:9s} {rate:14,.0f} env-steps/s   {own / rate:6.2f} x   {extra}")


def main() -> None:
    """Run and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)  # noqa: E501  # fmt: skip
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--no-compile", action="store_true", help="leave out torch.compile")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    cpu = options.device == "cpu"
    results = []
    print(kernels.explain(options.device, 100, 4, requires_grad=True))
    for size in CPU if cpu else GPU:
        result = forward(size, options.device, options.repeats, not options.no_compile)
        show("forward", size, result)
        results.append({"kind": "forward", "size": size._asdict(), **result})
    for size in CPU_GRADIENT if cpu else GPU_GRADIENT:
        result = gradient(size, options.device, options.repeats)
        show("gradient", size, result)
        results.append({"kind": "gradient", "size": size._asdict(), **result})
    if options.json:
        options.json.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
