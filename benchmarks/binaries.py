"""What the Triton kernels compile to, without a GPU: ``python -m benchmarks.binaries [WORD ...]``.

Two times that no run can beat, for as many logits as the losses' main line has, 8192 x 128256: to issue the
instructions that a binary has for each of them, and to move the bytes that it loads and stores. A kernel is bound by
memory where the first is the shorter one. Beside them barriers, registers, spills, occupancy and the narrowest access
to a row, all read from the binary; ``_sass.py`` says how instructions are counted.

The launches are those of ``torchtune_kd.kernels`` itself: its functions run on tensors of the meta device, and what
they hand to a kernel is compiled as Triton would specialise it there (``_launches.py``). Vocabularies that get the same
binary share a line.

Legend: N tokens, V vocabulary. A case's name says what it computes; those whose words hold all WORDs are compiled.
Without WORDs it is a table of each divergence with cross-entropy and gradient, and what else forward KL and JSD can do.
"""

import argparse
import json
import subprocess
import sys
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from itertools import product
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import triton
from triton.backends import compiler as backends
from triton.compiler import ASTSource

from torchtune_kd.kernels._checks import runs_interpreted
from torchtune_kd.kernels._triton import cells, rows, walk
from torchtune_kd.kernels._triton.launch import Blocks, blocks_for, rest_blocks_for

from ._launches import DTYPES, REFUSAL, VOCAB, Binary, Case, all_cases, binaries_of, common_cases
from ._sass import Pass, disassemble, passes, usage

ARCHITECTURES = (80, 90)
LOGITS = 8192 * VOCAB
WIDE = 128  # bits, the widest load that all of them have

_BIN = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
_BYTES = {f"*{name}": dtype.itemsize for name, dtype in DTYPES.items()}


class Gpu(NamedTuple):
    """Hold what bounds a kernel on the GPU that an architecture stands for."""

    name: str
    sms: int
    clock: float  # Hz
    memory: float  # bytes per second, of the data sheet

    schedulers = 4  # of an SM; each issues an instruction of a warp, 32 threads, every clock
    special_clocks = 8  # that a scheduler's special-function unit needs for an instruction of a warp

    def issue_seconds(self, instructions: float, logits: int = LOGITS) -> float:
        """Return the least time to issue so many instructions for each logit."""
        return instructions * logits / 32 / (self.schedulers * self.sms) / self.clock


GPUS = {
    80: Gpu("A100 SXM", 108, 1.41e9, 2.039e12),
    90: Gpu("H100 SXM", 132, 1.755e9, 3.35e12),
    100: Gpu("B200", 148, 1.965e9, 8e12),
}


@dataclass(frozen=True)
class Report:
    """Hold what was read from one binary; times are for `LOGITS`, whatever the vocabulary is."""

    case: str
    kernel: str
    arch: int
    vocabs: tuple[int, ...]
    dtype: str
    block: int
    warps: int
    registers: int
    most_registers: int  # that the launch allows; 0 for no bound
    spilled_bytes: int  # to the stack and to local memory
    shared_bytes: int
    programs_per_sm: int
    warps_per_sm: int
    passes: tuple[Pass, ...]

    @property
    def narrow(self) -> int:
        """Return how many passes load or store a part of the row by less than 128 bits."""
        return sum(one.narrowest < WIDE for one in self.passes)

    @property
    def instructions(self) -> float:
        """Return those of a logit, in all passes."""
        return sum(one.instructions for one in self.passes)

    @property
    def bytes(self) -> float:
        """Loaded and stored for a logit, in all passes."""
        return sum(one.loaded_bytes + one.stored_bytes for one in self.passes)

    @property
    def issue_seconds(self) -> float:
        """Return the least time to issue the instructions of all passes."""
        return GPUS[self.arch].issue_seconds(self.instructions)

    @property
    def special_seconds(self) -> float:
        """Return the least time of those that only the special-function units compute."""
        special = sum(one.special for one in self.passes)
        return GPUS[self.arch].issue_seconds(special) * Gpu.special_clocks

    @property
    def memory_seconds(self) -> float:
        """Return the least time to move the bytes of all passes."""
        return self.bytes * LOGITS / GPUS[self.arch].memory

    def as_dict(self) -> dict[str, Any]:
        times = {name: getattr(self, f"{name}_seconds") for name in ("issue", "special", "memory")}
        counts = {"instructions": self.instructions, "bytes": self.bytes, "seconds": times}
        return asdict(self) | {"narrow": self.narrow} | counts

    def line(self) -> tuple[str, ...]:
        """In the order of `COLUMNS`."""
        case = self.case if self.kernel == "rows_kernel" else f"{self.case}: {self.kernel}"
        vocabs = ", ".join(map(str, self.vocabs))
        registers = f"{self.registers}/{self.most_registers or '-'}"
        occupancy = f"{self.programs_per_sm} x {self.warps}"
        return case, str(self.arch), vocabs, self.dtype, *self._counts(), registers, str(self.spilled_bytes), occupancy

    def _counts(self) -> tuple[str, ...]:
        """Return the columns of the passes; nothing for a kernel that makes none."""
        if not self.passes:
            return ("-",) * 8
        each = " + ".join(f"{one.instructions:.1f}" for one in self.passes)
        return (
            f"{each} = {self.instructions:.1f}" if len(self.passes) > 1 else each,
            f"{self.issue_seconds * 1e3:.2f}",
            f"{self.special_seconds * 1e3:.2f}",
            f"{self.bytes:g}",
            f"{self.memory_seconds * 1e3:.2f}",
            f"{self.issue_seconds / self.memory_seconds:.0%}",
            " + ".join(f"{one.barriers:g}" for one in self.passes),
            str(min(one.narrowest for one in self.passes)),
        )


COLUMNS = (
    *("case", "sm", "V", "type", "instructions/id", "issue ms", "special ms", "bytes/id", "memory ms"),
    *("issue/memory", "barriers", "bits", "registers", "spilled", "programs x warps"),
)


def compiled(binary: Binary, arch: int | str, backend: str = "cuda", lanes: int = 32) -> Any:
    """Triton's compiled kernel for ``sm_<arch>``, or for another backend's architecture and warps of so many lanes."""
    kernel = getattr(sys.modules[binary.module], binary.kernel)
    signature, aligned = dict(binary.signature), map(kernel.arg_names.index, binary.aligned)
    if hasattr(backends, "AttrsDescriptor"):  # Triton 3.2
        signature = {name: kind for name, kind in signature.items() if kind != "constexpr"}
        attributes = backends.AttrsDescriptor.from_hints(dict.fromkeys(aligned, 16))
    else:
        attributes = {(place,): [["tt.divisibility", 16]] for place in aligned}
    source = ASTSource(kernel, signature, dict(binary.constants), attributes)
    return triton.compile(source, target=backends.GPUTarget(backend, arch, lanes), options=dict(binary.options))


def compile_binary(
    case: str, binary: Binary, arch: int, vocabs: tuple[int, ...] = (VOCAB,), dtype: str = "bf16"
) -> Report:
    """For ``sm_<arch>``; `case`, `vocabs` and `dtype` name it."""
    code = compiled(binary, arch)
    constants, options = dict(binary.constants), dict(binary.options)
    text = disassemble(code.asm["cubin"], _BIN)
    used = usage(text)
    warps, shared = code.metadata.num_warps, code.metadata.shared
    programs = programs_per_sm(arch, used["REG"], warps, shared)
    return Report(
        case=case,
        kernel=binary.kernel,
        arch=arch,
        vocabs=tuple(vocabs),
        dtype=dtype,
        block=constants.get("BLOCK", 0),
        warps=warps,
        registers=used["REG"],
        most_registers=options.get("maxnreg") or 0,
        spilled_bytes=used["STACK"] + used["LOCAL"],
        shared_bytes=shared,
        programs_per_sm=programs,
        warps_per_sm=programs * warps,
        passes=_passes(binary, text, code.asm["ttir"], warps),
    )


def passes_of(binary: Binary, arch: int) -> tuple[Pass, ...]:
    """Return what each pass over a row costs on ``sm_<arch>``, whichever that is."""
    code = compiled(binary, arch)
    return _passes(binary, disassemble(code.asm["cubin"], _BIN), code.asm["ttir"], code.metadata.num_warps)


def _passes(binary: Binary, text: str, ttir: str, warps: int) -> tuple[Pass, ...]:
    block, read = dict(binary.constants).get("BLOCK", 0), _bytes_read(binary)
    return passes(text, ttir, read, block / (32 * warps)) if block and read else ()


def _bytes_read(binary: Binary) -> int:
    """Return what one id takes in the tensors that a pass reads: both models' logits, the student's or a gradient."""
    signature, constants = dict(binary.signature), dict(binary.constants)
    names = ("student", "teacher") if constants.get("HAS_TEACHER", True) else ("student",)
    return sum(_BYTES[signature[name]] for name in (*names, "grad") if name in signature)


def programs_per_sm(arch: int, registers: int, warps: int, shared_bytes: int) -> int:
    """Return how many programs an SM holds at a time, by the limits of the CUDA programming guide."""
    most_warps, most_programs, shared = {80: (64, 32, 164), 90: (64, 32, 228), 100: (64, 32, 228)}[arch]
    per_warp = -(-registers * 32 // 256) * 256  # registers come in pieces of 256 a warp, for 4 warps at a time
    by_registers = 2**16 // per_warp // 4 * 4
    by_shared = shared * 1024 // (shared_bytes + 1024)  # the system takes 1 KB of each program
    return min(min(by_registers, most_warps) // warps, by_shared, most_programs)


def architectures() -> tuple[int, ...]:
    """Return those of `GPUS` that this Triton's assembler knows."""
    assembler = max(_BIN.glob("ptxas*"), key=lambda path: len(path.name))  # newer architectures may have their own
    known = subprocess.run([assembler, "--help"], stdout=subprocess.PIPE, check=True, text=True).stdout
    return tuple(arch for arch in GPUS if f"'sm_{arch}'" in known)


def reports(
    cases: list[Case],
    architectures: Iterable[int],
    jobs: int = 1,
    vocabs: Iterable[int] = (VOCAB,),
    dtypes: Iterable[str] = ("bf16",),
) -> list[Report]:
    """One for each distinct binary and architecture, under the name of the first case that needs it."""
    names: dict[tuple[Binary, str], tuple[str, list[int]]] = {}
    for dtype, case, vocab in product(dtypes, cases, vocabs):
        for binary in binaries_of(case, vocab, DTYPES[dtype]):
            name, sizes = names.setdefault((binary, dtype), (case.name, []))
            if name == case.name:
                sizes.append(vocab)
    work = [(n, binary, arch, tuple(v), dtype) for (binary, dtype), (n, v) in names.items() for arch in architectures]
    if jobs == 1:
        return [compile_binary(*item) for item in work]
    with ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as pool:
        return list(pool.map(compile_binary, *zip(*work, strict=True)))


def assumptions(architectures: Iterable[int]) -> str:
    """Return what the times stand for."""
    lines = [f"Least times for 8192 x {VOCAB} logits, from what the loops issue, load and store for each id"]
    for arch in sorted(architectures):
        gpu = GPUS[arch]
        lines.append(
            f"sm_{arch} as {gpu.name}: {gpu.sms} SMs of {gpu.schedulers} schedulers at {gpu.clock / 1e9:g} GHz, a warp "
            f"instruction each per clock (special: one in {gpu.special_clocks}); {gpu.memory / 1e12:g} TB/s"
        )
    return "\n".join(lines)


def _table(lines: list[tuple[str, ...]]) -> str:
    """Align the columns, numbers to the right."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    aligns = ["<" if name in ("case", "V") else ">" for name in COLUMNS]
    formats = [f"{{:{align}{width}}}" for align, width in zip(aligns, widths, strict=True)]
    return "\n".join("  ".join(formats).format(*line) for line in lines)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(
        "python -m benchmarks.binaries", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("words", nargs="*", metavar="WORD", help="of a case's name, as T=2 or jsd")
    parser.add_argument("--all", action="store_true", help="every case there is")
    parser.add_argument("--arch", nargs="+", type=int, choices=tuple(GPUS), default=[90], help="default 90")
    parser.add_argument("--vocab", nargs="+", type=int, default=[VOCAB], help=f"default {VOCAB}")
    parser.add_argument(
        "--dtype", nargs="+", choices=tuple(DTYPES), default=["bf16"], help="of the logits, default bf16"
    )
    parser.add_argument("--blocks", nargs=3, type=int, metavar=("IDS", "WARPS", "REGISTERS"), help="for all cases")
    parser.add_argument("--jobs", type=int, default=1, help="compile in so many processes")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    if runs_interpreted():
        parser.error(REFUSAL)
    if unknown := set(args.arch) - set(architectures()):
        parser.error(f"Triton {triton.__version__} does not know sm_{min(unknown)}; leave it out of --arch")
    known = all_cases() if args.words or args.all else common_cases()
    cases = [case for case in known if set(args.words) <= set(case.words)]
    if not cases:
        parser.error(f"no case's name has the words {' '.join(args.words)}")
    chosen = (lambda *_: Blocks(*args.blocks)) if args.blocks else blocks_for
    of_rest = chosen if args.blocks else rest_blocks_for
    with (
        patch.object(rows, "blocks_for", chosen),
        patch.object(walk, "blocks_for", chosen),
        patch.object(cells, "rest_blocks_for", of_rest),
    ):
        found = reports(cases, args.arch, args.jobs, args.vocab, args.dtype)
    print(f"Triton {triton.__version__}. {assumptions(args.arch)}\n")
    print(_table([COLUMNS, *(report.line() for report in found)]))
    over = sum(report.issue_seconds > report.memory_seconds for report in found)
    spilling, narrow = (sum(map(bool, of)) for of in zip(*((r.spilled_bytes, r.narrow) for r in found), strict=True))
    print(
        f"\n{len(found)} binaries: {over} take longer to issue than to move their bytes, {spilling} spill registers, "
        f"{narrow} touch rows by less than {WIDE} bits"
    )
    if args.json:
        gpus = {arch: GPUS[arch]._asdict() for arch in args.arch}
        what = {"triton": triton.__version__, "logits": LOGITS, "gpus": gpus}
        args.json.write_text(json.dumps(what | {"binaries": [report.as_dict() for report in found]}, indent=1))


if __name__ == "__main__":
    main()
