"""Two processes that fail, each in another way, while their cleaning up waits or fails; see test_errors.py."""

import time

import torch.distributed as dist

from torchtune_kd import errors
from torchtune_kd.training import RunError, UserError, report_errors


def fail() -> None:
    raise RuntimeError("the connection is closed")


def recipe_main() -> None:
    errors.CLEANUP_LIMIT = 1.0
    with report_errors() as cleanup:
        if dist.get_rank() == 0:
            cleanup.callback(time.sleep, 600)
            raise RunError("The memory of cuda:0 ran out.")
        cleanup.callback(fail)
        raise UserError("A file is missing on this node.")
