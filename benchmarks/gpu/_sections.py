"""The sections in their order, and their shares of the time."""

import importlib
from types import ModuleType
from typing import NamedTuple

REHEARSAL_MINUTES = 2.0
OVERHEAD = 0.4  # minutes between the sections and after them


class Section(NamedTuple):
    """One section of the report.

    Attributes:
        name (str): of its module here, and in ``--sections``.
        minutes (float): that it has; what one leaves over goes to those after it. A rehearsal has one limit.
        parallel (bool): its parts, and those of the next section, may run at the same time: nothing is timed.
    """

    name: str
    minutes: float
    parallel: bool = False

    @property
    def module(self) -> ModuleType:
        """Module with ``TITLE``, ``PARTS``, ``run``, ``problems`` and ``render``."""
        return importlib.import_module(f"{__package__}.{self.name}")


# The losses come last: they take whatever time there is. On an H200 the machine took 6 s, the kernels and the
# plan a minute, and a run of the steps 50 s, most of it to start.
SECTIONS = (
    Section("machine", 0.4),
    Section("plan", 1.0, parallel=True),
    Section("waits", 1.2, parallel=True),
    Section("kernels", 1.5, parallel=True),
    Section("steps", 3.2),
    Section("losses", 2.5),
)


def minutes_of(group: list[Section]) -> float:
    """Return what sections that run at the same time have."""
    return max(section.minutes for section in group)


def find(name: str) -> Section:
    return next(section for section in SECTIONS if section.name == name)


def groups(names: list[str] | None, together: bool = False) -> list[list[Section]]:
    """Return the wanted sections, those that may run together in one list; the machine always comes first.

    The steps are compared with their plan, so that comes with them. ``together``: nothing is timed, so that all but the
    machine may run together.
    """
    wanted = None if names is None else {"machine", *names, *(("plan",) if "steps" in names else ())}
    chosen = [section for section in SECTIONS if wanted is None or section.name in wanted]
    result: list[list[Section]] = []
    for section in chosen:
        if together and section.name != "machine":
            section = section._replace(parallel=True)
        if section.parallel and result and result[-1][-1].parallel:
            result[-1].append(section)
        else:
            result.append([section])
    return result


MINUTES = OVERHEAD + sum(map(minutes_of, groups(None)))  # for all of them
