"""Text from torchtune decoders."""

from torchtune_kd._torchtune import prepare_import

prepare_import()
