"""The device table, sizes, and figures of the user's own."""

import pytest

from torchtune_kd.plan.devices import DEVICES, custom_device, find_device, parse_memory
from torchtune_kd.training import UserError


def test_the_table_is_plausible_and_sourced():
    assert {device.name for device in DEVICES} == {"A100", "H100", "H200", "B200", "L40S", "RTX4090"}
    for device in DEVICES:
        assert "NVIDIA" in device.source
        assert device.tflops["bf16"] > device.tflops["fp32"] > 10
        assert 800 < device.bandwidth < 10_000 and 30 < device.link < 1000
        assert 20 <= device.memory / 2**30 <= 200
        # a matrix product of 4096 bf16 values a row is bound by arithmetic on each of them
        assert device.tflops["bf16"] * 1e12 / (device.bandwidth * 1e9) < 4096 / 3


@pytest.mark.parametrize("name", ["h100", "H100", "rtx 4090", "GeForce RTX-4090", "NVIDIA l40s"])
def test_devices_are_found_however_they_are_written(name):
    assert find_device(name) in DEVICES


@pytest.mark.parametrize(("name", "hint"), [("H10O", "did you mean H100"), ("MI300X", "tflops=")])
def test_unknown_device_is_one_sentence(name, hint):
    with pytest.raises(UserError, match=f"^Expected `gpu` to be one of A100, H100.*got {name}: .*{hint}"):
        find_device(name)


@pytest.mark.parametrize(
    ("text", "size"),
    [("80GiB", 80 * 2**30), ("24 GB", 24 * 10**9), ("1.5TiB", 3 * 2**39), ("512mib", 2**29), (1000, 1000), ("7b", 7)],
)
def test_sizes(text, size):
    assert parse_memory(text) == size


@pytest.mark.parametrize("text", ["80 gigs", "", "-3GiB", "GiB", "0GiB", "1e3GiB", "12GiBit"])
def test_sizes_that_cannot_be_read(text):
    with pytest.raises(UserError, match=r"^Expected `device_memory` to be a size such as 80GiB"):
        parse_memory(text)


def test_figures_of_ones_own():
    own = custom_device(None, "bf16", 100.0, 500.0, None)
    assert own.tflops == {"bf16": 100.0} and own.bandwidth == 500.0
    faster = custom_device(find_device("A100"), "bf16", None, 9000.0, None)
    assert faster.tflops == find_device("A100").tflops and faster.bandwidth == 9000.0
    assert "command line" in faster.source
    assert custom_device(None, "bf16", None, None, None) is None
    with pytest.raises(UserError, match=r"`tflops`.*`bandwidth`.*together"):
        custom_device(None, "bf16", 100.0, None, None)
    with pytest.raises(UserError, match="Expected `bandwidth` to be a number above 0, got 0"):
        custom_device(None, "bf16", 100.0, 0, None)
