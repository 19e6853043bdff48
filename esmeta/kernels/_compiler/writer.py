"""Writes LLVM instructions: loops, sums that stay in registers, vectors of float32."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

from llvmlite import ir

F32, I64, I8, PTR = ir.FloatType(), ir.IntType(64), ir.IntType(8), ir.PointerType()
_I32 = ir.IntType(32)
Piece = tuple[int, int]
"""Offset and width of a vector within a row."""


class Writer:
    """Writes instructions; numbers known now may be given as int, and vectors are of float32."""

    def __init__(self, function: ir.Function) -> None:
        self.b = ir.IRBuilder(function.append_basic_block())

    def table(self, base: Any, pointers: Sequence[str], sizes: Sequence[str]) -> dict[str, Any]:
        """The entries of a table of addresses and then sizes, by name."""
        kinds = [(name, PTR) for name in pointers] + [(name, I64) for name in sizes]
        return {
            name: self.b.load(self.at(base, k, I64), typ=kind, align=8)
            for k, (name, kind) in enumerate(kinds)
        }

    def whole(self, value: Any) -> Any:
        return ir.Constant(I64, value) if isinstance(value, int) else value

    def add(self, *terms: Any) -> Any:
        total: Any = sum(t for t in terms if isinstance(t, int))
        for term in terms:
            if not isinstance(term, int):
                total = term if isinstance(total, int) and total == 0 else self._sum(total, term)
        return total

    def _sum(self, left: Any, right: Any) -> Any:
        return self.b.add(self.whole(left), right)

    def mul(self, left: Any, right: Any) -> Any:
        if isinstance(left, int) and isinstance(right, int):
            return left * right
        return self.b.mul(self.whole(left), self.whole(right))

    def at(self, base: Any, index: Any, kind: Any = F32) -> Any:
        return self.b.gep(base, [self.whole(index)], source_etype=kind)

    def load(self, base: Any, index: Any, width: int) -> Any:
        return self.b.load(self.at(base, index), align=4, typ=ir.VectorType(F32, width))

    def store(self, value: Any, base: Any, index: Any) -> None:
        self.b.store(value, self.at(base, index), align=4)

    def zero(self, width: int) -> Any:
        return ir.Constant(ir.VectorType(F32, width), None)

    def copies(self, base: Any, index: Any, width: int) -> Any:
        """One number of memory in all places of a vector."""
        return self.splat(self.b.load(self.at(base, index), align=4, typ=F32), width)

    def prefetch(self, base: Any, index: Any) -> None:
        """Ask for memory that will be read soon; any address will do."""
        function = self._intrinsic("llvm.prefetch.p0", ir.VoidType(), [PTR, _I32, _I32, _I32])
        read, soon, data = (ir.Constant(_I32, k) for k in (0, 3, 1))
        self.b.call(function, [self.at(base, index), read, soon, data])

    def splat(self, number: Any, width: int) -> Any:
        kind = ir.VectorType(F32, width)
        one = self.b.insert_element(ir.Constant(kind, ir.Undefined), number, ir.Constant(I64, 0))
        zeros = ir.Constant(ir.VectorType(_I32, width), None)
        return self.b.shuffle_vector(one, ir.Constant(kind, ir.Undefined), zeros)

    def low(self, vector: Any, width: int) -> Any:
        """The first ``width`` numbers of a vector."""
        return vector if vector.type.count == width else self.part(vector, 0, width)

    def part(self, vector: Any, low: int, width: int) -> Any:
        """``width`` numbers of a vector from ``low`` on."""
        mask = [ir.Constant(_I32, low + k) for k in range(width)]
        places = ir.Constant(ir.VectorType(_I32, width), mask)
        return self.b.shuffle_vector(vector, ir.Constant(vector.type, ir.Undefined), places)

    def fma(self, a: Any, b: Any, c: Any) -> Any:
        """``a b + c``, rounded once where the machine can."""
        kind = a.type
        function = self._intrinsic(f"llvm.fmuladd.v{kind.count}f32", kind, [kind] * 3)
        return self.b.call(function, [a, b, c])

    def _intrinsic(self, name: str, result: Any, arguments: list[Any]) -> Any:
        module = self.b.module
        known = module.globals.get(name)
        return known or ir.Function(module, ir.FunctionType(result, arguments), name)

    def least(self, left: Any, right: Any) -> Any:
        return self.b.select(self.b.icmp_signed("<", left, right), left, right)

    def room(self, kind: Any, count: int = 1) -> Any:
        """The address of new memory on the stack."""
        place: Any = self.b.alloca(kind, count)
        place.align, place.type = 64, PTR
        return place

    @contextmanager
    def loop(self, low: Any, high: Any) -> Iterator[Any]:
        """For i from low to high."""
        body, after = (self.b.append_basic_block() for _ in range(2))
        low, high, before = self.whole(low), self.whole(high), self.b.block
        self.b.cbranch(self.b.icmp_signed("<", low, high), body, after)
        self.b.position_at_end(body)
        i = self.b.phi(I64)
        i.add_incoming(low, before)
        yield i
        following = self.add(i, 1)
        i.add_incoming(following, self.b.block)
        self.b.cbranch(self.b.icmp_signed("<", following, high), body, after)
        self.b.position_at_end(after)

    def fold(
        self,
        count: int,
        values: list[Any],
        body: Callable[[Any, list[Any]], list[Any]],
        at_once: int,
    ) -> list[Any]:
        """``values = body(i, values)`` for i in range(count), ``at_once`` per turn of the loop."""
        turns = count // at_once
        if turns > 1:
            before, block = self.b.block, self.b.append_basic_block()
            self.b.branch(block)
            self.b.position_at_end(block)
            turn = self.b.phi(I64)
            carried = [self.b.phi(value.type) for value in values]
            turn.add_incoming(self.whole(0), before)
            for phi, value in zip(carried, values, strict=True):
                phi.add_incoming(value, before)
            values = list(carried)
            for k in range(at_once):
                values = body(self.add(self.mul(turn, at_once), k), values)
            following = self.add(turn, 1)
            turn.add_incoming(following, self.b.block)
            for phi, value in zip(carried, values, strict=True):
                phi.add_incoming(value, self.b.block)
            after = self.b.append_basic_block()
            self.b.cbranch(self.b.icmp_signed("<", following, self.whole(turns)), block, after)
            self.b.position_at_end(after)
        for i in range(turns * at_once if turns > 1 else 0, count):
            values = body(i, values)
        return values

    def copy(self, length: int, source: Any, target: Any) -> None:
        """``length`` numbers, reading and writing nothing beyond."""
        for offset, width in pieces(length, 16):
            self.store(self.load(source, offset, width), target, offset)


def pieces(length: int, lanes: int) -> list[Piece]:
    """Vectors that fill a length exactly, each as wide as can be."""
    found, offset = [], 0
    while offset < length:
        while lanes > length - offset:
            lanes //= 2
        found.append((offset, lanes))
        offset += lanes
    return found


def tiles(pieces: Sequence[Piece], most: int) -> list[Sequence[Piece]]:
    """The pieces in groups of nearly equal size, at most ``most`` in each."""
    count = -(-len(pieces) // most)
    cuts = [len(pieces) * k // count for k in range(count + 1)]
    return [pieces[a:b] for a, b in pairwise(cuts)]
