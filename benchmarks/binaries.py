"""What the Triton kernels compile to, without a GPU: ``python -m benchmarks.binaries [WORD ...]``.

Registers, spills, occupancy and the width of loads and stores of every binary that ships, read from the binaries. The
launches are those of ``torchtune_kd.kernels`` itself: its functions run on tensors of the meta device, and what they
hand to a kernel is compiled as Triton would specialise it there.

Legend: N tokens, V vocabulary. A case's name says what it computes; those whose words hold all WORDs are compiled.
"""

import argparse
import inspect
import json
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from itertools import product
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
import triton
from torch import Tensor
from triton.backends import compiler as backends
from triton.compiler import ASTSource

from torchtune_kd.kernels import DIVERGENCES, METRICS, Objective
from torchtune_kd.kernels._checks import runs_interpreted
from torchtune_kd.kernels._plan import Plan
from torchtune_kd.kernels._softmax import softmax_backward, softmax_forward
from torchtune_kd.kernels._triton import rows, walk
from torchtune_kd.kernels._triton.launch import Blocks, blocks_for
from torchtune_kd.kernels._triton.shards import Group, parallel_rows

ARCHITECTURES = (80, 90)
VOCAB = 128256
WIDE = 128  # bits, the widest load there is
COLUMNS = "case kernel sm block warps registers spilled shared programs/SM warps/SM loads stores"
FORMAT = "{:52} {:12} {:>3} {:>5} {:>5} {:>9} {:>7} {:>6} {:>11} {:>8}  {:25} {}"
REFUSAL = "TRITON_INTERPRET is set, so Triton interprets its kernels and compiles nothing; unset it"

_BIN = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
_TYPES = {
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.float32: "fp32",
    torch.int64: "i64",
    torch.int32: "i32",
}


class Case(NamedTuple):
    """One call of the public functions, as far as it decides on a binary."""

    divergence: str  # "" if nothing but the cross-entropy is computed
    temperature: float = 1.0
    cross_entropy: bool = False
    gradient: bool = True
    metrics: str = ""  # "all", or "student": those that need no teacher
    labels: bool = True
    row_scale: bool = False  # rows with incoming gradients of their own: linear_kd_loss with a trained head, "none"
    shards: bool = False  # of rows, over several processes
    backward: str = ""  # "scale" or "scale-rows": instead, the scaling of a stored gradient

    @property
    def words(self) -> tuple[str, ...]:
        if self.backward:
            return (self.backward,)
        words = (self.divergence, f"T={self.temperature:g}" if self.divergence else "", "ce" * self.cross_entropy)
        words += ("gradient" if self.gradient else "loss", "" if self.labels else "unlabelled")
        words += ("row-scale" * self.row_scale, f"{self.metrics}-metrics" if self.metrics else "")
        words += ("shards" * self.shards,)
        return tuple(filter(None, words))

    @property
    def name(self) -> str:
        return " ".join(self.words)


def all_cases() -> list[Case]:
    """Every case, common ones first: each divergence, at T = 1 and another, with all that can be added to it."""
    flags = (False, True)
    everything = list(product(DIVERGENCES, (1.0, 2.0), flags, flags, ("", "all")))
    cases = [Case(*values) for values in everything]
    cases += [Case("", 1.0, True, gradient, metrics) for gradient, metrics in product(flags, ("", "student"))]
    cases += [Case(*values, labels=False) for values in everything if not values[2]]
    cases += [Case(*values, row_scale=True) for values in everything if values[3] and not values[4]]
    cases += [Case("", 1.0, True, True, row_scale=True)]
    cases += [Case(*values, shards=True) for values in everything if values[2]]
    return cases + [Case("", backward=word) for word in ("scale", "scale-rows")]


class NoGroup(Group):
    """Stand for a group of processes that are not there."""

    def reduce(self, tensor: Tensor, operation: object) -> Tensor:
        return tensor


class Binary(NamedTuple):
    """All that Triton compiles a kernel by, besides the architecture."""

    kernel: str  # name in its module
    module: str
    signature: tuple[tuple[str, str], ...]
    constants: tuple[tuple[str, Any], ...]
    aligned: tuple[str, ...]  # arguments known to be multiples of 16
    options: tuple[tuple[str, int], ...]  # what the launch gave


@dataclass(frozen=True)
class Report:
    """Hold what was read from one binary."""

    case: str
    kernel: str
    arch: int
    block: int
    warps: int
    registers: int
    most_registers: int  # that the launch allows; 0 for no bound
    spilled_bytes: int  # to the stack and to local memory
    shared_bytes: int
    programs_per_sm: int
    warps_per_sm: int
    loads: dict[int, int]  # instructions by their width in bits, of which the source has...
    stores: dict[int, int]
    scalar_loads: int  # ...so many that load one number, not a part of a row
    scalar_stores: int

    @property
    def narrow(self) -> int:
        """Instructions of less than 128 bits that load or store a part of a row; a kernel without a block has none."""
        if not self.block:
            return 0
        loads, stores = (sum(n for bits, n in of.items() if bits < WIDE) for of in (self.loads, self.stores))
        return max(0, loads - self.scalar_loads) + max(0, stores - self.scalar_stores)

    def line(self) -> tuple[object, ...]:
        """In the order of `COLUMNS`."""
        registers = f"{self.registers}/{self.most_registers or '-'}"
        numbers = (self.arch, self.block, self.warps, registers, self.spilled_bytes, self.shared_bytes)
        widths = (", ".join(f"{b}x{n}" for b, n in of.items()) for of in (self.loads, self.stores))
        return self.case, self.kernel, *numbers, self.programs_per_sm, self.warps_per_sm, *widths


def binaries_of(case: Case, vocab: int = VOCAB, dtype: torch.dtype = torch.bfloat16, n_tokens: int = 4096) -> list:
    """Those that the case launches."""
    with recorded() as binaries:
        _call(case, *(torch.empty(n_tokens, vocab, dtype=dtype, device="meta") for _ in range(2)))
    return binaries


@contextmanager
def recorded() -> Iterator[list[Binary]]:
    """In place of being launched, kernels are listed."""
    if runs_interpreted():
        raise RuntimeError(REFUSAL)
    binaries = []

    def run(kernel: triton.JITFunction, *args: object, grid: object, warmup: bool, **kwargs: object) -> None:
        binaries.append(specialise(kernel, *args, **kwargs))

    with patch.object(triton.JITFunction, "run", run):
        yield binaries


def _call(case: Case, student: Tensor, teacher: Tensor) -> None:
    n_tokens = student.shape[0]
    kd_ratio = 0.0 if not case.divergence else 0.5 if case.cross_entropy else 1.0
    if case.backward:
        shape, reduction = ((n_tokens,), "none") if case.backward == "scale-rows" else ((), "mean")
        grad_loss, count = torch.empty(shape, device="meta"), torch.empty((), dtype=torch.int64, device="meta")
        softmax_backward(student, grad_loss, count, reduction, "triton", in_place=True)
        return
    objective = Objective(case.divergence or "forward_kl", None, case.temperature, kd_ratio)
    metrics = {"": (), "student": ("class_loss", "student_entropy"), "all": METRICS}[case.metrics]
    metrics = tuple(name for name in metrics if case.labels or not name.endswith("class_loss"))
    plan = Plan(objective, metrics, student.shape[-1], "mean", bool(case.divergence), case.gradient)
    labels = torch.empty(n_tokens, dtype=torch.int64, device="meta") if case.labels else None
    teacher = teacher if plan.has_teacher else None
    row_scale = torch.empty((), device="meta")
    if case.shards:
        parallel_rows(
            student, teacher, labels, plan, student if case.gradient else None, row_scale, NoGroup(None, 0, 2)
        )
    elif case.row_scale:
        rows.rows(student, teacher, labels, plan, student, torch.empty(n_tokens, 1, device="meta"))
    else:
        softmax_forward(student, teacher, labels, plan, "triton")


def specialise(kernel: triton.JITFunction, *args: object, **kwargs: object) -> Binary:
    """As ``kernel[grid](*args, **kwargs)`` does: an integer 1 is a constant, multiples of 16 are known as such."""
    options = {name: kwargs.pop(name) for name in list(kwargs) if name not in kernel.arg_names}
    values = inspect.signature(kernel.fn).bind(*args, **kwargs).arguments
    signature, constants, aligned = {}, {}, []
    for parameter in kernel.params:
        name, value, free = parameter.name, values[parameter.name], not parameter.do_not_specialize
        if parameter.is_constexpr or value is None or (type(value) is int and value == 1 and free):
            signature[name], constants[name] = "constexpr", value
            continue
        if isinstance(value, float):
            signature[name] = "fp32"
            continue
        if isinstance(value, Tensor):
            signature[name], value = f"*{_TYPES[value.dtype]}", value.data_ptr()
        else:
            signature[name] = "i32" if -(2**31) <= value < 2**31 else "i64"
        if free and not parameter.do_not_specialize_on_alignment and value % 16 == 0:
            aligned.append(name)
    parts = map(tuple, (signature.items(), constants.items(), aligned, options.items()))
    return Binary(kernel.fn.__name__, kernel.fn.__module__, *parts)


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


def compile_binary(case: str, binary: Binary, arch: int) -> Report:
    """For ``sm_<arch>``."""
    code = compiled(binary, arch)
    constants, options = dict(binary.constants), dict(binary.options)
    usage = _usage(code.asm["cubin"])
    warps, shared, ttir = code.metadata.num_warps, code.metadata.shared, code.asm["ttir"]
    programs = programs_per_sm(arch, usage["REG"], warps, shared)
    return Report(
        case=case,
        kernel=binary.kernel,
        arch=arch,
        block=constants.get("BLOCK", 0),
        warps=warps,
        registers=usage["REG"],
        most_registers=options.get("maxnreg") or 0,
        spilled_bytes=usage["STACK"] + usage["LOCAL"],
        shared_bytes=shared,
        programs_per_sm=programs,
        warps_per_sm=programs * warps,
        loads=_widths("ld", code.asm["ptx"]),
        stores=_widths("st", code.asm["ptx"]),
        scalar_loads=len(re.findall(r"tt\.load [^\n]*: !tt\.ptr", ttir)),
        scalar_stores=len(re.findall(r"tt\.store [^\n]*: !tt\.ptr", ttir)),
    )


def _usage(cubin: bytes) -> dict[str, int]:
    """Registers, and bytes of stack and local memory, where registers that spill go."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.check_output([_BIN / "cuobjdump", "-res-usage", file.name], text=True)
    return {name: int(text.split(f" {name}:")[1].split()[0]) for name in ("REG", "STACK", "LOCAL")}


def _widths(instruction: str, ptx: str) -> dict[int, int]:
    """Accesses of global memory by bits."""
    found = re.findall(rf"\b{instruction}\.global\S*?(?:\.v(\d))?\.[bfsu](\d+)\s", ptx)
    return dict(sorted(Counter(int(vector or 1) * int(bits) for vector, bits in found).items()))


def programs_per_sm(arch: int, registers: int, warps: int, shared_bytes: int) -> int:
    """Return how many programs an SM holds at a time, by the limits of the CUDA programming guide."""
    most_warps, most_programs, shared = {80: (64, 32, 164), 90: (64, 32, 228), 100: (64, 32, 228)}[arch]
    per_warp = -(-registers * 32 // 256) * 256  # registers come in pieces of 256 a warp, for 4 warps at a time
    by_registers = 2**16 // per_warp // 4 * 4
    by_shared = shared * 1024 // (shared_bytes + 1024)  # the system takes 1 KB of each program
    return min(min(by_registers, most_warps) // warps, by_shared, most_programs)


def reports(cases: list[Case], architectures: list[int], jobs: int = 1, **inputs: Any) -> list[Report]:
    """One for each distinct binary and architecture, under the name of the first case that needs it."""
    names: dict[Binary, str] = {}
    for case in cases:
        for binary in binaries_of(case, **inputs):
            names.setdefault(binary, case.name)
    work = [(name, binary, arch) for binary, name in names.items() for arch in architectures]
    if jobs == 1:
        return [compile_binary(*item) for item in work]
    with ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as pool:
        return list(pool.map(compile_binary, *zip(*work, strict=True)))


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser("python -m benchmarks.binaries", description=__doc__.split("\n\n")[0])
    parser.add_argument("words", nargs="*", metavar="WORD", help="of a case's name, as T=2 or jsd")
    parser.add_argument("--arch", nargs="+", type=int, choices=(80, 90, 100), default=list(ARCHITECTURES))
    parser.add_argument("--vocab", type=int, default=VOCAB)
    parser.add_argument("--blocks", nargs=3, type=int, metavar=("IDS", "WARPS", "REGISTERS"), help="for all cases")
    parser.add_argument("--jobs", type=int, default=1, help="compile in so many processes")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    if runs_interpreted():
        parser.error(REFUSAL)
    cases = [case for case in all_cases() if set(args.words) <= set(case.words)]
    if not cases:
        parser.error(f"no case's name has the words {' '.join(args.words)}")
    chosen = (lambda *_: Blocks(*args.blocks)) if args.blocks else blocks_for
    with patch.object(rows, "blocks_for", chosen), patch.object(walk, "blocks_for", chosen):
        found = reports(cases, args.arch, args.jobs, vocab=args.vocab)
    print(f"bf16, V={args.vocab}, Triton {triton.__version__}; loads and stores in bits x instructions")
    print(FORMAT.format(*COLUMNS.split()))
    for report in found:
        print(FORMAT.format(*report.line()))
    spilling, narrow = (sum(map(bool, of)) for of in zip(*((r.spilled_bytes, r.narrow) for r in found), strict=True))
    print(f"{len(found)} binaries: {spilling} spill registers, {narrow} touch rows by less than {WIDE} bits")
    if args.json:
        what = {
            "triton": triton.__version__,
            "vocab": args.vocab,
            "dtype": "bf16",
            "binaries": list(map(asdict, found)),
        }
        args.json.write_text(json.dumps(what, indent=1))


if __name__ == "__main__":
    main()
