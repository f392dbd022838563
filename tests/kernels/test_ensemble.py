"""Several teachers in linear_kd_loss against identities that do not depend on its code, in fp64.

Legend: N tokens, V vocabulary, D hidden width, m members of an ensemble.
"""

import pytest
import torch
import torch.nn.functional as F

from helpers import oracle
from torchtune_kd.kernels import METRICS, Objective, float8_weight, linear_kd_loss, on_meta
from torchtune_kd.kernels._plan import chunk_size

BF16, F32, F64 = torch.bfloat16, torch.float32, torch.float64
N, V, D = 13, 300, 16
WIDTHS, VOCABS, SHARES = (24, 32), (300, 310), (0.3, 0.7)


def make(dtype=F64, n=N):
    """The student and two teachers of other widths and paddings; every third token is ignored."""
    labels = torch.randint(0, V, (n,))
    labels[::3] = -100
    tensors = {
        "student_hidden": torch.randn(n, D, dtype=F64),
        "student_weight": torch.randn(V, D, dtype=F64) / 2,
        "student_bias": torch.randn(V, dtype=F64),
    }
    inputs = {name: tensor.to(dtype).requires_grad_() for name, tensor in tensors.items()} | {"labels": labels}
    inputs["teacher_hidden"] = [torch.randn(n, d, dtype=F64).to(dtype) for d in WIDTHS]
    inputs["teacher_weight"] = [
        (torch.randn(v, d, dtype=F64) / 3).to(dtype) for v, d in zip(VOCABS, WIDTHS, strict=True)
    ]
    inputs["teacher_bias"] = [torch.randn(v, dtype=F64).to(dtype) for v in VOCABS]
    return inputs


def leaves(inputs):
    return [inputs[name] for name in ("student_hidden", "student_weight", "student_bias")]


def gradients(loss, inputs):
    return torch.autograd.grad(loss, leaves(inputs))


def members(inputs):
    """The arguments of a call with one member, for each."""
    names = ("teacher_hidden", "teacher_weight", "teacher_bias")
    for one in zip(*(inputs[name] for name in names), strict=True):
        yield {**inputs, **dict(zip(names, one, strict=True))}


def logits(inputs):
    """Return the logits of the student, and of each member on the shared ids."""
    student = F.linear(*leaves(inputs))
    teachers = [
        F.linear(*(one[f"teacher_{x}"] for x in ("hidden", "weight", "bias")))[:, :V] for one in members(inputs)
    ]
    return student.double(), [z.double() for z in teachers]


def mixed(inputs, mix):
    """The ensemble's logits, by the formulas."""
    teachers = logits(inputs)[1]
    if mix == "logits":
        return sum(w * z for w, z in zip(SHARES, teachers, strict=True))
    return sum(w * z.softmax(-1) for w, z in zip(SHARES, teachers, strict=True)).log()


def assert_close(found, expected, bound):
    for a, b in zip(found, expected, strict=True):
        assert (a.double() - b.double()).abs().max() <= bound * max(1.0, b.abs().max().item())


@pytest.mark.parametrize("mix", ["probabilities", "logits"])
@pytest.mark.parametrize("t", [1.0, 2.0])
@pytest.mark.parametrize("chunk_tokens", [None, 4])
def test_value_and_gradients(divergence, mix, t, chunk_tokens):
    inputs = make()
    settings = {"divergence": divergence, "temperature": t, "kd_ratio": 0.6}
    loss, found = linear_kd_loss(
        **inputs, **settings, teacher_shares=SHARES, teacher_mix=mix, chunk_tokens=chunk_tokens, return_metrics=True
    )
    student, teacher = logits(inputs)[0], mixed(inputs, mix)
    right = oracle.mean(student, teacher, inputs["labels"], beta=Objective(divergence).beta, **settings)
    assert_close((loss, *gradients(loss, inputs)), (right, *gradients(right, inputs)), 1e-12)
    assert list(found) == [*METRICS, "num_tokens"]
    valid = inputs["labels"] != -100
    p, q = teacher[valid].softmax(-1), logits(inputs)[0][valid].softmax(-1)
    assert found["teacher_entropy"].item() == pytest.approx(-(p * p.log()).sum().item(), rel=1e-6)
    assert found["kl"].item() == pytest.approx((p * (p / q).log()).sum().item(), rel=1e-6)


def test_forward_kl_to_the_mean_of_probabilities_is_the_mean_of_forward_kls():
    """In the gradient at T = 1, since q - p is linear in p; at another T it is not."""
    for t, equal in ((1.0, True), (2.0, False)):
        inputs = make()
        whole = gradients(linear_kd_loss(**inputs, teacher_shares=SHARES, temperature=t), inputs)
        parts = [gradients(linear_kd_loss(**one, temperature=t), inputs) for one in members(inputs)]
        mean = [sum(w * part[i] for w, part in zip(SHARES, parts, strict=True)) for i in range(3)]
        gap = max((a - b).abs().max() for a, b in zip(whole, mean, strict=True))
        assert gap < 1e-12 if equal else gap > 1e-3


@pytest.mark.parametrize("t", [1.0, 2.0])
def test_reverse_kl_to_the_mean_of_logits_is_the_mean_of_reverse_kls(t):
    """In the gradient, since log p is linear in the logits but for a constant of the row."""
    inputs = make()
    settings = {"divergence": "reverse_kl", "temperature": t}
    whole = gradients(linear_kd_loss(**inputs, teacher_shares=SHARES, teacher_mix="logits", **settings), inputs)
    parts = [gradients(linear_kd_loss(**one, **settings), inputs) for one in members(inputs)]
    mean = [sum(w * part[i] for w, part in zip(SHARES, parts, strict=True)) for i in range(3)]
    assert_close(whole, mean, 1e-12)


@pytest.mark.parametrize(("dtype", "bound"), [(F64, 1e-14), (F32, 1e-5), (BF16, 2e-2)])
def test_the_mean_of_logits_is_one_head_over_states_side_by_side(divergence, dtype, bound):
    inputs = make(dtype)
    settings = {"divergence": divergence, "temperature": 2.0, "kd_ratio": 0.6, "chunk_tokens": 5}
    loss = linear_kd_loss(**inputs, teacher_shares=SHARES, teacher_mix="logits", **settings)
    beside = {
        "teacher_hidden": torch.cat(inputs["teacher_hidden"], -1),
        "teacher_weight": torch.cat(
            [(w * x[:V].double()).to(dtype) for w, x in zip(SHARES, inputs["teacher_weight"], strict=True)], -1
        ),
        "teacher_bias": sum(w * x[:V].double() for w, x in zip(SHARES, inputs["teacher_bias"], strict=True)).to(dtype),
    }
    right = linear_kd_loss(**{**inputs, **beside}, **settings)
    if divergence == "tvd" and dtype == BF16:
        bound *= 3  # its gradient jumps where p = q
    assert loss.item() == pytest.approx(right.item(), rel=bound)
    for a, b in zip(gradients(loss, inputs), gradients(right, inputs), strict=True):
        assert (a.double() - b.double()).norm() <= bound * b.double().norm()


@pytest.mark.parametrize("mix", ["probabilities", "logits"])
@pytest.mark.parametrize("dtype", [F32, BF16])
def test_one_member_is_no_ensemble(mix, dtype, backend):
    inputs = make(dtype)
    one = next(members(inputs))
    alone = {**one, **{name: [one[name]] for name in ("teacher_hidden", "teacher_weight", "teacher_bias")}}
    keywords = {"temperature": 2.0, "kd_ratio": 0.5, "return_metrics": True}
    right, expected = linear_kd_loss(**one, **keywords)
    right_gradients = gradients(right, inputs)
    for shares in (None, [1.0]):
        loss, found = linear_kd_loss(**alone, **keywords, teacher_mix=mix, teacher_shares=shares)
        assert torch.equal(loss, right) and found == expected
        for a, b in zip(gradients(loss, inputs), right_gradients, strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("mix", ["probabilities", "logits"])
@pytest.mark.parametrize("dtype", [F32, BF16, torch.float16])
def test_low_precision(mix, dtype, backend):
    """Against fp64 from the same tensors; the members' logits are rounded to their dtype, as those of any head."""
    inputs = make(dtype, n=8)
    settings = {"temperature": 2.0, "kd_ratio": 0.5}
    loss = linear_kd_loss(**inputs, **settings, teacher_shares=SHARES, teacher_mix=mix)
    exact = {k: [x.double() for x in v] if isinstance(v, list) else v for k, v in inputs.items()}
    exact |= {
        k: inputs[k].detach().double().requires_grad_() for k in ("student_hidden", "student_weight", "student_bias")
    }
    right = oracle.mean(logits(exact)[0], mixed(exact, mix), exact["labels"], "forward_kl", **settings)
    unit = {F32: 2e-6, torch.float16: 2e-3, BF16: 1.5e-2}[dtype]
    assert loss.dtype == F32
    assert loss.item() == pytest.approx(right.item(), rel=unit)
    for a, b in zip(gradients(loss, inputs), gradients(right, exact), strict=True):
        assert (a.double() - b).norm() <= 2 * unit * b.norm()


def test_three_members_have_equal_shares_by_default():
    inputs = make()
    three = {
        name: [*inputs[name], inputs[name][0] * 0.5] for name in ("teacher_hidden", "teacher_weight", "teacher_bias")
    }
    inputs |= three
    loss = linear_kd_loss(**inputs)
    mean = torch.stack([z.softmax(-1) for z in logits(inputs)[1]]).mean(0).log()
    assert_close([loss], [oracle.mean(logits(inputs)[0], mean, inputs["labels"], "forward_kl")], 1e-12)


def test_biases_of_some_and_an_id_that_all_rule_out():
    inputs = make()
    inputs["teacher_bias"] = [None, inputs["teacher_bias"][1]]
    full = {**inputs, "teacher_bias": [torch.zeros(VOCABS[0], dtype=F64), inputs["teacher_bias"][1]]}
    for mix in ("probabilities", "logits"):
        assert_close([linear_kd_loss(**inputs, teacher_mix=mix)], [linear_kd_loss(**full, teacher_mix=mix)], 1e-12)
    for at in range(2):
        full["teacher_bias"][at][5] = -torch.inf
        for mix in ("probabilities", "logits"):
            loss = linear_kd_loss(**full, teacher_mix=mix)
            assert loss.isfinite() and all(grad.isfinite().all() for grad in gradients(loss, inputs))


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("mix", ["probabilities", "logits"])
def test_compiled_is_eager(mix, reduction):
    torch._dynamo.reset()
    inputs = make(F32)
    rest = {name: value for name, value in inputs.items() if not name.startswith("student")}

    def call(hidden, weight, bias):
        return linear_kd_loss(
            hidden, weight, student_bias=bias, **rest, teacher_mix=mix, teacher_shares=(1 / 3, 2 / 3),
            reduction=reduction, temperature=2.0,
        ).sum()  # fmt: skip

    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    loss, right = compiled(*leaves(inputs)), call(*leaves(inputs))
    assert torch.equal(loss, right)
    for a, b in zip(gradients(loss, inputs), gradients(right, inputs), strict=True):
        assert torch.equal(a, b)


def test_float8_heads():
    """Each member's is emulated here: the mean of what the members alone give."""
    inputs = make(F32)
    inputs["teacher_bias"] = None
    inputs["teacher_hidden"] = [torch.randn(N, 16), torch.randn(N, 32)]
    inputs["teacher_weight"] = weights = [torch.randn(V, 16) / 4, torch.randn(V + 10, 32) / 4]
    loss = linear_kd_loss(**inputs, teacher_shares=SHARES, teacher_head_dtype="float8")
    ready = {**inputs, "teacher_weight": [float8_weight(weights[0]), float8_weight(weights[1])]}
    assert torch.equal(loss, linear_kd_loss(**ready, teacher_shares=SHARES))
    names = "teacher_hidden", "teacher_weight"
    alone = [{**ready, **{name: ready[name][at] for name in names}} for at in range(2)]
    parts = [gradients(linear_kd_loss(**one), inputs) for one in alone]
    mean = [sum(w * part[i] for w, part in zip(SHARES, parts, strict=True)) for i in range(3)]
    assert_close(gradients(loss, inputs), mean, 1e-6)
    with pytest.raises(ValueError, match="teacher_mix='logits' adds products up, which those of heads in 8-bit floats"):
        linear_kd_loss(**ready, teacher_mix="logits")


@pytest.mark.parametrize(("mix", "bytes_of_teacher"), [("probabilities", 2 + 4), ("logits", 2)])
def test_chunks_leave_room_for_the_mean(mix, bytes_of_teacher):
    """By the products that a GPU would make, without one."""
    n, v = 5000, 128256
    tensors = [torch.empty(shape, dtype=BF16, device="meta") for shape in ((n, 16), (v, 16), (n, 24), (v, 24))]
    labels, rows = torch.zeros(n).long(), []

    class Products(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func.overloadpacket.__name__ in ("mm", "addmm"):
                rows.append(args[-2].shape[0])
            return func(*args, **(kwargs or {}))

    with on_meta("cuda"), torch.no_grad(), Products():
        linear_kd_loss(*tensors[:2], [tensors[2]] * 2, [tensors[3]] * 2, labels, teacher_mix=mix)
    assert rows[0] == chunk_size(n, v, 2 + bytes_of_teacher, torch.device("cuda"))
    assert sum(rows) == 3 * n


BAD = [
    ({"teacher_shares": [0.5, 0.4]}, r"teacher_shares must add up to 1, but \[0.5, 0.4\] add up to 0.9"),
    ({"teacher_shares": [1.0]}, r"one number for each of the 2 members, but got \[1.0\]"),
    ({"teacher_shares": 0.5}, "one number for each of the 2 members, but got 0.5"),
    ({"teacher_shares": [1.5, -0.5]}, r"numbers above 0, but got \[1.5, -0.5\]; leave out who has no share"),
    ({"teacher_shares": [1.0, 0.0]}, "numbers above 0"),
    ({"teacher_shares": [True, False]}, "numbers above 0"),
    ({"teacher_shares": [float("nan"), 1.0]}, "numbers above 0"),
    ({"teacher_mix": "mean"}, "teacher_mix must be one of probabilities, logits, but got 'mean'"),
    ({"teacher_weight": torch.randn(300, 24)}, "teacher_hidden must be a tensor, but got list; for an ensemble pass"),
    ({"teacher_hidden": torch.randn(N, 24)}, "teacher_weight must be a tensor, but got list; for an ensemble pass"),
    (
        {"teacher_bias": torch.randn(300)},
        "for an ensemble pass teacher_hidden and teacher_weight and teacher_bias as eq",
    ),
    ({"teacher_hidden": [torch.randn(N, 24)]}, "but got 1 of teacher_hidden and 2 of teacher_weight"),
    ({"teacher_hidden": [], "teacher_weight": [], "teacher_bias": None}, "and a member, but got 0 of teacher_hidden"),
    (
        {"teacher_hidden": [torch.randn(N, 24), torch.randn(N, 31)]},
        r"member 1 of the ensemble: teacher_weight must be \[",
    ),
    ({"teacher_hidden": [torch.randn(N, 24), None]}, "member 1 of the ensemble: teacher_hidden must be a tensor"),
    ({"teacher_hidden": [torch.randn(3, 24), torch.randn(N, 32)]}, "member 0 of the ensemble: .* leading shape"),
    ({"teacher_weight": [torch.randn(300, 24), torch.randn(9000, 32)], "teacher_bias": None}, "the teacher 9000"),
]


@pytest.mark.parametrize(("changes", "message"), BAD)
def test_refused_in_a_sentence(changes, message):
    with pytest.raises(ValueError, match=message):
        linear_kd_loss(**{**make(F32), **changes})


def test_members_of_other_dtypes_and_shares_of_one_teacher_are_refused():
    inputs = make(F32)
    for name in ("teacher_hidden", "teacher_weight", "teacher_bias"):
        inputs[name][1] = inputs[name][1].bfloat16()
    with pytest.raises(
        ValueError, match=r"must have one dtype, but got torch.bfloat16 and torch.float32; convert some"
    ):
        linear_kd_loss(**inputs)
    with torch.autocast("cpu", dtype=BF16):
        assert linear_kd_loss(**inputs).isfinite()  # which makes one of them
    with pytest.raises(ValueError, match="teacher_shares weigh the members of an ensemble, but the teacher is one"):
        linear_kd_loss(**next(members(make(F32))), teacher_shares=[1.0])
