"""The keys that ``torchtune_kd/plan`` reads beside those of a run's config."""

import dataclasses

from omegaconf import DictConfig

from torchtune_kd.config.reading import Config, read_run_config
from torchtune_kd.config.settings import DISTRIBUTED_ONLY, Settings, typed
from torchtune_kd.distributed.world import mesh_shape
from torchtune_kd.errors import UserError
from torchtune_kd.plan.communication import Layout
from torchtune_kd.plan.devices import Device, custom_device, find_device, parse_memory

SEQUENCE = 512  # where the tokenizer has no max_seq_len


@dataclasses.dataclass(frozen=True)
class Request:
    """Hold what is asked for.

    Attributes:
        devices (int | None): processes of the run, one per device; None takes 2 for a config of ``kd_distributed``
            and 1 for one of ``kd_single_device``.
        device_memory (str | int | None): of one device, such as 80GiB; None takes that of ``gpu``.
        gpu (str | None): a name out of the device table; None shows all.
        tflops (float | None): dense peak in the run's dtype, instead of the table's.
        bandwidth (float | None): GB/s of the device's memory, instead of the table's.
        link_bandwidth (float | None): GB/s in one direction between the devices of a node, instead of the table's.
        network_bandwidth (float): GB/s in one direction between nodes, per device; 50 is 400 Gbit/s.
        sequence_length (int | None): tokens of every sequence; None takes ``tokenizer.max_seq_len``, or 512.
        json (bool): print JSON in place of text.
    """

    devices: int | None = None
    device_memory: str | int | None = None
    gpu: str | None = None
    tflops: float | None = None
    bandwidth: float | None = None
    link_bandwidth: float | None = None
    network_bandwidth: float = 50.0
    sequence_length: int | None = None
    json: bool = False

    @property
    def memory_bytes(self) -> int | None:
        if self.device_memory is not None:
            return parse_memory(self.device_memory)
        return None if self.gpu is None else find_device(self.gpu).memory

    def chosen_device(self, dtype: str) -> Device | None:
        """Return the device that the figures describe; None where none is named."""
        base = None if self.gpu is None else find_device(self.gpu)
        return custom_device(base, dtype, self.tflops, self.bandwidth, self.link_bandwidth)


def read_request(written: DictConfig) -> tuple[Request, Config, Layout]:
    """Take the plan's own keys out of a config and read the rest as the recipe of that config would.

    Returns:
        tuple[Request, Config, Layout]: what is asked for, the run's config, and its processes.

    Raises:
        UserError: for a value that cannot be, and for a config of another recipe.
    """
    fields = {field.name: field for field in dataclasses.fields(Request)}
    given = {name: field for name, field in fields.items() if written.get(name) is not None}
    request = Request(**{name: typed(name, written[name], field.type) for name, field in given.items()})
    for name in ("devices", "sequence_length", "network_bandwidth"):
        value = getattr(request, name)
        if value is not None and not value > 0:
            raise UserError(f"Expected `{name}` to be above 0, got {value}: change it.")
    distributed = any(key in written for key in DISTRIBUTED_ONLY)
    devices = request.devices or (2 if distributed else 1)
    config = read_run_config(written, fields, distributed=devices > 1)
    return request, config, _layout(config.settings, devices, distributed or devices > 1)


def _layout(settings: Settings, devices: int, sharded: bool) -> Layout:
    *replicas, shards = mesh_shape(devices, settings.data_parallel_replicate_dim, settings.data_parallel_shard_dim)
    return Layout(shards=shards, replicas=replicas[0] if replicas else 1, sharded=sharded)
