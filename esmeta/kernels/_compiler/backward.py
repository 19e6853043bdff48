"""One segment of the backward sweep for one size, as LLVM instructions; float32.

The formulas are those of ``_adjoint``; one trial at a time goes through all steps of the segment,
so that its matrices stay in the cache. Nothing is padded, and vectors are 16 wide whatever the
machine, so that bits are the same everywhere.
"""

from __future__ import annotations

from kernel import Kernel, Machine, Shape, Size, product
from llvmlite import ir
from writer import Index, Place, Vector, Whole, fma, pieces
from writes import WRITES

POINTERS = (
    "posts pres slopes responses first start mask alpha_t alpha kappa composite write grad_y "
    "weights grad_w grad_start grad_alpha grad_decay post drive pull pre written grad_x"
).split()
SIZES = ("steps", "population", "batch", "starts")
"""The table that the function gets; shapes as in ``_segments``.

``alpha_t`` is transposed, ``alpha`` and ``write`` are not; ``weights`` ``[k, P B, n, n]`` is room;
``starts`` is the second axis of ``start`` (0: no resets).
"""


class Backward(Kernel):
    """The function for one size; a block is a trial."""

    def __init__(self, function: ir.Function, size: Size, on: Machine) -> None:
        n = size.neurons
        super().__init__(function, size, on, Shape(n, n), (POINTERS, SIZES))
        self.write = WRITES[self.rule]
        self.columns = pieces(n, 16)
        tables = ("V", "U", "post", "pre", "gain", "heard", "driven")
        self.rows = {name: self.w.room((self.depth + 1) * n) for name in tables}
        if self.write is None:
            self.rows["U"], self.rows["pre"] = self.rows["V"], self.rows["post"]
        lines = ("g", "z", "error", "extra", "pulled")
        self.g, self.z, self.error, self.extra, self.pulled = (self.w.room(n) for _ in lines)
        self.D = self.w.room(n * n)

    def run(self) -> None:
        """Trials ``low`` to ``high``, each through the segment and back."""
        w, steps = self.w, self.size["steps"]
        with w.loop(w.low, w.high) as trial:
            p = trial // self.size["batch"]
            kappa, composite, final = self.coefficients(p)
            with w.loop(0, steps) as step:
                self._rebuild(p, trial, step, final)
            last = steps - 1
            with w.loop(0, steps) as done:
                self._back(p, trial, last - done, kappa, composite, final)
        w.b.ret_void()

    def _place(self, step: Whole, trial: Whole) -> Whole:
        """The number of a trial at a step."""
        return step * (self.size["population"] * self.size["batch"]) + trial

    def _row(self, name: str, s: Index) -> Place:
        return self.rows[name] + s * self.n

    def _load_rounds(self, place: Whole, final: Place) -> None:
        """V, U and c_{S,l} V_l of one step."""
        length = self.depth * self.n
        (self.at["posts"] + place * length).copy_to(self.rows["V"], length)
        if self.write is not None:
            (self.at["pres"] + place * length).copy_to(self.rows["U"], length)
        for s in range(self.depth):
            V, gain = self._row("V", s), self._row("gain", s)
            for at, width in self.columns:
                gain[at] = final.copies(1 + s, width) * V[at, width]

    def _change(self, i: Whole, at: int, width: int) -> Vector:
        """``sum_l U_l[i] c_{S,l} V_l`` on some columns, the write before alpha."""
        total = self._row("U", 0).copies(i, width) * self._row("gain", 0)[at, width]
        for s in range(1, self.depth):
            left, right = self._row("U", s).copies(i, width), self._row("gain", s)[at, width]
            total = fma(left, right, total)
        return total

    def _rebuild(self, p: Whole, trial: Whole, step: Whole, final: Place) -> None:
        """The fast weights before this step, and from them those before the next one."""
        w, place = self.w, self._place(step, trial)
        here = self.matrix("weights", place)
        with w.when(step.compare("==", 0)):
            self.copy(self.matrix("first", trial), here)
        with w.when(self.may_start()):
            with w.when(self.at["mask"].marked(place)):
                self.copy(self.start(p, trial % self.size["batch"]), here)
        with w.when((step + 1).compare("<", self.size["steps"])):
            self._load_rounds(place, final)
            there = self.matrix("weights", self._place(step + 1, trial))
            alpha = self.matrix("alpha_t", p)
            with w.loop(0, self.n) as i:
                for at, width in self.columns:
                    index = i * self.n + at
                    change = self._change(i, at, width)
                    if self.alpha:
                        change = alpha[index, width] * change
                    there[index] = fma(final.copies(0, width), here[index, width], change)

    def _back(
        self, p: Whole, trial: Whole, step: Whole, kappa: Place, composite: Place, final: Place
    ) -> None:
        w, n, length = self.w, self.n, self.depth * self.n
        place = self._place(step, trial)
        self._load_rounds(place, final)
        weights, G = self.matrix("weights", place), self.matrix("grad_w", trial)
        self._write_back(p, trial, place, final, weights, G)
        (self.at["grad_y"] + place * n).copy_to(self.g, n)
        for s in range(self.depth, 0, -1):
            self._round(s, p, place, kappa, composite, weights)
        self.g.copy_to(self.at["grad_x"] + place * n, n)
        self.rows["pre"].copy_to(self.at["pre"] + place * length, length)
        with w.loop(0, n) as i:
            for at, width in self.columns:
                index = i * n + at
                total = final.copies(0, width) * G[index, width]
                for s in range(self.depth):
                    driven = self._row("driven", s)[at, width]
                    total = fma(self._row("V", s).copies(i, width), driven, total)
                G[index] = total
        with w.when(self.may_start()):
            with w.when(self.at["mask"].marked(place)):
                self._to_start(G, self.matrix("grad_start", trial))

    def _to_start(self, G: Place, start: Place) -> None:
        """``start += G``, ``G = 0``."""
        with self.w.loop(0, self.n) as i:
            for at, width in self.columns:
                index = i * self.n + at
                start[index] = start[index, width] + G[index, width]
                G[index] = self.w.zero(width)

    def _write_back(
        self, p: Whole, trial: Whole, place: Whole, final: Place, weights: Place, G: Place
    ) -> None:
        """Through the write: sums over G, D U_l and D^T V_l, and the first gradients of rounds."""
        w, n, extra, rounds = self.w, self.n, self.extra, range(self.depth)
        alpha, d_alpha = self.matrix("alpha_t", p), self.matrix("grad_alpha", trial)
        D = self.D if self.alpha else G
        for at, width in self.columns:
            extra[at] = w.zero(width)
        with w.loop(0, n) as i:
            for at, width in self.columns:
                index = i * n + at
                g = G[index, width]
                extra[at] = fma(g, weights[index, width], extra[at, width])
                if self.alpha:
                    change = self._change(i, at, width)
                    d_alpha[index] = fma(g, change, d_alpha[index, width])
                    D[index] = alpha[index, width] * g
        decay = self.at["grad_decay"]
        decay[trial] = decay[trial, 1] + self._total(extra)
        written = self.at["written"] + place * (self.depth * n)

        def take(s: int, at: int, value: Vector) -> None:
            written[s * n + at] = value
            self._row("post", s)[at] = final.copies(1 + s, value.width) * value

        product(w, self.on, [self._row("U", s) for s in rounds], D, self.shape, take)
        self._dots(D, [(self._row("V", s), self._row("heard", s)) for s in rounds])
        for s in rounds:
            for at, width in self.columns:
                value = final.copies(1 + s, width) * self._row("heard", s)[at, width]
                if self.write is None:
                    # In the base rule U_j is V_j: one table takes both gradients.
                    value = value + self._row("post", s)[at, width]
                self._row("pre", s)[at] = value

    def _round(
        self, s: int, p: Whole, place: Whole, kappa: Place, composite: Place, weights: Place
    ) -> None:
        """From g_s to g_{s-1}."""
        w, g, extra, before = self.w, self.g, self.extra, self._row("post", s - 1)
        kappa, row = (t + (s - 1) * (self.depth + 1) for t in (kappa, composite))
        line = place * (self.depth * self.n) + (s - 1) * self.n
        slopes, post, drive, pull = (self.at[k] + line for k in ("slopes", "post", "drive", "pull"))
        for at, width in self.columns:
            value = g[at, width]
            driven = value * slopes[at, width]
            post[at], drive[at], self.z[at] = value, driven, driven
            self._row("driven", s - 1)[at] = row.copies(0, width) * driven
            extra[at] = w.zero(width)
            for k in range(s):
                other = self._row("post", k)
                other[at] = fma(kappa.copies(k, width), value, other[at, width])
        if s > 1:
            with w.loop(0, s - 1) as j:
                self._correction(s, j, p, place, row)
        self._dots(weights, [(self.z, self.pulled)])
        if self.write is not None:
            tensors = self.at["write"] + p * self.write.numbers(self.shape)

            def take(_: int, at: int, value: Vector) -> None:
                extra[at] = extra[at, value.width] + value

            rows = [self._row("pre", s - 1)]
            self.write.back(w, self.on, rows, tensors, self.shape, take)
        for at, width in self.columns:
            pulled = self.pulled[at, width]
            pull[at] = pulled
            g[at] = fma(row.copies(0, width), pulled, before[at, width] + extra[at, width])

    def _correction(self, s: int, j: Whole, p: Whole, place: Whole, row: Place) -> None:
        """What the correction by the j-th write passes back."""
        z, error, extra, last = self.z, self.error, self.extra, self._row("V", s - 1)
        V, U, post, pre = (self._row(name, j) for name in ("V", "U", "post", "pre"))
        for at, width in self.columns:
            error[at] = z[at, width] * V[at, width]
        triangle = place * (self.depth * (self.depth - 1) // 2) + (s - 1) * (s - 2) // 2
        responses, c = self.at["responses"] + (triangle + j) * self.n, row + (j + 1)

        def take(_: int, at: int, value: Vector) -> None:
            width = value.width
            value = c.copies(0, width) * value
            post[at] = fma(z[at, width], responses[at, width], post[at, width])
            pre[at] = fma(value, last[at, width], pre[at, width])
            extra[at] = fma(value, U[at, width], extra[at, width])

        if self.alpha:
            product(self.w, self.on, [error], self.matrix("alpha", p), self.shape, take)
        else:
            total = self._total(error)
            for at, width in self.columns:
                take(0, at, total.first(width))

    def _dots(self, matrix: Place, pairs: list[tuple[Place, Place]]) -> None:
        """``out[i] = matrix[i] . vector`` for pairs of vector and out."""
        with self.w.loop(0, self.n) as i:
            loaded = [matrix[i * self.n + at, width] for at, width in self.columns]
            for vector, out in pairs:
                sums: dict[int, Vector] = {}
                for (at, width), part in zip(self.columns, loaded, strict=True):
                    other, known = vector[at, width], sums.get(width)
                    sums[width] = part * other if known is None else fma(part, other, known)
                out[i] = _across(sums)

    def _total(self, vector: Place) -> Vector:
        sums: dict[int, Vector] = {}
        for at, width in self.columns:
            value, known = vector[at, width], sums.get(width)
            sums[width] = value if known is None else known + value
        return _across(sums)


def _across(sums: dict[int, Vector]) -> Vector:
    """The sum of all that is in some vectors, by halves, as a vector of one."""
    width, total = max(sums), sums[max(sums)]
    while width > 1:
        width //= 2
        total = total.part(0, width) + total.part(width, width)
        if width in sums:
            total = total + sums[width]
    return total
