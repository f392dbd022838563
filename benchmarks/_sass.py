"""Count what a compiled kernel issues for each id of its row, from its machine code (SASS).

A pass over a row is a loop: the instructions of its body are issued once for the ids that a thread handles in one turn.
Which loops are passes, and how many ids a turn has, is read off the code:

- A loop is what lies between a backward branch and its target. Of nested loops the inner one counts, and none that does
  not load from global memory: those only write the zeros of an ignored token.
- Passes are told apart by what threads exchange, since each begins with what the one before found of the whole row.
  Loops without a shuffle or barrier between them are one pass: its main loop, the rest of one that the compiler has
  unrolled, and the masked tail where that is a loop. The one with most ids a turn counts, the first of equal ones. A
  tail in straight code is no loop. So whole blocks are counted, and the tail is left out: of a row at most one block.
- A pass within a branch of the source is left out beside others that are not, since it is for few rows, such as those
  with ids at -inf. Triton's intermediate code (TTIR) tells: it has the same passes in the same order, and its branches
  are nested.
- A turn has as many ids as its loads hold: the bytes that it loads over those of one id in all tensors that are read.
  That holds for any factor of unrolling, and for loops that load the next turn's ids. The factor is this number over
  the ids of one step, and has to be whole.

Instructions whose predicate is false are issued like others. What a branch within a loop skips is not counted, as where
the compiler has put it behind the loop: it is for few blocks, such as the one with the label's id. Nor are instructions
outside of the loops, some hundreds a row.
"""

import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

_INSTRUCTION = re.compile(r"^\s*/\*([0-9a-f]{4,})\*/\s+(@!?U?P\w+\s+)?(\S+)\s*(.*?)\s*;", re.M)
_TARGET = re.compile(r"0x([0-9a-f]+)$")
_LOADS, _STORES = ("LDG", "LDGSTS"), ("STG",)
_EXCHANGES = ("BAR", "SHFL", "REDUX")
_REGIONS = ("scf.for", "scf.while", "scf.if", "tt.reduce")
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
    predicate: str
    operation: str  # with its modifiers, as LDG.E.128
    operands: str

    @property
    def name(self) -> str:
        return self.operation.split(".")[0]

    @property
    def target(self) -> int | None:
        """Return the address that a branch leads to."""
        found = _TARGET.search(self.operands) if self.name == "BRA" else None
        return int(found[1], 16) if found else None

    @property
    def conditional(self) -> bool:
        return bool(self.predicate) or "," in self.operands

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
    code: list[_Instruction]  # that no branch skips

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


def passes(text: str, ttir: str, bytes_per_id: int, ids_per_step: float) -> tuple[Pass, ...]:
    """Count what each pass over the row issues; none where no loop loads.

    Args:
        text (str): of `disassemble`.
        ttir (str): the intermediate code of the same kernel.
        bytes_per_id (int): that one id takes in all the tensors that a pass reads.
        ids_per_step (float): that a thread handles in one step of the walk, BLOCK over the program's threads.
    """
    code = [
        _Instruction(int(address, 16), predicate, *rest) for address, predicate, *rest in _INSTRUCTION.findall(text)
    ]
    compiled, written = _by_pass(code), passes_of_source(ttir)
    stores = [any(loop.bytes(_STORES) for loop in loops) for loops in compiled]
    if stores != [one.stores for one in written]:
        raise ValueError(
            f"the code has {len(compiled)} passes and its source {len(written)}, or they do not store alike, so that "
            "one cannot tell which of them few rows take"
        )
    everyone = all(one.branch for one in written)
    usual = (loops for loops, one in zip(compiled, written, strict=True) if everyone or not one.branch)
    return tuple(_count(loops, bytes_per_id, ids_per_step) for loops in usual)


class SourcePass(NamedTuple):
    """Hold what the intermediate code tells of a pass."""

    branch: bool  # taken by some rows
    stores: bool  # parts of a row


def passes_of_source(ttir: str) -> list[SourcePass]:
    """Return the passes over a row in Triton's intermediate code: loops that load blocks, parted by reductions."""
    found: list[SourcePass] = []
    regions: list[str] = []  # what each open brace belongs to
    loads = stores = parted = False
    for line in map(str.strip, ttir.splitlines()):
        if line.startswith("}") and regions:
            closed = regions.pop()
            if closed in _REGIONS[:2] and loads:
                one = SourcePass("scf.if" in regions, stores)
                if found and not parted:  # a tail, or what is left of an unrolled loop
                    main = found.pop()
                    one = SourcePass(main.branch and one.branch, main.stores or one.stores)
                found.append(one)
                loads = parted = False
        in_loop = any(region in _REGIONS[:2] for region in regions)
        if in_loop and "tensor<" in line:
            loads, stores = loads or "tt.load " in line, stores or "tt.store " in line
        if line.endswith("{"):
            kind = next((region for region in _REGIONS if region in line), "")
            kind = closed if line.startswith("}") and "else" in line else kind
            parted = parted or (kind == "tt.reduce" and not in_loop)
            if kind in _REGIONS[:2]:
                loads = stores = False
            regions.append(kind)
    return found


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
        first = index.get(instruction.target, place)
        if first < place and not any(between.name in _ENDS for between in code[first:place]):
            last[first] = place
    return [_Loop(first, end, _not_skipped(code[first : end + 1])) for first, end in sorted(last.items())]


def _not_skipped(code: list[_Instruction]) -> list[_Instruction]:
    """Return a loop's instructions without those that a conditional branch leads past, within the loop."""
    kept, until = [], 0
    for instruction in code:
        if instruction.address < until:
            continue
        kept.append(instruction)
        target = instruction.target
        if target is not None and instruction.conditional and instruction.address < target <= code[-1].address:
            until = target
    return kept


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
