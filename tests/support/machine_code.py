"""Short pieces of machine code, as cuobjdump would print them."""

from __future__ import annotations

import re
from collections.abc import Sequence

from cbam_ext.building import decisions

from bench.machine_code.compilation import InspectionError, find_cuobjdump
from bench.machine_code.sass import Kernel, parse

LOAD_A, LOAD_B = "LDG.E.128 R4, [R2.64]", "LDG.E.128 R8, [R2.64+0x10]"
USE_A, USE_B = "FADD R20, R5, R20", "FADD R20, R8, R20"
FUNCTION = "function: FADD R9, R9, R9\nRET.REL.NODEC R20 0x0"


def missing_tool() -> str:
    """Why sources cannot be compiled and looked into here; empty if they can."""
    toolkit, why = decisions.find_toolkit()
    if toolkit is None:
        return f"no nvcc: {why}"
    try:
        find_cuobjdump()
    except InspectionError as error:
        return str(error)
    return ""


def dump(code: str, *, arch: str = "sm_90", stack: int = 0, attributes: Sequence[str] = ()) -> str:
    """What cuobjdump prints of a kernel. A line of code may begin with a label; {label} is its
    address."""
    lines = [
        re.fullmatch(r"(?:(\w+):)?\s*(.+)", line.strip()).groups()
        for line in code.splitlines()
        if line.strip()
    ]
    labels = {label: f"{16 * i:#x}" for i, (label, _) in enumerate(lines) if label}
    return "\n".join(
        [
            f"arch = {arch}",
            ".nv.info.toy",
            "\tAttribute:\tEIATTR_MAX_THREADS",
            "\tFormat:\tEIFMT_SVAL",
            "\tValue:\t0x100 0x1 0x1",
            *(f"\t\t{attribute.format(**labels)}" for attribute in attributes),
            " Function toy:",
            f"  REG:32 STACK:{stack} SHARED:16 LOCAL:0 CONSTANT[0]:384",
            f"\tcode for {arch}",
            "\t\tFunction : toy",
            *(
                f"        /*{16 * i:04x}*/  {text.format(**labels)} ;  /* 0x0000000000007918 */"
                for i, (_, text) in enumerate(lines)
            ),
        ]
    )


def kernel(code: str, **of_dump: object) -> Kernel:
    (found,) = parse(dump(code, **of_dump))
    return found


def around(body: str) -> str:
    """A loop with this body, to which the jump back is added."""
    return f"MOV R1, RZ\ntop: NOP\n{body}\n@!P0 BRA {{top}}\nEXIT"
