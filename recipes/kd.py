"""Knowledge distillation on one device, or on several processes and nodes with FSDP2:

``tune run torchtune_kd/kd_single_device --config ...``
``tune run --nproc_per_node 2 torchtune_kd/kd_distributed --config ...``
"""

import sys

import torchtune_kd.training as kd  # first: it says in one sentence when torchtune cannot be imported

# isort: split
from omegaconf import DictConfig
from torchtune import config

from torchtune_kd.plan import out_of_memory_explained


class KDRecipe:
    """Distil a teacher into a student.

    For one optimizer step with V its non-ignored tokens over all microbatches of all processes, the gradient is that of

        L = 1/|V| Σ_{i∈V} [ (1-α) CE_i + α T² D(p_T,i, q_T,i) ],    α = ``kd_ratio``, T = ``kd_loss.temperature``

    so the same tokens give the same gradient however they are split. The student is what ``model._component_`` builds:
    all weights train, or its LoRA, DoRA or QLoRA adapters. The teacher runs first and only its last hidden states are
    kept; logits exist one chunk at a time.

    On several processes (one per device; CUDA with NCCL, CPU with gloo) both models are sharded with FSDP2 over all of
    them or, where ``data_parallel_replicate_dim`` says so, over those of one node, so that across nodes only gradients
    travel. They are reduced once per step, in the backward of its last microbatch.

    Args:
        cfg (DictConfig): the parsed config; ``torchtune_kd/config/settings.py`` lists every key.

    Raises:
        UserError: before training, in one sentence, for whatever in config, files or data cannot work.
    """

    def __init__(self, cfg: DictConfig) -> None:
        self._config = kd.read_config(cfg)
        self._world = kd.join_world(self._config.settings)
        self._run: kd.Run | None = None

    def setup(self) -> None:
        """Check what can be checked without weights, then build data, models and optimizer."""
        self._run = kd.set_up(self._config, self._world)

    def train(self) -> None:
        """Take every step that is left; a resumed run enters where it stood."""
        run = self._run
        with out_of_memory_explained(run), kd.running(run):
            for epoch in run.epochs():
                for microbatches in kd.steps(run, epoch):
                    self.train_step(run, microbatches)
                    kd.validate_if_due(run)
                    kd.checkpoint_if_due(run)
                kd.export_epoch(run, epoch)

    def train_step(self, run: kd.Run, microbatches: list[kd.Batch]) -> None:
        """Take one optimizer step."""
        step = kd.begin_step(run, microbatches)  # |V| over all processes
        for batch in step:
            # teacher, then student and loss (models/student.py): sums over the valid tokens; no name keeps the signal
            loss, sums = run.student(batch, run.teacher.signal(batch), step.metrics)
            step.backward(loss, sums)  # of loss · W / |V| on W processes
        kd.finish_step(run, step)  # norm, clip, skip if not finite, update, schedule, log

    def cleanup(self) -> None:
        """Finish what is being written, and drop the models before the process group is left."""
        if self._run is not None:
            self._run.close()
            self._run = None
        kd.leave_process_group()


@kd.command
def recipe_main(cfg: DictConfig) -> None:
    """Values come from the YAML file first, then from ``key=value`` on the command line."""
    config.log_config(recipe_name="KDRecipe", cfg=cfg)
    with kd.report_errors() as cleanup:
        cleanup.callback(kd.leave_process_group)  # also if the next line fails
        recipe = KDRecipe(cfg=cfg)
        cleanup.callback(recipe.cleanup)
        recipe.setup()
        recipe.train()


if __name__ == "__main__":
    sys.exit(recipe_main())
