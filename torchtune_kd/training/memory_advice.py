"""stub to be replaced below"""

import contextlib


@contextlib.contextmanager
def explained(run, step):
    yield
