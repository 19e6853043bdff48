"""Writes machine code for this processor: ``python _compiler FILE n S ALPHA LINEAR``.

A program of its own beside the package: who runs what it writes needs no compiler in memory.
"""

from __future__ import annotations

import sys

import llvmlite.binding as llvm
from forward import Forward, Machine
from llvmlite import ir
from writer import I64, PTR

NAME = "esmeta_plastic"


def machine_code(neurons: int, depth: int, alpha: bool, linear: bool) -> bytes:
    """An object file for this machine that defines ``NAME(table, low, high)``."""
    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()
    features = llvm.get_host_cpu_features()
    wide = features.get("avx512f", False)
    module = ir.Module()
    function = ir.Function(module, ir.FunctionType(ir.VoidType(), [PTR, I64, I64]), NAME)
    function.attributes.add("nounwind")
    on = Machine(16, 32) if wide else Machine(8, 16)
    Forward(function, neurons, depth, alpha, linear, on).run()
    parsed = llvm.parse_assembly(str(module))
    parsed.verify()
    target = llvm.Target.from_default_triple().create_target_machine(
        cpu=llvm.get_host_cpu_name(),
        features=features.flatten() + (",-prefer-256-bit" if wide else ""),
        opt=3,
        reloc="pic",
        codemodel="default",
    )
    return target.emit_object(parsed)


if __name__ == "__main__":
    path, n, S, *flags = sys.argv[1:]
    with open(path, "wb") as file:
        file.write(machine_code(int(n), int(S), *(flag == "1" for flag in flags)))
