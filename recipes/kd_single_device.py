"""Knowledge distillation on one device: ``tune run torchtune_kd/kd_single_device --config ...``."""

import sys
from typing import Any

from omegaconf import DictConfig
from torchtune import config, training
from torchtune.recipe_interfaces import FTRecipeInterface

import torchtune_kd.training as kd


class KDRecipeSingleDevice(FTRecipeInterface):
    """Distil a teacher into a student on one device (CUDA or CPU, fp32 or bf16).

    For one optimizer step with V its non-ignored tokens over all microbatches, the gradient is that of

        L = 1/|V| Σ_{i∈V} [ (1-α) CE_i + α T² D(p_T,i, q_T,i) ],    α = ``kd_ratio``, T = ``kd_loss.temperature``

    The student is what ``model._component_`` builds: all weights train, or its LoRA, DoRA or QLoRA adapters. The
    teacher runs first and only its last hidden states are kept; logits exist one chunk at a time.

    Args:
        cfg (DictConfig): the parsed config; ``torchtune_kd/training/settings.py`` lists every key.

    Raises:
        UserError: before training, in one sentence, for whatever in config, files or data cannot work.
    """

    def __init__(self, cfg: DictConfig) -> None:
        self._cfg = cfg
        self._settings = kd.read_settings(cfg, distributed=False)
        self._world = kd.single_process(self._settings.device)
        self._seed = training.set_seed(self._settings.seed, debug_mode=self._settings.cudnn_deterministic_mode)
        self._global_step = 0

    def load_checkpoint(self, cfg_checkpointer: DictConfig) -> dict[str, Any]:
        """The student's weights, by torchtune's parameter names; keeps the checkpointer for saving."""
        self._checkpointer, weights = kd.load_weights(cfg_checkpointer, "checkpointer")
        return weights

    def setup(self, cfg: DictConfig) -> None:
        """Check everything that can be checked without weights, then build data, models and optimizer."""
        settings, world = self._settings, self._world
        self._kd_loss = kd.build_kd_loss(cfg)
        tokenizer = kd.build(cfg, "tokenizer")
        max_seq_len = kd.check_run(cfg, settings, tokenizer, world)

        self._loader, self._val_loader = kd.build_loaders(
            cfg, settings, tokenizer, self._kd_loss.ignore_index, max_seq_len, self._seed, world
        )
        self._steps_per_epoch = kd.steps_per_epoch(
            self._loader, settings.gradient_accumulation_steps, settings.max_steps_per_epoch
        )
        self._total_steps = settings.epochs * self._steps_per_epoch

        self._teacher = kd.build_teacher(cfg, settings, world)
        self._student = kd.build_student(
            cfg, settings, world, self._kd_loss, self.load_checkpoint(cfg.checkpointer), self._seed
        )
        self._trainable = [p for p in self._student.parameters() if p.requires_grad]
        self._optimizer = kd.build_optimizer(cfg, self._trainable)
        self._lr_scheduler = kd.build_lr_scheduler(cfg, self._optimizer, self._total_steps)
        self._profiler = kd.build_profiler(cfg)
        self._log = kd.TrainingLog(cfg, settings, world, self._total_steps)

    def train(self) -> None:
        """The training loop: one pass of the inner loop is one optimizer step."""
        settings, world = self._settings, self._world
        self._validate()
        self._profiler.start()
        for epoch in range(settings.epochs):
            self._loader.sampler.set_epoch(epoch)
            for step in kd.microbatches(self._loader, settings.gradient_accumulation_steps, self._steps_per_epoch):
                sums = kd.accumulate_gradients(
                    self._student,
                    self._teacher,
                    step,
                    self._log.wants(self._global_step + 1),
                    self._kd_loss.ignore_index,
                    world,
                )
                grad_norm = kd.gradient_norm(self._trainable, settings.clip_grad_norm)
                lr = self._optimizer.param_groups[0]["lr"]
                self._optimizer.step()
                self._optimizer.zero_grad(set_to_none=True)
                if self._lr_scheduler is not None:
                    self._lr_scheduler.step()
                self._global_step += 1
                self._log.log_step(self._global_step, epoch, sums, lr, grad_norm)
                if kd.validation_due(self._global_step, self._total_steps, settings):
                    self._validate()
                self._profiler.step()
            self.save_checkpoint(epoch)
            self._log.restart_clock()
        self._profiler.stop()

    def save_checkpoint(self, epoch: int) -> None:
        """Merged weights in the checkpointer's format, and the adapters alone where there are any."""
        kd.save_epoch(self._student, self._checkpointer, self._cfg, self._settings, self._world, epoch)

    def cleanup(self) -> None:
        self._log.close()

    def _validate(self) -> None:
        if self._val_loader is None:
            return
        values = kd.evaluate(
            self._student,
            self._teacher,
            self._val_loader,
            kd.validation_metrics(self._settings),
            self._world,
            max_batches=self._settings.max_val_batches,
        )
        self._log.log_validation(self._global_step, values)


@config.parse
@kd.one_sentence
def recipe_main(cfg: DictConfig) -> None:
    """Values come from the YAML file first, then from ``key=value`` on the command line."""
    config.log_config(recipe_name="KDRecipeSingleDevice", cfg=cfg)
    recipe = KDRecipeSingleDevice(cfg=cfg)
    recipe.setup(cfg=cfg)
    recipe.train()
    recipe.cleanup()


if __name__ == "__main__":
    sys.exit(recipe_main())
