"""What a compiled kernel issues for each id of its row, read from its machine code (SASS).

A pass over a row is a loop: the instructions of its body are issued once for the ids that a thread handles in one turn.
Which loops are passes, and how many ids a turn has, is read off the code:

- A loop is what lies between a backward branch and its target. Of nested loops the inner one counts, and none that does
  not load from global memory: those only write the zeros of an ignored token.
- Passes are told apart by what threads exchange, since each begins with what the one before found of the whole row.
  Loops without a shuffle or barrier between them are one pass: its main loop, the rest of one that the compiler has
  unrolled, and the masked tail where that is a loop. The one with most ids a turn counts, the first of equal ones. A
  tail in straight code is no loop. So whole blocks are counted, and the tail is left out: of a row at most one block.
- A turn has as many ids as its loads hold: the bytes that it loads over those of one id in all tensors that are read.
  That holds for any factor of unrolling, and for loops that load the next turn's ids. The factor is this number over
  the ids of one step, and has to be whole.

Instructions whose predicate is false are issued like others. Those outside of the loops, some hundreds a row, are not
counted.
"""

import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

_INSTRUCTION = re.compile(r"^\s*/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?(\S+)\s*(.*?)\s*;", re.M)
_TARGET = re.compile(r"0x([0-9a-f]+)$")
_LOADS, _STORES = ("LDG", "LDGSTS"), ("STG",)
_EXCHANGES = ("BAR", "SHFL", "REDUX")
_ENDS = ("EXIT", "RET")


@dataclass(frozen=True)
class Pass:
    """Hold what one pass over a row costs a thread."""

    instructions: float  # per id
    special: float  # of these, for the unit of exponentials, logarithms and reciprocals; per id
    loaded_bytes: float  # per id
    stored_bytes: float  # per id
    barriers: float  # of the whole program, per step of BLOCK ids
    unrolled: int  # steps in one turn of the loop
    narrowest: int  # bits of the narrowest load or store


class _Instruction(NamedTuple):
    address: int
    operation: str  # with its modifiers, as LDG.E.128
    operands: str

    @property
    def name(self) -> str:
        return self.operation.split(".")[0]

    @property
    def bytes(self) -> int:
        """Return what a thread moves by a load or store."""
        modifiers = self.operation.split(".")[1:]
        for bits in (256, 128, 64):
            if str(bits) in modifiers:
                return bits // 8
        return next((int(m[1:]) // 8 for m in modifiers if m in ("U8", "S8", "U16", "S16")), 4)


class _Loop(NamedTuple):
    first: int  # index of its first instruction
    last: int
    code: list[_Instruction]

    def bytes(self, names: tuple[str, ...]) -> int:
        return sum(instruction.bytes for instruction in self.code if instruction.name in names)

    def count(self, name: str) -> int:
        return sum(instruction.name == name for instruction in self.code)

    def holds(self, other: "_Loop") -> bool:
        return other is not self and self.first <= other.first and other.last <= self.last


def disassemble(cubin: bytes, folder: Path) -> str:
    """Return the machine code and the resources of a kernel as text, by the tool in ``folder``."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [folder / "cuobjdump", "-res-usage", "-sass", file.name]
        return subprocess.run(command, check=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True).stdout


def usage(text: str) -> dict[str, int]:
    """Return registers, and bytes of stack and local memory, where registers that spill go."""
    return {name: int(text.split(f" {name}:")[1].split()[0]) for name in ("REG", "STACK", "LOCAL")}


def passes(text: str, bytes_per_id: int, ids_per_step: float) -> tuple[Pass, ...]:
    """Count what each pass over the row issues; none where no loop loads.

    Args:
        text (str): of `disassemble`.
        bytes_per_id (int): that one id takes in all the tensors that a pass reads.
        ids_per_step (float): that a thread handles in one step of the walk, BLOCK over the program's threads.
    """
    code = [_Instruction(int(found[1], 16), found[2], found[3]) for found in _INSTRUCTION.finditer(text)]
    return tuple(_count(loops, bytes_per_id, ids_per_step) for loops in _by_pass(code))


def _by_pass(code: list[_Instruction]) -> list[list[_Loop]]:
    """Return the loops that load, those of one pass together."""
    loading = [loop for loop in _loops(code) if loop.bytes(_LOADS)]
    groups: list[list[_Loop]] = []
    for loop in loading:
        if any(map(loop.holds, loading)):
            continue
        between = code[groups[-1][-1].last + 1 : loop.first] if groups else []
        if groups and not any(instruction.name in _EXCHANGES for instruction in between):
            groups[-1].append(loop)
        else:
            groups.append([loop])
    return groups


def _loops(code: list[_Instruction]) -> list[_Loop]:
    """Return them by their beginning; a jump back from behind the kernel's end is none."""
    index = {instruction.address: place for place, instruction in enumerate(code)}
    last: dict[int, int] = {}
    for place, instruction in enumerate(code):
        target = _TARGET.search(instruction.operands) if instruction.name == "BRA" else None
        first = index.get(int(target[1], 16), place) if target else place
        if first < place and not any(between.name in _ENDS for between in code[first:place]):
            last[first] = place
    return [_Loop(first, end, code[first : end + 1]) for first, end in sorted(last.items())]


def _count(loops: list[_Loop], bytes_per_id: int, ids_per_step: float) -> Pass:
    main = max(loops, key=lambda loop: loop.bytes(_LOADS))  # the first of equal ones
    ids = main.bytes(_LOADS) / bytes_per_id
    unrolled = ids / ids_per_step
    if unrolled < 1 or unrolled % 1:
        raise ValueError(
            f"a turn of a loop loads {ids:g} ids of {bytes_per_id} bytes a thread, which is no multiple of a step's "
            f"{ids_per_step:g}, so that its instructions cannot be shared out; what else does the loop load?"
        )
    return Pass(
        instructions=len(main.code) / ids,
        special=main.count("MUFU") / ids,
        loaded_bytes=main.bytes(_LOADS) / ids,
        stored_bytes=main.bytes(_STORES) / ids,
        barriers=main.count("BAR") / unrolled,
        unrolled=int(unrolled),
        narrowest=8 * min(one.bytes for one in main.code if one.name in _LOADS + _STORES),
    )
