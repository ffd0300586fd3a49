"""Compiles the Triton kernels for GPUs that need not be there, in a process without TRITON_INTERPRET:

    python -m tests.kernels.ahead_of_time 80,90,100 16,64,128

prints a line for each variant: its name, registers, bytes of stack (spilled registers).
"""

import itertools
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import triton.backends.nvidia
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from lightning_dlrm.kernels import fused

CUOBJDUMP = Path(triton.backends.nvidia.__file__).parent / "bin/cuobjdump"
FORMULA = {"L2": 1e-5, "EPSILON": 1e-8, "BETA1": 0.9, "BETA2": 0.999}


def variants(width: int, kinds: list[tuple[str, bool, bool]], rules: list[str]) -> Iterator[tuple[str, Any, Any, Any]]:
    """Each variant's name, kernel, types and constants, and the number of warps, as ``fused.py`` launches them."""
    layout = fused.lookup_layout(width)
    for weight, bags, weighted in kinds:
        types = {"weight": weight, "ids": "*i32", "row_offsets": "*i64", "offsets": "*i64", "factors": "*fp32"}
        types |= {"out": weight, "bags": "i32", "tables": "i32", "width": "i32"}
        constants = {"HAS_BAGS": bags, "WEIGHTED": weighted, "BAGS": layout.items, "D": layout.columns}
        yield f"lookup {width} {weight} {bags=} {weighted=}", fused._lookup_kernel, (types, constants), layout.warps
    layout = fused.update_layout(width)
    for rule, (weight, bags, weighted) in itertools.product(rules, kinds):
        types = {"weight": weight, "first": "*fp32", "second": "*fp32", "scalars": "*fp32", "rows": "*i32"}
        sizes = {"count": "i32", "table_rows": "i32", "width": "i32"}
        sums = {"first_sums": "*fp32", "later_sums": "*fp32"}
        formula = {"RULE": rule, **FORMULA, "C": layout.items, "D": layout.columns}
        given = {"order": "*i64", "grad": weight, "bags": "*i64", "factors": "*fp32"}
        kind = f"{width} {rule} {weight} {bags=} {weighted=}"
        constants = {"HAS_BAGS": bags, "WEIGHTED": weighted, **formula}
        yield f"update {kind}", fused._update_kernel, (types | given | sums | sizes, constants), layout.warps
        spread = {**formula, "BLOCKS": fused.BLOCKS_PER_READ}
        yield f"spread {kind}", fused._update_spread_kernel, (types | sums | sizes, spread), layout.warps


def usage(kernel: Any, signature: Any, warps: int, capability: int) -> tuple[int, int]:
    """Registers, and bytes of stack and local memory, of a compiled kernel."""
    types, constants = signature
    source = ASTSource(fn=kernel, signature=types | dict.fromkeys(constants, "constexpr"), constexprs=constants)
    options = {"num_warps": warps, "enable_fp_fusion": True}
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        said = subprocess.run([CUOBJDUMP, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    registers, stack, local = (int(n) for n in re.findall(r"REG:(\d+) STACK:(\d+) .*LOCAL:(\d+)", said)[0])
    return registers, stack + local


if __name__ == "__main__":
    capabilities, widths = ([int(n) for n in text.split(",")] for text in sys.argv[1:3])
    everything = len(capabilities) > 1
    kinds = [("*fp32", True, True)]
    rules = ["adam", "row_wise_adagrad"]
    if everything:
        kinds += [("*fp32", False, False), ("*bf16", False, False)]
        rules += ["sgd", "adagrad"]
    for capability, width in itertools.product(capabilities, widths):
        for name, kernel, signature, warps in variants(width, kinds, rules):
            print(f"sm_{capability} {name}:", *usage(kernel, signature, warps, capability), flush=True)
