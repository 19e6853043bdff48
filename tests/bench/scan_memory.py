"""Memory kept for the backward pass: plastic_scan against autograd through a loop of steps.

    python tests/bench/scan_memory.py

Per trial, the scan keeps T (S + 1) n numbers (inputs and tanh values) and ceil(T / k) n^2
(matrices), k = ceil(sqrt(T)); autograd keeps several n^2 for each of the T steps. Every storage
that autograd is asked to keep counts once, inputs included. Autograd goes through the same shortcut
in torch operations, not through the naive loop.
"""

import argparse
from math import ceil

import torch

from esmeta.kernels import plastic_scan, prepare
from esmeta.kernels._recurrence import advance, constants


def saved_bytes(path: str, P: int, B: int, n: int, S: int, T: int) -> int:
    """Bytes kept for the backward pass of T steps; ``path`` is "scan" or "autograd"."""
    rng = torch.Generator().manual_seed(0)

    def leaf(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=rng).mul_(0.1).requires_grad_()

    W, x, alpha = leaf(P, B, n, n), leaf(T, P, B, n), leaf(P, n, n)
    kappa, beta = leaf(P, S, S + 1), leaf(P, S, S + 1)
    kept: dict[int, int] = {}
    alive: list[torch.Tensor] = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        # A freed storage could give its address to the next one and hide it.
        alive.append(tensor)
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        if path == "scan":
            plastic_scan(W, x, alpha, kappa, beta)
        else:
            k, w_t = constants(prepare(alpha, kappa, beta)), W.mT.contiguous()
            for v in x.unbind(0):
                _, w_t, _ = advance(k, w_t, v)
    return sum(kept.values())


def main() -> None:
    """Print the table."""
    argparse.ArgumentParser(description=__doc__).parse_args()
    print(f"{'T':>5} {'n':>4} {'S':>2} {'scan MB':>9} {'formula':>9} {'autograd':>9} {'ratio':>6}")
    P, B = 1, 16
    for T, n, S in (
        *((T, 32, 2) for T in (64, 256, 1024)),
        *((128, n, 2) for n in (16, 64, 128)),
        *((128, 32, S) for S in (1, 2, 4)),
    ):
        scan, plain = (saved_bytes(path, P, B, n, S, T) for path in ("scan", "autograd"))
        formula = 4 * P * B * (T * (S + 1) * n + ceil(T / ceil(T**0.5)) * n * n)
        numbers = " ".join(f"{value / 1e6:9.2f}" for value in (scan, formula, plain))
        print(f"{T:5d} {n:4d} {S:2d} {numbers} {plain / scan:6.1f}")


if __name__ == "__main__":
    main()
