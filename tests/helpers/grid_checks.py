"""What both functions of the kernels must fulfil in every case of the grid.

Legend: N tokens, V vocabulary, D hidden width.
"""

import torch
import torch.nn.functional as F

from helpers import oracle
from helpers.grid import make_labels, masked, without_masked
from torchtune_kd.kernels import Objective, linear_kd_loss, softmax_kd_loss

F16, BF16, F32, F64 = torch.float16, torch.bfloat16, torch.float32, torch.float64


def make_logits(kind, n, v, student_dtype, teacher_dtype):
    """Student and teacher logits ``[N, V]``; see the kinds of the grid."""
    scale = {"normal": 2.0, "strided": 2.0, "masked": 2.0, "close": 2.0, "huge": 1.0}[kind]
    width = 2 * v if kind == "strided" else v
    student, teacher = torch.randn(2, n, width).mul_(scale)
    if kind == "close":
        teacher = student + 0.05 * torch.randn(n, width)
    if kind == "huge":
        student, teacher = (torch.randint(-1, 2, (n, width)) * 1e4 for _ in range(2))
    student, teacher = student.to(student_dtype), teacher.to(teacher_dtype)
    if kind == "strided":
        student, teacher = student[:, ::2], teacher[:, ::2]
    if kind == "masked":  # the same ids in both models
        student[:, masked(v)] = teacher[:, masked(v)] = -torch.inf
    return student, teacher


def gradient(loss, *inputs):
    return torch.autograd.grad(loss, inputs, materialize_grads=True)


def worst(a, b):
    return (a.double() - b.double()).abs().max().item() if a.numel() else 0.0


def check_logits(divergence, beta, v, n, t, kd_ratio, labels, dtypes, kind, backend="torch"):
    """softmax_kd_loss in one case of the grid against the formula in fp64, in value and gradient."""
    student, teacher = make_logits(kind, n, v, *dtypes)
    labels = make_labels(labels, n, v, kind)
    student.requires_grad_()

    def plain(dtype):
        s, t_, y = student.to(dtype), teacher.to(dtype), labels
        if kind == "masked":
            s, t_, y = without_masked(v, labels, s, t_)
        loss = oracle.mean(s, t_, y, divergence, beta, t, kd_ratio)
        if not loss.requires_grad:  # skew_forward_kl at beta 1 does not depend on the student
            return loss, torch.zeros_like(student)
        return loss, gradient(loss, student)[0]

    truth, true_grad = plain(F64)
    reference, reference_grad = plain(F64 if F64 in dtypes else F32)
    kwargs = {"divergence": divergence, "beta": beta, "temperature": t, "kd_ratio": kd_ratio, "backend": backend}
    loss = softmax_kd_loss(student, teacher, labels, **kwargs)
    (grad,) = gradient(loss, student)

    assert loss.dtype == reference.dtype
    assert grad.dtype == dtypes[0]
    assert loss >= 0
    assert worst(loss, truth) <= worst(reference, truth) + 2e-6 * max(1.0, truth.item())
    largest = true_grad.double().abs().max().item() if n else 0.0
    rounding = {F64: 1e-12, F32: 4e-6, F16: 1e-3, BF16: 8e-3}[dtypes[0]]
    assert worst(grad, true_grad) <= worst(reference_grad, true_grad) + rounding * largest + 1e-9


def logits(inputs, dtype=None):
    """Both models' logits ``[N, V]`` by plain linear layers, in `dtype` or their own."""

    def of(model):
        factors = (inputs[f"{model}_{name}"] for name in ("hidden", "weight", "bias"))
        return F.linear(*(x if dtype is None else x.to(dtype) for x in factors))

    return of("student"), of("teacher")


def make_factors(kind, n, v, student_dtype, teacher_dtype, d=8):
    """Inputs whose logits are those of the grid's kinds.

    Hidden states and heads are multiples of 1/4: in every dtype their products are exact and so are the sums in
    fp32, whatever their order, which leaves one rounding, the same in every implementation.
    """

    def quarters(*shape):
        return torch.randn(*shape).mul(4).round() / 4

    width = 2 * d if kind == "strided" else d
    hidden, teacher_hidden = quarters(n, width), quarters(n, width)
    weight, teacher_weight = quarters(v, width) / 2, quarters(v, width) / 2
    if kind == "close":
        teacher_hidden, teacher_weight = hidden + quarters(n, width) / 64, weight
    if kind == "huge":
        hidden, teacher_hidden = (torch.eye(d)[torch.randint(d, (n,))] for _ in range(2))
        weight, teacher_weight = (torch.randint(-1, 2, (v, d)) * 1e4 for _ in range(2))
    bias = torch.zeros(v)
    if kind == "masked":
        bias[masked(v)] = -torch.inf
    inputs = {
        "student_hidden": hidden,
        "student_weight": weight,
        "student_bias": bias,
        "teacher_hidden": teacher_hidden,
        "teacher_weight": teacher_weight,
        "teacher_bias": bias,
    }
    for name, tensor in inputs.items():
        dtype = student_dtype if name.startswith("student") else teacher_dtype
        inputs[name] = tensor.to(dtype, copy=True)
        if kind == "strided" and tensor.dim() == 2:
            inputs[name] = inputs[name][:, ::2]
    return inputs


def check_hidden(divergence, v, n, t, kd_ratio, labels, dtypes, kind, chunk_tokens, backend="torch"):
    """linear_kd_loss in one case of the grid against the formula in fp64, in value and gradients."""
    inputs = make_factors(kind, n, v, *dtypes)
    labels = make_labels(labels, n, v, kind)
    names = ("student_hidden", "student_weight", "student_bias")
    for name in names:
        inputs[name].requires_grad_()
    beta = Objective(divergence).beta

    student, teacher = (z.detach() for z in logits(inputs))

    def plain(dtype):
        """Loss and gradient to the logits ``[N, V]``, from the logits as the models round them."""
        z = student.to(dtype).requires_grad_()
        s, t_, y = z, teacher.to(dtype), labels
        if kind == "masked":
            s, t_, y = without_masked(v, labels, s, t_)
        loss = oracle.mean(s, t_, y, divergence, beta, t, kd_ratio)
        return loss.detach(), torch.autograd.grad(loss, z)[0].double()

    truth, g = plain(F64)
    reference, reference_g = plain(F64 if F64 in dtypes else F32)
    loss = linear_kd_loss(
        **inputs,
        labels=labels,
        divergence=divergence,
        temperature=t,
        kd_ratio=kd_ratio,
        chunk_tokens=chunk_tokens,
        backend=backend,
    )
    assert loss.dtype == reference.dtype
    assert loss >= 0
    assert abs(loss - truth) <= abs(reference - truth) + 2e-6 * max(1.0, truth.item())

    # what rounding each gradient of a logit once, and each result once, can make of them
    unit = {F64: 1e-12, F32: 4e-6, F16: 1e-3, BF16: 8e-3}[dtypes[0]]
    slack = (reference_g - g).abs() + unit * g.abs()
    if dtypes[0] == F16:  # the smallest number, times the tokens by which the stored gradient is divided later
        slack += 6e-8 / max(1, int((labels != -100).sum()))
    if divergence == "tvd":  # its gradient jumps where p = q, and there fp32 does not know the side
        p, q = (torch.softmax(z.double() / t, -1) for z in (teacher, student))
        slack += torch.where((p - q).abs() < 1e-6 * q, t * q, 0.0)
    hidden, weight = (inputs[name].detach().double() for name in ("student_hidden", "student_weight"))
    expected = {
        "student_hidden": (g @ weight, slack @ weight.abs()),
        "student_weight": (g.t() @ hidden, slack.t() @ hidden.abs()),
        "student_bias": (g.sum(0), slack.sum(0)),
    }
    found = torch.autograd.grad(loss, [inputs[name] for name in names])
    for grad, (right, bound) in zip(found, expected.values(), strict=True):
        if (dtypes[0], kind) == (F16, "huge") and grad is found[0]:
            continue  # a token's gradient, of the order of the logits times the head's 1e4, has no place in fp16
        assert (grad.double() - right).norm() <= (bound + unit * right.abs()).norm() + 1e-9


def make_inputs(n=21, v=60, d=8, teacher_d=12, dtype=F32, trainable=True, ignored=3):
    """Hidden states, heads, bias and labels; every `ignored`-th token is ignored."""
    inputs = {
        "student_hidden": torch.randn(n, d),
        "student_weight": torch.randn(v, d),
        "teacher_hidden": torch.randn(n, teacher_d),
        "teacher_weight": torch.randn(v, teacher_d) / 2,
    }
    inputs = {name: tensor.to(dtype) for name, tensor in inputs.items()}
    labels = torch.randint(0, v, (n,))
    if ignored:
        labels[::ignored] = -100
    inputs["labels"] = labels
    inputs["student_bias"] = torch.randn(v).to(dtype)
    inputs["teacher_bias"] = torch.randn(v).to(dtype)
    inputs["student_hidden"].requires_grad_()
    if trainable:
        inputs["student_weight"].requires_grad_()
        inputs["student_bias"].requires_grad_()
    return inputs
