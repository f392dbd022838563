"""The runs of a sweep: a cell with a point of the tuning grid and a seed, and its folder.

``runs/<id>/`` holds ``train.yaml`` and ``train.log``, ``run/`` (the run's own output folder), ``trained.jsonl`` once
it is trained, ``evaluate.yaml`` and ``evaluate.log``, ``results.jsonl`` once it is done, ``failed.json`` if it
failed, and ``.lock``, which the process that works on it holds.
"""

import copy
import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from torchtune_kd.config.checks import checkpoint_files
from torchtune_kd.config.command import without_unread_names
from torchtune_kd.config.reading import Config, read_config
from torchtune_kd.errors import UserError, one_line
from torchtune_kd.evaluation.provenance import config_sha
from torchtune_kd.reports.results import Result, read_results
from torchtune_kd.storage.fingerprints import files_fingerprint
from torchtune_kd.sweeps.grid import Cell, tuning_points
from torchtune_kd.sweeps.request import Request

LOG = "log_run.txt"
_UNNAMED = "-"  # stands for every folder in a run's identity
# what changes no number of a run
_NOT_IDENTITY = ("resume_from_checkpoint", "save_every_n_steps", "keep_last_n", "overwrite_output_dir", "metric_logger")


@dataclass(frozen=True)
class Run:
    """One training run, or, with ``models``, the evaluation of models that no run trains.

    Attributes:
        cell (Cell): its line of the table.
        point (Mapping[str, Any]): what of ``tune`` it takes.
        seed (int | None): its seed.
        written (DictConfig): its config, as it is given to the recipe.
        id (str): SHA-256 of the resolved config without folders, and of the files that it reads.
        folder (Path): ``runs/<id>``.
        total_steps (int | None): steps of the run, where the config bounds them.
        models (tuple[str, ...]): what is evaluated.
    """

    cell: Cell
    point: Mapping[str, Any]
    seed: int | None
    written: DictConfig = field(repr=False)
    id: str
    folder: Path
    total_steps: int | None = None
    models: tuple[str, ...] = ("student",)

    @property
    def output(self) -> Path:
        """Return the run's own output folder."""
        return self.folder / "run"

    @property
    def trained_file(self) -> Path:
        return self.folder / "trained.jsonl"

    @property
    def results_file(self) -> Path:
        return self.folder / "results.jsonl"

    @property
    def failure_file(self) -> Path:
        return self.folder / "failed.json"

    @property
    def is_trained(self) -> bool:
        return self.trained_file.is_file() or self.models != ("student",)

    @property
    def is_done(self) -> bool:
        return self.results_file.is_file()

    @property
    def failure(self) -> dict[str, Any] | None:
        """Return what is known of a run that failed: ``exit_code`` and ``message``."""
        return json.loads(self.failure_file.read_text(encoding="utf-8")) if self.failure_file.is_file() else None

    @property
    def steps_done(self) -> int:
        """Return the last step in the run's log."""
        log = self.output / "logs" / LOG
        if not log.is_file():
            return 0
        steps = [line.partition(" | ")[0] for line in log.read_text(encoding="utf-8").splitlines()[-1:]]
        return int(steps[0].removeprefix("Step ")) if steps and steps[0].startswith("Step ") else 0

    def evaluation(self, request: Request) -> DictConfig:
        """Return the config that evaluates what the run has trained."""
        written = copy.deepcopy(self.written)
        for key, value in request.keys.evaluate.items():
            OmegaConf.update(written, key, value, merge=False, force_add=True)
        written.models = list(self.models)
        written.results = str(self.folder / "evaluated.jsonl")
        return written

    def result(self, task: str, metric: str, value: float) -> Result:
        """Return a line of the run that no evaluation gives."""
        cell = self.cell
        return Result(
            "student", task, metric, value, run=self.id, cell=cell.name, coordinates=cell.coordinates, seed=self.seed
        )

    def write_failure(self, exit_code: int, message: str) -> None:
        """Record that the run failed."""
        content = json.dumps({"exit_code": exit_code, "message": message}, indent=1)
        self.failure_file.write_text(f"{content}\n", encoding="utf-8")

    def delete_weights(self) -> None:
        """Delete checkpoints and exports; the logs stay."""
        for kind in ("epoch_*", "step_*"):
            for folder in self.output.glob(kind):
                shutil.rmtree(folder)

    def __str__(self) -> str:
        point = "".join(f", {key.rpartition('.')[2]}={value}" for key, value in self.point.items())
        return f"{self.cell.name}{point}" + ("" if self.seed is None else f", seed {self.seed}")


def plan_runs(request: Request) -> list[list[Run]]:
    """Return, for every seed in turn, the runs of all cells: of each cell as many as there are points to tune over.

    Every config is read whole, so that a key that the recipe does not read, or a value that cannot be, is found
    before the first run.

    Raises:
        UserError: naming the cell.
    """
    points, files = list(tuning_points(request.keys.tune)), {}
    return [
        [_run(request, cell, point, seed, files) for cell in request.cells for point in points]
        for seed in request.keys.seeds
    ]


def _run(request: Request, cell: Cell, point: Mapping[str, Any], seed: int, files: dict[tuple, str]) -> Run:
    written = _overridden(request, {**cell.overrides, **point, "seed": seed})
    nameless = copy.deepcopy(written)
    for key in nameless:
        if key == "output_dir" or str(key).endswith("_dir"):
            nameless[key] = _UNNAMED
    try:
        plain = OmegaConf.to_container(nameless, resolve=True)
        config = read_config(written, distributed=request.distributed)
    except UserError as error:
        raise UserError(f"The cell {cell.name!r} cannot be run: {error}") from error
    except Exception as error:  # OmegaConf's, for a ${name} that is nowhere
        raise UserError(f"The cell {cell.name!r} cannot be run, correct its keys: {one_line(error)}") from error
    for key in _NOT_IDENTITY:
        plain.pop(key, None)
    content = {"config": plain, "files": _fingerprint(config, files), "devices": request.keys.devices_per_run}
    identity = config_sha(content)[:16]
    folder = request.folder / "runs" / identity
    written.output_dir = str(folder / "run")
    written.resume_from_checkpoint = True
    written.metric_logger = {
        "_component_": "torchtune.training.metric_logging.DiskLogger",
        "log_dir": str(folder / "run" / "logs"),
        "filename": LOG,
    }
    steps = config.settings.max_steps_per_epoch
    return Run(cell, point, seed, written, identity, folder, steps and steps * config.settings.epochs)


def _overridden(request: Request, more: Mapping[str, Any]) -> DictConfig:
    """Return the runs' config with the sweep's overrides and ``more``, a section given whole replacing the other."""
    written = copy.deepcopy(request.base)
    for key, value in {**request.keys.overrides, **more}.items():
        OmegaConf.update(written, key, value, merge=False, force_add=True)
    return without_unread_names(written, request.base)


def run_of_models(request: Request) -> Run | None:
    """Return what evaluates the models that no run trains, or None where the sweep names none."""
    if not request.keys.models:
        return None
    written = _overridden(request, {})
    config = read_config(written, distributed=request.distributed)
    content = {"models": request.keys.models, "evaluate": request.keys.evaluate, "files": _fingerprint(config, {})}
    identity = config_sha(content)[:16]
    folder = request.folder / "runs" / identity
    written.output_dir = str(folder / "run")
    return Run(Cell("models"), {}, None, written, identity, folder, models=tuple(request.keys.models))


def _fingerprint(config: Config, known: dict[tuple, str]) -> str:
    """Compute one fingerprint of the files that a run reads: weights and local data."""
    sections = [config.checkpointer, *([config.teacher_checkpointer] if config.settings.uses_teacher else [])]
    paths = [path for section in sections if section is not None for path in checkpoint_files(section)]
    for section in (*config.dataset, *config.dataset_val):
        named = section.get("data_files", [])
        paths += [Path(str(path)) for path in (named if isinstance(named, list) else [named])]
    there = tuple(path for path in paths if path.is_file())  # the recipe says what is missing
    if there not in known:
        known[there] = files_fingerprint(list(there))
    return known[there]


def chosen_runs(request: Request, seeds: Sequence[Sequence[Run]]) -> set[str]:
    """Return the ids of the runs that count: of every cell those with the best point of the tuning grid.

    The best point has the lowest last validation with the first seed. A cell is left out while one of its points is
    neither trained nor failed, or where all have failed.
    """
    best: dict[str, tuple[float, Mapping[str, Any]]] = {}
    undecided = set()
    for run in seeds[0]:
        name = run.cell.name
        if run.is_trained:
            value = validation(run, request.keys.tune_by) if request.keys.tune else 0.0
            if name not in best or value < best[name][0]:
                best[name] = (value, run.point)
        elif run.failure is None:
            undecided.add(name)
    return {
        run.id
        for runs in seeds
        for run in runs
        if run.cell.name in best and run.cell.name not in undecided and best[run.cell.name][1] == run.point
    }


def validation(run: Run, metric: str) -> float:
    """Return the last value of a validation metric of a run that is done.

    Raises:
        UserError: if no validation of the run logged it.
    """
    found = {line.metric: line.value for line in read_results(run.trained_file) if line.task == "validation"}
    if metric not in found:
        raise UserError(
            f"`tune_by: {metric}` is no validation metric of the run {run}, which logged "
            f"{', '.join(sorted(found)) or 'none: it has no dataset_val'}: name one that every cell logs."
        )
    return found[metric]
