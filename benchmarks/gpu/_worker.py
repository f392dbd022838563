"""One part of a section in a process of its own: ``python -m benchmarks.gpu._worker JOB.json``."""

import json
import sys
import traceback
from pathlib import Path

from ._job import Job, Skip, write_rows
from ._sections import find


def main(file: str) -> int:
    job = Job(**json.loads(Path(file).read_text()))
    emit = write_rows(job)
    try:
        find(job.section).module.run(job, emit)
    except Skip as reason:
        emit({"skipped": str(reason)})
    except Exception as error:
        traceback.print_exc()
        emit({"failed": f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"})
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
