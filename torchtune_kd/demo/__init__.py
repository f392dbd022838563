"""The first result: SmolLM2-135M distilled on a CPU, with a table and a picture."""

from torchtune_kd._warnings import silence_known_warnings

silence_known_warnings()  # before torchao is imported
