"""Check what two models expect at every token against their whole logits, in fp64 from there on."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from omegaconf import OmegaConf
from torchtune import config as torchtune_config

from helpers.tiny import STUDENT, TEACHER, checkpointer_section, make_config, model_section, write_checkpoint
from torchtune_kd.distributed.world import World
from torchtune_kd.errors import RunError, UserError
from torchtune_kd.evaluation import inspection
from torchtune_kd.evaluation.candidates import load_candidate

SHORT = "The quick ✓\nbrown <|im_end|> fox"
LONG = "the quick brown fox jumps over the lazy dog " * 4  # 176 tokens, the models take 64
WORLD = World(torch.device("cpu"))


class WithBos:
    """A tokenizer that begins a sequence with id 1."""

    bos_id, pad_id = 1, 0

    def __init__(self, tokenizer):
        self.tokenizer, self.vocab_size, self.decode = tokenizer, tokenizer.vocab_size, tokenizer.decode

    def encode(self, text, add_bos=True, add_eos=True):
        return [self.bos_id] * add_bos + self.tokenizer.encode(text, add_eos=add_eos)


def loaded(folder, **overrides):
    cfg = make_config(folder, text="unused.txt", **overrides)
    request = inspection.read_request(cfg)
    models = [load_candidate(source, request.settings, WORLD) for source in (request.student, request.reference)]
    return *models, request.tokenizer.build()


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    return loaded(tmp_path_factory.mktemp("models"))


def log_probabilities(section, seed, ids):
    """log softmax [S, V] in fp64 of the logits that ``write_checkpoint``'s model gives by torchtune's own forward."""
    torch.manual_seed(seed)
    model = torchtune_config.instantiate(OmegaConf.create(section)).eval()
    with torch.no_grad():
        return model(torch.tensor([ids]))[0].double().log_softmax(-1)


def expected(ids):
    """KL, and for student and teacher loss and five likeliest, of each token of ids but the first."""
    p = log_probabilities(model_section("full", TEACHER, tied=False), 1, ids)[:-1]
    q = log_probabilities(model_section("full", STUDENT), 2, ids)[:-1]
    actual = torch.tensor(ids[1:])
    kl = (p.exp() * (p - q)).sum(-1)
    return kl, *((F.nll_loss(log, actual, reduction="none"), log.exp().topk(5)) for log in (q, p))


def close(tokens, ids):
    """Compare the predictions of tokens, whose ids end a window, with those of the window's ids."""
    kl, *both = expected(ids)
    found = [token.prediction for token in tokens]
    count = len(found)
    torch.testing.assert_close(torch.tensor([f.kl for f in found]).double(), kl[-count:], rtol=1e-4, atol=1e-6)
    for guesses, (loss, likeliest) in zip(
        ([f.student for f in found], [f.reference for f in found]), both, strict=True
    ):
        torch.testing.assert_close(
            torch.tensor([g.loss for g in guesses]).double(), loss[-count:], rtol=1e-5, atol=1e-5
        )
        assert [[index for index, _ in g.likeliest] for g in guesses] == likeliest.indices[-count:].tolist()
        probabilities = torch.tensor([[p for _, p in g.likeliest] for g in guesses]).double()
        torch.testing.assert_close(probabilities, likeliest.values[-count:], rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("chunk", [1, 5, 64])
def test_equals_whole_logits(models, monkeypatch, chunk):
    monkeypatch.setattr(inspection, "CHUNK", chunk)
    *_, tokenizer = models
    ids = tokenizer.encode(SHORT, add_eos=False)
    found = inspection.inspect_text(*models, SHORT)
    assert [token.id for token in found.tokens] == ids
    assert "".join(token.text for token in found.tokens) == SHORT
    assert found.tokens[0].prediction is None and found.windows == []
    assert [token.context for token in found.tokens] == list(range(len(ids)))
    close(found.tokens[1:], ids)


def test_logits_exist_a_chunk_at_a_time(models, monkeypatch):
    sizes, kl = [], inspection.softmax_kd_loss

    def watched(student, teacher, **options):
        sizes.append(student.shape[0])
        return kl(student, teacher, **options)

    monkeypatch.setattr(inspection, "CHUNK", 16)
    monkeypatch.setattr(inspection, "softmax_kd_loss", watched)
    found = inspection.inspect_text(*models, SHORT * 2)
    assert max(sizes) == 16 and sum(sizes) == len(found.tokens) - 1


def test_sums_are_means_over_the_predicted_tokens(models):
    *_, tokenizer = models
    found = inspection.inspect_text(*models, SHORT)
    kl, (student, top), (teacher, teacher_top) = expected(tokenizer.encode(SHORT, add_eos=False))
    assert found.kl == pytest.approx(kl.mean().item(), rel=1e-4)
    assert found.student_perplexity == pytest.approx(student.mean().exp().item(), rel=1e-5)
    assert found.reference_perplexity == pytest.approx(teacher.mean().exp().item(), rel=1e-5)
    agreement = (top.indices[:, 0] == teacher_top.indices[:, 0]).double().mean()
    assert found.agreement == pytest.approx(agreement.item())
    likely = {index for both in (top, teacher_top) for index in both.indices.flatten().tolist()}
    assert set(found.pieces) == likely


@pytest.mark.parametrize("max_seq_len, length", [(None, 64), (40, 40), (41, 41), (1000, 64)])
def test_a_long_text_is_read_in_windows_that_overlap_by_half(models, max_seq_len, length):
    *_, tokenizer = models
    ids = tokenizer.encode(LONG, add_eos=False)
    found = inspection.inspect_text(*models, LONG, max_seq_len)
    assert found.overlap == length // 2
    edges = [0, *found.windows, len(ids)]
    assert edges[1] == length and len(edges) > 4
    for begin, end in itertools.pairwise(edges[1:]):
        start = end - length
        assert [token.context for token in found.tokens[begin:end]] == list(range(begin - start, end - start))
        assert begin - start >= length // 2
        close(found.tokens[begin:end], ids[start:end])


@pytest.mark.parametrize("count", range(1, 30))
@pytest.mark.parametrize("length", [2, 3, 7, 8])
def test_windows_count_every_token_once(count, length):
    windows = list(inspection.windows_of(count, length))
    assert [place for _, scored, end in windows for place in range(scored, end)] == list(range(count))
    for begin, scored, end in windows[1:]:
        assert end - begin == length and scored - begin >= length // 2 and begin >= 0


def test_every_window_begins_with_the_sequence_token_where_there_is_one(models):
    """The text's first token then has a prediction too."""
    student, reference, tokenizer = models
    ids = tokenizer.encode(LONG, add_eos=False)
    found = inspection.inspect_text(student, reference, WithBos(tokenizer), LONG)
    assert [token.id for token in found.tokens] == ids
    assert found.windows[0] == 63
    close(found.tokens[:63], [1, *ids[:63]])
    begin, end = found.windows[:2]
    close(found.tokens[begin:end], [1, *ids[end - 63 : end]])


def test_padded_vocabularies_are_cut_to_the_shared_prefix(tmp_path):
    wide = model_section("full", STUDENT, vocab=416)
    checkpointer = checkpointer_section(write_checkpoint(tmp_path / "wide", wide, seed=2))
    student, reference, tokenizer = loaded(tmp_path, model=wide, checkpointer=checkpointer)
    assert (student.vocab_size, reference.vocab_size) == (416, 384)
    weight, _ = student.head
    weight[384:] = weight[64:96]  # what lies beyond is as likely as the letters are
    found = inspection.inspect_text(student, reference, tokenizer, SHORT)
    ids = tokenizer.encode(SHORT, add_eos=False)
    q = log_probabilities(wide, 2, ids)[:-1, :384].log_softmax(-1)
    p = log_probabilities(model_section("full", TEACHER, tied=False), 1, ids)[:-1]
    kl = (p.exp() * (p - q)).sum(-1)
    assert [t.prediction.kl for t in found.tokens[1:]] == pytest.approx(kl.tolist(), rel=1e-4)
    guesses = [t.prediction.student for t in found.tokens[1:]]
    losses = F.nll_loss(q, torch.tensor(ids[1:]), reduction="none")
    assert [guess.loss for guess in guesses] == pytest.approx(losses.tolist(), rel=1e-4)
    assert max(index for guess in guesses for index, _ in guess.likeliest) < 384


def test_a_text_of_one_token_has_nothing_to_predict(models):
    with pytest.raises(UserError, match="two tokens at least"):
        inspection.inspect_text(*models, "a")


def test_logits_that_are_not_finite_end_in_a_sentence(tmp_path):
    student, reference, tokenizer = loaded(tmp_path)
    student.decoder.norm.scale.data[0] = math.nan
    with pytest.raises(RunError, match="not finite"):
        inspection.inspect_text(student, reference, tokenizer, SHORT)
