"""What a compiled kernel asks of an H100: registers and spills, warps that fit, the machine code of
its inner loop, and from those the cycles of one tile against each limit.

Liberty taken: throughputs only. Limits are those of one SM at the boost clock; waiting is modelled
in one way alone, that within a program products and the arithmetic between them follow each other,
so that only other programs on the same SM fill the gaps (`serial`).
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

# NVIDIA H100 SXM (data sheet; Hopper tuning guide): per SM and clock, of 132 SMs at 1.83 GHz.
SMS, CLOCK = 132, 1.83e9
TENSOR_FLOPS = 4096  # dense bf16
SCHEDULERS = 4  # one warp instruction each
SPECIAL_LANES = 16  # exp2, reciprocal
SHARED_BYTES = 128
L2_BYTES = 5120 / SMS  # the A100's 5120 bytes per clock, of which the H100's is a successor
HBM_BYTES = 3.35e12 / SMS / CLOCK
REGISTERS, WARPS, PROGRAMS, SHARED = 65536, 64, 32, 228 << 10  # of an SM
RESERVED = 1 << 10  # shared memory the driver takes per program


@dataclass(frozen=True)
class Loop:
    """One warp's instructions of one pass, by kind; bytes and operations of the whole warp."""

    instructions: int = 0
    flops: float = 0.0
    special: int = 0
    wgmma: int = 0
    operand_bytes: float = 0.0  # that wgmma reads from shared memory
    shared_bytes: float = 0.0
    global_bytes: float = 0.0


@dataclass(frozen=True)
class Machine:
    """A kernel's resources and code; spills are bytes of stack per thread, calls those of
    subroutines (a 64-bit division is one)."""

    registers: int
    spill_bytes: int
    wgmma: int
    async_copies: int
    tma: int
    calls: int
    loop: Loop


_INSTRUCTION = re.compile(r"/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?(\S+)\s*([^;]*);")
_WGMMA = re.compile(r"[HQI]GMMA\.(\d+)x(\d+)x(\d+)")


def _tool(name: str, *arguments: str) -> str:
    import triton

    path = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    done = subprocess.run([str(path), *arguments], capture_output=True, text=True, check=True)
    return done.stdout


def _width(opcode: str) -> int:
    """Bytes of a memory instruction in all 32 lanes of a warp."""
    for part in opcode.split("."):
        if part in ("64", "128"):
            return 4 * int(part)
        if part in ("U8", "S8", "U16", "S16"):
            return 4 * int(part[1:])
    return 128


def _count(code: list[tuple[int, str, str]]) -> Loop:
    flops = products = special = wgmma = operand = shared = moved = 0.0
    for _, opcode, rest in code:
        name = opcode.split(".")[0]
        if found := _WGMMA.match(opcode):
            m, n, k = map(int, found.groups())
            wgmma += 1
            products += 2.0 * m * n * k / 4  # four warps share it
            size = 2 if opcode.startswith("H") and "F32.TF32" not in opcode else 4
            from_registers = "gdesc" not in rest.split(",")[1]
            operand += size * k * (n + (0 if from_registers else m)) / 4
        elif name in ("FFMA", "FFMA2"):
            flops += 64.0 * (2 if name == "FFMA2" else 1)
        elif name == "MUFU":
            special += 1
        elif name in ("LDS", "STS", "LDSM", "STSM"):
            matrices = re.search(r"\.(\d)$|M88\.(\d)", opcode) if name.endswith("M") else None
            shared += (
                128 * int(matrices.group(1) or matrices.group(2)) if matrices else _width(opcode)
            )
        elif name in ("LDG", "STG", "LDGSTS"):
            moved += _width(opcode)
            shared += _width(opcode) if name == "LDGSTS" else 0
    if wgmma:
        flops = products
    return Loop(len(code), flops, int(special), int(wgmma), operand, shared, moved)


def _loops(code: list[tuple[int, str, str]]) -> list[Loop]:
    """Innermost loops: from the target of a backward branch to the branch."""
    spans = []
    for at, opcode, rest in code:
        target = re.search(r"0x([0-9a-f]+)", rest)
        if opcode == "BRA" and target and int(target.group(1), 16) < at:
            spans.append((int(target.group(1), 16), at))
    inner = [s for s in spans if not any(s[0] <= o[0] and o[1] <= s[1] and o != s for o in spans)]
    return [_count([c for c in code if first <= c[0] <= last]) for first, last in inner]


def inspect(cubin: bytes) -> Machine:
    """Read resources and the hot loop: of the loops with most operations (or bytes, where there is
    no product) the shortest, or the whole kernel where nothing loops."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = dict(re.findall(r"(\w+):(\d+)", _tool("cuobjdump", "-res-usage", file.name)))
        text = _tool("cuobjdump", "-sass", file.name)
    code = [(int(a, 16), op, rest) for a, op, rest in _INSTRUCTION.findall(text)]
    last = max(i for i, (_, op, _) in enumerate(code) if op == "EXIT")
    code = code[: last + 1]
    names = [op.split(".")[0] for _, op, _ in code]
    loops = _loops(code)
    heavy = max((x.flops or x.global_bytes for x in loops), default=0)
    hot = [x for x in loops if heavy and (x.flops or x.global_bytes) >= heavy]
    whole = _count(code)
    return Machine(
        registers=int(usage["REG"]),
        spill_bytes=int(usage["STACK"]) + int(usage["LOCAL"]),
        wgmma=whole.wgmma,
        async_copies=names.count("LDGSTS"),
        tma=sum(name in ("UTMALDG", "UBLKCP") for name in names),
        calls=names.count("CALL"),
        loop=min(hot, key=lambda x: x.instructions) if hot else whole,
    )


def resident(registers: int, shared: int, warps: int) -> int:
    """Programs of one kernel that an SM holds at once."""
    per_warp = -(-registers * 32 // 256) * 256  # given out in units of 256
    by_registers = REGISTERS // SCHEDULERS // per_warp * SCHEDULERS // warps
    return min(by_registers, SHARED // (shared + RESERVED), WARPS // warps, PROGRAMS)


def cycles(loop: Loop, warps: int, programs: int) -> dict[str, float]:
    """Cycles an SM needs for one pass of the hot loop of one program, by limit. `memory` is L2
    where there are products (tiles of one head are read by many programs), HBM elsewhere."""
    tensor = warps * loop.flops / TENSOR_FLOPS if loop.wgmma else 0.0
    issue = warps * loop.instructions / SCHEDULERS
    special = warps * loop.special * 32 / SPECIAL_LANES
    per_clock = L2_BYTES if loop.flops > 64 * loop.instructions / 4 else HBM_BYTES
    limits = {
        "tensor": tensor,
        "issue": issue,
        "special": special,
        "shared": warps * (loop.shared_bytes + loop.operand_bytes) / SHARED_BYTES,
        "memory": warps * loop.global_bytes / per_clock,
    }
    if loop.wgmma:
        limits["serial"] = (tensor + max(issue, special)) / programs
    return limits
