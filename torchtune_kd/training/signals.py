"""SIGTERM, SIGINT and SIGUSR1 ask a run to end with a checkpoint; asked again, it ends at once.

torchrun's agent passes on what it gets, so a worker whose whole process group was signalled (Ctrl-C, ``scancel``)
hears of it twice at nearly the same time. Signals within :data:`ONE_REQUEST` of the first are therefore one request.
"""

import os
import signal
import socket
import threading
import time
from types import FrameType
from typing import Any

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
ONE_REQUEST = 1.0  # seconds


class StopRequests:
    """Listens for :data:`SIGNALS` inside ``with``; ``name`` is the first that came, or None.

    The interpreter writes each signal's number into a socket at once, even while the main thread is inside a
    collective that never returns, and a thread of ours reads it there. A Python handler would wait for that thread.
    """

    def __init__(self) -> None:
        self.name: str | None = None
        self._since = 0.0

    @property
    def pending(self) -> bool:
        return self.name is not None

    def __enter__(self) -> "StopRequests":
        self._before: dict[int, Any] = {}
        if threading.current_thread() is not threading.main_thread():
            return self  # only the main thread may install handlers; whoever runs us in another one handles signals
        self._reader, self._writer = socket.socketpair()
        self._writer.setblocking(False)
        self._wakeup_before = signal.set_wakeup_fd(self._writer.fileno(), warn_on_full_buffer=False)
        self._thread = threading.Thread(target=self._listen, name="stop-requests", daemon=True)
        self._thread.start()
        for number in SIGNALS:
            self._before[number] = signal.signal(number, _noted_by_the_thread)
        return self

    def __exit__(self, *_: object) -> None:
        if not self._before:
            return
        for number, handler in self._before.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._wakeup_before)
        self._writer.close()  # ends the thread
        self._thread.join()
        self._reader.close()

    def _listen(self) -> None:
        while received := self._reader.recv(1):
            number = received[0]
            if number not in SIGNALS:
                continue
            if self.name is None:
                self.name, self._since = signal.Signals(number).name, time.monotonic()
            elif time.monotonic() - self._since > ONE_REQUEST:
                os._exit(128 + number)


def _noted_by_the_thread(number: int, frame: FrameType | None) -> None:
    """Without a handler written in Python the interpreter would not write into the socket."""
