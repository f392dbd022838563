"""The tracker counts what is alive and what is computed, and nothing else."""

import pytest
import torch
from torch import nn
from torchao.dtypes.nf4tensor import linear_nf4, to_nf4

from helpers.measured import allocated
from torchtune_kd.plan.tracker import Tracker, tensor_bytes


def meta(*shape, dtype=torch.float32):
    return torch.empty(shape, dtype=dtype, device="meta")


def test_a_storage_counts_once_from_its_making_to_its_release():
    tracker = Tracker()
    x = meta(10, 10)
    tracker.hold("weights", [x])
    with tracker:
        tracker.phase = "one"
        y = x + 1
        z = y.t()[2:]  # views
        y.mul_(2)
        assert tracker.live == {"weights": 400, "one": 400}
        del y
        assert tracker.live["one"] == 400
        del z
        assert tracker.live["one"] == 0
        tracker.phase = "two"
        meta(25)
    assert tracker.peaks["one"] == 800 and tracker.peaks["two"] == 500
    assert tracker.at_peaks["one"] == {"weights": 400, "one": 400}


def test_storages_move_between_categories_and_phases_keep_their_peaks():
    tracker = Tracker()
    tracker.phase = "forward"
    with tracker:
        x = meta(100)
        tracker.hold("gradients", [x])
        assert tracker.live == {"forward": 0, "gradients": 400}
        tracker.hold("gradients", [x])
        assert tracker.live["gradients"] == 400
    assert tracker.peaks == {"forward": 400}


def test_what_autograd_keeps_is_alive_until_the_backward_pass():
    tracker = Tracker()
    weight = nn.Parameter(meta(8, 8))
    tracker.hold("weights", [weight])
    with tracker:
        tracker.phase = "forward"
        loss = (meta(16, 8) @ weight).exp().sum()
        assert tracker.live["forward"] == 2 * 16 * 8 * 4 + 4  # the input, the exponentials, the sum
        loss.backward()
    assert tracker.live["forward"] == 8 * 8 * 4 + 4  # the gradient, the sum


@pytest.mark.parametrize("again", [False, True])
def test_gradients_of_a_weight_used_often_are_summed_as_in_a_run(again):
    """Under a mode autograd adds them out of place, which the tracker must not count."""

    def loss_of(x, weight):
        for _ in range(3):
            x = x + torch.nn.functional.silu(x @ weight)
        return x.sum()

    def inputs(device):
        weight = nn.Parameter(torch.zeros(500, 500, device=device))
        weight.grad = torch.zeros_like(weight) if again else None
        return torch.zeros(64, 500, device=device), weight

    x, weight = inputs("cpu")
    measured, _ = allocated(lambda: loss_of(x, weight).backward())
    x, weight = inputs("meta")
    tracker = Tracker()
    tracker.hold("held", [x, weight, *([weight.grad] if again else [])])
    with tracker:
        tracker.phase = "forward"
        loss = loss_of(x, weight)
        tracker.phase = "backward"
        loss.backward()
    assert max(tracker.peaks.values()) - tracker.live["held"] == pytest.approx(measured, rel=1e-4)


def test_flops_and_bytes_are_those_of_what_computes():
    tracker = Tracker()
    x, w = meta(3, 4), meta(4, 5)
    with tracker:
        tracker.phase = "here"
        (x @ w).t().relu_()
        torch.mm(x, w, out=meta(3, 5))
    products = [operation for operation in tracker.operations if operation.flops]
    assert [operation.flops for operation in products] == [2 * 3 * 4 * 5] * 2
    assert products[0].bytes == 4 * (12 + 20 + 15)
    assert len(tracker.operations) == 4  # two products, relu_, and the empty result


def test_nf4_is_taken_apart():
    with torch.device("meta"):
        weight = to_nf4(torch.empty(256, 256, dtype=torch.bfloat16))
    tracker = Tracker()
    tracker.hold("weights", [weight])
    assert tracker.live["weights"] == tensor_bytes(weight) == pytest.approx(256 * 256 / 2, rel=0.05)
    with tracker:
        tracker.phase = "forward"
        linear_nf4(meta(4, 256, dtype=torch.bfloat16), weight)
    assert tracker.peaks["forward"] > 256 * 256 * 8  # torchao makes an index of 64 bits for every weight
    assert sum(operation.flops for operation in tracker.operations) == 2 * 4 * 256 * 256


def test_only_the_device_asked_for_is_looked_at():
    tracker = Tracker("cpu")
    with tracker:
        tracker.phase = "here"
        kept = torch.ones(5), meta(100)
    assert tracker.live == {"here": 20} and len(kept) == 2
