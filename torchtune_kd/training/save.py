"""Write checkpoints to go on with, and the weights of an epoch."""

from torchtune_kd.checkpoints.export import save_epoch
from torchtune_kd.checkpoints.resume import gather_state
from torchtune_kd.errors import Stopped
from torchtune_kd.training.run import Run


def checkpoint_if_due(run: Run) -> None:
    """Write ``step_<n>`` where the settings or a signal ask for it.

    Raises:
        Stopped: after a signal.
    """
    if run.stopping:
        run.saver.finish()  # if that one fails there is still time for another
    due = run.saver.is_due(run.progress, run.validation)
    missing = run.progress.global_step > 0 and not run.saver.is_written(run.progress)
    good = True
    if due or (run.stopping and missing):
        good = _write_checkpoint(run, wait=run.stopping)
    if run.stopping:
        step, name = run.progress.global_step, run.stop_requests.name or "a signal to another process"
        kept = f"its checkpoint is {run.saver.folder(step)}" if good and step else "no checkpoint of it is written"
        raise Stopped(f"{name} ended the run after step {step}; {kept}: go on with `resume_from_checkpoint=True`.")
    run.events.announce("between steps")


def export_epoch(run: Run, epoch: int) -> None:
    """Write the weights of an epoch; the time it takes is left out of the tokens per second.

    Where checkpoints are wanted one comes first: a run with an epoch and without a checkpoint could not go on. Once the
    time is up these are the weights of the last epoch, whichever it was, as if all had been done.
    """
    if run.time_is_up and epoch < run.settings.epochs - 1:
        return
    run.saver.finish()
    if run.settings.save_every_n_steps is not None and not run.saver.has_written:
        _write_checkpoint(run, wait=True)
    save_epoch(run.student, run.checkpointer, run.config, run.world, epoch, run.previous_run, run.events.announce)
    run.log.restart_clock()


def _write_checkpoint(run: Run, *, wait: bool) -> bool:
    run.progress.tokens = run.log.all_tokens()
    state = gather_state(run.student, run.optimizer, run.lr_scheduler, run.world, run.teacher.kept_state())
    good = run.saver.save(state, run.progress, run.validation, wait=wait)
    run.log.restart_clock()
    return good
