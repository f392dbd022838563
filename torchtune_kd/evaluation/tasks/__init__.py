"""Multiple-choice tasks that need no network, and how a task is found by its name."""

from torchtune_kd.evaluation.tasks.items import Item, read_items
from torchtune_kd.evaluation.tasks.names import BUILT_IN, check_task, items_of

__all__ = ["BUILT_IN", "Item", "check_task", "items_of", "read_items"]
