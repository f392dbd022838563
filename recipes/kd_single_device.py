"""Knowledge distillation on one device: ``tune run torchtune_kd/kd_single_device --config ...``."""

import sys
from typing import Any

import torchtune_kd.training as kd  # first: it says in one sentence when torchtune cannot be imported

# isort: split
from omegaconf import DictConfig
from torchtune import config
from torchtune.recipe_interfaces import FTRecipeInterface

from torchtune_kd.plan import out_of_memory_explained


class KDRecipeSingleDevice(FTRecipeInterface):
    """Distil a teacher into a student on one device (CUDA or CPU, fp32 or bf16).

    For one optimizer step with V its non-ignored tokens over all microbatches, the gradient is that of

        L = 1/|V| Σ_{i∈V} [ (1-α) CE_i + α T² D(p_T,i, q_T,i) ],    α = ``kd_ratio``, T = ``kd_loss.temperature``

    The student is what ``model._component_`` builds: all weights train, or its LoRA, DoRA or QLoRA adapters. The
    teacher runs first and only its last hidden states are kept; logits exist one chunk at a time.

    Args:
        cfg (DictConfig): the parsed config; ``torchtune_kd/config/settings.py`` lists every key.

    Raises:
        UserError: before training, in one sentence, for whatever in config, files or data cannot work.
    """

    def __init__(self, cfg: DictConfig) -> None:
        self._settings = kd.read_settings(cfg, distributed=False)
        self._world = kd.single_process(self._settings.device)
        self._run: kd.Run | None = None

    def load_checkpoint(self, cfg_checkpointer: DictConfig) -> dict[str, Any]:
        """The weights that a checkpointer reads, by torchtune's parameter names."""
        return kd.load_weights(cfg_checkpointer, "checkpointer")[1]

    def setup(self, cfg: DictConfig) -> None:
        """Check what can be checked without weights, then build data, models and optimizer."""
        self._run = kd.set_up(cfg, self._settings, self._world)

    def train(self) -> None:
        """The training loop: one pass of the inner loop is one optimizer step. A resumed run enters where it stood."""
        run = self._run
        with run.stop_requests, out_of_memory_explained(run):
            kd.validate_if_due(run)
            kd.checkpoint_if_due(run)
            run.profiler.start()
            for epoch in range(run.progress.epoch, run.settings.epochs):
                for step in kd.steps(run, epoch):
                    kd.optimizer_step(run, step, epoch)
                    kd.validate_if_due(run)
                    kd.checkpoint_if_due(run)
                self.save_checkpoint(epoch)
            run.profiler.stop()

    def save_checkpoint(self, epoch: int) -> None:
        """Merged weights in the checkpointer's format, and the adapters alone where there are any."""
        kd.save(self._run, epoch)

    def cleanup(self) -> None:
        if self._run is not None:
            self._run.close()


@kd.command
def recipe_main(cfg: DictConfig) -> None:
    """Values come from the YAML file first, then from ``key=value`` on the command line."""
    config.log_config(recipe_name="KDRecipeSingleDevice", cfg=cfg)
    with kd.report_errors() as cleanup:
        recipe = KDRecipeSingleDevice(cfg=cfg)
        cleanup.callback(recipe.cleanup)
        recipe.setup(cfg=cfg)
        recipe.train()


if __name__ == "__main__":
    sys.exit(recipe_main())
