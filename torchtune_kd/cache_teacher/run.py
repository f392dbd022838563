"""The writer: list the documents, let the teacher read them, write shards, and the manifest last.

Shapes: B documents of a batch, S tokens of the longest, m stored tokens, D hidden width, V vocabulary.
"""

import json
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.utils.data import Dataset
from tqdm import tqdm

from torchtune_kd.cache_teacher.coding import Coding, Drawn, HiddenStates, TopK
from torchtune_kd.cache_teacher.documents import (
    Listed,
    batches_of,
    held,
    list_documents,
    read_tokens,
    sample_of,
    with_stored,
)
from torchtune_kd.cache_teacher.error import SAMPLE, error_of, mass_of, said, said_of_mass
from torchtune_kd.cache_teacher.folder import check_room, check_shards, finish, prepare, size
from torchtune_kd.cache_teacher.request import Request
from torchtune_kd.cache_teacher.writing import ShardWriter
from torchtune_kd.caches.layout import HEAD, SHARDS, CacheManifest
from torchtune_kd.caches.states import channel_rms, decode, encode
from torchtune_kd.checkpoints.identity import teacher_identity, tokenizer_files
from torchtune_kd.config.checks import check_checkpoint_files, check_tokenizer
from torchtune_kd.data.datasets import build_dataset
from torchtune_kd.distributed.world import World
from torchtune_kd.errors import OutOfMemory, RunError, Stopped, UserError, first_line, phase, say
from torchtune_kd.losses.signals import Head
from torchtune_kd.models.build import on_meta
from torchtune_kd.models.output_head import output_head
from torchtune_kd.storage.atomic import PARTIAL, flush_file
from torchtune_kd.teachers.live import LiveTeacher, build_teacher
from torchtune_kd.training.signals import StopRequests

Datasets = Sequence[tuple[str, Dataset]]


def write_cache(request: Request, world: World, stop: StopRequests) -> CacheManifest:
    """Write what is missing of a cache, then its manifest.

    Whatever a killed writer left whole is kept, whatever the number of its processes. All processes call this together.

    Args:
        request (Request): what is asked for.
        world (World): over whose processes the teacher is sharded and the documents are divided.
        stop (StopRequests): asked after every batch.

    Raises:
        UserError: for a folder of another cache, too little room, or data that changes from one reading to the next.
        RunError: if memory runs out, or a file cannot be written.
        Stopped: if a signal asked for it.
    """
    config, folder = request.config, request.folder
    tokenizer = config.tokenizer.build()
    longest, facts = _facts(request, tokenizer, world)
    prepare(folder, world)
    datasets = [
        (name, build_dataset(sections, name, tokenizer, longest, facts["vocab"], world))
        for name, sections in (("dataset", config.dataset), ("dataset_val", config.dataset_val))
        if sections
    ]
    documents = list_documents(datasets, request.keys.positions, facts["vocab"], world)
    if not documents:
        raise UserError("No row of `dataset` or `dataset_val` has a token with a label: there is nothing to write.")
    index = check_shards(folder, facts, world)
    # a batch of which a part is there has new documents in it: what a killed writer left are whole batches
    batches = [
        missing
        for batch in batches_of(documents, request.keys.tokens_per_batch)
        if (missing := [with_stored(document, index) for document in batch if not held(document, index)])
    ]
    _announce(request, facts, documents, batches, world)
    writer = ShardWriter(folder / SHARDS, request.shard_bytes, facts)
    new_head = not world.gather((folder / HEAD).is_file())[0]
    if batches or new_head:
        teacher = build_teacher(replace(config, teacher_head=None), world)
        assert isinstance(teacher, LiveTeacher)
        coding = _coding(request, facts, teacher, documents, datasets, world)
        _write_all(request.bytes_per_token(facts["width"]), teacher, coding, batches, datasets, writer, world, stop)
    keys = request.keys
    return finish(folder, facts, keys.positions, writer.files, world, new_head=new_head, verify=keys.verify)


def _facts(request: Request, tokenizer: Any, world: World) -> tuple[int, dict[str, Any]]:
    """Check what needs neither weights nor data; return the longest sequence, and what each shard says of its cache."""
    config, keys = request.config, request.keys
    check_checkpoint_files(config.teacher_checkpointer)
    teacher = on_meta(config.teacher_model, config.settings, world)
    weight, bias = output_head(teacher)
    check_tokenizer(tokenizer, weight.shape[0])
    if keys.kind == "top_k" and keys.k >= weight.shape[0]:
        raise UserError(f"Expected `cache.k` below the teacher's {weight.shape[0]} ids, got {keys.k}: lower it.")
    identities = (teacher_identity(config), tokenizer_files(config)) if world.is_rank_zero else ({}, {})
    of_teacher, of_tokenizer = world.gather(identities)[0]
    return teacher.max_seq_len, {
        "kind": keys.kind,
        "dtype": keys.dtype if keys.kind == "hidden" else None,
        "k": keys.k if keys.kind == "top_k" else None,
        "temperatures": list(request.temperatures),
        "samples": keys.samples if keys.kind == "sampled" else None,
        "computed_in": config.settings.dtype,
        "width": weight.shape[1],
        "vocab": weight.shape[0],
        "has_bias": bias is not None,
        "teacher": of_teacher,
        "tokenizer": of_tokenizer,
    }


def _announce(
    request: Request,
    facts: dict[str, Any],
    documents: Sequence[Listed],
    batches: Sequence[Sequence[Listed]],
    world: World,
) -> None:
    """Say what is going to be written, and refuse a disk that has no room for it and for the head."""
    each, head = request.bytes_per_token(facts["width"]), 0
    if request.keys.kind == "hidden" and not (request.folder / HEAD).is_file():
        head = facts["vocab"] * facts["width"] * request.config.settings.torch_dtype.itemsize
    tokens, missing = (sum(len(document.positions) for document in some) for some in (documents, _flat(batches)))
    free = check_room(request.folder, missing * each + head, request.keys.kind, world)
    if world.is_rank_zero:
        part = "" if missing == tokens else f", of which {size(missing * each)} are missing"
        say(
            f"{len(documents):,} documents with {tokens:,} tokens to be stored, {size(each)} each: "
            f"{size(tokens * each)}{part}. {size(free)} are free in {request.folder}."
        )


def _coding(
    request: Request,
    facts: dict[str, Any],
    teacher: LiveTeacher,
    documents: Sequence[Listed],
    datasets: Datasets,
    world: World,
) -> Coding:
    """Return what turns states into columns; write ``head.safetensors``, if no earlier writer has."""
    keys = request.keys
    file = request.folder / HEAD
    if not world.gather(file.is_file())[0]:
        states, labels = [], []
        sample = sorted(sample_of(documents, SAMPLE), key=lambda listed: listed.length)
        for batch in batches_of(sample, keys.tokens_per_batch):
            tokens, places = _as_batch(batch, datasets)
            states.append(_forward(teacher, tokens, places, world))
            labels.append(tokens.roll(-1, dims=1).flatten()[places])
        if world.is_rank_zero:
            _write_head(request, facts, teacher, torch.cat(states), torch.cat(labels).to(world.device))
        world.barrier()
    if keys.kind == "hidden":
        rms = load_file(file)["channel_rms"].clone() if world.is_rank_zero else None  # others may see the file late
        return HiddenStates(keys.dtype, world.gather(rms)[0].to(world.device))

    def head() -> Head:
        return Head(*output_head(teacher.decoder))

    return Drawn(head, keys.samples) if keys.kind == "sampled" else TopK(head, keys.k, request.temperatures)


def _write_head(request: Request, facts: dict[str, Any], teacher: LiveTeacher, states: Tensor, labels: Tensor) -> None:
    """Write head and root mean squares, with the error that the sample shows; of log-probabilities that error alone."""
    keys, head = request.keys, Head(*output_head(teacher.decoder))
    tensors: dict[str, Tensor | None] = {}
    if keys.kind == "hidden":
        rms = channel_rms(states)
        stored = decode(encode(states, keys.dtype, rms), torch.float32, rms)
        error = error_of(states, stored, labels, head)
        tensors = {"weight": head.weight, "bias": head.bias, "channel_rms": rms}
        say(said(error))
    else:
        error = mass_of(states, head, keys.k if keys.kind == "top_k" else keys.samples, request.temperatures)
        say(said_of_mass(keys.kind, error))
    kept = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items() if tensor is not None}
    beside = request.folder / (HEAD + PARTIAL)
    try:
        save_file(kept, beside, metadata={"error": json.dumps(error), "cache": json.dumps(facts, sort_keys=True)})
        flush_file(beside)
    except (OSError, SafetensorError) as cause:
        raise RunError(
            f"The head could not be written into {beside} ({first_line(cause)}): make room there."
        ) from cause
    beside.replace(request.folder / HEAD)


def _write_all(
    each: int,
    teacher: LiveTeacher,
    coding: Coding,
    batches: Sequence[Sequence[Listed]],
    datasets: Datasets,
    writer: ShardWriter,
    world: World,
    stop: StopRequests,
) -> None:
    """Let the teacher read every batch, one on each process at a time; one without a batch keeps the others company."""
    total = sum(len(document.positions) for document in _flat(batches))
    with tqdm(total=total, unit="token", unit_scale=True, disable=not world.is_rank_zero, dynamic_ncols=True) as bar:
        for begin in range(0, len(batches), world.size):
            together = batches[begin : begin + world.size]
            batch = together[world.rank] if world.rank < len(together) else []
            tokens, places = _as_batch(batch, datasets)
            states = _forward(teacher, tokens, places, world)
            writer.add(batch, coding(states, _next(tokens, places, batch).to(world.device), batch))
            bar.update(sum(len(document.positions) for document in _flat(together)))
            bar.set_postfix_str(f"{size(bar.n * each)} of {size(total * each)}", refresh=False)
            if world.any(stop.pending):
                writer.finish()
                raise Stopped(
                    f"{stop.name or 'a signal on another process'} ended the writing after {bar.n:,} of {total:,} "
                    "tokens: start it again with the same command to go on."
                )
    teacher.end_step(teacher)
    writer.finish()


def _as_batch(batch: Sequence[Listed], datasets: Datasets) -> tuple[Tensor, Tensor]:
    """Return documents as a batch [B, S], padded on the right, and the places [m] of what is to be stored in it.

    Attention is causal, so that padding changes nothing before it. No document gives a batch of one token.

    Raises:
        UserError: for a document that is not the one that was listed.
    """
    longest = max((document.length for document in batch), default=1)
    tokens, places = torch.zeros(max(len(batch), 1), longest, dtype=torch.long), [torch.zeros(0, dtype=torch.long)]
    for row, document in enumerate(batch):
        tokens[row, : document.length] = read_tokens(datasets, document)
        places.append(torch.from_numpy(document.positions + row * longest))
    return tokens, torch.cat(places)


def _next(tokens: Tensor, places: Tensor, batch: Sequence[Listed]) -> Tensor:
    """Return the ids [m] that follow the tokens at places of a batch; -1 at the end of a document."""
    ends = torch.tensor([row * tokens.shape[1] + document.length - 1 for row, document in enumerate(batch)])
    following = tokens.roll(-1, dims=1).flatten()
    following[ends.long()] = -1
    return following[places]


def _forward(teacher: LiveTeacher, tokens: Tensor, places: Tensor, world: World) -> Tensor:
    """Return the teacher's last hidden states [m, D] at places of a batch."""
    try:
        with phase("teacher"):
            states = teacher(tokens.to(world.device, non_blocking=True))
            return states.flatten(0, 1)[places.to(world.device, non_blocking=True)]
    except OutOfMemory as error:
        raise RunError(
            f"The memory of {world.device} ran out at a batch of {tokens.numel():,} tokens: lower "
            "`cache.tokens_per_batch`, or start more processes; what is written is kept."
        ) from error


def _flat(batches: Sequence[Sequence[Listed]]) -> list[Listed]:
    return [document for batch in batches for document in batch]
