"""The config of a run: every key, checked; components found and built; the command line."""

from torchtune_kd._torchtune import prepare_import

prepare_import()
