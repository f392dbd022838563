"""One cell in a process of its own, for memory that only its own calls have touched: how a CPU is measured."""

import json
import sys
from pathlib import Path

import torch

from ._case import Case
from ._cell import find, measure_cell
from ._inputs import Inputs, Truth


def main(job_file: str) -> None:
    job = json.loads(Path(job_file).read_text())
    case = Case(**{**job["case"], "widths": tuple(job["case"]["widths"])})
    saved = torch.load(job["inputs"])
    inputs = Inputs(*saved["inputs"])
    truth = saved["truths"].get(job["truth"])
    cell = measure_cell(find(job["key"], case.op), inputs, truth and Truth(*truth), case, job["budget"])
    Path(job["output"]).write_text(json.dumps(cell._asdict()))


if __name__ == "__main__":
    main(sys.argv[1])
