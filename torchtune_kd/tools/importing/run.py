"""Read a source, and write what it says of a config's data as a cache."""

from collections.abc import Callable, Iterator
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.utils.data import Dataset

from torchtune_kd.caches.finish import write_manifest
from torchtune_kd.caches.layout import IMPORTED, CacheManifest
from torchtune_kd.caches.shards import Entry
from torchtune_kd.checkpoints.identity import tokenizer_identity
from torchtune_kd.config.checks import check_tokenizer
from torchtune_kd.config.reading import Config
from torchtune_kd.data.datasets import build_dataset
from torchtune_kd.distributed.world import World
from torchtune_kd.errors import UserError, say
from torchtune_kd.models.build import check_vocabularies, on_meta
from torchtune_kd.storage.fingerprints import files_fingerprint
from torchtune_kd.tools.importing.axolotl import read_axolotl
from torchtune_kd.tools.importing.distillkit import read_distillkit
from torchtune_kd.tools.importing.openai import read_openai
from torchtune_kd.tools.importing.request import Options, Request
from torchtune_kd.tools.importing.rows import JSON, PARQUET, source_files
from torchtune_kd.tools.importing.told import Told, TopKCoding
from torchtune_kd.tools.importing.vllm import read_vllm
from torchtune_kd.tools.importing.vllm_hidden import SAFETENSORS, HiddenCoding, read_vllm_hidden
from torchtune_kd.tools.importing.wanted import Coverage, Wanted
from torchtune_kd.tools.importing.writing import Shards, new_cache

Coding = TopKCoding | HiddenCoding
CHECKED = 256  # documents of a source of which one at least should be among the data


class Imported(NamedTuple):
    """A finished cache.

    Attributes:
        manifest (CacheManifest): what it says of itself.
        coverage (list[Coverage]): of each dataset.
        unused (int): documents of the source that the data do not have, or that came before.
        unknown (int): tokens whose mass of the rest is not known.
        nats (float | None): of hidden states, the teacher's cross-entropy of some tokens.
    """

    manifest: CacheManifest
    coverage: list[Coverage]
    unused: int
    unknown: int = 0
    nats: float | None = None


class Context(NamedTuple):
    """Hold what a format may be read with."""

    source: Path
    tokenizer: Any
    vocab: int
    width: int  # of hidden states
    options: Options


class Format(NamedTuple):
    """Say how the files of a project are read.

    Attributes:
        read (Callable[[Context], Iterator[Told]]): yields their documents.
        endings (tuple[str, ...]): of the files.
        hidden (bool): whether they hold hidden states.
    """

    read: Callable[[Context], Iterator[Told]]
    endings: tuple[str, ...]
    hidden: bool = False


def _distillkit(of: Context) -> Iterator[Told]:
    return read_distillkit(of.source, of.options.compression, exact_only=of.options.exact_only)


def _openai(of: Context) -> Iterator[Told]:
    return read_openai(of.source, of.tokenizer, of.vocab, ambiguous_to_rest=of.options.ambiguous_to_rest)


def _axolotl(of: Context) -> Iterator[Told]:
    return read_axolotl(of.source, of.tokenizer, of.options.logprobs_field, of.options.messages_field)


FORMATS = {
    "distillkit": Format(_distillkit, PARQUET),
    "vllm": Format(lambda of: read_vllm(of.source), JSON),
    "openai": Format(_openai, JSON),
    "axolotl": Format(_axolotl, (*JSON, *PARQUET)),
    "vllm_hidden": Format(lambda of: read_vllm_hidden(of.source, of.width, of.options.layer), SAFETENSORS, hidden=True),
}


def import_cache(request: Request) -> Imported:
    """Write a cache as a source is read, row by row, and give it its name once the source fits the config's data.

    Raises:
        UserError: for a source that cannot be read or does not fit, and as :func:`new_cache`.
    """
    config, options, format = request.config, request.options, FORMATS[request.format]
    files = source_files(request.source, format.endings)
    with new_cache(request.output, request.source, overwrite=options.overwrite) as folder:
        tokenizer, world = config.tokenizer.build(), World(torch.device("cpu"))
        student = on_meta(config.model, config.settings, world)
        if format.hidden:
            coding: Coding = HiddenCoding(config, world, options.dtype)
            vocab = check_vocabularies(student, coding.vocab)
        else:
            vocab = check_vocabularies(student, None)
            coding = TopKCoding(vocab, options.smallest_tail)
        check_tokenizer(tokenizer, vocab)
        wanted = Wanted(_datasets(config, tokenizer, student.max_seq_len, vocab, world))
        name = {} if options.teacher_name is None else {"name of the teacher": options.teacher_name}
        identities = {
            "teacher": {IMPORTED: request.format, **name, "files of the source": files_fingerprint(files)},
            "tokenizer": tokenizer_identity(config),
        }
        shards = Shards(folder, identities)
        told = format.read(Context(request.source, tokenizer, vocab, coding.facts()["width"], options))
        unused = _write(told, wanted, coding, shards, request)
        coverage = wanted.coverage()
        _check_coverage(coverage, request)
        more = {"samples": None, "positions": "labels"}
        write_manifest(folder, identities | coding.facts() | more, shards.files | coding.write(folder))
    manifest = CacheManifest.read(request.output)
    if isinstance(coding, HiddenCoding):
        return Imported(manifest, coverage, unused, nats=float(coding.nats.mean()) if len(coding.nats) else None)
    return Imported(manifest, coverage, unused, unknown=coding.unknown)


def _datasets(config: Config, tokenizer: Any, longest: int, vocab: int, world: World) -> list[tuple[str, Dataset]]:
    return [
        (name, build_dataset(sections, name, tokenizer, longest, vocab, world))
        for name, sections in (("dataset", config.dataset), ("dataset_val", config.dataset_val))
        if sections
    ]


def _write(told: Iterator[Told], wanted: Wanted, coding: Coding, shards: Shards, request: Request) -> int:
    """Write the documents that are wanted, and return how many of the source are not.

    Raises:
        UserError: if there is none in the source, or none that is wanted.
    """
    begin = next(told, None)
    if begin is None:
        raise UserError(
            f"Expected documents with log-probabilities, but {request.source} has none: name another source."
        )
    read = unused = 0
    for each in chain([begin], told):
        found, read = wanted.find(each), read + 1
        if found is None:
            unused += 1
            if unused == read == CHECKED:
                say(f"None of the first {CHECKED} documents of {request.source} is among the config's data.")
            continue
        columns = coding(each.rows(found.rows), found.labels, each.where)
        shards.add(Entry(found.key, found.positions, columns))
    shards.finish()
    if unused == read:
        ours, theirs = wanted.first, begin.documents[0][: len(wanted.first)].tolist()
        raise UserError(
            f"Expected the documents of the config's data in {request.source}, but none of its {read:,} is among them: "
            f"the first begins with the ids {theirs}, and that of `dataset` with {ours}; name the tokenizer, template "
            "and data that the source was written with."
        )
    return unused


def _check_coverage(coverage: list[Coverage], request: Request) -> None:
    """Refuse a source that lacks a row of the data, unless that is accepted."""
    if request.options.partial or all(each.found == each.rows for each in coverage):
        return
    said = " and ".join(
        f"{each.found:,} of the {each.rows:,} rows of `{each.name}`"
        + (f" ({each.incomplete:,} more without some of their labelled tokens)" if each.incomplete else "")
        for each in coverage
    )
    raise UserError(
        f"Expected all rows of the config's data in {request.source}, but it has {said}: name the tokenizer, template "
        "and data that the source was written with, or pass --partial to import what is there."
    )
