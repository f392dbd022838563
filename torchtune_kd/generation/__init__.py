"""Text from torchtune decoders."""

from torchtune_kd._versions import check_versions
from torchtune_kd._warnings import silence_known_warnings

check_versions()  # before torchtune is imported: its own failure with a wrong torchao says nothing
silence_known_warnings()  # before torchao is imported, also where PyTorch loads no plug-ins
