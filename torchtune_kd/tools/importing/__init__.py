"""Turn what other projects stored of a teacher into a cache: the program of ``torchtune_kd.tools.import_cache``."""

from torchtune_kd.tools.importing.request import Options, Request, read_request
from torchtune_kd.tools.importing.run import import_cache

__all__ = ["Options", "Request", "import_cache", "read_request"]
