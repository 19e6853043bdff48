"""A network of dense layers with tanh between them, as LLVM instructions; float32.

Four rows are taken through all layers at once. Bits of a row depend on nothing but the row.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

from block import TOGETHER, Machine, Shape, product, tanh
from llvmlite import ir
from writer import F32, Writer


class Dense:
    """The function for layers of widths ``sizes``, with or without tanh behind the last one.

    The input lies in parts of widths ``parts``, side by side a row. The table: addresses of the
    parts, y and the constants of ``_cpu_run``; of weight, bias and hidden of every layer; then the
    sizes population, batch and keep (1: store each layer's output in ``hidden``).
    """

    def __init__(
        self,
        function: ir.Function,
        parts: list[int],
        sizes: list[int],
        squash: bool,
        on: Machine,
    ) -> None:
        self.w, self.on, self.squash = Writer(function), on, squash
        self.parts, self.sizes = parts, [sum(parts), *sizes]
        self.layers = range(len(sizes))
        each = [f"{name}{k}" for k in self.layers for name in ("weight", "bias", "hidden")]
        table, self.low, self.high = function.args
        inputs = [f"x{k}" for k in range(len(parts))]
        names = [*inputs, "y", "constants", *each]
        self.of = self.w.table(table, names, ["population", "batch", "keep"])
        wide = max(on.padded(size) for size in self.sizes)
        self.scratch = [self.w.room(F32, TOGETHER * wide) for _ in range(2)]

    def run(self) -> None:
        """Blocks ``low`` to ``high`` of four rows each."""
        w, of = self.w, self.of
        groups = w.b.sdiv(w.add(of["batch"], TOGETHER - 1), w.whole(TOGETHER))
        keep = w.b.icmp_signed("!=", of["keep"], w.whole(0))
        with w.loop(self.low, self.high) as block:
            p, first = w.b.sdiv(block, groups), w.mul(w.b.srem(block, groups), TOGETHER)
            there = w.least(w.whole(TOGETHER), w.b.sub(of["batch"], first))
            # A block that is not full computes its last row again.
            inside = [w.least(w.whole(t), w.b.sub(there, w.whole(1))) for t in range(TOGETHER)]
            place = w.add(w.mul(p, of["batch"]), first)
            rows = self._inputs([w.add(place, t) for t in inside])
            out = self.scratch[0]
            for layer, (before, after) in enumerate(pairwise(self.sizes)):
                last = layer == self.layers[-1]
                out = self.scratch[layer % 2]
                self._layer(layer, p, rows, Shape(before, self.on.padded(after)), out)
                if not last or self.squash:
                    with w.loop(0, TOGETHER * self.on.padded(after) // 16) as k:
                        i = w.mul(k, 16)
                        w.store(tanh(w, of["constants"], w.load(out, i, 16)), out, i)
                rows = [w.at(out, t * self.on.padded(after)) for t in range(TOGETHER)]
                if not last:
                    with w.b.if_then(keep):
                        self._hand_out(out, after, of[f"hidden{layer}"], place, there)
            self._hand_out(out, self.sizes[-1], of["y"], place, there)
        w.b.ret_void()

    def _inputs(self, places: list[Any]) -> list[Any]:
        """Where the four rows of the input lie, put together if they are in parts."""
        w = self.w
        if len(self.parts) == 1:
            return [w.at(self.of["x0"], w.mul(place, self.parts[0])) for place in places]
        # The first layer writes into the other one.
        rows = [w.at(self.scratch[1], t * self.sizes[0]) for t in range(TOGETHER)]
        for row, place in zip(rows, places, strict=True):
            offset = 0
            for k, width in enumerate(self.parts):
                source = w.at(self.of[f"x{k}"], w.mul(place, width))
                w.copy(width, source, w.at(row, offset))
                offset += width
        return rows

    def _layer(self, layer: int, p: Any, rows: list[Any], shape: Shape, out: Any) -> None:
        w, of = self.w, self.of
        weight = w.at(of[f"weight{layer}"], w.mul(p, shape.size))
        bias = w.at(of[f"bias{layer}"], w.mul(p, shape.columns))

        def take(t: int, at: int, value: Any) -> None:
            total = w.b.fadd(value, w.load(bias, at, value.type.count))
            w.store(total, out, t * shape.columns + at)

        product(w, self.on, rows, weight, shape, take)

    def _hand_out(self, rows: Any, width: int, target: Any, place: Any, there: Any) -> None:
        w = self.w
        with w.loop(0, there) as t:
            source = w.at(rows, w.mul(t, self.on.padded(width)))
            w.copy(width, source, w.at(target, w.mul(w.add(place, t), width)))
