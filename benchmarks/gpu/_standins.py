"""Components of a measured run's config: data, tokenizer, weights and logger that need no files.

Legend: S tokens of a sequence, V vocabulary.
"""

import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from ._counter import WaitCounter


class IdTokenizer:
    """A tokenizer for rows that are token ids already."""

    pad_id = 0

    def __init__(self, max_seq_len: int) -> None:
        self.max_seq_len = max_seq_len


class RandomRows(Dataset):
    """Rows of S random ids below V, all of them labels too; the same in every run."""

    def __init__(self, tokenizer: IdTokenizer, rows: int, vocab: int) -> None:
        generator = torch.Generator().manual_seed(0)
        self._ids = torch.randint(1, vocab, (rows, tokenizer.max_seq_len), generator=generator)

    def __len__(self) -> int:
        return len(self._ids)

    def __getitem__(self, index: int) -> dict[str, list[int]]:
        ids = self._ids[index].tolist()
        return {"tokens": ids, "labels": list(ids)}


class RandomCheckpointer:
    """Random weights of a model's shapes where torchtune's recipe expects a checkpointer; writes nothing.

    Args:
        section (Mapping[str, Any]): the model's section.
        device (str): where the weights are made.
        dtype (str): of the weights, bf16 or fp32.
        **ignored: what the recipe gives a checkpointer besides.
    """

    def __init__(self, section: Mapping[str, Any], device: str, dtype: str, **ignored: Any) -> None:
        self._section, self._device = dict(section), device
        self._dtype = {"bf16": torch.bfloat16, "fp32": torch.float32}[dtype]

    def load_checkpoint(self) -> dict[str, Any]:
        from omegaconf import OmegaConf
        from torchtune import config, training
        from torchtune.modules.peft import get_adapter_params

        with torch.device("meta"):
            model = config.instantiate(OmegaConf.create(self._section))
        names = model.state_dict().keys() - get_adapter_params(model).keys()
        shapes = {name: tensor.shape for name, tensor in model.state_dict().items() if name in names}
        return {training.MODEL_KEY: {name: self._weight(shape) for name, shape in shapes.items()}}

    def _weight(self, shape: torch.Size) -> Tensor:
        """Scales are 1, matrices normal with Llama's standard deviation."""
        weight = torch.empty(shape, dtype=self._dtype, device=self._device)
        return weight.fill_(1.0) if len(shape) == 1 else weight.normal_(std=0.02)

    def save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        """Write nothing."""


class StepClock:
    """A metric logger that times steps, then counts in further ones where the host waits.

    A recipe that logs every step calls it once at the end of each. The first step also compiles and is left out.

    Args:
        output (str): the JSON file that it leaves.
        device (str): ``cuda`` or ``cpu``.
        timed (int): steps to time, after the first.
        counted (int): steps in which to count, after those; an operation of the last one may fall to the run's end.
        ends_run (bool): end the program after the last of them, before the recipe writes what it trained.
    """

    def __init__(self, output: str, device: str, timed: int, counted: int, ends_run: bool = False) -> None:
        self._output, self._cuda = Path(output), device.startswith("cuda")
        self._timed, self._counted, self._ends_run = timed, counted, ends_run
        self._counter = WaitCounter(device)
        self._found: dict[str, Any] = {"seconds": [], "losses": [], "peaks": [], "waits": []}
        self._calls, self._start = 0, 0.0

    def log(self, name: str, data: Any, step: int) -> None:
        """Nothing: recipes log whole steps."""

    def log_config(self, config: Any) -> None:
        """Nothing."""

    def log_dict(self, payload: Mapping[str, Any], step: int) -> None:
        counting = self._calls > self._timed
        places = self._counter.stop() if counting else {}
        if self._cuda:
            torch.cuda.synchronize()
        now = time.perf_counter()
        self._calls += 1
        if self._calls == 1:
            self._found["first_step_ended"] = time.time()
        if counting:
            self._found["waits"].append(places)
        elif self._calls > 1:
            self._found["seconds"].append(now - self._start)
            self._found["peaks"].append(self._peak(payload))
        self._found["losses"].append(float(payload["loss"]))
        self._output.write_text(json.dumps(self._found))
        if self._ends_run and self._calls == 1 + self._timed + self._counted:
            raise SystemExit(0)
        if self._timed < self._calls <= self._timed + self._counted:
            self._counter.start()
        self._start = time.perf_counter()

    def close(self) -> None:
        """Everything is written."""

    def _peak(self, payload: Mapping[str, Any]) -> float | None:
        """Bytes at the highest point of the step, which the recipe has read and reset just before; None on a CPU."""
        peak = payload.get("peak_memory_alloc")
        return None if peak is None else float(peak) * 2**30
