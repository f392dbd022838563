"""What a run will need, from its config alone: ``tune run torchtune_kd/plan``.

Models are built on the meta device and one microbatch of the real step runs there, so the figures follow the code:
:mod:`.dry_run` (the step), :mod:`.dry_teachers` (whom it asks), :mod:`.memory`, :mod:`.communication` (FSDP2's buffers
and traffic), :mod:`.timing` (a roofline over :mod:`.devices`), :mod:`.planner` (all of it), :mod:`.each_teacher`, and
:mod:`.report` (text and JSON).
"""

from torchtune_kd.plan.advice import out_of_memory_explained
from torchtune_kd.plan.communication import Layout
from torchtune_kd.plan.each_teacher import TeacherPlan
from torchtune_kd.plan.memory import Memory, fits, largest_batch, plan_memory
from torchtune_kd.plan.meta_models import Models, build_models, count_parameters
from torchtune_kd.plan.planner import RunPlan, plan_run
from torchtune_kd.plan.report import as_dict, as_text
from torchtune_kd.plan.request import Request, read_request

__all__ = [
    "Layout",
    "Memory",
    "Models",
    "Request",
    "RunPlan",
    "TeacherPlan",
    "as_dict",
    "as_text",
    "build_models",
    "count_parameters",
    "fits",
    "largest_batch",
    "out_of_memory_explained",
    "plan_memory",
    "plan_run",
    "read_request",
]
