"""Compile every kernel for sm_80 and sm_90, on a machine without a GPU too: registers, spills, load and store widths.

    python -m fastrot.ops.compile

Ends with status 1 where a kernel spills registers.
"""

import importlib
import re
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

OPS = (
    "fastrot.ops.rotate",
    "fastrot.ops.nce",
    "fastrot.ops.rows",
    "fastrot.ops.blocks",
    "fastrot.ops.norm",
)  # each with variants(): what to compile
TARGETS = (80, 90)  # A100; H100 and H200


@dataclass(frozen=True, kw_only=True)
class Report:
    """What the compiler made of one kernel for one target."""

    kernel: str
    target: int
    registers: int  # a thread
    spills: int  # bytes of local memory a thread
    shared: int  # bytes a program
    load: int  # widest from global memory, bytes a thread
    store: int  # widest to global memory, bytes a thread
    instructions: int  # of machine code


def compiled(variant: dict, target: int) -> Report:
    """Compile one variant and read its machine code with the cuobjdump of Triton's wheel."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = variant["kernel"].arg_names
    source = ASTSource(
        fn=variant["kernel"],
        signature={**variant["signature"], **dict.fromkeys(variant["constants"], "constexpr")},
        constexprs={(names.index(name),): value for name, value in variant["constants"].items()},
        attrs={(names.index(name),): [["tt.divisibility", 16]] for name in variant["aligned"]},
    )
    kernel = triton.compile(
        source,
        target=GPUTarget("cuda", target, 32),
        options={"num_warps": variant["warps"], **variant.get("options", {})},
    )
    cuobjdump = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        usage = _output(cuobjdump, "-res-usage", file.name)
        code = _output(cuobjdump, "-sass", file.name)
    return Report(
        kernel=variant["name"],
        target=target,
        registers=_number(r"REG:(\d+)", usage),
        spills=max(_number(r"LOCAL:(\d+)", usage), _number(r"STACK:(\d+)", usage)),
        shared=kernel.metadata.shared,
        load=_widest("LDG(?:STS)?", code),
        store=_widest("STG", code),
        instructions=len(re.findall(r"^\s+/\*[0-9a-f]{4,}\*/", code, re.M)),
    )


def _widest(instruction: str, code: str) -> int:
    """Bytes of the widest such instruction: STG.E.128 is 16, STG.E is 4, LDG.E.U8 is 1; LDGSTS copies to shared memory."""
    found = re.findall(rf"\b{instruction}\.E(\S*)", code)
    return max((_width(suffix) for suffix in found), default=0)


def _width(suffix: str) -> int:
    bits = re.search(r"\.[US]?(128|64|16|8)\b", suffix)
    return int(bits[1]) // 8 if bits else 4


def _number(pattern: str, text: str) -> int:
    match = re.search(pattern, text)
    assert match, f"cuobjdump says nothing of {pattern}: {text}"
    return int(match[1])


def _output(*command: str | Path) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def main() -> int:
    """Print the table; 1 where something spills."""
    variants = [v for op in OPS for v in importlib.import_module(op).variants()]
    reports = [compiled(variant, target) for variant in variants for target in TARGETS]
    print(f"{'kernel':32} target registers spills shared load store instructions")
    for r in reports:
        print(
            f"{r.kernel:32} sm_{r.target}  {r.registers:9} {r.spills:6} {r.shared:6} {r.load:4} {r.store:5} "
            f"{r.instructions:12}"
        )
    spilled = [f"{r.kernel} on sm_{r.target}" for r in reports if r.spills]
    if spilled:
        print(f"registers are spilled to memory by {', '.join(spilled)}", file=sys.stderr)
    return int(bool(spilled))


if __name__ == "__main__":
    sys.exit(main())
