"""Writes machine code for this processor to stdout, an object file that defines one function.

    python _compiler plastic ROW n S ALPHA RULE
    python _compiler backward ROW n S ALPHA RULE
    python _compiler dense ROW SQUASH PARTS WIDTH .. WIDTH ..

ROW: rows of matrices are padded to a multiple of so many columns. The widths are those of the parts
of the input, then those of the layers.

A program of its own beside the package: who runs what it writes needs no compiler in memory.
"""

from __future__ import annotations

import sys

import llvmlite.binding as llvm
from backward import Backward
from dense import Dense
from forward import Forward
from kernel import Machine, Size
from llvmlite import ir
from writer import I64, PTR

NAME = "esmeta_kernel"
BEGIN = b"\nesmeta machine code\n"


def machine_code(kind: str, row: int, words: list[str], processor: str = "") -> bytes:
    """An object file for this machine that defines ``NAME(table, low, high)``.

    ``processor`` is LLVM's name of another one than this machine's own, without wide vectors.
    """
    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()
    wide, features = False, ""
    if not processor:
        own = llvm.get_host_cpu_features()
        wide = own.get("avx512f", False)
        features = own.flatten() + (",-prefer-256-bit" if wide else "")
    on = Machine(16, 32, row) if wide else Machine(8, 16, row)
    module = ir.Module()
    function = ir.Function(module, ir.FunctionType(ir.VoidType(), [PTR, I64, I64]), NAME)
    function.attributes.add("nounwind")
    if kind in ("plastic", "backward"):
        *numbers, rule = words
        neurons, depth, alpha = map(int, numbers)
        build = Forward if kind == "plastic" else Backward
        build(function, Size(neurons, depth, alpha == 1, rule), on).run()
    else:
        squash, parts, *widths = map(int, words)
        Dense(function, widths[:parts], widths[parts:], squash == 1, on).run()
    parsed = llvm.parse_assembly(str(module))
    parsed.verify()
    target = llvm.Target.from_default_triple().create_target_machine(
        cpu=processor or llvm.get_host_cpu_name(),
        features=features,
        opt=3,
        reloc="pic",
        codemodel="default",
    )
    return target.emit_object(parsed)


if __name__ == "__main__":
    kind, row, *words = sys.argv[1:]
    code = machine_code(kind, int(row), words)
    # What an environment prints at the start of Python comes before this line.
    sys.stdout.buffer.write(BEGIN + code)
