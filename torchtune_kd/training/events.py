"""What a run announces while it goes on, for whoever wants to follow it or to interfere."""

from collections.abc import Callable

EVENTS = (
    "epoch",  # before its first step
    "step",  # before its first microbatch
    "microbatch",  # before its forward, in training
    "gradients",  # complete, before their norm is taken
    "update",  # after it, schedule and log included
    "validation",  # before its first batch
    "save",  # before a checkpoint is written
    "manifest",  # of a checkpoint, before it is written: the shards are there
    "rename",  # before a checkpoint or an export takes its name
    "export",  # before the weights of an epoch are gathered
    "between steps",  # after validation and checkpoint, where they were due
)


class Events:
    """Calls the listeners of an event, in their order, in the thread that announces it."""

    def __init__(self) -> None:
        self._listeners: dict[str, list[Callable[[], None]]] = {event: [] for event in EVENTS}

    def on(self, event: str, listener: Callable[[], None]) -> None:
        """Call ``listener`` whenever ``event`` is announced; what it raises ends the run.

        Raises:
            ValueError: if there is no such event.
        """
        if event not in self._listeners:
            raise ValueError(f"Expected an event out of {', '.join(EVENTS)}, got {event!r}: name one of them.")
        self._listeners[event].append(listener)

    def announce(self, event: str) -> None:
        """Tell the listeners of ``event``."""
        for listener in self._listeners[event]:
            listener()
