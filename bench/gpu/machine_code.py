"""What a compiled kernel consists of: registers, spills, shared memory, and its instructions by class and in its main
loop.

It reads the output of NVIDIA's `cuobjdump` and `nvdisasm`, which come with Triton.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import triton

from ...runtime.errors import UnavailableError

# class → beginnings of the names of its instructions; the first that fits counts
CLASSES = {
    "tensor": ("HGMMA", "HMMA", "IMMA", "QGMMA", "UTC"),
    "convert": ("I2F", "F2F", "F2I", "I2I", "FRND"),
    "special": ("MUFU",),
    "float": (
        "FADD",
        "FMUL",
        "FFMA",
        "FSEL",
        "FSET",
        "FMNMX",
        "FCHK",
        "HADD",
        "HMUL",
        "HFMA",
        "HSET",
        "HMNMX",
        "FSWZADD",
    ),
    "spill": ("LDL", "STL"),
    "global": ("LDG", "STG", "RED", "ATOM", "UBLKCP", "UTMA"),
    "shared": ("LDS", "STS", "LDSM", "STSM"),
    "control": ("BRA", "BAR", "BSSY", "BSYNC", "EXIT", "RET", "WARP", "DEPBAR", "LDGDEPBAR", "SYNCS", "NOP", "CALL"),
}
_INSTRUCTION = re.compile(r"^\s+/\*[0-9a-f]+\*/\s+(.*?);")
_LABEL = re.compile(r"^(\.L_x_\d+):")
_NAME = re.compile(r"^(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_]*)")
_BACK = re.compile(r"\bBRA\b.*?(\.L_x_\d+)")


@dataclass(frozen=True, slots=True)
class MachineCode:
    """`registers`: of a thread. `spilled`: bytes of a thread's local memory and stack. `shared`: bytes of a program.

    `loop`: name → number, in the body of the main loop: of the loops that have no other inside, the one with the most
    instructions for tensor cores, if there is one. Empty if the kernel has no loop with these.
    """

    registers: int
    spilled: int
    shared: int
    instructions: Counter[str]
    loop: Counter[str]

    def classes(self) -> dict[str, int]:
        """Class → number of instructions; what is in none is "integer": addresses, masks, moves, shuffles."""
        found: Counter[str] = Counter()
        for name, count in self.instructions.items():
            found[_class_of(name)] += count
        return dict(sorted(found.items()))


def _class_of(name: str) -> str:
    fits = ((kind, len(prefix)) for kind, prefixes in CLASSES.items() for prefix in prefixes if name.startswith(prefix))
    return max(fits, key=lambda fit: fit[1], default=("integer", 0))[0]  # LDGDEPBAR is no LDG


def read(compiled: Any) -> MachineCode:
    """What Triton's compiled kernel consists of. Raises `UnavailableError` if Triton came without NVIDIA's tools, or if
    their output has another form."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage = _tool("cuobjdump", "-res-usage", file.name)
        listing = _tool("nvdisasm", "-c", file.name)
    used = {name: int(value) for name, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage)}
    names, labels, jumps = _parse(listing)
    if set(used) != {"REG", "STACK", "LOCAL"} or not names:
        raise UnavailableError(
            f"cuobjdump and nvdisasm of Triton {triton.__version__} print what this bench does not read"
        )
    spilled = used["STACK"] + used["LOCAL"]
    return MachineCode(used["REG"], spilled, compiled.metadata.shared, Counter(names), _main_loop(names, labels, jumps))


def _tool(name: str, *arguments: str) -> str:
    tool = getattr(triton.knobs.nvidia, name)
    if tool is None:
        raise UnavailableError(f"Triton {triton.__version__} has no {name}; install Triton from its wheel")
    result = subprocess.run([tool.path, *arguments], capture_output=True, text=True, timeout=120)
    if result.returncode:
        raise UnavailableError(f"{name} ended with {result.returncode}: {result.stderr[-300:]}")
    return result.stdout


def _parse(listing: str) -> tuple[list[str], dict[str, int], list[tuple[int, str]]]:
    """Names of the instructions, label → index of the instruction after it, and (index, label) of every branch."""
    names: list[str] = []
    labels: dict[str, int] = {}
    jumps: list[tuple[int, str]] = []
    for line in listing.splitlines():
        if label := _LABEL.match(line):
            labels[label[1]] = len(names)
        elif (found := _INSTRUCTION.match(line)) and (name := _NAME.match(found[1])):
            if jump := _BACK.search(found[1]):
                jumps.append((len(names), jump[1]))
            names.append(name[1])
    return names, labels, jumps


def _main_loop(names: Sequence[str], labels: dict[str, int], jumps: Sequence[tuple[int, str]]) -> Counter[str]:
    spans = [(labels[label], at) for at, label in jumps if label in labels and labels[label] < at]
    inner = [(a, b) for a, b in spans if not any(a <= c and d <= b and (a, b) != (c, d) for c, d in spans)]
    bodies = [Counter(names[a : b + 1]) for a, b in inner]
    return (
        max(bodies, key=tensor_instructions, default=Counter()) if any(map(tensor_instructions, bodies)) else Counter()
    )


def tensor_instructions(body: Counter[str]) -> int:
    """How many instructions for tensor cores there are in a body. Of Blackwell's `UTC…`, only those that multiply
    count."""
    return sum(count for name, count in body.items() if name.endswith("MMA"))
