"""The runs of a sweep: a cell with a point of the tuning grid and a seed, and its folder.

``runs/<id>/`` holds ``train.yaml`` and ``train.log``, ``run/`` (the run's own output folder), ``trained.jsonl`` once
it is trained, ``evaluate.yaml`` and ``evaluate.log``, ``results.jsonl`` once it is done, ``failed.json`` if it
failed, and ``.lock``, which the process that works on it holds.
"""

import copy
import json
import math
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from torchtune_kd.config.command import without_unread_names
from torchtune_kd.config.reading import read_config
from torchtune_kd.errors import UserError, one_line
from torchtune_kd.evaluation import read_request as read_evaluation
from torchtune_kd.reports.results import Result, read_results
from torchtune_kd.storage.atomic import write_text
from torchtune_kd.sweeps.grid import Cell, tuning_points
from torchtune_kd.sweeps.identity import evaluation_id, models_id, run_id
from torchtune_kd.sweeps.request import Request

LOG = "log_run.txt"
# what the sweep sets itself
_SET = ("seed", "output_dir", "overwrite_output_dir", "resume_from_checkpoint", "metric_logger", "log_every_n_steps")
_SET_IN_EVALUATION = ("models", "results", "output_dir")


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
        evaluation_id (str | None): identity of what is measured of the run; None where nothing is.
        models (tuple[str, ...]): what is evaluated.
    """

    cell: Cell
    point: Mapping[str, Any]
    seed: int | None
    written: DictConfig = field(repr=False)
    id: str
    folder: Path
    total_steps: int | None = None
    evaluation_id: str | None = None
    models: tuple[str, ...] = ("student",)

    @property
    def output(self) -> Path:
        """Return the run's own output folder."""
        return self.folder / "run"

    @property
    def trained_file(self) -> Path:
        return self.folder / "trained.jsonl"

    @property
    def evaluated_file(self) -> Path:
        return self.folder / "evaluated.jsonl"

    @property
    def results_file(self) -> Path:
        """Return where the results are: another file once the sweep measures something else."""
        return self.folder / ("results.jsonl" if self.evaluation_id is None else f"results_{self.evaluation_id}.jsonl")

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
    def has_weights(self) -> bool:
        """Return whether an epoch of the run is on the disk."""
        return any(path.is_dir() and path.suffix == "" for path in self.output.glob("epoch_*"))

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
        written.results = str(self.evaluated_file)
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
        write_text(self.failure_file, f"{content}\n")

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

    Every config is read whole, that of its evaluation too, so that a key that nothing reads, or a value that cannot be,
    is found before the first run.

    Raises:
        UserError: naming the cell.
    """
    _check_keys(request)
    points, files = list(tuning_points(request.keys.tune)), {}
    seeds = [
        [_run(request, cell, point, seed, files) for cell in request.cells for point in points]
        for seed in request.keys.seeds
    ]
    known: dict[str, Run] = {}
    for run in seeds[0]:
        if run.id in known:
            raise UserError(f"The cells {str(known[run.id])!r} and {str(run)!r} are the same run: delete one of them.")
        known[run.id] = run
    for run in seeds[0][:: len(points)] if request.keys.evaluate else []:
        _check_evaluation(request, run)
    return seeds


def _check_keys(request: Request) -> None:
    """Refuse keys that the sweep sets itself, and a key that is tuned and set by a cell."""
    keys = request.keys
    given = {
        "overrides": keys.overrides, "grid": keys.grid, "tune": keys.tune,
        **{f"cells.{name}": overrides for name, overrides in keys.cells.items()},
    }  # fmt: skip
    for where, overrides in given.items():
        for key in overrides:
            if key.split(".")[0] in _SET:
                there = "`seeds` are a key of the sweep" if key == "seed" else "the sweep sets it"
                raise UserError(f"`{where}` sets `{key}`, but {there}: delete it there.")
            if key in keys.tune and where not in ("tune", "overrides"):
                raise UserError(f"`{where}` sets `{key}`, which `tune` tunes for every cell alike: delete one of them.")
    for key in keys.evaluate:
        if key.split(".")[0] in _SET_IN_EVALUATION:
            raise UserError(f"`evaluate` sets `{key}`, which the sweep sets for every run: delete it there.")


def _check_evaluation(request: Request, run: Run) -> None:
    written = run.evaluation(request)
    written.models = ["untrained"]  # nothing is trained yet
    try:
        read_evaluation(written)
    except UserError as error:
        raise UserError(f"`evaluate` cannot be done for the cell {run.cell.name!r}: {error}") from error
    if written.get("save_adapter_weights_only"):
        raise UserError(
            f"The cell {run.cell.name!r} has `save_adapter_weights_only: True`, and `evaluate` needs merged weights: "
            "set it to False."
        )


def _run(request: Request, cell: Cell, point: Mapping[str, Any], seed: int, files: dict[tuple, str]) -> Run:
    written = _overridden(request, {**cell.overrides, **point, "seed": seed})
    try:
        plain = OmegaConf.to_container(written, resolve=True)
        config = read_config(written, distributed=request.distributed)
    except UserError as error:
        raise UserError(f"The cell {cell.name!r} cannot be run: {error}") from error
    except Exception as error:  # OmegaConf's, for a ${name} that is nowhere
        raise UserError(f"The cell {cell.name!r} cannot be run, correct its keys: {one_line(error)}") from error
    identity = run_id(plain, config, request.keys.devices_per_run, files)
    folder = request.folder / "runs" / identity
    written.output_dir = str(folder / "run")
    written.resume_from_checkpoint = True
    written.overwrite_output_dir = True  # an epoch without a checkpoint is that of a run that was killed
    written.log_every_n_steps = 1
    written.metric_logger = {
        "_component_": "torchtune.training.metric_logging.DiskLogger",
        "log_dir": str(folder / "run" / "logs"),
        "filename": LOG,
    }
    steps = config.settings.max_steps_per_epoch
    total = steps and steps * config.settings.epochs
    return Run(cell, point, seed, written, identity, folder, total, evaluation_id(request.keys.evaluate))


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
    plain = OmegaConf.to_container(written, resolve=True)
    config, evaluation = read_config(written, distributed=request.distributed), evaluation_id(request.keys.evaluate)
    identity = models_id(plain, config, request.keys.models, evaluation)
    folder = request.folder / "runs" / identity
    written.output_dir = str(folder / "run")
    models = tuple(request.keys.models)
    return Run(Cell("models"), {}, None, written, identity, folder, evaluation_id=evaluation, models=models)


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
            value = value if math.isfinite(value) else math.inf
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
