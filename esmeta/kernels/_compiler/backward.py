"""One segment of the backward sweep for one size, as LLVM instructions; float32.

The formulas are those of ``_adjoint``; one trial at a time goes through all steps of the segment,
so that its matrices stay in the cache. Nothing is padded, and vectors are 16 wide whatever the
machine, so that bits are the same everywhere.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from block import Machine, Shape, product
from llvmlite import ir
from writer import F32, I8, Writer, pieces

POINTERS = (
    "posts pres slopes responses first start mask alpha_t alpha kappa composite write grad_y "
    "weights grad_w grad_start grad_alpha grad_decay post drive pull pre written grad_x"
).split()
SIZES = ("steps", "population", "batch", "starts")
"""The table that the function gets; shapes as in ``_segments``.

``alpha_t`` is transposed, ``alpha`` and ``write`` (A) are not; ``weights`` ``[k, P B, n, n]`` is
room; ``starts`` is the second axis of ``start`` (0: no resets).
"""


class Backward:
    """The function for one size; a block is a trial."""

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
        self.n, self.depth, self.alpha, self.linear, self.on = neurons, depth, alpha, linear, on
        self.columns = pieces(neurons, 16)
        self.shape = Shape(neurons, neurons)
        table, self.low, self.high = function.args
        self.of = self.w.table(table, POINTERS, SIZES)
        tables = ("V", "U", "post_", "pre_", "gain", "heard", "driven")
        self.rows = {name: self.w.room(F32, (depth + 1) * neurons) for name in tables}
        if not linear:
            self.rows["U"], self.rows["pre_"] = self.rows["V"], self.rows["post_"]
        self.line = {k: self.w.room(F32, neurons) for k in ("g", "z", "error", "extra", "pulled")}
        self.D = self.w.room(F32, neurons * neurons)

    def run(self) -> None:
        """Trials ``low`` to ``high``, each through the segment and back."""
        w, of = self.w, self.of
        with w.loop(self.low, self.high) as trial:
            p = w.b.sdiv(trial, of["batch"])
            kappa = w.at(of["kappa"], w.mul(p, self.depth * (self.depth + 1)))
            composite = w.at(of["composite"], w.mul(p, (self.depth + 1) ** 2))
            final = w.at(composite, self.depth * (self.depth + 1))
            with w.loop(0, of["steps"]) as step:
                self._rebuild(p, trial, step, final)
            with w.loop(0, of["steps"]) as done:
                step = w.b.sub(w.b.sub(of["steps"], w.whole(1)), done)
                self._back(p, trial, step, kappa, composite)
        w.b.ret_void()

    # Where things lie -----------------------------------------------------------------------

    def _place(self, step: Any, trial: Any) -> Any:
        """The number of a trial at a step."""
        w, of = self.w, self.of
        return w.add(w.mul(step, w.mul(of["population"], of["batch"])), trial)

    def _matrix(self, name: str, index: Any) -> Any:
        return self.w.at(self.of[name], self.w.mul(index, self.shape.size))

    def _row(self, name: str, s: Any) -> Any:
        return self.w.at(self.rows[name], self.w.mul(s, self.n))

    def _load_rounds(self, place: Any, final: Any) -> None:
        """V, U and c_{S,l} V_l of one step."""
        w, length = self.w, self.depth * self.n
        w.copy(length, w.at(self.of["posts"], w.mul(place, length)), self.rows["V"])
        if self.linear:
            w.copy(length, w.at(self.of["pres"], w.mul(place, length)), self.rows["U"])
        for s in range(self.depth):
            self._each(lambda at, k, s=s: self._gain(final, s, at, k))

    def _gain(self, final: Any, s: int, at: int, width: int) -> None:
        w = self.w
        value = w.b.fmul(w.copies(final, 1 + s, width), w.load(self._row("V", s), at, width))
        w.store(value, self._row("gain", s), at)

    def _each(self, body: Callable[[int, int], None]) -> None:
        for at, width in self.columns:
            body(at, width)

    def _change(self, i: Any, at: int, width: int) -> Any:
        """``sum_l U_l[i] c_{S,l} V_l`` on some columns, the write before alpha."""
        w, total = self.w, None
        for s in range(self.depth):
            left = w.copies(self._row("U", s), i, width)
            right = w.load(self._row("gain", s), at, width)
            total = w.b.fmul(left, right) if total is None else w.fma(left, right, total)
        return total

    def _copy(self, source: Any, target: Any) -> None:
        with self.w.loop(0, self.n) as i:
            row = self.w.mul(i, self.n)
            self.w.copy(self.n, self.w.at(source, row), self.w.at(target, row))

    def _is_new(self, place: Any) -> Any:
        mark = self.w.b.load(self.w.at(self.of["mask"], place, I8), typ=I8)
        return self.w.b.icmp_signed("!=", mark, ir.Constant(I8, 0))

    # Forward again --------------------------------------------------------------------------

    def _rebuild(self, p: Any, trial: Any, step: Any, final: Any) -> None:
        """The fast weights before this step, and from them those before the next one."""
        w, of = self.w, self.of
        place = self._place(step, trial)
        here = self._matrix("weights", place)
        with w.b.if_then(w.b.icmp_signed("==", step, w.whole(0))):
            self._copy(self._matrix("first", trial), here)
        with w.b.if_then(w.b.icmp_signed("!=", of["starts"], w.whole(0))):
            with w.b.if_then(self._is_new(place)):
                last = w.b.sub(of["starts"], w.whole(1))
                own = w.least(w.b.srem(trial, of["batch"]), last)
                fresh = w.add(w.mul(p, of["starts"]), own)
                self._copy(self._matrix("start", fresh), here)
        more = w.b.icmp_signed("<", w.add(step, 1), of["steps"])
        with w.b.if_then(more):
            self._load_rounds(place, final)
            there = self._matrix("weights", self._place(w.add(step, 1), trial))
            alpha = self._matrix("alpha_t", p)
            with w.loop(0, self.n) as i:
                for at, width in self.columns:
                    index = w.add(w.mul(i, self.n), at)
                    change = self._change(i, at, width)
                    if self.alpha:
                        change = w.b.fmul(w.load(alpha, index, width), change)
                    old = w.load(here, index, width)
                    w.store(w.fma(w.copies(final, 0, width), old, change), there, index)

    # Back -----------------------------------------------------------------------------------

    def _back(self, p: Any, trial: Any, step: Any, kappa: Any, composite: Any) -> None:
        w, of, n = self.w, self.of, self.n
        place = self._place(step, trial)
        final = w.at(composite, self.depth * (self.depth + 1))
        self._load_rounds(place, final)
        weights, G = self._matrix("weights", place), self._matrix("grad_w", trial)
        self._write_back(p, trial, place, final, weights, G)
        w.copy(n, w.at(of["grad_y"], w.mul(place, n)), self.line["g"])
        for s in range(self.depth, 0, -1):
            self._round(s, p, place, kappa, composite, weights)
        w.copy(n, self.line["g"], w.at(of["grad_x"], w.mul(place, n)))
        length = self.depth * n
        w.copy(length, self.rows["pre_"], w.at(of["pre"], w.mul(place, length)))
        with w.loop(0, n) as i:
            for at, width in self.columns:
                index = w.add(w.mul(i, n), at)
                total = w.b.fmul(w.copies(final, 0, width), w.load(G, index, width))
                for s in range(self.depth):
                    left = w.copies(self._row("V", s), i, width)
                    total = w.fma(left, w.load(self._row("driven", s), at, width), total)
                w.store(total, G, index)
        with w.b.if_then(w.b.icmp_signed("!=", of["starts"], w.whole(0))):
            with w.b.if_then(self._is_new(place)):
                self._to_start(G, self._matrix("grad_start", trial))

    def _to_start(self, G: Any, start: Any) -> None:
        """``start += G``, ``G = 0``."""
        w = self.w
        with w.loop(0, self.n) as i:
            for at, width in self.columns:
                index = w.add(w.mul(i, self.n), at)
                both = w.b.fadd(w.load(start, index, width), w.load(G, index, width))
                w.store(both, start, index)
                w.store(w.zero(width), G, index)

    def _write_back(self, p: Any, trial: Any, place: Any, final: Any, weights: Any, G: Any) -> None:
        """Through the write: sums over G, D U_l and D^T V_l, and the first gradients of rounds."""
        w, of, n = self.w, self.of, self.n
        alpha, d_alpha = self._matrix("alpha_t", p), self._matrix("grad_alpha", trial)
        D = self.D if self.alpha else G
        self._each(lambda at, k: w.store(w.zero(k), self.line["extra"], at))
        with w.loop(0, n) as i:
            for at, width in self.columns:
                index = w.add(w.mul(i, n), at)
                g = w.load(G, index, width)
                seen = w.fma(
                    g, w.load(weights, index, width), w.load(self.line["extra"], at, width)
                )
                w.store(seen, self.line["extra"], at)
                if self.alpha:
                    total = w.fma(g, self._change(i, at, width), w.load(d_alpha, index, width))
                    w.store(total, d_alpha, index)
                    w.store(w.b.fmul(w.load(alpha, index, width), g), D, index)
        decay = w.load(of["grad_decay"], trial, 1)
        w.store(w.b.fadd(decay, self._total(self.line["extra"])), of["grad_decay"], trial)
        length = self.depth * n

        def written(s: int, at: int, value: Any) -> None:
            w.store(value, of["written"], w.add(w.mul(place, length), s * n + at))
            gain = w.copies(final, 1 + s, value.type.count)
            w.store(w.b.fmul(gain, value), self._row("post_", s), at)

        rows = [self._row("U", s) for s in range(self.depth)]
        product(w, self.on, rows, D, self.shape, written)
        self._dots(D, [(self._row("V", s), self._row("heard", s)) for s in range(self.depth)])
        for s in range(self.depth):
            for at, width in self.columns:
                value = w.b.fmul(
                    w.copies(final, 1 + s, width), w.load(self._row("heard", s), at, width)
                )
                if not self.linear:
                    # In the base rule U_j is V_j: one table takes both gradients.
                    value = w.b.fadd(value, w.load(self._row("post_", s), at, width))
                w.store(value, self._row("pre_", s), at)

    def _round(self, s: int, p: Any, place: Any, kappa: Any, composite: Any, weights: Any) -> None:
        """From g_s to g_{s-1}."""
        w, of, n, depth = self.w, self.of, self.n, self.depth
        line, g, z = w.add(w.mul(place, depth * n), (s - 1) * n), self.line["g"], self.line["z"]
        row = w.at(composite, (s - 1) * (depth + 1))
        for at, width in self.columns:
            value = w.load(g, at, width)
            driven = w.b.fmul(value, w.load(of["slopes"], w.add(line, at), width))
            w.store(value, of["post"], w.add(line, at))
            w.store(driven, of["drive"], w.add(line, at))
            w.store(driven, z, at)
            decayed = w.b.fmul(w.copies(row, 0, width), driven)
            w.store(decayed, self._row("driven", s - 1), at)
            w.store(w.zero(width), self.line["extra"], at)
            for before in range(s):
                k = w.copies(kappa, (s - 1) * (depth + 1) + before, width)
                post = self._row("post_", before)
                w.store(w.fma(k, value, w.load(post, at, width)), post, at)
        if s > 1:
            with w.loop(0, s - 1) as j:
                self._correction(s, j, p, place, row)
        self._dots(weights, [(z, self.line["pulled"])])
        if self.linear:
            write = self._matrix("write", p)

            def own(_: int, at: int, value: Any) -> None:
                extra = w.load(self.line["extra"], at, value.type.count)
                w.store(w.b.fadd(extra, value), self.line["extra"], at)

            product(w, self.on, [self._row("pre_", s - 1)], write, self.shape, own)
        for at, width in self.columns:
            pulled = w.load(self.line["pulled"], at, width)
            w.store(pulled, of["pull"], w.add(line, at))
            value = w.b.fadd(
                w.load(self._row("post_", s - 1), at, width), w.load(self.line["extra"], at, width)
            )
            w.store(w.fma(w.copies(row, 0, width), pulled, value), g, at)

    def _correction(self, s: int, j: Any, p: Any, place: Any, row: Any) -> None:
        """What the correction by the j-th write passes back."""
        w, n, z, error = self.w, self.n, self.line["z"], self.line["error"]
        last = self._row("V", s - 1)
        for at, width in self.columns:
            both = w.b.fmul(w.load(z, at, width), w.load(self._row("V", j), at, width))
            w.store(both, error, at)
        triangle = w.mul(place, self.depth * (self.depth - 1) // 2)
        response = w.mul(w.add(triangle, (s - 1) * (s - 2) // 2, j), n)
        c = w.at(row, w.add(j, 1))

        def take(_: int, at: int, value: Any) -> None:
            width = value.type.count
            value = w.b.fmul(w.copies(c, 0, width), value)
            post, pre = self._row("post_", j), self._row("pre_", j)
            heard = w.load(self.of["responses"], w.add(response, at), width)
            w.store(w.fma(w.load(z, at, width), heard, w.load(post, at, width)), post, at)
            w.store(w.fma(value, w.load(last, at, width), w.load(pre, at, width)), pre, at)
            extra = w.load(self.line["extra"], at, width)
            left = w.load(self._row("U", j), at, width)
            w.store(w.fma(value, left, extra), self.line["extra"], at)

        if self.alpha:
            product(w, self.on, [error], self._matrix("alpha", p), self.shape, take)
        else:
            total = w.b.extract_element(self._total(error), w.whole(0))
            for at, width in self.columns:
                take(0, at, w.splat(total, width))

    # Sums over columns ----------------------------------------------------------------------

    def _dots(self, matrix: Any, pairs: list[tuple[Any, Any]]) -> None:
        """``out[i] = matrix[i] . vector`` for pairs of vector and out."""
        w = self.w
        with w.loop(0, self.n) as i:
            loaded = [w.load(matrix, w.add(w.mul(i, self.n), at), k) for at, k in self.columns]
            for vector, out in pairs:
                w.store(self._dot(loaded, vector), out, i)

    def _dot(self, parts: list[Any], vector: Any) -> Any:
        w, sums = self.w, {}
        for (at, width), part in zip(self.columns, parts, strict=True):
            other = w.load(vector, at, width)
            if width in sums:
                sums[width] = w.fma(part, other, sums[width])
            else:
                sums[width] = w.b.fmul(part, other)
        return self._across(sums)

    def _total(self, vector: Any) -> Any:
        w, sums = self.w, {}
        for at, width in self.columns:
            value = w.load(vector, at, width)
            sums[width] = w.b.fadd(sums[width], value) if width in sums else value
        return self._across(sums)

    def _across(self, sums: dict[int, Any]) -> Any:
        """The sum of all that is in some vectors, by halves, as a vector of one."""
        width, total = max(sums), sums[max(sums)]
        while width > 1:
            width //= 2
            total = self.w.b.fadd(self.w.part(total, 0, width), self.w.part(total, width, width))
            if width in sums:
                total = self.w.b.fadd(total, sums[width])
        return total
