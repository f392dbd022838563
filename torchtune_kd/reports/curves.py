"""Draw what a run logged."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

Records = Sequence[Mapping[str, float]]


def write_curves(file: Path, steps: Records, validations: Records, objective: str) -> None:
    """Write the run as a picture (PNG): distances in nats on the left, agreement on the right.

    Args:
        file (Path): PNG file to write.
        steps (Records): Training steps with "step", "loss", "kl", "top1_agreement".
        validations (Records): Validations with "step", "val_kl", "val_top1_agreement".
        objective (str): Name of the training loss, for the legend.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib.ticker import MaxNLocator, PercentFormatter

    figure, (nats, share) = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    figure.suptitle("SmolLM2-135M-Instruct, 30 layers, distilled into 15 of them")
    _draw(nats, steps, "loss", objective, color="0.7", linewidth=1)
    _draw(nats, steps, "kl", "KL(teacher ‖ student), training text", color="tab:blue", linewidth=1)
    _draw(nats, validations, "val_kl", "KL(teacher ‖ student), held-out text", color="tab:orange", marker="o")
    nats.set(xlabel="optimizer step", ylabel="nats per token", ylim=(0, None), title="Distance to the teacher")
    _draw(share, steps, "top1_agreement", "training text", color="tab:blue", linewidth=1)
    _draw(share, validations, "val_top1_agreement", "held-out text", color="tab:orange", marker="o")
    share.set(
        xlabel="optimizer step",
        ylabel="share of tokens",
        ylim=(0, 1),
        title="Same most likely next token as the teacher",
    )
    share.yaxis.set_major_formatter(PercentFormatter(1))
    for axes in (nats, share):
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(alpha=0.3)
        axes.legend()
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(file, dpi=120)
    plt.close(figure)


def _draw(axes: Any, records: Records, key: str, label: str, **style: Any) -> None:
    points = [(record["step"], record[key]) for record in records if key in record]
    axes.plot([x for x, _ in points], [y for _, y in points], label=label, **style)
