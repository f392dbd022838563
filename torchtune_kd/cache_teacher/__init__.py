"""Write what a teacher says about the documents of a config: the program behind ``torchtune_kd/cache_teacher``."""

from torchtune_kd.cache_teacher.request import Request, read_request
from torchtune_kd.cache_teacher.run import write_cache

__all__ = ["Request", "read_request", "write_cache"]
