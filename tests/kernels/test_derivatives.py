"""What both functions refuse because it would be wrong: second derivatives, transforms of functions, tracing.

Legend: N tokens, V vocabulary, D hidden width.
"""

import gc
import weakref

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
from torch import nn

from torchtune_kd.kernels import linear_kd_loss, softmax_kd_loss

N, V, D = 4, 20, 6
TWICE = "the gradient of a distillation loss cannot be differentiated"
FORWARD = "forward-mode differentiation cannot go through a distillation loss"
TRANSFORMED = "torch.func's transforms .* cannot go through a distillation loss"
TRACED = "make_fx and aot_function would record the steps of one call"


@pytest.fixture(autouse=True)
def _forget_compiled_code():
    torch._dynamo.reset()


class Losses:
    """Both functions of hidden states ``[N, D]``; the head is trained."""

    def __init__(self, backend: str = "torch", reduction: str = "mean") -> None:
        self.head = torch.randn(V, D, requires_grad=True)
        self.teacher = torch.randn(N, D), torch.randn(V, D)
        self.labels = torch.tensor([3, -100, 0, 19])
        self.settings = {"kd_ratio": 0.5, "temperature": 2.0, "backend": backend, "reduction": reduction}

    def softmax(self, hidden):
        teacher = self.teacher[0] @ self.teacher[1].t()
        return softmax_kd_loss(hidden @ self.head.t(), teacher, self.labels, **self.settings).sum()

    def linear(self, hidden):
        return linear_kd_loss(hidden, self.head, *self.teacher, self.labels, **self.settings).sum()


def direct(name: str) -> tuple:
    """One of the functions of its first argument alone, without an operation before it, and such an argument."""
    teacher, labels, settings = torch.randn(N, V), torch.tensor([3, -100, 0, 19]), {"kd_ratio": 0.5}
    if name == "softmax":
        return lambda x: softmax_kd_loss(x, teacher, labels, **settings), torch.randn(N, V)
    heads = torch.randn(V, D), torch.randn(N, D), torch.randn(V, D)
    return lambda x: linear_kd_loss(x, *heads, labels, **settings), torch.randn(N, D)


NAMES = pytest.mark.parametrize("name", ["softmax", "linear"])

# Each asks for second derivatives: by backward(), of what lies before the loss, and of a leaf that feeds it.
PENALTIES = {
    "backward": lambda penalty, layer, x: penalty.backward(),
    "of the layer": lambda penalty, layer, x: torch.autograd.grad(penalty, layer.weight),
    "of the input": lambda penalty, layer, x: torch.autograd.grad(penalty, x),
}


@NAMES
@pytest.mark.parametrize("way", PENALTIES)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_a_gradient_penalty_is_an_error(name, way, reduction, backend):
    """The gradient that comes in does not require grad; that of a layer before the loss depends on the logits."""
    layer, x = nn.Linear(D, D), torch.randn(N, D, requires_grad=True)
    loss = getattr(Losses(backend, reduction), name)(layer(x))
    (grad,) = torch.autograd.grad(loss, x, create_graph=True)
    with pytest.raises(RuntimeError, match=TWICE):
        PENALTIES[way](grad.pow(2).sum(), layer, x)


@NAMES
def test_so_is_the_gradient_of_the_head(name):
    losses, hidden = Losses(), torch.randn(N, D)
    (grad,) = torch.autograd.grad(getattr(losses, name)(hidden), losses.head, create_graph=True)
    with pytest.raises(RuntimeError, match=TWICE):
        grad.pow(2).sum().backward()


@NAMES
def test_so_is_the_derivative_by_the_incoming_gradient(name):
    x, weight = torch.randn(N, D, requires_grad=True), torch.tensor(2.0, requires_grad=True)
    (grad,) = torch.autograd.grad(getattr(Losses(), name)(x), x, weight, create_graph=True)
    with pytest.raises(RuntimeError, match=TWICE):
        torch.autograd.grad(grad.sum(), weight)


@NAMES
@pytest.mark.parametrize("vectorize", [False, True])
def test_hessians_are_errors(name, vectorize):
    with pytest.raises(RuntimeError, match=TWICE):
        torch.autograd.functional.hessian(getattr(Losses(), name), torch.randn(N, D), vectorize=vectorize)


@NAMES
def test_so_is_the_product_with_a_jacobian_by_two_backward_passes(name):
    x = torch.randn(N, D)
    with pytest.raises(RuntimeError, match=TWICE):
        torch.autograd.functional.jvp(getattr(Losses(), name), x, x)


@NAMES
def test_gradgradcheck_finds_the_error(name):
    losses = Losses()
    losses.head, losses.teacher = losses.head.detach().double(), tuple(t.double() for t in losses.teacher)
    x = torch.randn(N, D, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(getattr(losses, name), x)
    with pytest.raises(RuntimeError, match=TWICE):
        torch.autograd.gradgradcheck(getattr(losses, name), x)


@NAMES
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_a_graph_of_gradients_that_nobody_differentiates_does_no_harm(name, reduction, backend):
    losses, x = Losses(backend, reduction), torch.randn(N, D, requires_grad=True)
    leaves = (x, losses.head)
    expected = torch.autograd.grad(getattr(losses, name)(x), leaves)
    found = torch.autograd.grad(getattr(losses, name)(x), leaves, create_graph=True)
    assert all(grad.requires_grad for grad in found)
    for ours, right in zip(found, expected, strict=True):
        assert torch.equal(ours, right)
    getattr(losses, name)(x).backward(create_graph=True)
    assert torch.equal(x.grad, expected[0])
    x.grad = losses.head.grad = None  # PyTorch warns of the cycle


@NAMES
def test_gradients_without_a_graph_have_none(name):
    x = torch.randn(N, D, requires_grad=True)
    (grad,) = torch.autograd.grad(getattr(Losses(), name)(x), x, retain_graph=True)
    assert not grad.requires_grad


def test_logits_are_not_kept_alive():
    """Check that what hangs on the logits' graph holds none of their memory."""
    x = torch.randn(N, V, requires_grad=True)
    logits = x + 1
    memory = weakref.ref(logits.untyped_storage())
    loss = softmax_kd_loss(logits, torch.randn(N, V))
    del logits
    gc.collect()
    assert memory() is None
    loss.backward()


# -------------------------------------------------------------------------------------------- torch.compile


@NAMES
@pytest.mark.parametrize("way", PENALTIES)
@pytest.mark.parametrize("whole", [True, False], ids=["with the layer", "the loss alone"])
def test_the_operator_refuses_a_gradient_penalty(name, way, whole):
    """In a graph that PyTorch's autograd walks as it is."""
    layer, x, loss = nn.Linear(D, D), torch.randn(N, D, requires_grad=True), getattr(Losses(), name)
    call = lambda x: loss(layer(x))  # noqa: E731
    if whole:
        call = torch.compile(call, backend="eager", fullgraph=True)
    else:
        loss = torch.compile(loss, backend="eager", fullgraph=True)
    (grad,) = torch.autograd.grad(call(x), x, create_graph=True)
    with pytest.raises(RuntimeError, match=TWICE):
        PENALTIES[way](grad.pow(2).sum(), layer, x)


@NAMES
@pytest.mark.parametrize("whole", [True, False], ids=["with the layer", "the loss alone"])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_a_compiled_graph_of_gradients_is_an_error(name, whole, reduction, backend):
    """Ahead-of-time autograd would not always notice that it is differentiated, so that it is not made."""
    layer, x, loss = nn.Linear(D, D), torch.randn(N, D, requires_grad=True), getattr(Losses(backend, reduction), name)
    if whole:
        call = torch.compile(lambda x: loss(layer(x)), backend="aot_eager", fullgraph=True)
    else:
        compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)
        call = lambda x: compiled(layer(x))  # noqa: E731
    expected = torch.autograd.grad(loss(layer(x)), x)
    found = call(x)
    for _ in range(2):
        with pytest.raises(RuntimeError, match="create_graph=True has no use for a compiled distillation loss"):
            torch.autograd.grad(found, x, create_graph=True)
        assert torch.equal(torch.autograd.grad(found, x, retain_graph=True)[0], expected[0])


# ------------------------------------------------------------------------------- transforms and tracers


def dual(function, x):
    with forward_ad.dual_level():
        return function(forward_ad.make_dual(x, torch.ones_like(x)))


def batched(function, x):
    x = x.clone().requires_grad_()
    return torch.autograd.grad(function(x), x, torch.ones(3), is_grads_batched=True)


def traced(function, x, **settings):
    from torch.fx.experimental.proxy_tensor import make_fx

    return make_fx(function, **settings)(x)


def ahead_of_time(function, x):
    from functorch.compile import aot_function, nop

    return aot_function(function, nop)(x)


TRANSFORMS = {
    "grad": (lambda f, x: torch.func.grad(f)(x), TRANSFORMED),
    "vmap": (lambda f, x: torch.func.vmap(f)(torch.stack([x, x])), TRANSFORMED),
    "jvp": (lambda f, x: torch.func.jvp(f, (x,), (x,)), TRANSFORMED),
    "vjp": (lambda f, x: torch.func.vjp(f, x), TRANSFORMED),
    "jacrev": (lambda f, x: torch.func.jacrev(f)(x), TRANSFORMED),
    "jacfwd": (lambda f, x: torch.func.jacfwd(f)(x), TRANSFORMED),
    "hessian": (lambda f, x: torch.func.hessian(f)(x), TRANSFORMED),
    "functionalize": (lambda f, x: torch.func.functionalize(f)(x), TRANSFORMED),
    "a batch of gradients": (batched, TRANSFORMED),
    "forward mode": (dual, FORWARD),
    "forward mode of a leaf": (lambda f, x: dual(f, x.clone().requires_grad_()), FORWARD),
    "make_fx": (traced, TRACED),
    "make_fx with fakes": (lambda f, x: traced(f, x, tracing_mode="fake"), TRACED),
    "make_fx of a gradient": (
        lambda f, x: traced(lambda x: torch.autograd.grad(f(x), x), x.clone().requires_grad_()),
        TRACED,
    ),
    "aot_function": (ahead_of_time, TRACED),
}


@NAMES
@pytest.mark.parametrize("transform", TRANSFORMS)
def test_transforms_are_refused_in_a_sentence(name, transform):
    apply, sentence = TRANSFORMS[transform]
    with pytest.raises(ValueError, match=sentence):
        apply(*direct(name))


INSIDE = {"grad": TRANSFORMED, "vmap": TRANSFORMED, "jvp": TRANSFORMED, "forward mode": FORWARD}


@NAMES
@pytest.mark.parametrize("transform", INSIDE)
@pytest.mark.parametrize("order", ["compiled outside", "compiled inside"])
def test_and_in_compiled_functions(name, transform, order):
    """Check the derivatives whose tangents a graph might drop, which would make them 0."""
    apply, (loss, x) = TRANSFORMS[transform][0], direct(name)
    if order == "compiled outside":
        call = torch.compile(lambda x: apply(loss, x), backend="aot_eager")
    else:
        compiled = torch.compile(loss, backend="aot_eager")
        compiled(x)  # there is a graph from a call that was none of these
        call = lambda x: apply(compiled, x)  # noqa: E731
    with pytest.raises(ValueError, match=INSIDE[transform]):
        call(x)


def test_a_call_beside_forward_mode_is_none_of_its_business():
    """Only what has a tangent is refused."""
    losses, x = Losses(), torch.randn(N, D)
    with forward_ad.dual_level():
        forward_ad.make_dual(torch.randn(2), torch.ones(2))
        assert losses.softmax(x).isfinite() and losses.linear(x).isfinite()
