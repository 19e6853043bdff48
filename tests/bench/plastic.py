"""Speed of the plastic recurrence: esmeta's kernels, the naive loop and its compiled form.

    python tests/bench/plastic.py
    python tests/bench/plastic.py --device cuda --json plastic.json

One process, which keeps freed memory as a training run does; on a CPU one thread and CPU seconds.
Every contender's results are compared with the float64 reference before the clock starts, and each
repeat times all contenders in an order that rotates. Rates are environment steps of single trials
per second, medians over repeats.

* ``esmeta``: prepared steps, in place as a rollout makes them; ``step`` are steps that are not
  prepared; ``scan`` is ``plastic_scan``.
* ``torch``: the same shortcut in torch operations (what runs in float64).
* ``naive``: Algorithm 1 as printed, eager; ``compiled``: the same under ``torch.compile``, which
  needs a C++ compiler; its first call is not timed.
* ``jax``: the naive recursion under jit, vmap and lax.scan, where jax is installed.
* ``GRU``: torch's GRU of the same width over the same sequence, which is what RL2 pays.

``gradient`` is forward and backward of 100 steps, on a CPU beside its bound: the multiply-adds that
it cannot do without, at the rate of a loop that does nothing else. With n^2 as the unit, a trial's
step takes ``2 S + 2 + S (S - 1) / 2`` forward (reads, write, corrections) and three times as many
back: S + 2 to rebuild W, 2 S + 2 for what goes back through the write, S for the reads, S + 1 to
pass dJ/dW on, S + 1 for alpha and 3 S (S - 1) / 2 for the corrections. A GRU takes 18.
"""

from __future__ import annotations

import argparse
import ctypes
import functools
import json
import os
import statistics
import sys
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


CPU = (
    *(Size(256, 16, 20, 2), Size(1, 128, 20, 4), Size(16, 8, 100, 4)),
    *(Size(1, 128, 100, 4), Size(8, 16, 200, 4)),
)
CPU_GRADIENT = (
    *(Size(1, 64, 20, 2), Size(1, 64, 64, 1), Size(1, 64, 64, 2), Size(1, 64, 128, 1)),
    *(Size(1, 64, 128, 2), Size(1, 16, 100, 4), Size(1, 20, 200, 1), Size(1, 20, 200, 2)),
)
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


def gru(net: torch.nn.GRU, i: Inputs) -> Callable[[int], Any]:
    """A GRU of the same width on the same inputs, ``[T, P B, n]``."""
    return lambda count: net(i.x[:count].flatten(1, 2))


def jax_scan(size: Size, i: Inputs, gradient: bool = False) -> Callable[[int], Any] | None:
    """The naive recursion compiled by JAX, on JAX's own default device; None without JAX."""
    try:
        import jax
        import jax.numpy as jnp
    except ImportError:
        return None
    parameters = [jnp.asarray(t[0].detach().cpu().numpy()) for t in i[:4]]
    x = jnp.asarray(i.x[:, 0].detach().cpu().numpy())

    def sequence(alpha: Any, kappa: Any, beta: Any, W: Any, x: Any) -> Any:
        def step(W: Any, v: Any) -> tuple[Any, Any]:
            matrices, posts = [W], [v]
            for s in range(size.depth):
                posts.append(jnp.tanh(matrices[-1] @ posts[-1]) * kappa[s, s + 1])
                posts[-1] += sum(kappa[s, k] * posts[k] for k in range(s + 1))
                new = sum(beta[s, k] * matrices[k] for k in range(s + 1))
                outer = posts[s][:, None] * posts[s][None, :]
                matrices.append(new + beta[s, s + 1] * alpha * outer)
            return matrices[-1], posts[-1]

        return jax.vmap(lambda W, x: jax.lax.scan(step, W, x), in_axes=(0, 1))(W, x)

    def total(*given: Any) -> Any:
        return sequence(*given)[1].sum()

    run = jax.jit(jax.grad(total, argnums=(0, 1, 2, 3, 4)) if gradient else sequence)
    return lambda count: jax.block_until_ready(run(*parameters, x[:count]))


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
        "step": functools.partial(loop_steps, kernels.plastic_step, i),
        "torch": functools.partial(torch_steps, i),
        "naive": functools.partial(loop_steps, reference, i),
    }
    if compiled:
        step["compiled"] = functools.partial(loop_steps, torch.compile(reference), i)
    errors = {name: error(call(3), want) for name, call in step.items()}
    errors["scan"] = error(_last(scan(i, 3)), want)
    calls: dict[str, tuple[Callable[[int], Any], int]] = {n: (c, 30) for n, c in step.items()}
    calls["scan"] = (functools.partial(scan, i), STEPS)
    calls["GRU"] = (gru(torch.nn.GRU(size.neurons, size.neurons).to(device), i), STEPS)
    peer = jax_scan(size, i) if size.members == 1 else None
    if peer is not None:
        calls["jax"] = (peer, STEPS)
    assert max(errors.values()) < 1e-5, errors
    return {"rates": median_rates(calls, size, device, repeats), "errors": errors}


def _last(result: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    return result[0][-1], result[1]


def gradient(size: Size, device: str, repeats: int) -> dict[str, Any]:
    """Rates of forward and backward over 100 steps, on a CPU with their bound."""
    i = Inputs(*(t.detach().requires_grad_() for t in inputs(size, STEPS, device)))

    def backward(call: Callable[[int], Any], *leaves: Tensor) -> Callable[[int], Any]:
        return lambda count: torch.autograd.grad(call(count)[0].sum(), leaves)

    net = torch.nn.GRU(size.neurons, size.neurons).to(device)
    calls: dict[str, tuple[Callable[[int], Any], int]] = {
        "esmeta": (backward(functools.partial(scan, i), *i), STEPS),
        "GRU": (backward(gru(net, i), i.x, *net.parameters()), STEPS),
    }
    rates = median_rates(calls, size, device, repeats)
    peer = jax_scan(size, i, gradient=True)
    if peer is not None:
        # By itself: it leaves threads that spin, and the others without their memory.
        rates |= median_rates({"jax": (peer, STEPS)}, size, device, 3)
    if device == "cpu":
        depth = size.depth
        work = 4 * (2 * depth + 2 + depth * (depth - 1) // 2) * size.neurons**2
        rates["bound"] = multiply_adds() / work
    return {"rates": rates}


@functools.cache
def multiply_adds() -> float:
    """Multiply-adds of float32 per CPU second of this core, in a loop that does nothing else."""
    sys.path.insert(0, str(Path(kernels.__file__).with_name("_compiler")))
    import llvmlite.binding as llvm
    from llvmlite import ir
    from writer import I64, PTR, Vector, Writer, fma

    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()
    module, chains, turns = ir.Module(), 12, 2_000_000
    kind = ir.FunctionType(ir.VoidType(), [PTR, I64, I64])
    w = Writer(ir.Function(module, kind, "loop"), ["numbers"], [])
    one = w.at["numbers"][0, 16]

    def turn(_: Any, sums: list[Vector]) -> list[Vector]:
        return [fma(one, total, one) for total in sums]

    for k, total in enumerate(w.fold(w.high, [one] * chains, turn)):
        w.at["numbers"][16 * k] = total
    w.b.ret_void()
    machine = llvm.Target.from_default_triple().create_target_machine(
        cpu=llvm.get_host_cpu_name(),
        features=llvm.get_host_cpu_features().flatten() + ",-prefer-256-bit",
        opt=3,
    )
    engine = llvm.create_mcjit_compiler(llvm.parse_assembly(str(module)), machine)
    engine.finalize_object()
    call = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64)(
        engine.get_function_address("loop")
    )
    numbers = torch.zeros(chains * 16)
    table = torch.tensor([numbers.data_ptr()])
    seconds = []
    for _ in range(9):
        start = time.process_time()
        call(table.data_ptr(), 0, turns)
        seconds.append(time.process_time() - start)
    return chains * 16 * turns / statistics.median(seconds)


def show(kind: str, size: Size, result: dict[str, Any]) -> None:
    """One line per contender, with esmeta's (for sequences: the scan's) rate over it."""
    rates = result["rates"]
    print(f"\n{kind}: P={size.members} B={size.trials} n={size.neurons} S={size.depth}")
    for name, rate in rates.items():
        own = rates.get("scan", rates["esmeta"]) if name in ("GRU", "jax") else rates["esmeta"]
        extra = f"{result['errors'][name]:9.1e}" if name in result.get("errors", {}) else ""
        print(f"  {name:9s} {rate:14,.0f} env-steps/s   {own / rate:6.2f} x   {extra}")


def main() -> None:
    """Run and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)  # noqa: E501  # fmt: skip
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--no-compile", action="store_true", help="leave out torch.compile")
    parser.add_argument("--gradient", action="store_true", help="gradients alone")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    cpu = options.device == "cpu"
    results = []
    print(kernels.explain(options.device, 100, 4, requires_grad=True))
    for size in () if options.gradient else CPU if cpu else GPU:
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
