"""The kernels for a teacher's stored ids, interpreted, against the formulas of the cells in fp64.

Legend: N tokens, n valid tokens, V vocabulary, D hidden width, k stored ids a token.
"""

import itertools

import pytest
import torch
from allocations import Memory

from helpers import cells
from torchtune_kd.kernels import (
    DIVERGENCES,
    SPARSE_METRICS,
    Objective,
    _linear,
    linear_sparse_kd_loss,
    on_meta,
)
from torchtune_kd.kernels._plan import Plan
from torchtune_kd.kernels._teachers import CELLS, Cells
from torchtune_kd.kernels._torch.cells import CellsBlockLoss
from torchtune_kd.kernels._torch.coarse import coarse

pytest.importorskip("triton")
from torchtune_kd.kernels._triton.cells import TritonCellsBlockLoss

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # NumPy's, of lanes that are masked out

F16, BF16, F32, F64 = torch.float16, torch.bfloat16, torch.float32, torch.float64
# What rounding to the dtype takes from a gradient's element: once, and in fp16 again where the mean is taken. The
# interpreter cuts digits of bf16 off, of which a GPU rounds the last one.
ROUNDING = {F32: 0.0, F16: 2 * 2.0**-11, BF16: 2.0**-7}


def check(name, t, v, k, dtype, padded, kd_ratio):
    """The loss and its gradient by the logits, which are `dtype`, against the formulas of these logits in fp64."""
    case = cells.of_logits(k, v, dtype=dtype, padded=padded)
    settings = {"divergence": name, "kd_ratio": kd_ratio}
    loss = case.loss(t, F32, backend="triton", **settings)
    exact = case.to(F64)
    right = cells.truth(exact, name, t, kd_ratio)
    (found,), (expected,) = case.gradients(loss), exact.gradients(right)
    assert loss.dtype == F32 and found.dtype == dtype
    assert loss.item() == pytest.approx(right.item(), rel=2e-6, abs=2e-6)
    # the label's element too, in which nearly equal numbers are subtracted; fp16 has no numbers below 6e-8
    allowed = ROUNDING[dtype] * expected.abs() + 4e-6 * expected.abs().max() + 6e-8
    assert ((found.double() - expected).abs() <= allowed).all()


# One id; a part; all but one, whose rest is one id; all, whose rest is empty. A row is one block, or several whole ones
# and a part of one.
ROWS = [(v, k) for v, stored in ((37, (1, 20, 36, 37)), (130, (1, 64, 129, 130)), (2100, (1, 64))) for k in stored]
# Every divergence at T = 1 and 2, and with them all of these rows: 3 and their number have no common factor.
DAY = [
    (name, t, *ROWS[3 * i % len(ROWS)], (F32, BF16)[i // 4 % 2], i % 3 == 1, (0.3, 1.0)[i // 2 % 2])
    for i, (name, t) in enumerate(itertools.product(DIVERGENCES, (1.0, 2.0)))
]


@pytest.mark.parametrize(("name", "t", "v", "k", "dtype", "padded", "kd_ratio"), DAY)
def test_value_and_gradient(name, t, v, k, dtype, padded, kd_ratio, device):
    check(name, t, v, k, dtype, padded, kd_ratio)


@pytest.mark.slow
@pytest.mark.nightly
@pytest.mark.parametrize("dtype", [F32, F16, BF16])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize(("v", "k"), ROWS)
@pytest.mark.parametrize("t", [0.7, 1.0, 2.0])
def test_every_value_and_gradient(divergence, t, v, k, padded, dtype, device):
    for kd_ratio in (1.0, 0.3):
        check(divergence, t, v, k, dtype, padded, kd_ratio)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("trained", [True, False])
def test_heads_chunks_and_reductions(reduction, trained, device):
    """A chunk is several tokens, or all; without a trained head "none" is scaled in backward, with one before."""
    exact = cells.make(6, v=130, padded=True)
    if not trained:
        exact = exact._replace(weight=exact.weight.detach(), bias=exact.bias.detach())
    rounded = exact.to(F32)
    weights = torch.arange(1.0, 12.0) if reduction == "none" else torch.tensor(1.0)
    settings = {"kd_ratio": 0.6, "divergence": "jsd", "reduction": reduction}
    right = exact.loss(2.0, backend="torch", **settings)
    expected = exact.gradients((right * weights).sum())
    for chunk_tokens in (None, 3):
        loss = rounded.loss(2.0, F32, chunk_tokens=chunk_tokens, backend="triton", **settings)
        assert torch.allclose(loss.double(), right, rtol=4e-6, atol=4e-6)
        found = rounded.gradients((loss * weights).sum())
        assert len(found) == (3 if trained else 1)
        for ours, theirs in zip(found, expected, strict=True):
            assert ours.dtype == F32
            assert (ours - theirs).abs().max() <= 1e-5 * theirs.abs().max()


@pytest.mark.parametrize("k", [1, 8, 130])
@pytest.mark.parametrize("t", [1.0, 2.0])
@pytest.mark.parametrize("kd_ratio", [1.0, 0.5, 0.0])
def test_metrics(kd_ratio, t, k, device):
    case = cells.of_logits(k, 130, n=12, dtype=BF16)
    case = case._replace(hidden=(case.hidden + case.teacher.mean(0)).to(BF16).detach().requires_grad_())
    settings = {"kd_ratio": kd_ratio, "divergence": "skew_forward_kl", "entropy": cells.entropy(case.teacher)}
    loss, found = case.loss(t, F32, return_metrics=True, backend="triton", **settings)
    exact = case.to(F64)
    right = cells.sums_of_metrics(exact, cells.truth(exact, "skew_forward_kl", t))
    assert list(found) == [*SPARSE_METRICS, "num_tokens"]
    for name, value in right.items():
        assert found[name].item() == pytest.approx(value.item(), rel=2e-6, abs=2e-6), name
    alone = case.loss(t, F32, backend="triton", **settings)
    assert loss.item() == pytest.approx(alone.item(), rel=1e-6)


@pytest.mark.parametrize(("t", "kd_ratio"), [(1.0, 0.5), (2.0, 0.5), (2.0, 1.0)])
def test_a_metric_alone_is_the_same(t, kd_ratio, device):
    """Each asks for sums of its own."""
    case = cells.of_logits(8, 130)
    settings = {"kd_ratio": kd_ratio, "entropy": cells.entropy(case.teacher), "backend": "triton"}
    found = case.to(F32).loss(t, F32, return_metrics=True, **settings)[1]
    for name in SPARSE_METRICS:
        assert torch.equal(case.to(F32).loss(t, F32, return_metrics=[name], **settings)[1][name], found[name]), name


def compare(case, loss_of):
    """Compare a loss and its gradients by the kernels with PyTorch's in fp64; `loss_of` takes case, dtype, backend."""
    found = []
    for dtype, backend in ((F64, "torch"), (F32, "triton")):
        ours = case.to(dtype)
        loss = loss_of(ours, dtype, backend)
        found.append((loss, *ours.gradients(loss)))
    for right, ours in zip(*found, strict=True):
        assert (right - ours).abs().max() <= 4e-6 * max(1.0, right.abs().max().item())


@pytest.mark.parametrize("name", ["forward_kl", "jsd", "skew_forward_kl", "skew_reverse_kl", "tvd"])
def test_without_a_tail(name, device):
    settings = {"tail": None, "tail_at_1": None, "divergence": name}
    compare(
        cells.of_logits(6, 130, padded=True),
        lambda case, dtype, backend: case.loss(2.0, dtype, backend=backend, **settings),
    )


def test_drawn_ids(device):
    case = cells.of_logits(6, 130, padded=True)
    log_probs = torch.rand(case.ids.shape).log_softmax(-1)

    def loss_of(case, dtype, backend):
        return linear_sparse_kd_loss(
            case.hidden, case.weight, case.ids, log_probs.to(dtype), None, case.labels, sampled=True, kd_ratio=0.7,
            backend=backend,
        )  # fmt: skip

    compare(case, loss_of)


def plan_of(vocab, metrics=(), divergence="jsd", temperature=2.0, kd_ratio=0.5):
    objective = Objective(divergence, temperature=temperature, kd_ratio=kd_ratio)
    return Plan(objective, metrics, vocab, "none", True, True, teacher_kind=CELLS)


def stored_of(ids, dtype=F32):
    """The teacher's side of a block, alike for all ids."""
    n, k = ids.shape
    return Cells(ids, torch.full((n, k), -2.0, dtype=dtype), *(torch.full((n,), -1.0, dtype=dtype) for _ in range(3)))


def both_blocks(plan, logits, ids, labels):
    """Losses, metrics and gradients of one block: by PyTorch in fp64, and by the kernels."""
    found = []
    for dtype in (F64, F32):
        student = logits.clone() if dtype == F32 else logits.to(F64)
        grad = torch.full_like(student, torch.nan)
        settings = plan, len(logits), F64, logits.device
        block = CellsBlockLoss(*settings) if dtype == F64 else TritonCellsBlockLoss(plan)
        loss, metrics = block(student, stored_of(ids, dtype), labels, grad)
        found.append((loss.double(), [metric.double() for metric in metrics], grad.double()))
    return found


@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize("t", [1.0, 2.0])
def test_ids_at_minus_infinity(divergence, t, dtype, device):
    """In the rest, all of it, all that are stored, and the label's: infinite as in PyTorch's arithmetic, no NaN."""
    logits, ids = (2 * torch.randn(5, 37)).to(dtype), torch.rand(5, 37).topk(4).indices
    stored = cells.is_stored(ids, 37)
    logits[::2, 5:20] = -torch.inf
    logits[1] = logits[1].masked_fill(~stored[1], -torch.inf)
    logits[2] = logits[2].masked_fill(stored[2], -torch.inf)
    labels = torch.cat([logits[:4].float().argmax(-1), torch.tensor([6])])
    (right, _, expected), (loss, _, grad) = both_blocks(plan_of(37, (), divergence, t), logits, ids, labels)
    assert not loss.isnan().any() and grad.isfinite().all()
    assert loss.isinf()[4] and torch.equal(loss.isinf(), right.isinf())
    assert torch.allclose(loss, right, rtol=4e-6, atol=4e-6)
    assert (grad - expected).abs().max() <= (ROUNDING[dtype] + 8e-6) * expected.abs().max()


@pytest.mark.parametrize("t", [1.0, 2.0])
def test_sums_over_several_blocks(t, device):
    """Maxima that rise from block to block move what was summed before; a block of -inf moves nothing."""
    logits = torch.randn(3, 3300) + torch.arange(3300) / 500
    logits[:, 1024:2048] = -torch.inf
    logits[0, :2048] = -torch.inf
    ids = torch.tensor([[2500, 3299], [0, 3299], [5, 900]])
    plan = plan_of(3300, ("student_entropy", "top1_agreement"), "tvd", t)
    (right, sums, expected), (loss, found, grad) = both_blocks(plan, logits, ids, torch.tensor([2300, 7, 3298]))
    assert torch.allclose(loss, right, rtol=2e-6)
    assert torch.allclose(found[0], sums[0], rtol=2e-6) and torch.equal(found[1], sums[1])
    assert (grad - expected).abs().max() <= 4e-6 * expected.abs().max()


def test_the_mass_of_a_small_rest(device):
    """Q_R within 1e-6 of itself: 1 - Σ would be 0 from 1e-8 on."""
    logits, ids, right = cells.small_rests()
    read = TritonCellsBlockLoss(plan_of(4000))._read(logits, ids, torch.zeros(25).long())
    for (t, expected), rest in zip(right.items(), (read.at_t, read.at_1), strict=True):
        found = coarse(read.stored, rest, t).cells.prob[:, -1]
        assert ((found - expected) / expected).abs().max() <= 1e-6
    assert right[1.0].min() < 1e-19


def test_padding_writes_nothing(device):
    """A row of padding alone, and ids that the student does not have, as a device gets them."""
    logits, labels = torch.randn(3, 130), torch.tensor([0, 129, 4])
    ids = torch.tensor([[-1, -1, -1, -1], [0, 5000, -7, 129], [-1, 4, 130, 0]])
    grads = []
    for padding in (ids, ids.where((ids >= 0) & (ids < 130), -1), ids.flip(-1)):
        (right, _, expected), (loss, _, grad) = both_blocks(plan_of(130), logits, padding, labels)
        assert torch.allclose(loss, right, rtol=4e-6)
        assert (grad - expected).abs().max() <= 4e-6 * expected.abs().max()
        grads.append(grad)
    assert grads[0].isfinite().all()
    assert torch.equal(grads[0], grads[1]) and torch.allclose(grads[0], grads[2])
    assert grads[0].sum(-1).abs().max() <= 1e-6  # of a loss that no constant in the logits changes


def test_more_stored_ids_than_the_student_has(device):
    """A padded teacher of which all ids are stored: no rest is left, and what the tail says is of other ids."""
    logits, ids = torch.randn(2, 37), torch.arange(40).flip(0).expand(2, -1)
    (right, _, expected), (loss, _, grad) = both_blocks(plan_of(37), logits, ids, torch.tensor([0, 36]))
    assert torch.allclose(loss, right, rtol=4e-6)
    assert (grad - expected).abs().max() <= 4e-6 * expected.abs().max()


def test_in_place_and_again_give_the_same_bits(device):
    logits, labels = (3 * torch.randn(2, 2100)).to(BF16), torch.tensor([2099, 0])
    ids = logits.float().topk(4).indices
    results, block = [], TritonCellsBlockLoss(plan_of(2100))
    for in_place in (False, True, False):
        student = logits.clone()
        grad = student if in_place else torch.full_like(logits, torch.nan)
        results.append((block(student, stored_of(ids), labels, grad)[0], grad))
    for found in results[1:]:
        assert all(map(torch.equal, found, results[0]))


def test_labels_outside_of_the_vocabulary_give_nan(device):
    """As a device sees them, whose labels the host does not look at."""
    student, ids = torch.randn(4, 20), torch.tensor([[3, 4, -1]]).expand(4, -1)
    block = TritonCellsBlockLoss(plan_of(20))
    loss, _ = block(student, stored_of(ids), torch.tensor([3, 20, -1, 19]), student)
    assert loss.isnan().tolist() == [False, True, True, False]
    assert student.isfinite().all()


def test_many_stored_ids_are_worked_on_in_blocks(backend, monkeypatch):
    """Temporaries as wide as the cells stay small where these are as many as the ids."""
    found, rows, plain = [], [], _linear._block_loss

    def block_loss(*args):
        block = plain(*args)
        watched = lambda student, *rest: rows.append(len(student)) or block(student, *rest)  # noqa: E731
        watched.release = block.release
        return watched

    monkeypatch.setattr(_linear, "_block_loss", block_loss)
    case = cells.make(97, dtype=F32)
    for limit, largest in ((None, 7), (98 * 2, 2)):
        if limit is not None:
            monkeypatch.setattr(_linear, "rows_per_block", lambda width, device, limit=limit: max(1, limit // width))
        rows.clear()
        loss = case.loss(2.0, F32, kd_ratio=0.5, backend=backend)
        found.append((loss, *case.gradients(loss)))
        assert max(rows) == largest and sum(rows) == 7
    for a, b in zip(*found, strict=True):
        assert (a - b).abs().max() <= 1e-5 * max(1.0, b.abs().max().item())


@pytest.mark.parametrize("k", [16, 600])
@pytest.mark.parametrize("return_metrics", [False, True])
def test_on_meta_a_gpu_holds_what_the_kernels_leave(return_metrics, k):
    """The peak of the interpreted kernels' call; fp64 has PyTorch's workspace on a GPU too."""
    n, v, d = 48, 1024, 8

    def call(device, dtype, backend):
        hidden, weight = torch.zeros(n, d, dtype=dtype, device=device), torch.zeros(v, d, dtype=dtype, device=device)
        ids = torch.arange(k, device=device).expand(n, k)
        log_probs, tail = torch.full((n, k), -9.0, device=device), torch.full((n,), -1.0, device=device)
        settings = {"temperature": 2.0, "kd_ratio": 0.5, "divergence": "jsd", "backend": backend}
        if return_metrics:
            settings |= {"return_metrics": True, "tail_at_1": tail, "entropy": tail}
        labels = torch.zeros(n, dtype=torch.int64)
        with Memory(torch.device(device)) as memory:
            found = linear_sparse_kd_loss(hidden.requires_grad_(), weight, ids, log_probs, tail, labels, **settings)
            (found[0] if return_metrics else found).backward()
        return memory

    real = call("cpu", BF16, "triton")
    with on_meta("cuda"):
        planned, wide = call("meta", BF16, "auto"), call("meta", F64, "auto")
    assert planned.peak == pytest.approx(real.peak, rel=0.1)
    # at T = 2 and 1, and scratch for the entropy, of a block that has all rows
    numbers = (2 + return_metrics) * n * (v + 1)
    assert 8 * numbers in wide.made
    assert 4 * numbers not in planned.made
