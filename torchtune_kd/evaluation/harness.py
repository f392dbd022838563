"""Tasks of lm-eval (EleutherAI's evaluation harness) through our own models, without transformers.

lm-eval is an optional package, so that nothing of it is imported before one of its tasks is asked for.
"""

from collections.abc import Iterator, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import torch

from torchtune_kd.errors import RunError, UserError, nearest, one_line
from torchtune_kd.evaluation.candidates import Candidate
from torchtune_kd.evaluation.choices import Question, Score, question_of, score_questions
from torchtune_kd.evaluation.measured import Measured, over_items
from torchtune_kd.evaluation.writing import write_until

MAX_NEW_TOKENS = 256  # where a task sets no `max_gen_toks`


class LMEvalTask:
    """One of lm-eval's tasks, a group of them included.

    Args:
        name (str): lm-eval's name.
        include (Path | None): a folder with task files of one's own, which are then the only ones known.

    Raises:
        UserError: if lm-eval is not there, or does not know the task.
    """

    def __init__(self, name: str, include: Path | None = None) -> None:
        try:
            from lm_eval.tasks import TaskManager
        except ImportError as error:
            raise UserError(
                f"The task lm_eval:{name} needs lm-eval, which is not installed: run "
                f"`pip install 'torchtune-kd[evaluate]'`. ({one_line(error)})"
            ) from error
        self.name = name
        self._manager = TaskManager(include_path=include and str(include), include_defaults=include is None)
        if name not in self._manager.all_tasks:
            raise UserError(f"lm-eval has no task {name!r}: {nearest(name, self._manager.all_tasks)}")

    def measure(
        self, candidate: Candidate, tokenizer: Any, limit: int | None, batch_size: int
    ) -> tuple[list[Measured], str]:
        """Run the task.

        Args:
            candidate (Candidate): the model.
            tokenizer (Any): torchtune's.
            limit (int | None): items of each task; None takes all.
            batch_size (int): questions of a pass.

        Returns:
            tuple[list[Measured], str]: its metrics, with items where it has one value for each, and the task's
            fingerprint: name, version and number of items.

        Raises:
            UserError: if its data cannot be fetched.
        """
        from lm_eval import simple_evaluate

        try:
            found = simple_evaluate(
                _model(candidate, tokenizer, batch_size),
                tasks=[self.name],
                limit=limit,
                task_manager=self._manager,
                bootstrap_iters=0,
                log_samples=True,
                verbosity="ERROR",
            )
        except (UserError, RunError, torch.OutOfMemoryError):
            raise
        except Exception as error:  # whatever the hub, the dataset's reader or the task's own code raises
            raise UserError(
                f"The task lm_eval:{self.name} cannot be run, make its data reachable or leave it out: "
                f"{type(error).__name__}: {one_line(error)}"
            ) from error
        return list(_measured(found, self.name)), _fingerprint(found, self.name)


def _measured(found: dict[str, Any], task: str) -> Iterator[Measured]:
    """Yield the metrics of a task, or the aggregated ones of a group."""
    values, samples = found["results"][task], found["samples"].get(task, [])
    for key, value in values.items():
        metric, _, strategy = key.partition(",")
        if not strategy or metric.endswith("_stderr") or isinstance(value, bool) or not isinstance(value, int | float):
            continue
        mine = [sample for sample in samples if sample.get("filter", strategy) == strategy]
        items = [sample[metric] for sample in mine if metric in sample]
        name = metric if strategy == "none" else f"{metric} ({strategy})"
        if items and all(isinstance(item, int | float) for item in items):
            measured = over_items(name, [float(item) for item in items])
            # a task may aggregate otherwise, as perplexities are: then the items say nothing of the value's error
            yield measured if abs(measured.value - value) < 1e-9 else Measured(name, float(value), None, len(items))
        else:
            yield Measured(name, float(value), None, len(samples))


def _fingerprint(found: dict[str, Any], task: str) -> str:
    items = {name: len(samples) for name, samples in sorted(found["samples"].items())}
    return f"lm-eval {task} version {found['versions'].get(task)} items {sum(items.values())}"


def _model(candidate: Candidate, tokenizer: Any, batch_size: int) -> Any:
    from lm_eval.api.model import TemplateLM
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

    class KDModel(TemplateLM):
        """lm-eval's view of a candidate: log-likelihoods with one pass per context, greedy text."""

        @property
        def eot_token_id(self) -> int:
            return tokenizer.eos_id

        @property
        def prefix_token_id(self) -> int:
            return tokenizer.eos_id if tokenizer.bos_id is None else tokenizer.bos_id

        @property
        def max_gen_toks(self) -> int:
            return MAX_NEW_TOKENS

        @property
        def tokenizer_name(self) -> str:
            return type(tokenizer).__name__

        def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
            return tokenizer.encode(string, add_bos=add_special_tokens is not False, add_eos=False)

        def _loglikelihood_tokens(self, requests: list, **_: Any) -> list[tuple[float, bool]]:
            return [
                tuple(score) for score in _scores(candidate, [(list(c), list(t)) for _, c, t in requests], batch_size)
            ]

        def loglikelihood_rolling(self, requests: list, disable_tqdm: bool = False) -> list[float]:
            texts = [request.args[0] for request in requests]
            windows = [
                [
                    make_disjoint_window(window)
                    for window in get_rolling_token_windows(
                        token_list=self.tok_encode(text, add_special_tokens=False),
                        prefix_token=self.prefix_token_id,
                        max_seq_len=candidate.max_seq_len,
                        context_len=1,
                    )
                ]
                for text in texts
            ]
            pairs = [(list(context), list(rest)) for text in windows for context, rest in text]
            scores = iter(_scores(candidate, pairs, batch_size))
            return [sum(next(scores).log_likelihood for _ in text) for text in windows]

        def generate_until(self, requests: list, disable_tqdm: bool = False) -> list[str]:
            return [_text(request.args[0], dict(request.args[1])) for request in requests]

    def _text(context: str, wanted: dict[str, Any]) -> str:
        if wanted.get("do_sample") or (wanted.get("temperature") or 0) > 0:
            raise UserError(
                "The task draws its texts at random (do_sample, temperature), and only the most likely text is written "
                "here: choose another task."
            )
        until = wanted.get("until") or []
        tokens = int(wanted.get("max_gen_toks") or MAX_NEW_TOKENS)
        return write_until(candidate, tokenizer, context, [until] if isinstance(until, str) else until, tokens)

    return KDModel()


def _scores(candidate: Candidate, pairs: Sequence[tuple[list[int], list[int]]], batch_size: int) -> list[Score]:
    """Score what follows each context; neighbours with the same context go through the model as one question."""
    questions = [
        _question(context, [rest for _, rest in group]) for context, group in groupby(pairs, key=lambda pair: pair[0])
    ]
    return [score for scores in score_questions(candidate, questions, batch_size) for score in scores]


def _question(context: list[int], rests: list[list[int]]) -> Question:
    return question_of(len(context), [context + rest for rest in rests])
