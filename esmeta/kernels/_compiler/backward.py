"""The backward of a scan for one size, as LLVM instructions; float32.

The formulas are those of ``_adjoint``. Two trials of a member go together through all steps, so
that what they share is loaded once for both. By segments, from the last to the first: their fast
weights are rebuilt from a checkpoint, in blocks of rows; then every step takes one pass over dJ/dW,
in which the step behind it is added, alpha's gradient grows, and all sums of the write and of the
last read are taken. Rows are padded to 16 columns whatever the machine, so that bits are the same
everywhere.
"""

from __future__ import annotations

from collections.abc import Callable

from kernel import Block, Kernel, Machine, Shape, Size, product
from llvmlite import ir
from writer import Index, Place, Vector, Whole, across, fma, pieces
from writes import WRITES, Given

POINTERS = (
    "room x reads first kept start mask alpha_t alpha kappa composite factor write "
    "grad_y grad_w grad_start grad_alpha sums grad_write grad_x constants"
).split()
SIZES = "steps population batch starts every".split()
"""The table that the function gets; shapes as in ``_cpu``.

``first``, ``kept`` and ``start`` are padded as the machine likes, all other matrices to 16 columns;
``factor`` are U's tensors transposed, ``write`` as they are; ``room`` is for this thread alone.
"""
TRIALS = 2
"""Trials that go together: those of four would not stay in the second cache at n = 200."""
LINES = 4
"""Rows of a matrix that are taken together."""
Pair = tuple[Place, Place]


class Backward(Kernel):
    """The function for one size."""

    def __init__(self, function: ir.Function, size: Size, on: Machine) -> None:
        n, depth = size.neurons, size.depth
        super().__init__(function, size, on, Shape(n, -(-n // 16) * 16), (POINTERS, SIZES))
        self.outside = Shape(n, on.padded(n))
        self.write = WRITES[self.rule]
        self.block, self.rounds = TRIALS * self.m, range(depth)
        # Rows of a step in the room: V, c_{S,l} V_l, U if it is not V, and what U has kept.
        kinds = 2 if self.write is None else 4 if self.write.deep else 3
        self.tables = kinds * depth * self.block
        self.pairs = depth * (depth - 1) // 2
        tables = dict.fromkeys("read drive heard written before driven pre inner".split(), depth)
        tables |= {"post": depth + 1, "query": self.pairs, "error": self.pairs}
        tables |= dict.fromkeys("pulled extra answer spread".split(), 1)
        self.own = {name: self.w.room(max(1, k) * self.block) for name, k in tables.items()}
        if self.write is None:
            self.own["pre"] = self.own["post"]
        self.fade, self.none = self.w.room(TRIALS), self.w.room(16)
        self.none[0] = self.w.zero(16)
        with self.w.loop(0, self.block // 16) as k:
            for name, count in tables.items():
                for s in range(count):
                    self._row(name, s)[k * 16] = self.w.zero(16)

    def run(self) -> None:
        """Blocks ``low`` to ``high`` of two trials, each from its last step to its first."""
        w, steps, every = self.w, self.size["steps"], self.size["every"]
        segments = (steps + (every - 1)) // every
        with w.loop(w.low, w.high) as number:
            self.here = Block(number, self.size["batch"], TRIALS)
            self.member = self.here.p
            self.sums = self.at["sums"] + number * (16 * (self.depth + 1) * (2 * self.depth + 1))
            self.d_alpha = self.matrix("grad_alpha", number)
            self.kappa, self.composite, self.final = self.coefficients(self.member)
            with w.loop(0, self.here.there) as t:
                self._forget(t)
            with w.loop(0, segments) as done:
                low = (segments - 1 - done) * every
                high = (low + every).at_most(steps)
                with w.loop(low, high) as step:
                    self._recall(step, step - low)
                with w.loop(0, self.here.there) as t:
                    self._rebuild(t, low, high)
                with w.loop(0, high - low) as back:
                    step = high - 1 - back
                    self._back(number, step, step - low)
            with w.loop(0, self.here.there) as t:
                self._settle(t)
        w.b.ret_void()

    # Places -------------------------------------------------------------------------------------

    def _row(self, name: str, s: Index) -> Place:
        return self.own[name] + s * self.block

    def _weights(self, slot: Whole, t: Whole) -> Place:
        return self.at["room"] + (slot * TRIALS + t) * self.shape.size

    def _told(self, slot: Whole, kind: int, s: Index) -> Place:
        """V, gain or U of a step of the segment."""
        tables = self.at["room"] + self.size["every"] * (TRIALS * self.shape.size)
        return tables + slot * self.tables + (s + kind * self.depth) * self.block

    def _V(self, slot: Whole, s: Index) -> Place:
        return self._told(slot, 0, s)

    def _gain(self, slot: Whole, s: Index) -> Place:
        return self._told(slot, 1, s)

    def _U(self, slot: Whole, s: Index) -> Place:
        return self._told(slot, 0 if self.write is None else 2, s)

    def _place(self, step: Whole) -> Whole:
        """The number of the first trial at a step."""
        return step * (self.size["population"] * self.size["batch"]) + self.here.trials[0]

    def _line(self, s: int) -> Place:
        """Row s-1 of composite."""
        return self.composite + (s - 1) * (self.depth + 1)

    def _zeros(self, count: int) -> list[Vector]:
        """From memory, because LLVM would keep a constant where code can only be linked."""
        return [self.none[0, 16]] * count

    def _trials(self, table: Place) -> list[Place]:
        return [table + t * self.m for t in range(TRIALS)]

    def _fetch(self, source: Place, target: Place) -> None:
        """Rows of the trials into a table."""
        with self.w.loop(0, self.here.there) as t:
            (source + t * self.n).copy_to(target + t * self.m, self.n)

    # Vectors of all trials ----------------------------------------------------------------------

    def _along(
        self,
        body: Callable[[Index, list[Vector]], list[Vector]],
        sums: tuple[tuple[str, int, Index], ...] = (),
    ) -> None:
        """Go along rows of all trials, 16 numbers a time; what ``body`` adds goes to ``sums``."""
        w = self.w
        count = self.here.there * (self.m // 16)
        found = w.fold(count, self._zeros(len(sums)), lambda k, values: body(k * 16, values))
        for (name, row, column), value in zip(sums, found, strict=True):
            self._add_sum(name, row, column, value)

    def _add_sum(self, name: str, row: int, column: Index, value: Vector) -> None:
        offset = 0 if name == "kappa" else self.depth * (self.depth + 1)
        place = (column + (offset + row * (self.depth + 1))) * 16
        self.sums[place] = self.sums[place, 16] + value

    # Rows and matrices of a segment -------------------------------------------------------------

    def _recall(self, step: Whole, slot: Whole) -> None:
        """What a step read and wrote, from x and its values of tanh."""
        place = self._place(step)
        self._fetch(self.at["x"] + place * self.n, self._V(slot, 0))
        for s in range(1, self.depth):
            self._fetch(self._tanh(step, s), self._V(slot, s))

        def mix(i: Index, _: list[Vector]) -> list[Vector]:
            posts: list[Vector] = []
            for s in self.rounds:
                value = self._V(slot, s)[i, 16]
                if s:
                    kappa = self.kappa + (s - 1) * (self.depth + 1)
                    value = kappa.copies(s, 16) * value
                    for k, post in enumerate(posts):
                        value = fma(kappa.copies(k, 16), post, value)
                    self._V(slot, s)[i] = value
                self._gain(slot, s)[i] = self.final.copies(1 + s, 16) * value
                posts.append(value)
            return []

        self._along(mix)
        if self.write is not None:
            for s in self.rounds:
                target = self._U(slot, s)

                def take(t: int, at: int, value: Vector, target: Place = target) -> None:
                    target[t * self.m + at] = value

                given = self._own_tensors("factor", slot, s)
                self.write.factor(given, self._trials(self._V(slot, s)), take)

    def _own_tensors(self, name: str, slot: Whole, s: int) -> Given:
        """U's tensors, and what it has kept of V_s."""
        assert self.write is not None, "in the base rule U_s is V_s"
        tensors = self.at[name] + self.member * self.write.numbers(self.shape)
        return Given(self.w, self.on, self.shape, tensors, self._told(slot, 3, s))

    def _tanh(self, step: Whole, s: int) -> Place:
        total = self.size["population"] * self.size["batch"]
        line = (step * self.depth + (s - 1)) * total + self.here.trials[0]
        return self.at["reads"] + line * self.n

    def _rebuild(self, t: Whole, low: Whole, high: Whole) -> None:
        """The fast weights of a trial before every step of a segment."""
        w, trial, outside = self.w, self.here.trials[0] + t, self.outside.size
        number = self.size["population"] * self.size["batch"]
        kept = self.at["kept"] + ((low // self.size["every"] - 1) * number + trial) * outside
        first = low.compare("==", 0).choose(self.at["first"] + trial * outside, kept)
        starts = self.size["starts"]
        index = (self.here.first + t).at_most(starts - 1)
        start = self.at["start"] + (self.member * starts + index) * outside
        alpha = self.matrix("alpha_t", self.member)

        def lines(rows: list[Index]) -> None:
            with w.loop(low, high) as step:
                slot = step - low
                here, before = self._weights(slot, t), self._weights(slot - 1, t)
                with w.when(slot.compare("==", 0)):
                    self._bring(rows, first, here)
                with w.when(slot.compare("!=", 0)), w.loop(0, self.m // 16) as k:
                    at = k * 16
                    gains = [self._gain(slot - 1, s)[t * self.m + at, 16] for s in self.rounds]
                    pres = [self._U(slot - 1, s) + t * self.m for s in self.rounds]
                    for i in rows:
                        value = self._written(pres, i, gains)
                        if self.alpha:
                            value = alpha[i * self.m + at, 16] * value
                        old = before[i * self.m + at, 16]
                        here[i * self.m + at] = fma(self.final.copies(0, 16), old, value)
                with w.when(self.may_start()):
                    with w.when(self.at["mask"].marked(self._place(step) + t)):
                        self._bring(rows, start, here)

        self._by_lines(lines)

    def _by_lines(self, body: Callable[[list[Index]], None]) -> None:
        """All rows of a matrix, some together."""
        most = self.n // LINES
        if most:
            with self.w.loop(0, most) as k:
                body([k * LINES + r for r in range(LINES)])
        if self.n % LINES:
            body(list(range(most * LINES, self.n)))

    def _bring(self, rows: list[Index], source: Place, target: Place) -> None:
        """Copy rows of a matrix from outside."""
        for i in rows:
            line = source + i * self.outside.columns
            for at, _ in pieces(self.n, 16):
                line.prefetch(at + LINES * self.outside.columns)
            line.copy_to(target + i * self.m, self.n)

    def _written(self, pres: list[Place], i: Index, gains: list[Vector]) -> Vector:
        """``sum_l U_l[i] c_{S,l} V_l`` on some columns, the write before alpha."""
        total = pres[0].copies(i, 16) * gains[0]
        for pre, gain in zip(pres[1:], gains[1:], strict=True):
            total = fma(pre.copies(i, 16), gain, total)
        return total

    # A step back --------------------------------------------------------------------------------

    def _back(self, number: Whole, step: Whole, slot: Whole) -> None:
        w, depth = self.w, self.depth
        place = self._place(step)
        self._fetch(self.at["grad_y"] + place * self.n, self._row("post", depth))
        for s in self.rounds:
            self._fetch(self._tanh(step, s + 1), self._row("read", s))
        self._enter(depth, slot)
        with w.loop(0, self.block // 16) as k:
            for s in self.rounds:
                self._row("written", s)[k * 16] = w.zero(16)
        self._by_lines(lambda rows: self._for_trials(lambda t: self._sweep(rows, t, slot)))
        self._hear(slot)
        for s in range(depth, 0, -1):
            if s < depth:
                self._enter(s, slot)
                self._for_trials(lambda t, s=s: self._pull(s, t, slot))
            self._round(s, slot)
        with w.loop(0, self.here.there) as t:
            target = self.at["grad_x"] + (place + t) * self.n
            (self.own["post"] + t * self.m).copy_to(target, self.n)
        if self.write is not None:
            d_write = self.at["grad_write"] + number * self.write.numbers(self.shape)
            self._for_trials(lambda t: self._add_own(d_write, slot, t))
        with w.when(self.may_start()), w.loop(0, self.here.there) as t:
            with w.when(self.at["mask"].marked(place + t)):
                self._settle(t)
                self._to_start(t)

    def _for_trials(self, body: Callable[[Whole], None]) -> None:
        with self.w.loop(0, self.here.there) as t:
            body(t)

    def _enter(self, s: int, slot: Whole) -> None:
        """From g_s to z_s, and what passes by the read."""
        kappa = self.kappa + (s - 1) * (self.depth + 1)

        def body(i: Index, sums: list[Vector]) -> list[Vector]:
            g, read = self._row("post", s)[i, 16], self._row("read", s - 1)[i, 16]
            own = kappa.copies(s, 16)
            self._row("drive", s - 1)[i] = g * (own - own * read * read)
            for k in range(s):
                share, table = kappa.copies(k, 16), self._row("post", k)
                table[i] = share * g if s == self.depth else fma(share, g, table[i, 16])
            with_ = [self._V(slot, k)[i, 16] for k in range(s)] + [read]
            return [fma(g, other, sum_) for other, sum_ in zip(with_, sums, strict=True)]

        self._along(body, tuple(("kappa", s - 1, k) for k in range(s + 1)))

    def _sweep(self, rows: list[Index], t: Whole, slot: Whole) -> None:
        """Some rows of a trial: G of this step from the one behind, and all sums over them."""
        w, m, depth, rounds, row = self.w, self.m, self.depth, self.rounds, t * self.m
        trial = self.here.trials[0] + t
        G, weights = self.matrix("grad_w", trial), self._weights(slot, t)
        alpha = self.matrix("alpha_t", self.member)
        before = [self._row("before", s) + row for s in rounds]
        pres = [self._U(slot, s) + row for s in rounds]
        queries = [self._row("query", k) + row for k in range(self.pairs if self.alpha else 0)]
        fade = self.fade.copies(t, 16)
        count = len(rows)

        def column(k: Index, sums: list[Vector]) -> list[Vector]:
            at = k * 16
            driven = [self._row("driven", s)[row + at, 16] for s in rounds]
            errors = [self._row("error", k)[row + at, 16] for k in range(len(queries))]
            gains = [self._gain(slot, s)[row + at, 16] for s in rounds]
            posts = [self._V(slot, s)[row + at, 16] for s in rounds]
            z = self._row("drive", depth - 1)[row + at, 16]
            written = [self._row("written", s)[row + at, 16] for s in rounds]
            sums = list(sums)
            for r, i in enumerate(rows):
                # All loads come before the first store, behind which LLVM would load again.
                index = i * m + at
                weights.prefetch(index + LINES * m)
                G.prefetch(index + LINES * m)
                g, weight = fade * G[index, 16], weights[index, 16]
                for s in rounds:
                    g = fma(before[s].copies(i, 16), driven[s], g)
                sums[r] = fma(weight, z, sums[r])
                sums[-1] = fma(g, weight, sums[-1])
                change = alpha[index, 16] * g if self.alpha else g
                if self.alpha:
                    total = fma(g, self._written(pres, i, gains), self.d_alpha[index, 16])
                    for query, error in zip(queries, errors, strict=True):
                        total = fma(query.copies(i, 16), error, total)
                    self.d_alpha[index] = total
                for s in rounds:
                    written[s] = fma(pres[s].copies(i, 16), change, written[s])
                    sums[(1 + s) * count + r] = fma(change, posts[s], sums[(1 + s) * count + r])
                G[index] = g
            for s in rounds:
                self._row("written", s)[row + at] = written[s]
            return sums

        found = w.fold(m // 16, self._zeros(count * (1 + depth) + 1), column, 2)
        tables = [self._row("pulled", 0), *(self._row("heard", s) for s in rounds)]
        for k, table in enumerate(tables):
            self._store_sums(table + row, rows, found[k * count : (k + 1) * count])
        self._add_sum("composite", depth, 0, found[-1])

    def _store_sums(self, table: Place, rows: list[Index], vectors: list[Vector]) -> None:
        missing = self._zeros(LINES - len(vectors))
        table[rows[0]] = across(vectors + missing)

    def _hear(self, slot: Whole) -> None:
        """From D U_l and D^T V_l to the first gradients of rounds."""

        def body(i: Index, sums: list[Vector]) -> list[Vector]:
            found = []
            for s, total in zip(self.rounds, sums, strict=True):
                written, heard = (self._row(name, s)[i, 16] for name in ("written", "heard"))
                gain, table = self.final.copies(1 + s, 16), self._row("post", s)
                if self.write is None:
                    # In the base rule U_j is V_j: one table takes both gradients.
                    table[i] = fma(gain, written + heard, table[i, 16])
                else:
                    table[i] = fma(gain, written, table[i, 16])
                    self._row("pre", s)[i] = gain * heard
                found.append(fma(written, self._V(slot, s)[i, 16], total))
            return found

        self._along(body, tuple(("composite", self.depth, 1 + s) for s in self.rounds))

    def _pull(self, s: int, t: Whole, slot: Whole) -> None:
        """``W^T z_s`` of a trial."""
        weights, z = self._weights(slot, t), self._row("drive", s - 1) + t * self.m

        def lines(rows: list[Index]) -> None:
            def column(k: Index, sums: list[Vector]) -> list[Vector]:
                at = k * 16
                other = z[at, 16]
                values = [weights[i * self.m + at, 16] for i in rows]
                return [fma(v, other, total) for v, total in zip(values, sums, strict=True)]

            found = self.w.fold(self.m // 16, self._zeros(len(rows)), column, 2)
            self._store_sums(self._row("pulled", 0) + t * self.m, rows, found)

        self._by_lines(lines)

    def _round(self, s: int, slot: Whole) -> None:
        """From z_s to g_{s-1}; what the step before needs of it is kept."""
        line, extra = self._line(s), self._row("extra", 0)
        if s > 1:
            with self.w.loop(0, s - 1) as j:
                self._correction(s, j, slot)
        if self.write is not None:

            def take(t: int, at: int, value: Vector) -> None:
                extra[t * self.m + at] = value

            given, inner = self._own_tensors("write", slot, s - 1), self._row("inner", s - 1)
            self.write.back(given, self._trials(self._row("pre", s - 1)), inner, take)

        def body(i: Index, sums: list[Vector]) -> list[Vector]:
            pulled, V = self._row("pulled", 0)[i, 16], self._V(slot, s - 1)[i, 16]
            decay, table = line.copies(0, 16), self._row("post", s - 1)
            g = fma(decay, pulled, table[i, 16])
            table[i] = g if self.write is None else g + extra[i, 16]
            self._row("driven", s - 1)[i] = decay * self._row("drive", s - 1)[i, 16]
            self._row("before", s - 1)[i] = V
            return [fma(pulled, V, sums[0])]

        self._along(body, (("composite", s - 1, 0),))
        if s == 1:
            with self.w.loop(0, self.here.there) as t:
                self.fade[t] = self.final[0, 1]

    def _correction(self, s: int, j: Whole, slot: Whole) -> None:
        """What the correction by the j-th write passes back."""
        V, U, last = self._V(slot, j), self._U(slot, j), self._V(slot, s - 1)
        z, post, pre = self._row("drive", s - 1), self._row("post", j), self._row("pre", j)
        pair = j + (s - 1) * (s - 2) // 2
        query, error = self._row("query", pair), self._row("error", pair)
        answer, spread, c = self.own["answer"], self.own["spread"], self._line(s) + (j + 1)

        def ask(i: Index, _: list[Vector]) -> list[Vector]:
            query[i] = U[i, 16] * last[i, 16]
            error[i] = z[i, 16] * V[i, 16]
            return []

        self._along(ask)
        self._respond(query, "alpha_t", answer)
        self._respond(error, "alpha", spread)

        def pass_back(i: Index, sums: list[Vector]) -> list[Vector]:
            gain, heard, wrong = c.copies(0, 16), answer[i, 16], error[i, 16]
            back = gain * spread[i, 16]
            post[i] = fma(gain * z[i, 16], heard, post[i, 16])
            pre[i] = fma(back, last[i, 16], pre[i, 16])
            table = self._row("post", s - 1)
            table[i] = fma(back, U[i, 16], table[i, 16])
            error[i] = gain * wrong
            return [fma(wrong, heard, sums[0])]

        self._along(pass_back, (("composite", s - 1, j + 1),))

    def _respond(self, rows: Place, name: str, out: Place) -> None:
        """``rows @ alpha``; without alpha their sums, for every neuron."""
        if self.alpha:

            def take(t: int, at: int, value: Vector) -> None:
                out[t * self.m + at] = value

            matrix = self.matrix(name, self.member)
            product(self.w, self.on, self._trials(rows), matrix, self.shape, take)
            return
        with self.w.loop(0, self.here.there) as t:
            row = rows + t * self.m
            sums = self.w.fold(self.m // 16, self._zeros(1), lambda k, s: [s[0] + row[k * 16, 16]])
            total = across(sums)
            with self.w.loop(0, self.m // 16) as k:
                (out + t * self.m)[k * 16] = total.first(16)

    # What is still to be added ------------------------------------------------------------------

    def _add(self, matrix: Place, pairs: list[Pair], t: Whole, fade: Vector | None = None) -> None:
        """``matrix = fade matrix + sum_k left_k right_k^T`` with rows of a trial."""
        with self.w.loop(0, self.n) as i, self.w.loop(0, self.m // 16) as k:
            index = i * self.m + k * 16
            total = matrix[index, 16] if fade is None else fade * matrix[index, 16]
            for left, right in pairs:
                value = (right + t * self.m)[k * 16, 16]
                total = fma((left + t * self.m).copies(i, 16), value, total)
            matrix[index] = total

    def _add_own(self, d_write: Place, slot: Whole, t: Whole) -> None:
        """A trial's share in the gradients of U's tensors."""
        assert self.write is not None, "in the base rule U_s is V_s"
        posts = [self._V(slot, s) for s in self.rounds]
        pres, inner = ([self._row(name, s) for s in self.rounds] for name in ("pre", "inner"))
        if not self.write.deep:
            self._add(d_write, list(zip(posts, pres, strict=True)), t)
            return
        hidden = [self._told(slot, 3, s) for s in self.rounds]
        for lefts, rights in ((posts, inner), (hidden, pres)):
            self._add(d_write, list(zip(lefts, rights, strict=True)), t)
            bias = d_write + self.shape.size
            with self.w.loop(0, self.m // 16) as k:
                total = bias[k * 16, 16]
                for right in rights:
                    total = total + (right + t * self.m)[k * 16, 16]
                bias[k * 16] = total
            d_write = bias + self.m

    def _settle(self, t: Whole) -> None:
        """Add to a trial's G, and to alpha's gradient, what the last step has left."""
        G = self.matrix("grad_w", self.here.trials[0] + t)
        pairs = [(self._row("before", s), self._row("driven", s)) for s in self.rounds]
        self._add(G, pairs, t, self.fade.copies(t, 16))
        if self.alpha and self.pairs:
            pairs = [(self._row("query", k), self._row("error", k)) for k in range(self.pairs)]
            self._add(self.d_alpha, pairs, t)
        self._forget(t)

    def _forget(self, t: Whole) -> None:
        """Nothing is left to be added for a trial."""
        self.fade[t] = self.composite[0, 1]  # b_0 = 1
        tables = [self._row(name, s) for name in ("before", "driven") for s in self.rounds]
        tables += [self._row("error", k) for k in range(self.pairs)]
        with self.w.loop(0, self.m // 16) as k:
            for table in tables:
                (table + t * self.m)[k * 16] = self.w.zero(16)

    def _to_start(self, t: Whole) -> None:
        """``start += G``, ``G = 0``."""
        trial = self.here.trials[0] + t
        G, start = self.matrix("grad_w", trial), self.matrix("grad_start", trial)
        with self.w.loop(0, self.shape.size // 16) as k:
            start[k * 16] = start[k * 16, 16] + G[k * 16, 16]
            G[k * 16] = self.w.zero(16)
