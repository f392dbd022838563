"""Every unusable argument is refused in one sentence that says what to do."""

import dataclasses
import inspect
import subprocess
import sys

import pytest
import torch

import torchtune_kd.kernels as kernels
from torchtune_kd.kernels import (
    DIVERGENCES,
    METRICS,
    SPARSE_METRICS,
    Objective,
    linear_kd_loss,
    linear_kd_objective,
    softmax_kd_loss,
    softmax_kd_objective,
)


def from_logits(**changes):
    arguments = {
        "student_logits": torch.randn(4, 9),
        "teacher_logits": torch.randn(4, 9),
        "labels": torch.tensor([0, 8, -100, 3]),
    }
    return softmax_kd_loss(**{**arguments, **changes})


def from_hidden(**changes):
    arguments = {
        "student_hidden": torch.randn(4, 3),
        "student_weight": torch.randn(9, 3),
        "teacher_hidden": torch.randn(4, 5),
        "teacher_weight": torch.randn(9, 5),
        "labels": torch.tensor([0, 8, -100, 3]),
    }
    return linear_kd_loss(**{**arguments, **changes})


BOTH = [
    ({"divergence": "foward_kl"}, "did you mean 'forward_kl'"),
    ({"divergence": "hellinger"}, "must be one of forward_kl, "),
    ({"beta": 0.5}, "forward_kl has no beta"),
    ({"divergence": "tvd", "beta": 0.0}, "tvd has no beta"),
    ({"divergence": "jsd", "beta": 1.5}, r"beta must be a number in \[0, 1\], but got 1.5"),
    ({"divergence": "jsd", "beta": float("nan")}, "beta"),
    ({"divergence": "jsd", "beta": "0.5"}, "beta"),
    ({"temperature": 0}, "temperature must be a number from 0.001 to 1000, but got 0"),
    ({"temperature": 1e-40}, "temperature"),
    ({"temperature": 1e200}, "temperature"),
    ({"temperature": True}, "temperature"),
    ({"temperature": -1.0}, "temperature"),
    ({"temperature": float("inf")}, "temperature"),
    ({"temperature": float("nan")}, "temperature"),
    ({"kd_ratio": 1.1}, r"kd_ratio must be a number in \[0, 1\], but got 1.1"),
    ({"kd_ratio": -0.1}, "kd_ratio"),
    ({"ignore_index": 1.5}, "ignore_index must be an integer"),
    ({"reduction": "avg"}, "reduction must be one of mean, sum, none, but got 'avg'"),
    ({"backend": "cuda"}, "backend must be one of auto, torch, triton, but got 'cuda'"),
    ({"backend": "triton-split"}, "backend must be one of auto, torch, triton, but got"),
    ({"labels": [0, 8, -100, 3]}, "labels must be a tensor, but got list"),
    ({"labels": torch.tensor([0, 1, 2])}, r"labels must have one entry per row.*\[4\], but got \[3\]"),
    ({"labels": torch.zeros(4)}, "labels must be integers, but got torch.float32"),
    ({"labels": torch.ones(4, dtype=torch.bool)}, "labels must be integers, but got torch.bool"),
    ({"labels": torch.tensor([0, 9, 1, 1])}, r"\[0, 9\) or equal ignore_index=-100, but one is 9"),
    ({"labels": torch.tensor([0, -1, 1, 1])}, "but one is -1"),
    ({"labels": torch.tensor([0, -100, 1, 1]), "ignore_index": -1}, "but one is -100"),
]


@pytest.mark.parametrize("call", [from_logits, from_hidden])
@pytest.mark.parametrize(("changes", "message"), BOTH)
def test_refused_by_both(call, changes, message):
    with pytest.raises(ValueError, match=message):
        call(**changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"student_logits": [[0.0] * 9] * 4}, "student_logits must be a tensor, but got list"),
        ({"teacher_logits": [[0.0] * 9] * 4}, "teacher_logits must be a tensor, but got list"),
        ({"student_logits": torch.randn(9)}, r"must be \[N, V\] or \[B, S, V\], but got \[9\]"),
        ({"student_logits": torch.randn(4, 0)}, "student_logits"),
        ({"student_logits": torch.ones(4, 9, dtype=torch.long)}, "must be a floating-point tensor"),
        ({"teacher_logits": torch.randn(3, 9)}, r"leading shape \[4\], but got \[3, 9\]"),
        ({"teacher_logits": torch.randn(4, 9000)}, "student has 9 ids and the teacher 9000"),
        ({"teacher_logits": torch.randn(4, 9, requires_grad=True)}, r"pass teacher_logits.detach\(\)"),
        ({"teacher_logits": None}, "needs a teacher, but teacher_logits is None"),
        ({"labels": None, "kd_ratio": 0.5}, "needs labels"),
        ({"scale": float("inf")}, "scale must be a finite number, but got inf"),
        ({"scale": "0.5"}, "scale must be a finite number, but got '0.5'"),
    ],
)
def test_refused_from_logits(changes, message):
    with pytest.raises(ValueError, match=message):
        from_logits(**changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"student_weight": torch.randn(9, 4)}, r"student_weight must be \[V, 3\].*but got \[9, 4\]"),
        ({"student_weight": torch.randn(9, 3).bfloat16()}, "torch.float32 and torch.bfloat16; convert one of them"),
        ({"teacher_hidden": torch.randn(4, 5).bfloat16()}, "teacher_hidden and teacher_weight must have one dtype"),
        ({"teacher_hidden": torch.randn(3, 5)}, r"leading shape \[4\]"),
        ({"teacher_weight": torch.randn(9, 5, requires_grad=True)}, "teacher_weight must not require grad"),
        ({"teacher_weight": torch.randn(5000, 5)}, "student has 9 ids and the teacher 5000"),
        ({"teacher_weight": None}, "teacher_weight is None"),
        ({"student_hidden": [[0.0] * 3] * 4}, "student_hidden must be a tensor, but got list"),
        ({"student_weight": [[0.0] * 3] * 9}, "student_weight must be a tensor, but got list"),
        ({"teacher_hidden": [[0.0] * 5] * 4}, "teacher_hidden must be a tensor, but got list"),
        ({"teacher_weight": [[0.0] * 5] * 9}, "teacher_weight must be a tensor, but got list"),
        ({"student_bias": [0.0] * 9}, "student_bias must be a tensor, but got list"),
        ({"student_bias": torch.randn(8)}, r"student_bias must be \[V\] = \[9\], but got \[8\]"),
        ({"student_bias": torch.ones(9).long()}, "student_bias must be a floating-point tensor, but got torch.int64"),
        ({"student_bias": torch.randn(9, device="meta")}, "student_bias must be on the device of student_hidden, cpu"),
        ({"student_weight": torch.randn(9, 3, device="meta")}, "student_weight must be on the device of"),
        ({"teacher_bias": torch.randn(8)}, r"teacher_bias must be \[V\] = \[9\]"),
        ({"teacher_bias": torch.randn(9, requires_grad=True)}, "teacher_bias must not require grad"),
        ({"teacher_bias": torch.randn(9, device="meta")}, "teacher_bias must be on the device of teacher_hidden"),
        ({"labels": None}, "needs labels"),
        ({"chunk_tokens": 0}, "chunk_tokens must be a whole number above 0"),
        ({"chunk_tokens": 2.5}, "chunk_tokens"),
        ({"chunk_tokens": True}, "chunk_tokens must be a whole number above 0 or None, but got True"),
        ({"teacher_head_dtype": "fp8"}, "teacher_head_dtype must be one of float8, but got 'fp8'"),
        ({"teacher_head_dtype": torch.float8_e4m3fn}, "teacher_head_dtype must be one of float8, but got torch.float8"),
        ({"teacher_head_dtype": "float8"}, "whose hidden width is a multiple of 16, but that of teacher_weight is 5"),
    ],
)
def test_refused_from_hidden(changes, message):
    with pytest.raises(ValueError, match=message):
        from_hidden(**changes)


def test_any_integer_dtype_of_labels_will_do():
    assert torch.equal(from_logits_seeded(torch.int32), from_logits_seeded(torch.int64))


def from_logits_seeded(dtype):
    torch.manual_seed(1)
    return from_logits(labels=torch.tensor([0, 8, -100, 3]).to(dtype), kd_ratio=0.5)


@pytest.mark.parametrize(("student", "teacher"), [(1000, 2023), (2023, 1000)])
def test_vocabularies_less_than_1024_apart_fit(student, teacher):
    assert softmax_kd_loss(torch.randn(1, student), torch.randn(1, teacher)) > 0
    with pytest.raises(ValueError, match="share a tokenizer"):
        softmax_kd_loss(torch.randn(1, student), torch.randn(1, teacher + 1 if teacher > student else teacher - 1))


def test_the_signatures_are_as_promised():
    shared = [
        ("divergence", "forward_kl"),
        ("beta", None),
        ("temperature", 1.0),
        ("kd_ratio", 1.0),
        ("ignore_index", -100),
        ("reduction", "mean"),
        ("scale_by_temperature_squared", True),
    ]
    empty = inspect.Parameter.empty
    hidden = ("student_hidden", "student_weight", "teacher_hidden", "teacher_weight", "labels")
    last = [("backend", "auto"), ("return_metrics", False)]
    promised = {
        softmax_kd_loss: [
            ("student_logits", empty),
            ("teacher_logits", empty),
            ("labels", None),
            *shared,
            ("scale", 1.0),
            *last,
            ("group", None),
        ],
        linear_kd_loss: [
            *((name, empty) for name in hidden),
            ("student_bias", None),
            ("teacher_bias", None),
            ("teacher_shares", None),
            ("teacher_mix", "probabilities"),
            *shared,
            ("chunk_tokens", None),
            ("teacher_head_dtype", None),
            *last,
        ],
    }
    for function, parameters in promised.items():
        found = inspect.signature(function).parameters.values()
        assert [(p.name, p.default) for p in found] == parameters
        keyword_only = [p.name for p in found if p.kind is p.KEYWORD_ONLY]
        assert keyword_only[0] in ("divergence", "student_bias")


SETTINGS = {"divergence": "jsd", "beta": 0.3, "temperature": 2.0, "kd_ratio": 0.5}
INPUTS = {
    softmax_kd_objective: (softmax_kd_loss, (torch.randn(4, 9), torch.randn(4, 9), torch.tensor([0, 8, -100, 3]))),
    linear_kd_objective: (
        linear_kd_loss,
        (torch.randn(4, 3), torch.randn(9, 3), torch.randn(4, 5), torch.randn(9, 5), torch.tensor([0, 8, -100, 3])),
    ),
}


@pytest.mark.parametrize("entry", INPUTS)
def test_an_objective_is_built_once_for_many_calls(entry, monkeypatch):
    function, inputs = INPUTS[entry]
    expected = function(*inputs, **SETTINGS, reduction="none", return_metrics=True)
    objective = Objective(**SETTINGS)
    built = []
    monkeypatch.setattr(Objective, "__post_init__", lambda self: built.append(self))
    for _ in range(2):
        loss, metrics = entry(*inputs, objective, reduction="none", return_metrics=True)
        assert torch.equal(loss, expected[0])
        assert metrics == expected[1]
    assert not built


@pytest.mark.parametrize("entry", INPUTS)
def test_the_entries_that_take_an_objective_take_all_else(entry):
    function, _ = INPUTS[entry]
    settings = {field.name for field in dataclasses.fields(Objective)}
    theirs = inspect.signature(function).parameters.values()
    ours = [p for p in inspect.signature(entry).parameters.values() if p.name != "objective"]
    assert [p.name for p in ours] == [p.name for p in theirs if p.name not in settings]


def test_public_names():
    functions = {"float8_weight", "linear_kd_loss", "linear_sparse_kd_loss", "softmax_kd_loss"}
    settings = {"DIVERGENCES", "METRICS", "SPARSE_METRICS", "Float8Weight", "Objective"}
    assert set(kernels.__all__) == settings | functions
    assert len(DIVERGENCES) == 7
    assert len(METRICS) == len(SPARSE_METRICS) == 8


def test_importing_pulls_in_neither_torchtune_nor_the_compiler():
    code = "import sys, torchtune_kd.kernels; print([m for m in ('torchtune', 'torch._dynamo') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd="/")
    assert done.stdout.strip() == "[]"
