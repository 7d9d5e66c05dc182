"""Compile every kernel for sm_80 and sm_90, on a machine without a GPU too: registers, spills, warps, load and store widths.

    python tests/ops/kernels.py

Ends with status 1 where a kernel spills registers, leaves an SM with few warps, or moves fewer bytes at once than it should.
"""

import re
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from fastrot.ops import blocks, nce_kernels, norm_kernels, rotate, rows

TARGETS = {80: 164, 90: 228}  # A100; H100 and H200: KB of an SM's shared memory
FEWEST = 16  # warps of an SM's 64
# by a word of a kernel's name: 128 registers, which 16 leave, would spill norm_sums; no paper's features are the widest
FEWER = {"norm_sums": 12, str(rows.WIDEST): 12}
WIDE = {  # bytes a thread loads or stores at once, by the first word of a kernel's name here
    "rotated_views": dict(store=16),
    "space_to_depth": dict(store=16),
    "nce": dict(load=16),
    "infonce": dict(load=16),
    "update_rows": dict(load=16),
    "unpack_crops": dict(load=8, store=4),  # a thread's pixels are four, so that decoding fits
    "norm_statistics": dict(load=16),
    "norm_relu": dict(load=16, store=16),
    "norm_sums": dict(load=16),
    "norm_back": dict(load=16, store=16),
    "norm_finish_statistics": dict(load=16),
    "norm_finish_sums": dict(load=16),
}


@dataclass(frozen=True, kw_only=True)
class Kernel:
    """A kernel in a form in which training runs it."""

    name: str
    kernel: Any  # triton.jit's
    types: dict[str, str]  # of arguments, as Triton writes them; others may stand here too
    constants: dict[str, Any]
    aligned: tuple[str, ...] | None = None  # arguments that 16 divides; None: all pointers
    warps: int
    options: dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Report:
    """What the compiler made of one kernel for one target."""

    kernel: str
    target: int
    registers: int  # a thread
    spills: int  # bytes of local memory a thread
    shared: int  # bytes a program
    warps: int  # that an SM holds at once
    load: int  # widest from global memory, bytes a thread
    store: int  # widest to global memory, bytes a thread
    instructions: int  # of machine code

    def faults(self) -> list[str]:
        """What is not as it should be."""
        name, found = self.kernel.split()[0], asdict(self)
        fewest = min(FEWER.get(word, FEWEST) for word in self.kernel.split())
        wanted = {"spills": 0, **WIDE[name], "warps": max(self.warps, fewest)}
        return [
            f"{self.kernel} on sm_{self.target}: {what} is {found[what]}, not {value}"
            for what, value in wanted.items()
            if found[what] != value
        ]


def warps_an_sm(registers: int, shared: int, warps: int, target: int) -> int:
    """Warps that an SM holds at once: each quarter has 16,384 registers, a warp takes them by 256; programs come whole."""
    in_quarter = 16_384 // (-(-32 * registers // 256) * 256)
    room = TARGETS[target] * 1024 // (shared + 1024)  # a program takes a KB more than it asks for
    return warps * min(4 * in_quarter // warps, room, 64 // warps, 32)


def compiled(kernel: Kernel, target: int) -> Report:
    """Compile it and read its machine code with the cuobjdump of Triton's wheel."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = kernel.kernel.arg_names
    signature = {name: kernel.types[name] for name in names if name not in kernel.constants}
    pointers = tuple(name for name, kind in signature.items() if kind.startswith("*"))
    aligned = pointers if kernel.aligned is None else kernel.aligned
    source = ASTSource(
        fn=kernel.kernel,
        signature={**signature, **dict.fromkeys(kernel.constants, "constexpr")},
        constexprs={(names.index(name),): value for name, value in kernel.constants.items()},
        attrs={(names.index(name),): [["tt.divisibility", 16]] for name in aligned},
    )
    made = triton.compile(
        source,
        target=GPUTarget("cuda", target, 32),
        options={"num_warps": kernel.warps, **kernel.options},
    )
    cuobjdump = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(made.asm["cubin"])
        file.flush()
        usage, code = (
            subprocess.run([cuobjdump, each, file.name], check=True, capture_output=True, text=True).stdout
            for each in ("-res-usage", "-sass")
        )  # fmt: skip
    registers, shared = _number(r"REG:(\d+)", usage), made.metadata.shared
    return Report(
        kernel=kernel.name,
        target=target,
        registers=registers,
        spills=max(_number(r"LOCAL:(\d+)", usage), _number(r"STACK:(\d+)", usage)),
        shared=shared,
        warps=warps_an_sm(registers, shared, kernel.warps, target),
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


# ---- the kernels, as training uses them ----


def kernels() -> list[Kernel]:
    """All of them."""
    return [*of_rotate(), *of_nce(), *of_rows(), *of_blocks(), *of_norm()]


def of_rotate() -> list[Kernel]:
    """All four rotations, one rotation, a rotation of each image's own; at 224 pixels."""
    plain = rotate.SpaceToDepth(1, 0, 224)
    types = {"images": "*u8", "rotations": "*i64", "size": "i32", "count": "i32"}
    types |= dict.fromkeys(("mean0", "mean1", "mean2", "std0", "std1", "std2"), "fp32")
    return [
        Kernel(
            name=f"{name} {form} {out}",
            kernel=rotate._rotated_views_kernel,
            types={**types, "out": f"*{out}"},
            constants=dict(
                VIEWS=views, PATTERN=pattern, SIDE=cells.side, PAD=cells.pad, BESIDE=cells != plain,
                FUSED=True, ROWS=tile[0], WIDTH=tile[1],
            ),
            aligned=("images", "rotations", "out", "size", *("count",) * (cells == plain)),
            warps=rotate.WARPS,
            options={},
        )
        for name, cells, tile in (
            ("rotated_views", plain, rotate.TILE),
            ("space_to_depth", rotate.SpaceToDepth(4, 2, 57), rotate.CELLS_TILE),
        )
        for out in ("bf16", "fp32")
        for form, views, pattern in (("0123", 4, 0b11100100), ("0", 1, 0), ("per image", 2, -1))
    ]  # fmt: skip


def of_nce() -> list[Kernel]:
    """At D 128, and at the widest."""
    types = dict.fromkeys(("positive", "negatives", "index", "step"), "*i64")
    types |= dict.fromkeys(("x", "z", "sums", "grads", "loss", "mass", "grad"), "*fp32")
    types |= dict.fromkeys(("count", "size", "splits", "turns", "seed"), "i32")
    types |= dict.fromkeys(("in_log2", "level", "over_temperature", "floor"), "fp32")
    forms = {  # D, drawn inside, never the image's own, InfoNCE
        "nce draw": (128, True, False, False),
        "nce": (128, False, False, False),
        "infonce draw": (128, True, False, True),
        "infonce": (128, False, False, True),
        "nce draw others": (rows.WIDEST, True, True, False),
        "infonce given": (rows.WIDEST, False, False, True),
    }
    found = []
    for kind, itemsize in (("bf16", 2), ("fp32", 4)):
        for form, (d, drawn, others, softmax) in forms.items():
            parts = nce_kernels._parts(d * itemsize)
            found.append(
                Kernel(
                    name=f"{form} {d} {kind}",
                    kernel=nce_kernels._nce_kernel,
                    types={**types, "rows": f"*{kind}"},
                    constants=dict(
                        D=d, PARTS=parts, WIDTH=d // parts, ROWS=max(1, nce_kernels.TILE // (d * itemsize)),
                        DRAWN=drawn, OTHERS=others, SOFTMAX=softmax,
                    ),
                    aligned=("x", "rows", "negatives", "grads"),
                    warps=nce_kernels.WARPS,
                    options={},
                )
            )  # fmt: skip
    for form, d, kind in (("nce", 128, "bf16"), ("infonce", rows.WIDEST, "fp32")):
        found.append(
            Kernel(
                name=f"{form} second stage {d} {kind}",
                kernel=nce_kernels._finish_kernel,
                types={**types, "rows": f"*{kind}"},
                constants=dict(
                    D=d, BLOCK_D=d, SPLITS=max(1, nce_kernels.STEP // d), SOFTMAX=form == "infonce"
                ),
                aligned=("x", "rows", "grads", "grad"),
                warps=nce_kernels.WARPS,
                options={},
            )
        )
    return found


def of_rows() -> list[Kernel]:
    """At the papers' width and at the widest."""
    types = {"index": "*i64", "features": "*fp32", "size": "i32", "images": "i32"}
    types |= dict.fromkeys(("momentum", "rest", "eps"), "fp32")
    return [
        Kernel(
            name=f"update_rows {d} {kind}",
            kernel=rows._update_rows_kernel,
            types={**types, "rows": f"*{kind}"},
            constants=dict(D=d, BLOCK_D=d, AHEAD=rows.AHEAD),
            warps=rows.WARPS,
            options={},
        )
        for kind, d in (("bf16", 128), ("fp32", 128), ("fp32", rows.WIDEST))
    ]


def of_blocks() -> list[Kernel]:
    """Both encodings, at 224 pixels."""
    types = {"first": "*i64", "sizes": "*i32", "boxes": "*i64", "out": "*u8", "size": "i32"}
    return [
        Kernel(
            name=f"unpack_crops {encoding}",
            kernel=blocks._unpack_kernel,
            types={**types, "tiles": tiles},
            constants=dict(PACKED=encoding == "ycc", SIDE=blocks.SIDE),
            aligned=("tiles", "first", "sizes", "boxes", "out", "size"),
            warps=blocks.WARPS,
            options=blocks.EXACT | (blocks.REGISTERS if encoding == "ycc" else {}),
        )
        for encoding, tiles in (("ycc", "*i64"), ("raw", "*u8"))
    ]


def of_norm() -> list[Kernel]:
    """As AlexNet's layers use them: pooled behind conv1 and conv2, not pooled behind conv3."""
    layers = [
        each
        for y in ("bf16", "fp32")
        for c, pool in ((64, True), (192, True), (384, False))
        for each in _of_layer(y, c, pool)
    ]
    return [each for each in layers if "finish" not in each.name or each.name.endswith("384 bf16")]


def _of_layer(y: str, c: int, pool: bool) -> list[Kernel]:
    block, itemsize = norm_kernels._block(c), 2 if y == "bf16" else 4
    types = dict.fromkeys(
        ("weight", "bias", "mean", "var", "dweight", "dbias", "running_mean", "running_var", "shift", "parts"),
        "*fp32",
    )  # fmt: skip
    types |= dict.fromkeys(
        ("rows", "tiles", "shares", "per_share", "places", "height", "width", "down", "across", "blocks"),
        "i32",
    )  # fmt: skip
    types |= dict.fromkeys(("y", "out", "peak", "grad", "dy"), f"*{y}")
    types |= {"winner": "*u8", "eps": "fp32", "momentum": "fp32", "over_rows": "fp32"}
    tile, finish = (
        norm_kernels.TILE // (block * itemsize),
        dict(BLOCK_C=norm_kernels.FINISH, SHARES=norm_kernels.SHARES),
    )
    forms = {
        "norm_statistics": (norm_kernels._statistics_kernel, dict(ROWS=tile)),
        "norm_relu": (
            norm_kernels._norm_relu_kernel,
            dict(POOL=pool, ROWS=norm_kernels.WINDOWS // block),
        ),
        "norm_sums": (norm_kernels._sums_kernel, dict(POOL=pool, ROWS=tile)),
        "norm_back": (
            norm_kernels._back_kernel,
            dict(POOL=pool, ROWS=norm_kernels.BLOCKS // block),
        ),
        "norm_finish_statistics": (
            norm_kernels._finish_statistics_kernel,
            dict(SHIFTED=True, **finish),
        ),
        "norm_finish_sums": (norm_kernels._finish_sums_kernel, finish),
    }
    return [
        Kernel(
            name=f"{name} {'pooled ' * pool}{c} {y}",
            kernel=kernel,
            types=types,
            constants=dict(C=c, BLOCK_C=block) | constants,
            warps=norm_kernels.WARPS,
            options=norm_kernels.REGISTERS if name == "norm_back" and pool else {},
        )
        for name, (kernel, constants) in forms.items()
    ]


def main() -> int:
    """Print the table; 1 where something is not as it should be."""
    faults = []
    print(f"{'kernel':32} target registers spills shared warps load store instructions")
    for kernel in kernels():
        for target in TARGETS:
            r = compiled(kernel, target)
            print(
                f"{r.kernel:32} sm_{r.target}  {r.registers:9} {r.spills:6} {r.shared:6} {r.warps:5} {r.load:4} {r.store:5} "
                f"{r.instructions:12}"
            )
            faults += r.faults()
    print(*faults, sep="\n", file=sys.stderr)
    return int(bool(faults))


if __name__ == "__main__":
    sys.exit(main())
