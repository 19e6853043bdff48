"""The plastic recurrence for one size, as LLVM instructions: steps and scans, float32.

Sums stay in registers: a product takes four trials at once where they share a matrix, and every
sum runs in two chains (even and odd rows) whatever the machine, so that bits do not depend on the
width of its vectors. The function allocates nothing, calls nothing and holds no constants, so that
its code runs wherever it is put.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from kernel import TOGETHER, Block, Kernel, Machine, Shape, Size, product, sums, tanh
from llvmlite import ir
from writer import Index, Piece, Place, Vector, Whole, fma, pieces, tiles
from writes import WRITES, Given

POINTERS = "first x start mask alpha kappa composite write y last reads kept constants".split()
SIZES = ("steps", "population", "batch", "starts", "keep", "every")
"""The table that the function gets: addresses of POINTERS, then SIZES, 64 bits each.

``starts`` is the second axis of ``start`` (0: no resets); ``keep`` 1 stores what a gradient needs;
shapes as in ``_cpu``, whose ``CONSTANTS`` are the ``constants``.
"""
_FAR = 4096  # a matrix of more numbers is fetched early: the first cache cannot hold it


class Forward(Kernel):
    """The function for one size.

    Scratch is ``[post S+1][pre S][z][query]`` of ``[4, m]`` each, then ``gains [S, m]``; what lies
    beyond n columns is and stays 0.
    """

    def __init__(self, function: ir.Function, size: Size, on: Machine) -> None:
        shape = Shape(size.neurons, on.padded(size.neurons))
        super().__init__(function, size, on, shape, (POINTERS, SIZES))
        self.write = WRITES[self.rule]
        self.columns = pieces(self.m, on.lanes)
        self.block = TOGETHER * self.m
        count = (2 * self.depth + 3) * self.block + -(-self.depth * self.m // 16) * 16
        self.scratch = self.w.room(count)
        self.now = self.w.variable()
        with self.w.loop(0, count // 16) as i:
            self.scratch[i * 16] = self.w.zero(16)
        self.z, self.query, self.gains = (self.post(2 * self.depth + k) for k in (1, 2, 3))

    def post(self, s: Index) -> Place:
        return self.scratch + s * self.block

    def pre(self, s: Index) -> Place:
        return self.post(s) if self.write is None else self.post(s + (self.depth + 1))

    def run(self) -> None:
        """Blocks ``low`` to ``high`` of four trials, each through all steps."""
        w = self.w
        with w.loop(w.low, w.high) as number:
            block = Block(number, self.size["batch"])
            with w.loop(0, self.size["steps"]) as step:
                self._step(block, step)
        w.b.ret_void()

    def _step(self, block: Block, step: Whole) -> None:
        w, at, depth, trials = self.w, self.at, self.depth, block.trials
        total = self.size["population"] * self.size["batch"]
        row = step * total
        fresh = step.compare("==", 0)  # still in the matrices that came in
        self.now.set(fresh.choose(at["first"], at["last"]))
        keep = self.size["keep"].compare("!=", 0)
        due = (step % self.size["every"]).compare("==", 0) & ~fresh
        with w.when(keep & due), w.loop(0, block.there) as t:
            place = (step // self.size["every"] - 1) * total + trials[0] + t
            self.copy(self.matrix(self.now.get(), trials[0] + t), self.matrix("kept", place))
        with w.when(self.may_start()):
            self._restart(block, row)
        for t, trial in enumerate(trials):
            (at["x"] + (row + trial) * self.n).copy_to(self.post(0) + t * self.m, self.n)
        now = self.now.get()
        kappa, composite, final = self.coefficients(block.p)
        alpha = self.matrix("alpha", block.p)
        for s in range(1, depth + 1):
            rows = composite + (s - 1) * (depth + 1)
            if self.write is not None:
                self._factor(s - 1, block.p)
            if s < depth:
                self._read(s, [self.matrix(now, trial) for trial in trials], rows)
            else:
                with w.loop(0, block.there) as t:
                    old, new = (self.matrix(m, trials[0] + t) for m in (now, at["last"]))
                    self._read_and_write(t * self.m, rows, final, alpha, old, new)
            self._finish(s, rows, kappa + (s - 1) * (depth + 1), alpha)
            with w.when(keep), w.loop(0, block.there) as t:
                place = (step * depth + (s - 1)) * total + trials[0] + t
                (self.z + t * self.m).copy_to(at["reads"] + place * self.n, self.n)
        with w.loop(0, block.there) as t:
            target = at["y"] + (row + trials[0] + t) * self.n
            (self.post(depth) + t * self.m).copy_to(target, self.n)

    def _restart(self, block: Block, row: Whole) -> None:
        """Put the matrices of a block into ``last``, started afresh where the mask is set."""
        w, mask = self.w, self.at["mask"]
        marks = [mask.marked(row + trial) for trial in block.trials]
        now = self.now.get()
        with w.when(marks[0] | marks[1] | marks[2] | marks[3]):
            with w.loop(0, block.there) as t:
                trial = block.trials[0] + t
                start = self.start(block.p, block.first + t)
                source = mask.marked(row + trial).choose(start, self.matrix(now, trial))
                self.copy(source, self.matrix("last", trial))
            self.now.set(self.at["last"])

    def _factor(self, s: int, p: Whole) -> None:
        """U of V_s for all trials of a block."""
        assert self.write is not None and not self.write.deep, "such rules run in torch operations"
        tensors, pre = self.at["write"] + p * self.write.numbers(self.shape), self.pre(s)

        def take(t: int, at: int, value: Vector) -> None:
            pre[t * self.m + at] = value

        given = Given(self.w, self.on, self.shape, tensors, pre)
        self.write.factor(given, self._rows(self.post(s)), take)

    def _rows(self, table: Place) -> list[Place]:
        return [table + t * self.m for t in range(TOGETHER)]

    def _finish(self, s: int, row: Place, kappa: Place, alpha: Place) -> None:
        """From z = b_{s-1} W V_{s-1} to V_s for all trials of a block."""
        w = self.w
        if s > 1:
            with w.loop(0, s - 1) as before:
                correct = self._correct if self.alpha else self._correct_alike
                correct(s, before, row + (before + 1), alpha)
        with w.loop(0, self.block // 16) as k:
            i = k * 16
            read = tanh(self.at["constants"], self.z[i, 16])
            self.z[i] = read
            total = kappa.copies(s, 16) * read
            for before in range(s):
                total = fma(kappa.copies(before, 16), self.post(before)[i, 16], total)
            self.post(s)[i] = total

    def _read(self, s: int, matrices: list[Place], row: Place) -> None:
        """``z[t] = b_{s-1} V_{s-1}[t] @ matrices[t]``."""
        most, rows = (self.on.registers - 8) // 2, self._rows(self.post(s - 1))
        for tile in tiles(self.columns, most):
            together = max(k for k in (1, 2, 4) if k == 1 or k * len(tile) <= most)
            for low in range(0, TOGETHER, together):
                some = slice(low, low + together)
                far = together == 1 and self.shape.size > _FAR
                totals = sums(self.w, rows[some], matrices[some], self.shape, tile, far)
                for t, values in enumerate(totals):
                    self._heard((low + t) * self.m, tile, values, row if s > 1 else None)

    def _heard(
        self, offset: Index, tile: Sequence[Piece], values: list[Vector], scale: Place | None
    ) -> None:
        """Keep the sums of a tile as z, times b_{s-1} where it is not 1."""
        for (at, width), value in zip(tile, values, strict=True):
            self.z[offset + at] = value if scale is None else scale.copies(0, width) * value

    def _correct(self, s: int, before: Whole, c: Place, alpha: Place) -> None:
        """``z += c_{s-1,j} V_j * alpha (U_j * V_{s-1})`` for j = ``before``, c at its place."""
        post = self.post(before)
        with self.w.loop(0, self.block // 16) as k:
            i = k * 16
            self.query[i] = self.pre(before)[i, 16] * self.post(s - 1)[i, 16]

        def take(t: int, at: int, heard: Vector) -> None:
            i, width = t * self.m + at, heard.width
            gain = c.copies(0, width) * post[i, width]
            self.z[i] = fma(gain, heard, self.z[i, width])

        product(self.w, self.on, self._rows(self.query), alpha, self.shape, take)

    def _correct_alike(self, s: int, before: Whole, c: Place, _: Place) -> None:
        """The same without alpha: one number per trial instead of a product."""
        with self.w.loop(0, TOGETHER) as t:
            place = t * self.m
            left, right = self.pre(before) + place, self.post(s - 1) + place
            total = self._dot(left, right)
            post, z = self.post(before) + place, self.z + place
            total = c.copies(0, 1) * total
            for at, width in self.columns:
                z[at] = fma(total.first(width), post[at, width], z[at, width])

    def _dot(self, left: Place, right: Place) -> Vector:
        def eight(k: Index, sums: list[Vector]) -> list[Vector]:
            return [fma(left[k * 8, 8], right[k * 8, 8], sums[0])]

        (sums,) = self.w.fold(self.n // 8, [self.w.zero(8)], eight, 2)
        parts = [sums.part(k, 1) for k in range(8)]
        while len(parts) > 1:
            parts = [a + b for a, b in zip(parts[::2], parts[1::2], strict=True)]
        total = parts[0]
        for i in range(self.n // 8 * 8, self.n):
            total = fma(left[i, 1], right[i, 1], total)
        return total

    def _read_and_write(
        self, offset: Whole, row: Place, final: Place, alpha: Place, old: Place, new: Place
    ) -> None:
        """The last read of a trial, and what it writes: ``old`` is fetched once for both.

        ``z = b_{S-1} V_{S-1} @ old``, ``new = b_S old + alpha * sum_l U_l (c_l V_l)^T``; ``new``
        may be ``old``.
        """
        for at, width in self.columns:
            for s in range(self.depth):
                value = (self.post(s) + offset)[at, width]
                self.gains[s * self.m + at] = final.copies(1 + s, width) * value
        held = 2 * self.depth + 3
        least = (self.on.registers - 6) // 2
        most = max(least if self.on.registers < 32 else 1, (self.on.registers - held - 4) // 2)
        for tile in tiles(self.columns, most):
            rows = self._writing(tile, offset, final, alpha, old, new)
            zeros = [self.w.zero(width) for _, width in tile]
            totals = self.w.fold(
                self.n // 2, zeros * 2, lambda k, sums, rows=rows: rows([k * 2, k * 2 + 1], sums), 1
            )
            even, odd = totals[: len(tile)], totals[len(tile) :]
            if self.n % 2:
                even = rows([self.n - 1], even)
            values = [a + b for a, b in zip(even, odd, strict=True)]
            self._heard(offset, tile, values, row if self.depth > 1 else None)

    def _writing(
        self, tile: Sequence[Piece], offset: Whole, final: Place, alpha: Place, old: Place,
        new: Place,
    ) -> Callable[[list[Index], list[Vector]], list[Vector]]:  # fmt: skip
        """What writes some rows of a tile anew and gives the sums with the old ones added."""
        rounds, wide = range(self.depth), max(width for _, width in tile)

        def rows(lines: list[Index], sums: list[Vector]) -> list[Vector]:
            # Loaded before the first store, behind which LLVM would have to load them again.
            last = self.post(self.depth - 1) + offset
            told = [last.copies(i, wide) for i in lines]
            pres = [self.pre(s) + offset for s in rounds]
            factors = [[pre.copies(i, wide) for pre in pres] for i in lines]
            fade, sums = final.copies(0, wide), list(sums)
            for k, (at, width) in enumerate(tile):
                gains = [self.gains[s * self.m + at, width] for s in rounds]
                values = []
                for odd, i in enumerate(lines):
                    row, here = old[i * self.m + at, width], odd * len(tile) + k
                    sums[here] = fma(told[odd].part(0, width), row, sums[here])
                    written = factors[odd][0].part(0, width) * gains[0]
                    for factor, gain in zip(factors[odd][1:], gains[1:], strict=True):
                        written = fma(factor.part(0, width), gain, written)
                    value = fade.part(0, width) * row
                    if self.alpha:
                        values.append(fma(alpha[i * self.m + at, width], written, value))
                    else:
                        values.append(written + value)
                for i, value in zip(lines, values, strict=True):
                    new[i * self.m + at] = value
            return sums

        return rows
