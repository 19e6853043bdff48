"""The plastic recurrence for one size, as LLVM instructions: steps and scans, float32.

Sums stay in registers: a product takes four trials at once where they share a matrix, and every
sum runs in two chains (even and odd rows) whatever the machine, so that bits do not depend on the
width of its vectors. The function allocates nothing, calls nothing and holds no constants, so that
its code runs wherever it is put.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from block import TOGETHER, Machine, Shape, product, sums, tanh
from llvmlite import ir
from writer import F32, I8, PTR, Piece, Writer, pieces, tiles

POINTERS = "first x start mask alpha kappa composite write y last reads kept constants".split()
SIZES = ("steps", "population", "batch", "starts", "keep", "every")
"""The table that the function gets: addresses of POINTERS, then SIZES, 64 bits each.

``starts`` is the second axis of ``start`` (0: no resets); ``keep`` 1 stores what a gradient needs;
shapes as in ``_cpu.run``, whose ``_CONSTANTS`` are the ``constants``.
"""
_FAR = 4096  # a matrix of more numbers is fetched early: the first cache cannot hold it


class Forward:
    """The function for one size.

    Scratch is ``[post S+1][pre S][z][query]`` of ``[4, m]`` each, then ``gains [S, m]``; what lies
    beyond n columns is and stays 0.
    """

    def __init__(
        self,
        function: ir.Function,
        neurons: int,
        depth: int,
        alpha: bool,
        linear: bool,
        on: Machine,
    ) -> None:
        self.w = Writer(function)
        self.n, self.m, self.depth = neurons, on.padded(neurons), depth
        self.alpha, self.linear, self.on = alpha, linear, on
        self.columns = pieces(self.m, on.lanes)
        self.shape = Shape(self.n, self.m)
        table, self.low, self.high = function.args
        self.of = self.w.table(table, POINTERS, SIZES)
        self.block = TOGETHER * self.m
        count = (2 * depth + 3) * self.block + -(-depth * self.m // 16) * 16
        self.scratch = self.w.room(F32, count)
        self.now = self.w.room(PTR)
        with self.w.loop(0, count // 16) as i:
            self.w.store(self.w.zero(16), self.scratch, self.w.mul(i, 16))

    def post(self, s: Any) -> Any:
        return self.w.at(self.scratch, self.w.mul(s, self.block))

    def pre(self, s: Any) -> Any:
        return self.post(self.w.add(self.depth + 1, s)) if self.linear else self.post(s)

    @property
    def z(self) -> Any:
        return self.post(2 * self.depth + 1)

    @property
    def query(self) -> Any:
        return self.post(2 * self.depth + 2)

    @property
    def gains(self) -> Any:
        return self.post(2 * self.depth + 3)

    def run(self) -> None:
        """Blocks ``low`` to ``high`` of four trials, each through all steps."""
        w, of = self.w, self.of
        groups = w.b.sdiv(w.add(of["batch"], TOGETHER - 1), w.whole(TOGETHER))
        with w.loop(self.low, self.high) as block:
            p, first = w.b.sdiv(block, groups), w.mul(w.b.srem(block, groups), TOGETHER)
            there = w.least(w.whole(TOGETHER), w.b.sub(of["batch"], first))
            # A block that is not full computes its last trial again.
            inside = [w.least(w.whole(t), w.b.sub(there, w.whole(1))) for t in range(TOGETHER)]
            trials = [w.add(w.mul(p, of["batch"]), first, t) for t in inside]
            with w.loop(0, of["steps"]) as step:
                self._step(p, first, there, trials, step)
        w.b.ret_void()

    def _step(self, p: Any, first: Any, there: Any, trials: list[Any], step: Any) -> None:
        w, of, depth = self.w, self.of, self.depth
        total = w.mul(of["population"], of["batch"])
        row = w.mul(step, total)
        fresh = w.b.icmp_signed("==", step, w.whole(0))  # still in the matrices that came in
        w.b.store(w.b.select(fresh, of["first"], of["last"]), self.now)
        keep = w.b.icmp_signed("!=", of["keep"], w.whole(0))
        due = w.b.icmp_signed("==", w.b.srem(step, of["every"]), w.whole(0))
        due = w.b.and_(due, w.b.not_(fresh))
        with w.b.if_then(w.b.and_(keep, due)), w.loop(0, there) as t:
            trial = w.add(trials[0], t)
            number = w.b.sub(w.b.sdiv(step, of["every"]), w.whole(1))
            place = w.add(w.mul(number, total), trial)
            self._copy(self._matrix(self._source(), trial), self._matrix(of["kept"], place))
        with w.b.if_then(w.b.icmp_signed("!=", of["starts"], w.whole(0))):
            self._restart(p, first, there, trials, row)
        for t, trial in enumerate(trials):
            source = w.at(of["x"], w.mul(w.add(row, trial), self.n))
            w.copy(self.n, source, w.at(self.post(0), t * self.m))
        now = self._source()
        kappa = w.at(of["kappa"], w.mul(p, depth * (depth + 1)))
        composite = w.at(of["composite"], w.mul(p, (depth + 1) ** 2))
        alpha = w.at(of["alpha"], w.mul(p, self.shape.size)) if self.alpha else None
        final = w.at(composite, depth * (depth + 1))
        for s in range(1, depth + 1):
            rows = w.at(composite, (s - 1) * (depth + 1))
            self._prepare(s, p)
            if s < depth:
                self._read(s, [self._matrix(now, trial) for trial in trials], rows)
            else:
                with w.loop(0, there) as t:
                    trial = w.add(trials[0], t)
                    old, new = self._matrix(now, trial), self._matrix(of["last"], trial)
                    self._read_and_write(w.mul(t, self.m), rows, final, alpha, old, new)
            self._finish(s, rows, kappa, alpha)
            with w.b.if_then(keep), w.loop(0, there) as t:
                place = w.add(w.mul(w.add(w.mul(step, depth), s - 1), total), trials[0], t)
                source = w.at(self.z, w.mul(t, self.m))
                w.copy(self.n, source, w.at(of["reads"], w.mul(place, self.n)))
        with w.loop(0, there) as t:
            target = w.at(of["y"], w.mul(w.add(row, trials[0], t), self.n))
            w.copy(self.n, w.at(self.post(depth), w.mul(t, self.m)), target)

    def _source(self) -> Any:
        return self.w.b.load(self.now, typ=PTR)

    def _matrix(self, base: Any, trial: Any) -> Any:
        return self.w.at(base, self.w.mul(trial, self.shape.size))

    def _copy(self, source: Any, target: Any) -> None:
        with self.w.loop(0, self.n) as i:
            row = self.w.mul(i, self.m)
            self.w.copy(self.m, self.w.at(source, row), self.w.at(target, row))

    def _restart(self, p: Any, first: Any, there: Any, trials: list[Any], row: Any) -> None:
        """Put the matrices of a block into ``last``, started afresh where the mask is set."""
        w, of = self.w, self.of
        hit = ir.Constant(I8, 0)
        for trial in trials:
            hit = w.b.or_(hit, w.b.load(w.at(of["mask"], w.add(row, trial), I8), typ=I8))
        now = self._source()
        with w.b.if_then(w.b.icmp_signed("!=", hit, ir.Constant(I8, 0))):
            with w.loop(0, there) as t:
                trial = w.add(trials[0], t)
                mark = w.b.load(w.at(of["mask"], w.add(row, trial), I8), typ=I8)
                own = w.least(w.add(first, t), w.b.sub(of["starts"], w.whole(1)))
                fresh = self._matrix(of["start"], w.add(w.mul(p, of["starts"]), own))
                marked = w.b.icmp_signed("!=", mark, ir.Constant(I8, 0))
                source = w.b.select(marked, fresh, self._matrix(now, trial))
                self._copy(source, self._matrix(of["last"], trial))
            w.b.store(of["last"], self.now)

    def _prepare(self, s: int, p: Any) -> None:
        """U of V_{s-1} for all trials of a block."""
        w = self.w
        if self.linear:
            matrix = w.at(self.of["write"], w.mul(p, self.shape.size))
            self._product(
                self.post(s - 1), matrix, lambda at, total: w.store(total, self.pre(s - 1), at)
            )

    def _finish(self, s: int, row: Any, kappa: Any, alpha: Any) -> None:
        """From z = b_{s-1} W V_{s-1} to V_s for all trials of a block."""
        w, depth = self.w, self.depth
        if s > 1:
            with w.loop(0, s - 1) as before:
                correct = self._correct if self.alpha else self._correct_alike
                correct(s, before, w.at(row, w.add(before, 1)), alpha)
        row = w.at(kappa, (s - 1) * (depth + 1))
        with w.loop(0, self.block // 16) as k:
            i = w.mul(k, 16)
            read = tanh(w, self.of["constants"], w.load(self.z, i, 16))
            w.store(read, self.z, i)
            total = w.b.fmul(w.copies(row, s, 16), read)
            for before in range(s):
                total = w.fma(w.copies(row, before, 16), w.load(self.post(before), i, 16), total)
            w.store(total, self.post(s), i)

    def _read(self, s: int, matrices: list[Any], row: Any) -> None:
        """``z[t] = b_{s-1} V_{s-1}[t] @ matrices[t]``."""
        w, most, rows = self.w, (self.on.registers - 8) // 2, self.post(s - 1)
        for tile in tiles(self.columns, most):
            together = max(k for k in (1, 2, 4) if k == 1 or k * len(tile) <= most)
            for low in range(0, TOGETHER, together):
                trials = range(low, low + together)
                own = [w.at(rows, t * self.m) for t in trials]
                own_matrices = [matrices[t] for t in trials]
                far = together == 1 and self.shape.size > _FAR
                totals = sums(w, own, own_matrices, self.shape, tile, far)
                for t, values in zip(trials, totals, strict=True):
                    self._heard(t * self.m, tile, values, row if s > 1 else None)

    def _heard(self, offset: Any, tile: Any, values: list[Any], scale: Any) -> None:
        """Keep the sums of a tile as z, times b_{s-1} where it is not 1."""
        w = self.w
        for (at, width), value in zip(tile, values, strict=True):
            scaled = value if scale is None else w.b.fmul(w.copies(scale, 0, width), value)
            w.store(scaled, self.z, w.add(offset, at))

    def _product(self, rows: Any, matrix: Any, take: Callable[[int, Any], None]) -> None:
        """Hand ``take`` the place in ``[4, m]`` and value of all vectors of ``rows @ matrix``."""
        own = [self.w.at(rows, t * self.m) for t in range(TOGETHER)]
        product(self.w, self.on, own, matrix, self.shape, lambda t, at, x: take(t * self.m + at, x))

    def _correct(self, s: int, before: Any, c: Any, alpha: Any) -> None:
        """``z += c_{s-1,j} V_j * alpha (U_j * V_{s-1})`` for j = ``before``."""
        w, post = self.w, self.post(before)
        with w.loop(0, self.block // 16) as k:
            i = w.mul(k, 16)
            both = w.b.fmul(w.load(self.pre(before), i, 16), w.load(self.post(s - 1), i, 16))
            w.store(both, self.query, i)

        def take(at: int, heard: Any) -> None:
            width = heard.type.count
            gain = w.b.fmul(w.copies(c, 0, width), w.load(post, at, width))
            w.store(w.fma(gain, heard, w.load(self.z, at, width)), self.z, at)

        self._product(self.query, alpha, take)

    def _correct_alike(self, s: int, before: Any, c: Any, _: Any) -> None:
        """The same without alpha: one number per trial instead of a product."""
        w = self.w
        with w.loop(0, TOGETHER) as t:
            place = w.mul(t, self.m)
            left, right = w.at(self.pre(before), place), w.at(self.post(s - 1), place)

            def eight(k: Any, sums: list[Any]) -> list[Any]:
                i = w.mul(k, 8)
                return [w.fma(w.load(left, i, 8), w.load(right, i, 8), sums[0])]  # noqa: B023

            (sums,) = w.fold(self.n // 8, [w.zero(8)], eight, 2)
            parts = [w.b.extract_element(sums, w.whole(k)) for k in range(8)]
            while len(parts) > 1:
                parts = [w.b.fadd(a, b) for a, b in zip(parts[::2], parts[1::2], strict=True)]
            total = w.splat(parts[0], 1)
            for i in range(self.n // 8 * 8, self.n):
                total = w.fma(w.load(left, i, 1), w.load(right, i, 1), total)
            total = w.b.extract_element(w.b.fmul(w.copies(c, 0, 1), total), w.whole(0))
            post, z = w.at(self.post(before), place), w.at(self.z, place)
            for offset, width in self.columns:
                value = w.fma(
                    w.splat(total, width), w.load(post, offset, width), w.load(z, offset, width)
                )
                w.store(value, z, offset)

    def _read_and_write(
        self, offset: Any, row: Any, final: Any, alpha: Any, old: Any, new: Any
    ) -> None:
        """The last read of a trial, and what it writes: ``old`` is fetched once for both.

        ``z = b_{S-1} V_{S-1} @ old``, ``new = b_S old + alpha * sum_l U_l (c_l V_l)^T``; ``new``
        may be ``old``.
        """
        w, rounds = self.w, range(self.depth)
        for at, width in self.columns:
            for s in rounds:
                value = w.load(w.at(self.post(s), offset), at, width)
                gain = w.b.fmul(w.copies(final, 1 + s, width), value)
                w.store(gain, self.gains, s * self.m + at)
        held = 2 * self.depth + 3
        least = (self.on.registers - 6) // 2
        most = max(least if self.on.registers < 32 else 1, (self.on.registers - held - 4) // 2)
        for tile in tiles(self.columns, most):
            count = len(tile)

            def body(first: Any, sums: list[Any], tile: Any = tile) -> list[Any]:
                lines = [w.add(first, k) for k in range(len(sums) // len(tile))]
                return self._rows(lines, tile, sums, offset, final, alpha, old, new)

            def two_rows(pair: Any, sums: list[Any]) -> list[Any]:
                return body(w.mul(pair, 2), sums)  # noqa: B023

            zeros = [w.zero(width) for _, width in tile]
            totals = w.fold(self.n // 2, zeros * 2, two_rows, 1)
            even, odd = totals[:count], totals[count:]
            if self.n % 2:
                even = body(self.n - 1, even)
            values = [w.b.fadd(a, b) for a, b in zip(even, odd, strict=True)]
            self._heard(offset, tile, values, row if self.depth > 1 else None)

    def _rows(
        self, lines: list[Any], tile: Sequence[Piece], sums: list[Any], offset: Any, final: Any,
        alpha: Any, old: Any, new: Any,
    ) -> list[Any]:  # fmt: skip
        """Some rows of a tile: the sums with them added; the rows are written anew."""
        w, rounds, count = self.w, range(self.depth), len(tile)
        wide = max(width for _, width in tile)
        last = w.at(self.post(self.depth - 1), offset)
        # Loaded before the first store, behind which LLVM would have to load them again.
        told = [w.copies(last, i, wide) for i in lines]
        factors = [[w.copies(w.at(self.pre(s), offset), i, wide) for s in rounds] for i in lines]
        fade, sums = w.copies(final, 0, wide), list(sums)
        for k, (at, width) in enumerate(tile):
            gains = [w.load(self.gains, s * self.m + at, width) for s in rounds]
            values = []
            for odd, i in enumerate(lines):
                row = w.load(old, w.add(w.mul(i, self.m), at), width)
                here = odd * count + k
                sums[here] = w.fma(w.low(told[odd], width), row, sums[here])
                written = w.b.fmul(w.low(factors[odd][0], width), gains[0])
                for factor, gain in zip(factors[odd][1:], gains[1:], strict=True):
                    written = w.fma(w.low(factor, width), gain, written)
                value = w.b.fmul(w.low(fade, width), row)
                if self.alpha:
                    own = w.load(alpha, w.add(w.mul(i, self.m), at), width)
                    values.append(w.fma(own, written, value))
                else:
                    values.append(w.b.fadd(written, value))
            for i, value in zip(lines, values, strict=True):
                w.store(value, new, w.add(w.mul(i, self.m), at))
        return sums
