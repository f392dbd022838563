"""Find where a student differs from its teacher: the KL, and what both expect, at every token of a text.

Shapes: N tokens of a chunk, S tokens of a window, D hidden width, V vocabulary that both models share.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from omegaconf import DictConfig
from torch import Tensor
from tqdm import tqdm

from torchtune_kd.config.checks import check_tokenizer
from torchtune_kd.config.reading import read_run_config
from torchtune_kd.config.sections import Section
from torchtune_kd.config.settings import Settings, typed
from torchtune_kd.distributed.world import World
from torchtune_kd.errors import RunError, UserError, as_user_errors
from torchtune_kd.evaluation.candidates import Candidate, Source, check_sources, load_candidate, sources_of
from torchtune_kd.evaluation.pieces import Pieces
from torchtune_kd.kernels import shared_vocab, softmax_kd_loss
from torchtune_kd.reports.inspected import Guess, Inspection, Model, Prediction, Token
from torchtune_kd.reports.inspection_page import inspection_page

OWN = ("text", "student", "reference", "output")  # keys beside those of a training run
CHUNK = 64  # tokens whose logits exist at a time
LIKELIEST = 5


@dataclass(frozen=True)
class Request:
    """Hold what is asked for.

    Attributes:
        text (Path): a text in UTF-8.
        student (Source): the model to inspect.
        reference (Source): the model that it is measured against.
        output (Path): the page.
        tokenizer (Section): of both models.
        settings (Settings): of the training run; device and dtype count.
    """

    text: Path
    student: Source
    reference: Source
    output: Path
    tokenizer: Section
    settings: Settings


def read_request(written: DictConfig) -> Request:
    """Take the inspection's own keys out of a training run's config and read the rest as its recipe would.

    Raises:
        UserError: naming the first key that is unknown, missing, or has a value that cannot be.
    """
    config = read_run_config(written, OWN)
    given = {key: typed(key, written.get(key), str | None) for key in OWN}
    if not given["text"]:
        raise UserError("Expected the key `text`, the path of a text to inspect, but it is missing: add text=my.txt.")
    known = sources_of(config)
    student = _source("student", given["student"] or ("student" if "student" in known else "untrained"), known)
    reference = _source("reference", given["reference"] or "teacher", known)
    if student is reference:
        raise UserError(f"Expected two models, but `student` and `reference` are both `{student.name}`: change one.")
    output = Path(given["output"] or Path(config.settings.output_dir) / "inspect.html")
    if output.is_dir():
        raise UserError(f"Expected `output` to be a file, but {output} is a folder: name a file in it.")
    return Request(Path(given["text"]), student, reference, output, config.tokenizer, config.settings)


def _source(role: str, name: str, known: Mapping[str, Source]) -> Source:
    if name in known:
        return known[name]
    if name == "student":
        there = "`output_dir` holds no `epoch_<n>` yet, which training writes; before that, take `untrained`."
    elif known:
        there = f"choose one of {', '.join(known)}."
    else:
        there = "the config names no files of weights."
    raise UserError(f"Unknown model `{name}` under `{role}`: {there}")


def inspect(request: Request) -> Inspection:
    """Load both models, compare them on the text, and write the page.

    Raises:
        UserError: for a text, files or models that cannot be used.
    """
    text = read_text(request.text)
    world = World(request.settings.torch_device)
    tokenizer = request.tokenizer.build()
    check_sources([request.student], request.reference, request.settings, world)
    student, reference = (load_candidate(s, request.settings, world) for s in (request.student, request.reference))
    found = inspect_text(student, reference, tokenizer, text, request.tokenizer.get("max_seq_len"), request.text.name)
    with as_user_errors():
        request.output.parent.mkdir(parents=True, exist_ok=True)
        request.output.write_text(inspection_page(found), encoding="utf-8")
    return found


def read_text(path: Path) -> str:
    """Return a file's text as it is, line ends included.

    Raises:
        UserError: for a file that cannot be read, is not UTF-8, or holds nothing but whitespace.
    """
    with as_user_errors():
        content = path.read_bytes()
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(
            f"Expected {path} to be a text in UTF-8, but byte {error.start} is not: convert it "
            f"(iconv -f latin1 -t utf-8, for example)."
        ) from error
    if not text.strip():
        raise UserError(f"Expected a text in {path}, but it is empty: name another.")
    return text


@torch.inference_mode()
def inspect_text(
    student: Candidate,
    reference: Candidate,
    tokenizer: Any,
    text: str,
    max_seq_len: int | None = None,
    name: str = "text",
) -> Inspection:
    """Compare what two models expect at every token of a text.

    A text longer than the models take is read in windows that overlap by half: every token after the first window is
    predicted from half a window at least. Each begins with the tokenizer's beginning of a sequence, where it has one.

    Args:
        student (Candidate): q of KL(p ‖ q).
        reference (Candidate): p; of the same tokenizer.
        tokenizer (Any): torchtune's.
        text (str): the text.
        max_seq_len (int | None): the longest window; None for what both models take.
        name (str): of the text.

    Raises:
        UserError: for a text without a token that has one before it, and for a tokenizer of other models.
    """
    vocab = shared_vocab(student.vocab_size, reference.vocab_size)
    check_tokenizer(tokenizer, vocab)
    ids = tokenizer.encode(text, add_bos=True, add_eos=False)
    begin = ids[:1] if ids[:1] == [getattr(tokenizer, "bos_id", None)] else []
    ids = ids[len(begin) :]
    if not all(0 <= index < vocab for index in ids):
        raise UserError(
            f"Expected ids below {vocab}, which both models know, but the text has {max(ids)}: name the tokenizer of "
            "these models, or take that special token out of the text."
        )
    length = min(student.max_seq_len, reference.max_seq_len, max_seq_len or math.inf) - len(begin)
    if length < 2 or len(ids) + len(begin) < 2:
        raise UserError(
            f"Expected a text of two tokens at least, in windows of two at least, got {len(ids)}: lengthen it."
        )
    pieces = Pieces(tokenizer)
    texts, tokens, windows = pieces.texts(ids), [], list(windows_of(len(ids), length))
    with tqdm(total=len(ids), desc=name, unit="token", leave=False) as progress:
        for start, scored, end in windows:
            window = torch.tensor([[*begin, *ids[start:end]]])  # [1, S]
            found = _predictions(student, reference, window, scored - start + len(begin), vocab)
            if not scored and not begin:
                tokens.append(Token(ids[0], texts[0], 0, None))
                progress.update()
            for place, prediction in enumerate(found, start=len(tokens)):
                tokens.append(Token(ids[place], texts[place], place - start, prediction))
                progress.update()
    likely = {
        index
        for token in tokens
        if (both := token.prediction) is not None
        for guess in (both.student, both.reference)
        for index, _ in guess.likeliest
    }
    return Inspection(
        name, _model(student), _model(reference), tokens, {index: pieces.piece(index) for index in sorted(likely)},
        [scored for _, scored, _ in windows[1:]], length // 2,
    )  # fmt: skip


def windows_of(count: int, length: int) -> Iterator[tuple[int, int, int]]:
    """Yield begin, first token that counts, and end of each window; every token counts in one of them."""
    yield 0, 0, min(count, length)
    overlap = length // 2
    for scored in range(length, count, length - overlap):
        end = min(scored + length - overlap, count)
        yield end - length, scored, end


def _predictions(
    student: Candidate, reference: Candidate, window: Tensor, first: int, vocab: int
) -> Iterator[Prediction]:
    """Yield what is expected at the tokens of a window [1, S] from ``first`` on, but never at its token 0."""
    first = max(first, 1)
    models = (student, reference)
    states = [model.states(window)[0, first - 1 : -1] for model in models]  # [S - first, D] each
    heads = [model.head for model in models]
    for places in torch.arange(window.shape[1] - first).split(CHUNK):
        q, p = (
            F.linear(hidden[places[0] : places[-1] + 1], *head)[:, :vocab]  # [N, V]
            for hidden, head in zip(states, heads, strict=True)
        )
        kl = softmax_kd_loss(q, p, reduction="none")
        if not kl.isfinite().all():
            raise RunError(
                f"`{student.name}` or `{reference.name}` gives logits that are not finite on this text: its weights "
                "are damaged, or `dtype` is too narrow for it."
            )
        actual = window[0, first + places].to(q.device)
        yield from map(Prediction, kl.tolist(), _guesses(q, actual), _guesses(p, actual))


def _guesses(logits: Tensor, actual: Tensor) -> Iterator[Guess]:
    """Yield a guess for each row of logits [N, V], given the ids [N] that the text has."""
    log_p = logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)  # [N, V]
    losses = -log_p.gather(-1, actual.unsqueeze(-1)).squeeze(-1)
    likeliest, ids = log_p.topk(min(LIKELIEST, log_p.shape[-1]))
    for loss, row, probabilities in zip(losses.tolist(), ids.tolist(), likeliest.exp().tolist(), strict=True):
        yield Guess(loss, list(zip(row, probabilities, strict=True)))


def _model(candidate: Candidate) -> Model:
    return Model(candidate.name, str(candidate.source.checkpointer.get("checkpoint_dir")))
