"""Read what torchtune's loggers wrote."""

from pathlib import Path


def read_log(folder: Path) -> tuple[list[dict[str, float]], list[dict[str, float]]]:
    """Read training steps and validations out of the file that torchtune's DiskLogger wrote into ``folder``."""
    (file,) = folder.glob("log_*.txt")
    steps, validations = [], []
    for line in file.read_text().splitlines():
        head, _, values = line.partition(" | ")
        pairs = (pair.rsplit(":", 1) for pair in values.split())
        record = {"step": int(head.removeprefix("Step "))} | {name: float(value) for name, value in pairs}
        (steps if "loss" in record else validations).append(record)
    return steps, validations
