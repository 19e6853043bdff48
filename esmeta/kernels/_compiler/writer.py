"""LLVM instructions written as arithmetic: numbers, places in memory, vectors of float32, loops."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from typing import Any, TypeVar

from llvmlite import ir

F32, I64, I8, PTR = ir.FloatType(), ir.IntType(64), ir.IntType(8), ir.PointerType()
_I32 = ir.IntType(32)
Piece = tuple[int, int]
"""Offset and width of a vector within a row."""


class _Value:
    """What is known when the function runs."""

    def __init__(self, b: ir.IRBuilder, value: Any) -> None:
        self.b, self.value = b, value


def _whole(number: Any) -> Any:
    return ir.Constant(I64, number) if isinstance(number, int) else number.value


V = TypeVar("V", bound=_Value)


def _operator(name: str) -> Callable[[V, V | int], V]:
    """An operation of two values of one kind; the right one may be an int."""
    return lambda left, right: type(left)(left.b, getattr(left.b, name)(left.value, _whole(right)))


class Truth(_Value):
    """Yes or no."""

    __and__, __or__ = _operator("and_"), _operator("or_")

    def __invert__(self) -> Truth:
        return Truth(self.b, self.b.not_(self.value))

    def choose(self, yes: Place, no: Place) -> Place:
        """One place or the other."""
        return Place(self.b, self.b.select(self.value, yes.value, no.value))


class Whole(_Value):
    """An integer; where it is known now, an int serves as well."""

    __add__ = __radd__ = _operator("add")
    __mul__ = __rmul__ = _operator("mul")
    __sub__, __floordiv__, __mod__ = _operator("sub"), _operator("sdiv"), _operator("srem")

    def compare(self, sign: str, other: Index) -> Truth:
        """``<``, ``==`` or ``!=``."""
        return Truth(self.b, self.b.icmp_signed(sign, self.value, _whole(other)))

    def at_most(self, other: Index) -> Whole:
        """The smaller one."""
        less = self.compare("<", other).value
        return Whole(self.b, self.b.select(less, self.value, _whole(other)))


Index = int | Whole


class Vector(_Value):
    """Some float32."""

    __add__, __sub__ = _operator("fadd"), _operator("fsub")
    __mul__, __truediv__ = _operator("fmul"), _operator("fdiv")

    @property
    def width(self) -> int:
        return self.value.type.count

    def within(self, low: Vector, high: Vector) -> Vector:
        """Cut to low..high; NaN stays NaN."""
        b, x = self.b, self.value
        x = b.select(b.fcmp_ordered("<", x, low.value), low.value, x)
        return Vector(b, b.select(b.fcmp_ordered(">", x, high.value), high.value, x))

    def part(self, low: int, width: int) -> Vector:
        """``width`` numbers from ``low`` on."""
        return self if (low, width) == (0, self.width) else _join([self], range(low, low + width))

    def first(self, width: int) -> Vector:
        """The first number, in all places of a vector."""
        return _splat(self.b, self.b.extract_element(self.value, _whole(0)), width)


def _join(vectors: Sequence[Vector], places: Iterable[int]) -> Vector:
    """The numbers at some places of one or two vectors side by side."""
    kind = vectors[0].value.type
    other = vectors[1].value if len(vectors) > 1 else ir.Constant(kind, ir.Undefined)
    mask = [ir.Constant(_I32, place) for place in places]
    where = ir.Constant(ir.VectorType(_I32, len(mask)), mask)
    return Vector(vectors[0].b, vectors[0].b.shuffle_vector(vectors[0].value, other, where))


def across(vectors: list[Vector]) -> Vector:
    """The sum of every vector, by halves, side by side; a power of two of them."""
    part = vectors[0].width
    while part > 1:
        pairs = [vectors[k : k + 2] for k in range(0, len(vectors), 2)]
        halves = []
        for pair in pairs:
            places = range(len(pair) * pair[0].width)
            low = _join(pair, [k for k in places if k % part < part // 2])
            halves.append(low + _join(pair, [k for k in places if k % part >= part // 2]))
        vectors, part = halves, part // 2
    return vectors[0]


def _splat(b: ir.IRBuilder, number: Any, width: int) -> Vector:
    nothing = ir.Constant(ir.VectorType(F32, width), ir.Undefined)
    zeros = ir.Constant(ir.VectorType(_I32, width), None)
    return Vector(b, b.shuffle_vector(b.insert_element(nothing, number, _whole(0)), nothing, zeros))


def fma(a: Vector, b: Vector, c: Vector) -> Vector:
    """``a b + c``, rounded once where the machine can."""
    kind = a.value.type
    function = _intrinsic(a.b.module, f"llvm.fmuladd.v{kind.count}f32", kind, [kind] * 3)
    return Vector(a.b, a.b.call(function, [a.value, b.value, c.value]))


def _intrinsic(module: Any, name: str, result: Any, arguments: list[Any]) -> Any:
    known = module.globals.get(name)
    return known or ir.Function(module, ir.FunctionType(result, arguments), name)


class Place(_Value):
    """An address of float32 (or of marks, of a byte each)."""

    def __add__(self, index: Index) -> Place:
        return Place(self.b, self._at(index))

    def _at(self, index: Index, kind: Any = F32) -> Any:
        return self.b.gep(self.value, [_whole(index)], source_etype=kind)

    def __getitem__(self, piece: tuple[Index, int]) -> Vector:
        """The vector of a width at an index."""
        index, width = piece
        kind = ir.VectorType(F32, width)
        return Vector(self.b, self.b.load(self._at(index), align=4, typ=kind))

    def __setitem__(self, index: Index, vector: Vector) -> None:
        self.b.store(vector.value, self._at(index), align=4)

    def copies(self, index: Index, width: int) -> Vector:
        """The number at an index, in all places of a vector."""
        return _splat(self.b, self.b.load(self._at(index), align=4, typ=F32), width)

    def marked(self, index: Index) -> Truth:
        """Whether the byte at an index is set."""
        mark = self.b.load(self._at(index, I8), typ=I8)
        return Truth(self.b, self.b.icmp_signed("!=", mark, ir.Constant(I8, 0)))

    def prefetch(self, index: Index) -> None:
        """Ask for memory that will be read soon; any address will do."""
        kinds = [PTR, _I32, _I32, _I32]
        function = _intrinsic(self.b.module, "llvm.prefetch.p0", ir.VoidType(), kinds)
        self.b.call(function, [self._at(index), *(ir.Constant(_I32, k) for k in (0, 3, 1))])

    def copy_to(self, target: Place, length: int) -> None:
        """Copy ``length`` numbers, reading and writing nothing beyond."""
        for offset, width in pieces(length, 16):
            target[offset] = self[offset, width]


class Variable(_Value):
    """A place that changes."""

    def set(self, place: Place) -> None:
        self.b.store(place.value, self.value)

    def get(self) -> Place:
        return Place(self.b, self.b.load(self.value, typ=PTR))


class Writer:
    """Writes the body of ``function(table, low, high)``."""

    def __init__(self, function: ir.Function, places: Sequence[str], sizes: Sequence[str]) -> None:
        """The table holds addresses (``at``) and then sizes (``size``), by name."""
        self.b = ir.IRBuilder(function.append_basic_block())
        table, *ends = function.args
        self.low, self.high = (Whole(self.b, end) for end in ends)
        kinds = [PTR] * len(places) + [I64] * len(sizes)
        entries = [
            self.b.load(Place(self.b, table)._at(k, I64), typ=kind, align=8)
            for k, kind in enumerate(kinds)
        ]
        named = dict(zip((*places, *sizes), entries, strict=True))
        self.at = {name: Place(self.b, named[name]) for name in places}
        self.size = {name: Whole(self.b, named[name]) for name in sizes}

    def zero(self, width: int) -> Vector:
        return Vector(self.b, ir.Constant(ir.VectorType(F32, width), None))

    def room(self, count: int) -> Place:
        """New memory on the stack for float32."""
        place: Any = self.b.alloca(F32, count)
        place.align, place.type = 64, PTR
        return Place(self.b, place)

    def variable(self) -> Variable:
        cell: Any = self.b.alloca(PTR, 1)
        cell.align, cell.type = 64, PTR
        return Variable(self.b, cell)

    @contextmanager
    def when(self, truth: Truth) -> Iterator[None]:
        with self.b.if_then(truth.value):
            yield

    @contextmanager
    def loop(self, low: Index, high: Index) -> Iterator[Whole]:
        """For i from low to high."""
        body, after = (self.b.append_basic_block() for _ in range(2))
        start, end, before = _whole(low), _whole(high), self.b.block
        self.b.cbranch(self.b.icmp_signed("<", start, end), body, after)
        self.b.position_at_end(body)
        phi = self.b.phi(I64)
        phi.add_incoming(start, before)
        i = Whole(self.b, phi)
        yield i
        following = i + 1
        phi.add_incoming(following.value, self.b.block)
        self.b.cbranch(self.b.icmp_signed("<", following.value, end), body, after)
        self.b.position_at_end(after)

    def fold(
        self,
        count: Index,
        values: list[Vector],
        body: Callable[[Index, list[Vector]], list[Vector]],
        at_once: int = 1,
    ) -> list[Vector]:
        """``values = body(i, values)`` for i in range(count), ``at_once`` per turn of the loop.

        A count that is not known now is at least 1, and one per turn.
        """
        turns = count // at_once if isinstance(count, int) else count
        if not isinstance(turns, int) or turns > 1:
            before, block = self.b.block, self.b.append_basic_block()
            self.b.branch(block)
            self.b.position_at_end(block)
            turn = self.b.phi(I64)
            carried = [self.b.phi(value.value.type) for value in values]
            turn.add_incoming(_whole(0), before)
            for phi, value in zip(carried, values, strict=True):
                phi.add_incoming(value.value, before)
            values, i = [Vector(self.b, phi) for phi in carried], Whole(self.b, turn)
            for k in range(at_once):
                values = body(i * at_once + k, values)
            following = (i + 1).value
            turn.add_incoming(following, self.b.block)
            for phi, value in zip(carried, values, strict=True):
                phi.add_incoming(value.value, self.b.block)
            after = self.b.append_basic_block()
            self.b.cbranch(self.b.icmp_signed("<", following, _whole(turns)), block, after)
            self.b.position_at_end(after)
        if isinstance(turns, int) and isinstance(count, int):
            for i in range(turns * at_once if turns > 1 else 0, count):
                values = body(i, values)
        return values


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
