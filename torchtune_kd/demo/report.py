"""What the demo shows at the end: tables, sentences and the picture of the run."""

from collections.abc import Mapping, Sequence
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from torchtune_kd.evaluation.distance import Distance


def distance_table(
    before: Distance, after: Distance, held_out: Mapping[str, int], training: Mapping[str, int]
) -> Table:
    """Before and after training on held-out text, the teacher beside it.

    Args:
        before (Distance): The untrained student's.
        after (Distance): The trained student's.
        held_out (Mapping[str, int]): "tokens" that were held out, and "validated", those that are the table's.
        training (Mapping[str, int]): "steps", "rows_per_step", "row_tokens".
    """
    steps, rows, length = (training[key] for key in ("steps", "rows_per_step", "row_tokens"))
    tokens, validated = held_out["tokens"], held_out["validated"]
    share = f"{validated:,}" if validated == tokens else f"{validated:,} of {tokens:,}"
    title = (
        f"After {steps} steps of {rows} x {length} tokens, {steps * rows * length:,} in all\n"
        f"Held-out text, {share} tokens, never trained on"
    )
    table = _table(title, ["student before", "after", "teacher"])
    table.add_row("perplexity", *map(_number, (before.perplexity, after.perplexity, after.teacher_perplexity)))
    table.add_row("KL to the teacher, nats per token", _number(before.kl), _number(after.kl), "0")
    table.add_row("same most likely token", f"{before.top1_agreement:.1%}", f"{after.top1_agreement:.1%}", "100%")
    table.add_row("acceptance rate", f"{before.acceptance_rate:.1%}", f"{after.acceptance_rate:.1%}", "100%")
    return table


def size_table(teacher: Mapping[str, Any], student: Mapping[str, Any], speed: Mapping[str, int]) -> Table:
    """Layers, weights, bytes and speed of both models."""
    what = f"{speed['generated_tokens']} tokens, one by one, after a prompt of {speed['prompt_tokens']}"
    table = _table(f"Size, and speed of writing {what}", ["student", "teacher"])
    models = (student, teacher)
    table.add_row("layers", *(str(model["layers"]) for model in models))
    table.add_row("parameters, millions", *(f"{model['parameters'] / 1e6:.1f}" for model in models))
    table.add_row("checkpoint, MB", *(f"{model['checkpoint_bytes'] / 1e6:.0f}" for model in models))
    table.add_row("tokens per second", *(f"{model['tokens_per_second']:.1f}" for model in models))
    return table


def completion_table(completions: Sequence[Mapping[str, str]]) -> Table:
    """Greedy continuations of the same prompts side by side; runs of white space shown as one space."""
    table = Table(box=SIMPLE_HEAD, title="Greedy continuations", title_justify="left", show_lines=True)
    for name in ("prompt", "teacher", "student before", "student after"):
        table.add_column(name, ratio=1, overflow="fold")
    for row in completions:
        texts = (" ".join(row[key].split()) for key in ("prompt", "teacher", "untrained", "trained"))
        table.add_row(*map(escape, texts))
    return table


def print_report(console: Console, tables: Sequence[Table], sentences: Sequence[str]) -> None:
    for table in tables:
        console.print(table)
    for sentence in sentences:
        console.print(sentence, highlight=False)


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _table(title: str, columns: Sequence[str]) -> Table:
    table = Table(box=SIMPLE_HEAD, title=title, title_justify="left")
    table.add_column("", no_wrap=True)
    for name in columns:
        table.add_column(name, justify="right")
    return table
