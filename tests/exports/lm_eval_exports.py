"""Run lm-eval's own Hugging Face model on an export: ``lm_eval_exports.py FOLDER TASKS_FOLDER RESULTS PREFIX TASK...``.

PREFIX is the id that stands for an empty context.
"""

import json
import sys
from pathlib import Path

import torch
from lm_eval import simple_evaluate
from lm_eval.tasks import TaskManager


def main(folder: str, include: str, results: str, prefix: str, tasks: list[str]) -> None:
    torch.set_num_threads(1)
    found = simple_evaluate(
        "hf",
        model_args={"pretrained": folder, "dtype": "float32", "max_length": 1024, "prefix_token_id": int(prefix)},
        tasks=tasks,
        task_manager=TaskManager(include_path=include, include_defaults=False),
        bootstrap_iters=0,
        batch_size=4,
        device="cpu",
    )
    numbers = {
        task: {key.partition(",")[0]: value for key, value in values.items() if isinstance(value, float)}
        for task, values in found["results"].items()
    }
    Path(results).write_text(json.dumps(numbers))


if __name__ == "__main__":
    main(*sys.argv[1:5], sys.argv[5:])
