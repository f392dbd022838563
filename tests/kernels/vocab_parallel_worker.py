"""Processes that hold a shard of the vocabulary each: ``python vocab_parallel_worker.py FOLDER 7,30``.

Every process compares its share with the torch backend on the whole; what differs goes to standard error.
"""

import itertools
import sys
from collections import Counter
from pathlib import Path
from unittest.mock import patch

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from torchtune_kd.kernels import DIVERGENCES, softmax_kd_loss

N = 3


def main(folder: Path, sizes: list[int]) -> None:
    # forked, so that PyTorch and Triton are imported once
    mp.start_processes(run, (folder, sizes), nprocs=len(sizes), start_method="fork")


def run(rank: int, folder: Path, sizes: list[int]) -> None:
    dist.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=len(sizes))
    # interpreted kernels are slow: with three processes every other case
    for case in itertools.islice(cases(sum(sizes)), 0, None, len(sizes) - 1):
        check(rank, sizes, **case)
    if len(sizes) == 2:
        check_collectives(rank, sizes)
    check_padding_of_the_last_shard(rank, sizes)
    check_errors(rank, sizes)
    dist.destroy_process_group()
    (folder / f"rank_{rank}").touch()


def cases(vocab: int):
    """Every divergence with every other value at least once, and what is special about shards."""
    ends = torch.tensor([vocab - 1, -100, 0])
    others = itertools.cycle(
        [
            {"temperature": 2.0, "kd_ratio": 0.5, "labels": ends, "metrics": True},
            {"temperature": 1.0, "kd_ratio": 1.0, "labels": ends, "reduction": "none"},
            {"temperature": 0.5, "kd_ratio": 0.3, "labels": ends, "dtype": torch.bfloat16, "reduction": "sum"},
            {"temperature": 2.0, "kd_ratio": 1.0, "labels": None},
            {"temperature": 3.0, "kd_ratio": 0.5, "labels": torch.full((N,), -100), "metrics": True},
        ]
    )
    empty = itertools.cycle(["teacher", "student", "both"])
    for divergence in DIVERGENCES:
        for values in itertools.islice(others, 2):
            yield {"divergence": divergence, **values}
        # the first shard has no finite logit
        yield {
            "divergence": divergence,
            "temperature": 2.0,
            "kd_ratio": 0.5,
            "labels": ends,
            "empty_shard": next(empty),
        }
    yield {"divergence": "jsd", "kd_ratio": 0.0, "labels": ends, "metrics": True}
    yield {"divergence": "jsd", "kd_ratio": 0.5, "labels": ends.clamp(min=-1), "ignore_index": -1, "shape": (1, 3)}
    yield {"divergence": "forward_kl", "kd_ratio": 0.5, "labels": ends.clamp(min=3), "ignore_index": 3, "shape": (3, 1)}
    yield {"divergence": "reverse_kl", "kd_ratio": 1.0, "labels": None, "equal": True, "metrics": True}


def logits(vocab, sizes, dtype, equal, empty_shard):
    torch.manual_seed(0)
    student = 3 * torch.randn(N, vocab)
    teacher = student.clone() if equal else student + torch.randn(N, vocab)
    for model, tensor in (("student", student), ("teacher", teacher)):
        if empty_shard in (model, "both"):
            tensor[:, : sizes[0]] = -torch.inf
    return student.to(dtype), teacher.to(dtype)


def check(
    rank, sizes, *, divergence, labels, metrics=False, dtype=torch.float32, shape=(N,), equal=False, empty_shard="",
    **settings,
):  # fmt: skip
    vocab = sum(sizes)
    student, teacher = (x.view(*shape, vocab) for x in logits(vocab, sizes, dtype, equal, empty_shard))
    if empty_shard and labels is not None:
        labels = labels.where(labels == -100, vocab - 1)
    settings = {**settings, "divergence": divergence, "labels": None if labels is None else labels.view(shape)}
    start = sum(sizes[:rank])
    own = slice(start, start + sizes[rank])

    def call(student, teacher, **more):
        student = student.clone().requires_grad_()
        with torch.no_grad():
            value = softmax_kd_loss(student, teacher, **settings, **more)
        loss, sums = softmax_kd_loss(student, teacher, **settings, **more, return_metrics=metrics or ["kd_loss"])
        (loss * torch.arange(1.0, loss.numel() + 1).view(loss.shape)).sum().backward()
        return value, loss.detach(), sums, student.grad

    expected = call(student, teacher, backend="torch")
    got = call(student[..., own], teacher[..., own], backend="triton", group=dist.group.WORLD)
    what = f"{rank} of {sizes}: {divergence} {settings} {dtype} {empty_shard}"
    for index, tolerance in ((0, 2e-5), (1, 1e-5)):
        torch.testing.assert_close(got[index], expected[index], rtol=tolerance, atol=2e-6, msg=lambda m: f"{what}: {m}")
    for name, value in expected[2].items():
        torch.testing.assert_close(got[2][name], value, rtol=2e-5, atol=2e-6, msg=lambda m, n=name: f"{what} {n}: {m}")
    rtol = 8e-3 if dtype == torch.bfloat16 else 1e-4  # the interpreter cuts bf16 off
    torch.testing.assert_close(
        got[3], expected[3][..., own], rtol=rtol, atol=1e-6 if dtype == torch.float32 else 1e-4,
        msg=lambda m: f"{what} gradient: {m}",
    )  # fmt: skip
    if equal:
        assert got[1] == 0 and not got[3].any(), what


def check_collectives(rank, sizes):
    """One MAX and one SUM for the KLs; what else costs one more."""
    student, teacher = (x.split(sizes, -1)[rank] for x in logits(sum(sizes), sizes, torch.float32, False, ""))
    student, teacher, labels = student[:1], teacher[:1], torch.tensor([1])
    for divergence in DIVERGENCES:
        for metrics in (False, ["kd_loss", "class_loss"], ["kl"], ["top1_agreement"]):
            found = Counter()

            def counted(tensor, operation, group, found=found, reduce=dist.all_reduce):
                found[str(operation).rpartition(".")[2]] += 1
                return reduce(tensor, operation, group)

            with patch.object(dist, "all_reduce", counted):
                z = student.clone().requires_grad_()
                settings = {"divergence": divergence, "kd_ratio": 0.5, "temperature": 2.0, "return_metrics": metrics}
                softmax_kd_loss(z, teacher, labels, **settings, backend="triton", group=dist.group.WORLD)
            needs_terms = divergence not in ("forward_kl", "reverse_kl", "symmetric_kl")
            needs_terms = needs_terms or metrics == ["kl"]
            expected = {"MAX": 1, "SUM": 1 + needs_terms} | ({"MIN": 1} if metrics == ["top1_agreement"] else {})
            assert found == expected, (divergence, metrics, found)


def check_padding_of_the_last_shard(rank, sizes):
    student, teacher = logits(sum(sizes), sizes, torch.float32, False, "")
    padded = torch.cat([teacher, torch.full((N, 5), 9.0)], -1)
    parts = padded.split([*sizes[:-1], sizes[-1] + 5], -1)
    expected = softmax_kd_loss(student, teacher, backend="torch")
    got = softmax_kd_loss(student.split(sizes, -1)[rank], parts[rank], backend="triton", group=dist.group.WORLD)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)


def check_errors(rank, sizes):
    student, teacher = (x.split(sizes, -1)[rank] for x in logits(sum(sizes), sizes, torch.float32, False, ""))
    labels = torch.tensor([0, 1, sum(sizes)])
    refused(f"labels must lie in [0, {sum(sizes)})", student, teacher, labels, backend="triton")
    refused("group= works with backend='triton'", student, teacher, backend="torch")
    if rank < len(sizes) - 1:
        refused(
            "every shard but the last must hold the same ids",
            student,
            torch.cat([teacher, teacher], -1),
            backend="triton",
        )


def refused(sentence, *tensors, **settings):
    try:
        softmax_kd_loss(*tensors, **settings, group=dist.group.WORLD)
    except ValueError as error:
        assert sentence in str(error), error
    else:
        raise AssertionError(f"not refused: {sentence}")


if __name__ == "__main__":
    sys.path.append(str(Path(__file__).parents[1]))
    from helpers.interpreter import patch_language_once_a_launch

    patch_language_once_a_launch()
    main(Path(sys.argv[1]), [int(size) for size in sys.argv[2].split(",")])
