"""Distillation losses from hidden states to the student's gradient: torchtune's stock path and ours.

    python -m benchmarks.losses --llama

Forward KL at T = 1 and cross-entropy, half each, bf16, frozen heads, at the Llama 3 shape: student width 2048 (1B),
teacher width 4096 (8B), 128256 ids. The chunked losses are what torchtune's KD configs use. On a CPU they also pay for
the heads, since PyTorch runs a linear layer over a chunk [B, S/8, D] as a batched product with a copy of the weights.

Every run is a process of its own on the same inputs; the sides take turns, the chunked one in the first round alone
because it takes minutes. CPU seconds add up all threads; where others use the machine too, set OMP_NUM_THREADS=1 and
compare those. Memory is the high-water mark of the resident set above the inputs. Errors are against fp64 on 16
tokens; most of them is the rounding of logits to bf16, which all sides share. Nobody can be faster than the three
matrix products of the valid tokens (both models' logits, the gradient of the student's hidden states) at the best rate
that a product alone reaches here; the last line of a table says how long they take.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median

import torch

from .._device import matrix_rate
from .._measure import describe_machine
from ._llama_worker import IGNORE, KD_RATIO, SIDES

STUDENT_WIDTH, TEACHER_WIDTH = 2048, 4096
SLICE = 16  # tokens compared with fp64
ONCE = ("stock_chunked",)  # takes minutes, so it runs in the first round alone
LABELS = {
    "stock": "torchtune ForwardKLLoss + cross-entropy",
    "stock_chunked": "torchtune WithChunkedOutputLoss, 8 chunks",
    "our_module": "our ForwardKLLoss + cross-entropy",
    "our_softmax": "our softmax_kd_loss",
    "our_linear": "our linear_kd_loss",
}


def make_inputs(tokens: int, vocab: int, ignored: float) -> dict:
    """Hidden states ``[1, N, D]``, heads ``[V, D]`` and labels ``[1, N]``, from one seed for all runs."""
    torch.manual_seed(0)

    def normal(*shape: int, std: float) -> torch.Tensor:
        return torch.empty(shape, dtype=torch.bfloat16).normal_(std=std)

    labels = torch.randint(0, vocab, (1, tokens))
    labels[torch.rand(1, tokens) < ignored] = IGNORE
    labels[:, :SLICE] = torch.randint(0, vocab, (1, min(SLICE, tokens)))
    # logits with a standard deviation of about 2
    return {
        "student_hidden": normal(1, tokens, STUDENT_WIDTH, std=1),
        "student_weight": normal(vocab, STUDENT_WIDTH, std=2 * STUDENT_WIDTH**-0.5),
        "teacher_hidden": normal(1, tokens, TEACHER_WIDTH, std=1),
        "teacher_weight": normal(vocab, TEACHER_WIDTH, std=2 * TEACHER_WIDTH**-0.5),
        "labels": labels,
    }


def fp64_truth(inputs: dict) -> dict:
    """The objective on the first tokens from its formula in fp64; heads are converted a piece at a time."""

    def logits(model: str) -> torch.Tensor:
        hidden = inputs[f"{model}_hidden"][0, :SLICE].double()
        return torch.cat([hidden @ rows.double().t() for rows in inputs[f"{model}_weight"].split(8192)], dim=1)

    labels = inputs["labels"][0, :SLICE]
    student = logits("student").requires_grad_()
    log_p, log_q = logits("teacher").log_softmax(-1), student.log_softmax(-1)
    class_loss = -log_q.gather(1, labels.unsqueeze(1)).mean()
    kd_loss = (log_p.exp() * (log_p - log_q)).sum(-1).mean()
    loss = (1 - KD_RATIO) * class_loss + KD_RATIO * kd_loss
    (grad,) = torch.autograd.grad(loss, student)  # [n, V]
    pieces = zip(grad.split(8192, dim=1), inputs["student_weight"].split(8192), strict=True)
    return {
        "n_tokens": SLICE,
        "loss": loss.item(),
        "teacher_entropy": -(log_p.exp() * log_p).sum(-1).mean().item(),
        "grad": sum(part @ rows.double() for part, rows in pieces),
    }


def run_side(side: str, inputs_file: Path) -> dict:
    output = inputs_file.with_name("result.json")
    command = [sys.executable, "-m", "benchmarks.losses._llama_worker", side, str(inputs_file), str(output)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{side} ended with exit code {done.returncode}:\n{done.stderr[-2000:]}")
    return json.loads(output.read_text())


def summarise(runs: list[dict]) -> dict:
    return {key: median(run[key] for run in runs) for key in runs[0]}


def least_seconds(inputs: dict, vocab: int, rate: float) -> float:
    """Return what the three matrix products of the valid tokens take at ``rate`` operations per second."""
    valid = int((inputs["labels"] != IGNORE).sum())
    return 2 * valid * vocab * (2 * STUDENT_WIDTH + TEACHER_WIDTH) / rate


def print_table(results: dict[str, list[dict]]) -> None:
    summary = {side: summarise(runs) for side, runs in results.items()}
    heads = ("seconds", "CPU s", "vs stock", "vs chunked", "added MiB", "loss err", "grad err")
    print(f"{'':44}" + "".join(f"{head:>12}" for head in heads))
    for side, row in summary.items():
        versus = (summary[other]["seconds"] / row["seconds"] for other in ("stock", "stock_chunked"))
        cells = [f"{row['seconds']:.2f}", f"{row['cpu_seconds']:.2f}", *(f"{ratio:.1f}x" for ratio in versus)]
        cells += [f"{row['added_bytes'] / 2**20:.0f}", f"{row['loss_error']:.1e}", f"{row['gradient_error']:.1e}"]
        print(f"{LABELS[side]:44}" + "".join(f"{cell:>12}" for cell in cells))


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.losses --llama", description=__doc__.split("\n\n")[0])
    parser.add_argument("--tokens", type=int, default=1024, help="N (default 1024)")
    parser.add_argument("--vocab", type=int, default=128256, help="V (default 128256)")
    parser.add_argument("--rounds", type=int, default=3, help="runs of each side (default 3)")
    parser.add_argument(
        "--ignored", type=float, nargs="+", default=[0.0, 0.5], help="shares of ignored tokens (default 0 0.5)"
    )
    parser.add_argument("--quick", action="store_true", help="one round of 128 tokens and 32000 ids")
    parser.add_argument("--output", type=Path, help="write all numbers as JSON")
    args = parser.parse_args(argv)
    if args.quick:
        args.tokens, args.vocab, args.rounds = 128, 32000, 1
    if args.tokens < SLICE or args.vocab < 1 or args.rounds < 1 or not all(0 <= x < 1 for x in args.ignored):
        parser.error(f"expected --tokens of at least {SLICE}, --vocab and --rounds of at least 1, --ignored in [0, 1)")

    machine, rate = describe_machine(), matrix_rate("cpu")
    print(machine)
    report = {"machine": machine, "matrix_rate": rate, "tokens": args.tokens, "vocab": args.vocab, "ignored": {}}
    for ignored in args.ignored:
        results: dict[str, list[dict]] = {side: [] for side in SIDES}
        with tempfile.TemporaryDirectory() as folder:
            inputs_file = Path(folder) / "inputs.pt"
            inputs = make_inputs(args.tokens, args.vocab, ignored)
            torch.save({**inputs, "truth": fp64_truth(inputs)}, inputs_file)
            least = least_seconds(inputs, args.vocab, rate)
            del inputs
            for number in range(args.rounds):
                for side, runs in results.items():
                    if number and side in ONCE:
                        continue
                    runs.append(run_side(side, inputs_file))
                    print(f"round {number + 1}, {side}: {runs[-1]['seconds']:.2f} s", file=sys.stderr, flush=True)
        print(f"\n{args.tokens} tokens, {ignored:.0%} ignored, V = {args.vocab}, median of {args.rounds}")
        print_table(results)
        print(f"{'the three products at ' + f'{rate / 1e9:.0f} GFLOP/s':44}{least:12.2f}")
        report["ignored"][str(ignored)] = {side: {"runs": r, "median": summarise(r)} for side, r in results.items()}
    if args.output:
        args.output.write_text(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()
