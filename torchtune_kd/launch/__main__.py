"""Copy what starts a run on several nodes: ``python -m torchtune_kd.launch FOLDER``."""

import argparse
import shutil
from collections.abc import Sequence
from pathlib import Path

FILES = ("kd_multinode.slurm", "kd_pytorchjob.yaml")


def main(argv: Sequence[str] | None = None) -> None:
    """Copy the SLURM script and the Kubernetes manifest, to be edited."""
    parser = argparse.ArgumentParser(prog="python -m torchtune_kd.launch", description=main.__doc__)
    parser.add_argument("folder", type=Path, help="an existing folder; no file in it is replaced")
    folder = parser.parse_args(argv).folder
    if not folder.is_dir():
        parser.error(f"expected an existing folder, but {folder} is none: make it or name another")
    for name in FILES:
        if (folder / name).exists():
            parser.error(f"{folder / name} is there already: move it away or name another folder")
    for name in FILES:
        shutil.copy(Path(__file__).parent / name, folder / name)
        print(folder / name)


if __name__ == "__main__":
    main()
