"""What `kernels/README.md` counts is what the kernels do."""

import re
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from torchtune_kd.kernels import METRICS, linear_kd_loss, linear_sparse_kd_loss, softmax_kd_loss

README = Path(find_spec("torchtune_kd.kernels").origin).parent / "README.md"
pytestmark = pytest.mark.skipif(not README.exists(), reason="a wheel does not hold kernels/README.md")

IN_TWO = ("forward_kl", "reverse_kl", "symmetric_kl")
IN_THREE = ("jsd", "skew_forward_kl", "skew_reverse_kl", "tvd")
WITHOUT_AGREEMENT = tuple(name for name in METRICS if name != "top1_agreement")
# Row of the table of bytes -> the divergences it speaks of and the keywords of the calls.
CALLS = {
    "loss; forward, reverse, symmetric KL": (IN_TWO, {}),
    "loss; JSD, skewed KL, TVD": (IN_THREE, {}),
    "loss and gradient; forward, reverse, symmetric KL": (IN_TWO, {"grad": True}),
    "loss and gradient; JSD, skewed KL, TVD": (IN_THREE, {"grad": True}),
    "loss; cross-entropy alone (`kd_ratio=0`)": (IN_TWO[:1], {"kd_ratio": 0.0}),
    "loss and gradient; cross-entropy alone": (IN_TWO[:1], {"kd_ratio": 0.0, "grad": True}),
    "loss and metrics; forward, reverse, symmetric KL": (IN_TWO, {"return_metrics": WITHOUT_AGREEMENT}),
    "an ignored token, with gradient": (IN_TWO[:1] + IN_THREE[:1], {"label": -100, "grad": True}),
    "an ignored token, loss alone": (IN_TWO[:1] + IN_THREE[:1], {"label": -100}),
    "`backward()`, incoming gradient 1": (IN_TWO[:1], {"backward": 1.0}),
    "`backward()`, any other": (IN_TWO[:1], {"backward": 0.5}),
}


def table():
    """Row -> bytes in bf16, bytes in fp32."""
    text = README.read_text().partition("## Bytes")[2].partition("\n## ")[0]
    return {
        name: (int(two), int(four)) for name, two, four in re.findall(r"^\| (.+?) \| (\d+) \| (\d+) \|$", text, re.M)
    }


@pytest.fixture
def moved(monkeypatch):
    """Counts the bytes of all loads and stores of more than one element."""
    from triton.runtime.interpreter import InterpreterBuilder

    counted = [0]

    def count(name, mask_at):
        plain = getattr(InterpreterBuilder, name)

        def method(self, pointers, *rest):
            mask = rest[mask_at].data
            if mask.size > 1:
                counted[0] += int(mask.sum()) * pointers.get_element_ty().primitive_bitwidth // 8
            return plain(self, pointers, *rest)

        monkeypatch.setattr(InterpreterBuilder, name, method)

    count("create_masked_load", 0)
    count("create_masked_store", 1)
    return counted


def test_the_table_and_the_calls_are_the_same_rows():
    assert table().keys() == CALLS.keys()


@pytest.mark.parametrize("row", CALLS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
@pytest.mark.parametrize("vocab", [1000, 4100], ids=["one block", "several blocks"])
def test_bytes_per_element(row, dtype, vocab, moved):
    """Cross-entropy and temperature ride along, so that the numbers are those of the dearest call."""
    divergences, settings = CALLS[row]
    grad, incoming = settings.get("grad", False), settings.get("backward")
    more = {name: settings[name] for name in ("kd_ratio", "return_metrics") if name in settings}
    for divergence in divergences:
        s, t = torch.randn(1, vocab, dtype=dtype), torch.randn(1, vocab, dtype=dtype)
        s.requires_grad_(grad or incoming is not None)
        labels = torch.tensor([settings.get("label", 3)])
        keywords = {"divergence": divergence, "temperature": 2.0, "kd_ratio": 0.5, "backend": "triton"} | more
        moved[0] = 0
        loss = softmax_kd_loss(s, t, labels, **keywords)
        if incoming is not None:
            moved[0] = 0
            loss.backward(torch.tensor(incoming))
        assert moved[0] == table()[row][dtype == torch.float32] * vocab, divergence


def test_metrics_ride_along_with_a_gradient(moved):
    expected = table()
    for divergence, row in (("reverse_kl", "forward, reverse, symmetric KL"), ("tvd", "JSD, skewed KL, TVD")):
        s, t = torch.randn(1, 1500, requires_grad=True), torch.randn(1, 1500)
        moved[0] = 0
        metrics = [name for name in WITHOUT_AGREEMENT if "class_loss" not in name]
        softmax_kd_loss(s, t, divergence=divergence, backend="triton", return_metrics=metrics)
        assert moved[0] == expected[f"loss and gradient; {row}"][1] * 1500


def test_agreement_reads_one_block_of_either_model_again(moved):
    student, teacher = torch.randn(2, 1, 4100)
    student[0, 2000] = teacher[0, 4099] = 9.0  # in the second block of 1024, and in the last, of 4 ids
    softmax_kd_loss(student, teacher, backend="triton", return_metrics=["top1_agreement"])
    assert moved[0] == 4 * (2 * 4100 + 1024 + 4)


def test_ids_masked_in_either_model_cost_the_reverse_kl_another_read(moved):
    student, teacher = torch.randn(2, 1, 4100)
    teacher[0, 7] = -torch.inf
    softmax_kd_loss(student, teacher, backend="triton", divergence="reverse_kl")
    assert moved[0] == 2 * 4 * 2 * 4100


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
def test_bytes_beside_stored_ids(dtype, moved):
    """Text below the table says: 2 for the loss and 6 with its gradient; in fp32 4 and 12."""
    text, vocab = re.sub(r"\s+", " ", README.read_text()), 2100
    found = re.search(
        r"In bf16 that is (\d+) bytes for the loss and (\d+) with its gradient \(in fp32 (\d+) and (\d+)\)", text
    )
    expected = [int(number) for number in found.groups()][2 * (dtype == torch.float32) :][:2]
    for grad, size in zip((False, True), expected, strict=True):
        hidden, weight = torch.zeros(1, 1, dtype=dtype, requires_grad=grad), torch.zeros(vocab, 1, dtype=dtype)
        ids, log_probs, tail = torch.tensor([[7, 2000, -1]]), torch.full((1, 3), -2.0), torch.tensor([-1.0])
        moved[0] = 0
        linear_sparse_kd_loss(
            hidden, weight, ids, log_probs, tail, torch.tensor([9]), temperature=2.0, kd_ratio=0.5, backend="triton"
        )
        assert moved[0] == size * vocab


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("trained", [False, True], ids=["frozen", "trained"])
def test_flops_of_the_linear_loss(trained, reduction):
    """By PyTorch's own counter, over forward and backward; ignored tokens count nothing.

    In bf16 and several chunks, where the head's gradient is a product that the counter knows.
    """
    from torch.utils.flop_counter import FlopCounterMode

    n, vocab, width_s, width_t = 6, 50, 8, 24
    shapes = (n + 3, width_s), (vocab, width_s), (n + 3, width_t), (vocab, width_t)
    hidden, head, *teacher = (torch.randn(shape, dtype=torch.bfloat16) for shape in shapes)
    hidden.requires_grad_()
    head.requires_grad_(trained)
    labels = torch.tensor([1, -100, 4, 2, -100, 0, 0, -100, 7])
    with FlopCounterMode(display=False) as counter:
        linear_kd_loss(hidden, head, *teacher, labels, reduction=reduction, chunk_tokens=4).sum().backward()
    with torch.no_grad(), FlopCounterMode(display=False) as without_grad:
        linear_kd_loss(hidden, head, *teacher, labels, reduction=reduction)
    rows = dict(re.findall(r"^\| (head .+?|loss only) \| 2·n·V·\((.+?)\) \|$", README.read_text(), re.M))
    row = ('head trained, `reduction="none"`' if reduction == "none" else "head trained") if trained else "head frozen"
    assert len(rows) == 4
    for counted, name in ((counter, row), (without_grad, "loss only")):
        widths = eval(rows[name].replace("·", "*"), {"D_s": width_s, "D_t": width_t})
        assert counted.get_total_flops() == 2 * n * vocab * widths, name
