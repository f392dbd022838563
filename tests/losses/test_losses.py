"""The components: settings and checks, whole and chunked logits, compilation."""

import subprocess
import sys

import pytest
import torch

from helpers import oracle
from torchtune_kd import losses
from torchtune_kd.kernels import DIVERGENCES, linear_kd_loss, softmax_kd_loss

NAMES = ["ForwardKL", "ReverseKL", "SymmetricKL", "JSD", "SkewForwardKL", "SkewReverseKL", "TVD"]
DEFAULT_BETA = {"SymmetricKL": 0.5, "JSD": 0.5, "SkewForwardKL": 0.1, "SkewReverseKL": 0.1}


@pytest.fixture(params=NAMES)
def name(request):
    return request.param


def whole(name):
    return getattr(losses, f"{name}Loss")


def chunked(name):
    return getattr(losses, f"{name}WithChunkedOutputLoss")


def make_logits(batch=2, seq=13, vocab=50):
    """Student and teacher logits ``[B, S, V]``, labels ``[B, S]`` with unequal numbers of valid tokens per chunk."""
    student, teacher = torch.randn(2, batch, seq, vocab)
    labels = torch.randint(0, vocab, (batch, seq))
    labels[0, :5] = labels[1, -1] = -100
    return student.requires_grad_(), teacher, labels


def grad_of(loss, student):
    return torch.autograd.grad(loss, student)[0]


def test_every_divergence_has_a_component_and_a_chunked_twin():
    assert {whole(name).divergence for name in NAMES} == set(DIVERGENCES)
    for name in NAMES:
        assert chunked(name).divergence == whole(name).divergence
        assert issubclass(whole(name), losses.KDLoss)
        assert issubclass(chunked(name), losses.KDWithChunkedOutputLoss)
    exported = {f"{name}{kind}" for name in NAMES for kind in ("Loss", "WithChunkedOutputLoss")}
    assert set(losses.__all__) == exported | {"KDLoss", "KDWithChunkedOutputLoss"}


def test_default_settings(name):
    for loss in (whole(name)(), chunked(name)()):
        assert loss.settings() == {
            "divergence": whole(name).divergence,
            "beta": DEFAULT_BETA.get(name),
            "temperature": 1.0,
            "ignore_index": -100,
            "scale_by_temperature_squared": True,
        }
        for key, value in loss.settings().items():
            assert getattr(loss, key) == value
    assert chunked(name)().num_output_chunks == 8


def test_settings_reach_both_functions_of_the_kernels(name):
    """One component, two paths: from logits and from hidden states."""
    kwargs = {"temperature": 3.0, "ignore_index": 0, "scale_by_temperature_squared": False}
    if name in DEFAULT_BETA:
        kwargs["beta"] = 0.3
    loss = whole(name)(**kwargs)
    hidden, teacher_hidden = torch.randn(2, 6, 4)
    weight, teacher_weight = torch.randn(2, 9, 4)
    labels = torch.tensor([0, 3, 0, 1, 8, 2])
    student, teacher = hidden @ weight.t(), teacher_hidden @ teacher_weight.t()
    from_logits = loss(student, teacher, labels)
    assert torch.equal(from_logits, softmax_kd_loss(student, teacher, labels, divergence=loss.divergence, **kwargs))
    from_hidden = linear_kd_loss(hidden, weight, teacher_hidden, teacher_weight, labels, **loss.settings())
    assert torch.allclose(from_logits, from_hidden)


# Each setting away from its default in turn: what a component drops on the way shows here.
@pytest.mark.parametrize(
    "kwargs", [{}, {"temperature": 8.0}, {"temperature": 0.5, "scale_by_temperature_squared": False}, {"beta": 0.3}]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_value_and_gradient(name, dtype, kwargs):
    if "beta" in kwargs and name not in DEFAULT_BETA:
        for component in (whole(name), chunked(name)):
            with pytest.raises(ValueError, match="beta"):
                component(**kwargs)
        return
    student, teacher, labels = make_logits()
    student, teacher = student.detach().to(dtype).requires_grad_(), teacher.to(dtype)
    truth = oracle.mean(
        student.double(),
        teacher.double(),
        labels,
        whole(name).divergence,
        kwargs.get("beta", DEFAULT_BETA.get(name)),
        kwargs.get("temperature", 1.0),
        scale=kwargs.get("scale_by_temperature_squared", True),
    )
    right = grad_of(truth, student).double()
    unit = {torch.float32: 1e-5, torch.bfloat16: 8e-3}[dtype]
    for loss in (
        whole(name)(**kwargs)(student, teacher, labels),
        chunked(name)(num_output_chunks=4, **kwargs)(student.chunk(4, 1), teacher.chunk(4, 1), labels),
    ):
        assert loss.item() == pytest.approx(truth.item(), rel=1e-5)
        assert (grad_of(loss, student) - right).norm() <= unit * right.norm()


@pytest.mark.parametrize("make", [whole, chunked])
@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"temperature": 0.0}, "temperature"),
        ({"temperature": "hot"}, "temperature"),
        ({"beta": 2.0}, "beta"),
        ({"ignore_index": None}, "ignore_index"),
    ],
)
def test_bad_settings_are_refused_at_construction(name, make, kwargs, message):
    with pytest.raises(ValueError, match=message):
        make(name)(**kwargs)


@pytest.mark.parametrize("make", [whole, chunked])
def test_an_unknown_setting_names_the_component_and_the_nearest(name, make):
    component = make(name)
    with pytest.raises(ValueError, match=f"{component.__name__} has no setting temperture; did you mean temperature"):
        component(temperture=2.0)
    with pytest.raises(ValueError, match=rf"{component.__name__} has no setting alpha; it has .*, temperature"):
        component(alpha=0.5)


def test_unknown_settings_are_compared_with_those_of_subclasses_too():
    with pytest.raises(ValueError, match="did you mean num_output_chunks"):
        losses.JSDWithChunkedOutputLoss(num_output_chunk=4)
    with pytest.raises(ValueError, match="did you mean sym_kd_ratio"):
        losses.SymmetricKLLoss(sym_ratio=0.5)


def test_beta_is_refused_where_there_is_none():
    for name in set(NAMES) - set(DEFAULT_BETA):
        with pytest.raises(ValueError, match="has no beta"):
            whole(name)(beta=0.5)


@pytest.mark.parametrize("chunks", [0, -1, 2.5, True, "8"])
def test_bad_chunk_counts_are_refused(chunks):
    with pytest.raises(ValueError, match="num_output_chunks must be a whole number above 0"):
        losses.JSDWithChunkedOutputLoss(num_output_chunks=chunks)


@pytest.mark.parametrize("make", [whole, chunked])
def test_symmetric_kl_knows_torchtunes_name_for_beta(make):
    loss = make("SymmetricKL")(sym_kd_ratio=0.3)
    assert loss.beta == loss.sym_kd_ratio == 0.3
    assert make("SymmetricKL")(beta=0.0).sym_kd_ratio == 0.0
    with pytest.raises(ValueError, match="two names of one setting"):
        make("SymmetricKL")(beta=0.3, sym_kd_ratio=0.3)
    with pytest.raises(ValueError, match="beta"):
        make("SymmetricKL")(sym_kd_ratio=1.3)


def test_repr_shows_the_settings():
    assert repr(losses.JSDWithChunkedOutputLoss(4, temperature=2.0)) == (
        "JSDWithChunkedOutputLoss(num_output_chunks=4, divergence='jsd', beta=0.5, temperature=2.0, "
        "ignore_index=-100, scale_by_temperature_squared=True)"
    )


def test_normalize_false_gives_the_sum(name):
    student, teacher, labels = make_logits()
    loss = whole(name)(temperature=2.0)
    valid = (labels != -100).sum()
    assert torch.allclose(loss(student, teacher, labels, normalize=False), valid * loss(student, teacher, labels))


# 8 chunks of 13 tokens come out as 7, 4 as 4 of unequal size; 1 and more chunks than tokens are the ends.
@pytest.mark.parametrize("chunks", [1, 4, 8, 20])
def test_chunked_equals_whole(name, chunks):
    student, teacher, labels = make_logits()
    expected = whole(name)(temperature=2.0)(student, teacher, labels)
    loss = chunked(name)(num_output_chunks=chunks, temperature=2.0)
    pieces = student.chunk(chunks, dim=1), teacher.chunk(chunks, dim=1)
    assert torch.allclose(loss(*pieces, labels), expected)
    assert torch.allclose(grad_of(loss(*pieces, labels), student), grad_of(expected, student), atol=1e-8)
    assert torch.allclose(loss(*pieces, labels, normalize=False), expected * (labels != -100).sum())


def test_chunks_of_a_tensor_split_count_too():
    """torchtune's later versions cut with tensor_split: 8 chunks of 13 tokens are 8."""
    student, teacher, labels = make_logits()
    pieces = student.tensor_split(8, dim=1), teacher.tensor_split(8, dim=1)
    assert len(pieces[0]) == 8
    loss = losses.ForwardKLWithChunkedOutputLoss()(*pieces, labels)
    assert torch.allclose(loss, losses.ForwardKLLoss()(student, teacher, labels))


def test_no_valid_token_gives_a_connected_zero(name):
    student, teacher, labels = make_logits()
    labels[:] = -100
    for loss in (
        whole(name)()(student, teacher, labels),
        chunked(name)()(student.chunk(8, 1), teacher.chunk(8, 1), labels),
    ):
        assert loss == 0
        assert not grad_of(loss, student).any()


def test_missing_labels_are_refused(name):
    student, teacher, _ = make_logits()
    with pytest.raises(ValueError, match=r"labels \[N\] or \[B, S\] are needed"):
        whole(name)()(student, teacher, None)
    with pytest.raises(ValueError, match=r"labels must be a tensor \[B, 13\].* but got NoneType"):
        chunked(name)()(student.chunk(2, 1), teacher.chunk(2, 1), None)


def test_chunks_that_do_not_fit_are_refused():
    student, teacher, labels = make_logits()
    loss = losses.ForwardKLWithChunkedOutputLoss(2)
    with pytest.raises(ValueError, match="must be a list of chunks"):
        loss(student, teacher, labels)
    with pytest.raises(ValueError, match="must be a list of chunks"):
        loss([None], [None], labels)
    with pytest.raises(ValueError, match=r"one \[B, S\] each"):
        loss(student.chunk(2, 1), teacher.chunk(3, 1), labels)
    with pytest.raises(ValueError, match=r"labels must be a tensor \[B, 13\]"):
        loss(student.chunk(2, 1), teacher.chunk(2, 1), labels[:, 1:])


def test_padded_vocabularies_in_chunks():
    student, teacher, labels = make_logits()
    wide = torch.cat([teacher, torch.randn(2, 13, 3)], dim=-1)
    loss = losses.JSDWithChunkedOutputLoss(4)
    expected = loss(student.chunk(4, 1), teacher.chunk(4, 1), labels)
    assert torch.equal(loss(student.chunk(4, 1), wide.chunk(4, 1), labels), expected)


@pytest.mark.heavy
@pytest.mark.parametrize("make", [whole, chunked])
def test_compiled_by_torchtune_it_computes_the_same(make):
    from torchtune.training import compile_loss

    loss = make("JSD")(temperature=2.0)
    compiled = compile_loss(make("JSD")(temperature=2.0), verbose=False)
    assert compiled.ignore_index == -100  # what the stock recipe reads off it
    for seq in (13, 9):  # a second length must not need what the first one had
        student, teacher, labels = make_logits(seq=seq)
        if make is chunked:
            assert compiled.num_output_chunks == 8
            inputs = student.chunk(8, 1), teacher.chunk(8, 1), labels
        else:
            inputs = student, teacher, labels
        assert torch.equal(compiled(*inputs), loss(*inputs))
        assert torch.equal(grad_of(compiled(*inputs), student), grad_of(loss(*inputs), student))


@pytest.mark.heavy
def test_importing_the_losses_does_not_import_torchtune():
    code = "import sys, torchtune_kd.losses; print('torchtune' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd="/")
    assert done.stdout.strip() == "False"
