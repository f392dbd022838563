"""Evaluate models side by side: load one after the other, run the tasks, write a line for every metric."""

import math
import os
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch.utils.data import Subset
from tqdm import tqdm

from torchtune_kd.config.checks import check_tokenizer
from torchtune_kd.data.batches import Batch
from torchtune_kd.data.datasets import build_dataset
from torchtune_kd.data.steps import build_loader
from torchtune_kd.distributed.world import World
from torchtune_kd.errors import UserError, say
from torchtune_kd.evaluation.candidates import Candidate, Limits, check_sources, load_candidate
from torchtune_kd.evaluation.choices import encode_question, score_questions
from torchtune_kd.evaluation.harness import LMEvalTask
from torchtune_kd.evaluation.heldout import DISTANCES, measure_text, text_fingerprint
from torchtune_kd.evaluation.latency import measure_latency
from torchtune_kd.evaluation.measured import Measured, over_items
from torchtune_kd.evaluation.provenance import provenance
from torchtune_kd.evaluation.request import Request
from torchtune_kd.evaluation.size import measure_size
from torchtune_kd.evaluation.tasks import Item, items_of
from torchtune_kd.evaluation.tasks.items import items_fingerprint
from torchtune_kd.evaluation.tasks.names import HELDOUT, LM_EVAL
from torchtune_kd.reports.results import Result, append_results

IGNORE = -100
LN2 = math.log(2)
Measure = Callable[[Candidate, Candidate | None], tuple[list[Measured], str | None]]  # metrics, fingerprint of the data


def evaluate(request: Request) -> list[Result]:
    """Measure every model on every task, and add the lines to the results file as each model is done.

    Raises:
        UserError: for files, tasks or models that cannot be used; what was measured before stays in the file.
    """
    settings = request.settings
    world = World(settings.torch_device)
    tokenizer = request.tokenizer.build()
    limits = check_sources(list(request.sources), request.reference, settings, world)
    check_tokenizer(tokenizer, limits.vocab)
    steps: dict[str, Measure] = {name: _task(name, request, tokenizer, limits, world) for name in request.tasks}
    steps |= {"size": _size, **_latencies(request, limits)}
    reference = None if request.reference is None else load_candidate(request.reference, settings, world)
    results: list[Result] = []
    for source in request.sources:
        is_reference = reference is not None and source.name == reference.name
        candidate = reference if is_reference else load_candidate(source, settings, world)
        lines = []
        for name, measure in tqdm(steps.items(), desc=source.name, unit="task", leave=False):
            began = time.perf_counter()
            measured, data = measure(candidate, reference)
            lines += _lines(measured, request, source.name, name, data, time.perf_counter() - began)
        append_results(lines, request.results)
        results += lines
        del candidate
    return results


def _lines(
    measured: list[Measured], request: Request, model: str, task: str, data: str | None, seconds: float
) -> Iterator[Result]:
    origin = provenance(request.settings.torch_device, request.resolved)
    reference = request.reference
    for one in measured:
        kept = {"items": one.items, "weights": one.weights} if request.items else {}
        against = {"data": data}
        if reference is not None and one.metric in DISTANCES:
            against = {"data": f"{data}, reference {reference.fingerprint}", "reference": reference.name}
        yield Result(
            model, task, one.metric, one.value, one.se, one.n, **kept, **against, seconds=round(seconds, 3), **origin
        )


def _task(name: str, request: Request, tokenizer: Any, limits: Limits, world: World) -> Measure:
    """Read a task's data, before any model is loaded."""
    if name == HELDOUT:
        batches = text_batches(request, tokenizer, limits, world)
        return partial(_heldout, batches=batches, data=text_fingerprint(batches))
    if name.startswith(LM_EVAL):
        task = LMEvalTask(name.removeprefix(LM_EVAL))
        return partial(_lm_eval, tokenizer=tokenizer, task=task, request=request)
    items = items_of(name)[: request.limit]
    return partial(_choices, tokenizer=tokenizer, items=items, request=request)


def text_batches(request: Request, tokenizer: Any, limits: Limits, world: World) -> list[Batch]:
    """Return the rows of ``dataset_val`` in batches; of ``limit`` rows at most."""
    settings = request.settings
    dataset = build_dataset(request.dataset_val, "dataset_val", tokenizer, *limits, world)
    if request.limit is not None and request.limit < len(dataset):
        packed = getattr(dataset, "packed", False)
        dataset = Subset(dataset, range(request.limit))
        dataset.packed = packed
    loader = build_loader(
        dataset,
        tokenizer,
        batch_size=request.batch_size,
        shuffle=False,
        ignore_index=IGNORE,
        max_seq_len=limits.max_seq_len,
        vocab=limits.vocab,
        seed=0,
        world=World(torch.device("cpu")),
        name="dataset_val",
    )
    torch.manual_seed(settings.seed or 0)  # for datasets that draw
    return list(loader)


def _heldout(
    candidate: Candidate, reference: Candidate | None, *, batches: list[Batch], data: str
) -> tuple[list[Measured], str]:
    return measure_text(candidate, reference, tqdm(batches, desc="heldout", leave=False)), data


def _choices(
    candidate: Candidate, reference: Candidate | None, *, tokenizer: Any, items: list[Item], request: Request
) -> tuple[list[Measured], str]:
    questions = [encode_question(tokenizer, item.context, item.choices) for item in items]
    scores = score_questions(candidate, questions, request.batch_size)
    return over_choices(items, [[choice.log_likelihood for choice in found] for found in scores]), items_fingerprint(
        items
    )


def over_choices(items: list[Item], scores: list[list[float]]) -> list[Measured]:
    """Return accuracy, accuracy by length, and bits per byte of the right answer, from log-likelihoods in nats.

    ``acc`` takes the choice with the largest log-likelihood, ``acc_norm`` the one with the largest per byte.
    """
    right, by_length, bits = [], [], []
    for item, nats in zip(items, scores, strict=True):
        sizes = [len(choice.strip().encode()) for choice in item.choices]
        per_byte = [score / size for score, size in zip(nats, sizes, strict=True)]
        right.append(float(nats.index(max(nats)) == item.answer))
        by_length.append(float(per_byte.index(max(per_byte)) == item.answer))
        bits.append(-per_byte[item.answer] / LN2)
    return [over_items("acc", right), over_items("acc_norm", by_length), over_items("bits_per_byte", bits)]


def _lm_eval(
    candidate: Candidate, reference: Candidate | None, *, tokenizer: Any, task: LMEvalTask, request: Request
) -> tuple[list[Measured], str]:
    return task.measure(candidate, tokenizer, request.limit, request.batch_size)


def _size(candidate: Candidate, reference: Candidate | None) -> tuple[list[Measured], None]:
    return measure_size(candidate), None


def _latencies(request: Request, limits: Limits) -> dict[str, Measure]:
    settings = request.latency
    if settings is None:
        return {}
    if settings.prompt_tokens + settings.new_tokens > limits.max_seq_len:
        raise UserError(
            f"`latency` asks for {settings.prompt_tokens} + {settings.new_tokens} tokens, and the models take "
            f"{limits.max_seq_len}: lower `latency.prompt_tokens`, or set `latency: null`."
        )
    load, cores = os.getloadavg()[0], os.cpu_count() or 1
    if load > cores / 2:
        say(
            f"warning: {load:.1f} processes compute on {cores} cores already, and latencies of a busy machine mislead: "
            "measure again when it is idle, or set `latency=null`."
        )

    def timed(size: int, candidate: Candidate, reference: Candidate | None) -> tuple[list[Measured], str]:
        data = f"prompt {settings.prompt_tokens} new {settings.new_tokens} {request.settings.dtype}"
        return measure_latency(candidate, size, settings), data

    return {f"latency {size}": partial(timed, size) for size in settings.batch_sizes}
