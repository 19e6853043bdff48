"""A network of dense layers with tanh between them, as LLVM instructions; float32.

Four rows are taken through all layers at once. Bits of a row depend on nothing but the row.
"""

from __future__ import annotations

from itertools import pairwise

from kernel import TOGETHER, Machine, Shape, product, tanh
from llvmlite import ir
from writer import Place, Vector, Whole, Writer


class Dense:
    """The function for layers of widths ``sizes``, with or without tanh behind the last one.

    The input lies in parts of widths ``parts``, side by side a row. The table: addresses of the
    parts, y and the constants of ``_cpu_run``; of weight, bias and hidden of every layer; then the
    sizes population, batch and keep (1: store each layer's output in ``hidden``).
    """

    def __init__(
        self, function: ir.Function, parts: list[int], sizes: list[int], squash: bool, on: Machine
    ) -> None:
        self.on, self.squash = on, squash
        self.parts, self.sizes = parts, [sum(parts), *sizes]
        self.last = len(sizes) - 1
        each = [f"{name}{k}" for k in range(len(sizes)) for name in ("weight", "bias", "hidden")]
        names = [*(f"x{k}" for k in range(len(parts))), "y", "constants", *each]
        self.w = Writer(function, names, ["population", "batch", "keep"])
        self.at = self.w.at
        wide = max(on.padded(size) for size in self.sizes)
        self.scratch = [self.w.room(TOGETHER * wide) for _ in range(2)]

    def run(self) -> None:
        """Blocks ``low`` to ``high`` of four rows each."""
        w, batch = self.w, self.w.size["batch"]
        groups = (batch + (TOGETHER - 1)) // TOGETHER
        keep = w.size["keep"].compare("!=", 0)
        with w.loop(w.low, w.high) as block:
            p, first = block // groups, block % groups * TOGETHER
            there = (batch - first).at_most(TOGETHER)
            place = p * batch + first
            # A block that is not full computes its last row again.
            rows = self._inputs([place + (there - 1).at_most(t) for t in range(TOGETHER)])
            out = self.scratch[0]
            for layer, (before, after) in enumerate(pairwise(self.sizes)):
                out, columns = self.scratch[layer % 2], self.on.padded(after)
                self._layer(layer, p, rows, Shape(before, columns), out)
                if layer < self.last or self.squash:
                    with w.loop(0, TOGETHER * columns // 16) as k:
                        out[k * 16] = tanh(self.at["constants"], out[k * 16, 16])
                rows = [out + t * columns for t in range(TOGETHER)]
                if layer < self.last:
                    with w.when(keep):
                        self._hand_out(out, after, self.at[f"hidden{layer}"], place, there)
            self._hand_out(out, self.sizes[-1], self.at["y"], place, there)
        w.b.ret_void()

    def _inputs(self, places: list[Whole]) -> list[Place]:
        """Where the four rows of the input lie, put together if they are in parts."""
        if len(self.parts) == 1:
            return [self.at["x0"] + place * self.parts[0] for place in places]
        # The first layer writes into the other one.
        rows = [self.scratch[1] + t * self.sizes[0] for t in range(TOGETHER)]
        for row, place in zip(rows, places, strict=True):
            offset = 0
            for k, width in enumerate(self.parts):
                (self.at[f"x{k}"] + place * width).copy_to(row + offset, width)
                offset += width
        return rows

    def _layer(self, layer: int, p: Whole, rows: list[Place], shape: Shape, out: Place) -> None:
        weight = self.at[f"weight{layer}"] + p * shape.size
        bias = self.at[f"bias{layer}"] + p * shape.columns

        def take(t: int, at: int, value: Vector) -> None:
            out[t * shape.columns + at] = value + bias[at, value.width]

        product(self.w, self.on, rows, weight, shape, take)

    def _hand_out(self, rows: Place, width: int, target: Place, place: Whole, there: Whole) -> None:
        with self.w.loop(0, there) as t:
            (rows + t * self.on.padded(width)).copy_to(target + (place + t) * width, width)
