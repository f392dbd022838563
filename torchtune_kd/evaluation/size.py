"""Measure how large a model is: parameters, and bytes with the embedding counted."""

from torch import Tensor, nn
from torchtune.modules.peft import get_adapter_params

from torchtune_kd.evaluation.candidates import Candidate
from torchtune_kd.evaluation.measured import Measured


def measure_size(candidate: Candidate) -> list[Measured]:
    """Count weights, their bytes in memory and on disk, and how many of these are tables: embedding and head.

    A tied table counts once. For small models the table is a third of the weights, so a size without it misleads.
    """
    decoder, adapters = candidate.decoder, get_adapter_params(candidate.decoder)  # the files hold them merged
    weights = [parameter for name, parameter in decoder.named_parameters() if name not in adapters]
    tables = {id(tensor): tensor for tensor in (*decoder.tok_embeddings.parameters(), *_own(decoder.output))}
    return [
        Measured("parameters", sum(weight.numel() for weight in weights)),
        Measured("weight_bytes", sum(map(_bytes, weights))),
        Measured("table_bytes", sum(map(_bytes, tables.values()))),
        Measured("file_bytes", sum(file.stat().st_size for file in candidate.source.files)),
    ]


def _own(output: object) -> list[Tensor]:
    return list(output.parameters()) if isinstance(output, nn.Module) else []  # a tied head has none


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()
