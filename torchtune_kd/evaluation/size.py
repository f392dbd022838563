"""How large a model is: parameters, and bytes with the embedding counted."""

from torch import Tensor, nn

from torchtune_kd.evaluation.candidates import Candidate
from torchtune_kd.evaluation.measured import Measured


def measure_size(candidate: Candidate) -> list[Measured]:
    """Count weights, their bytes in memory and on disk, and how many of these are tables: embedding and head.

    A tied table counts once. For small models the table is a third of the weights, so a size without it misleads.
    """
    decoder = candidate.decoder
    tables = {id(tensor): tensor for tensor in (*decoder.tok_embeddings.parameters(), *_own(decoder.output))}
    return [
        Measured("parameters", sum(parameter.numel() for parameter in decoder.parameters())),
        Measured("weight_bytes", sum(map(_bytes, decoder.parameters()))),
        Measured("table_bytes", sum(map(_bytes, tables.values()))),
        Measured("file_bytes", sum(file.stat().st_size for file in candidate.source.files)),
    ]


def _own(output: object) -> list[Tensor]:
    return list(output.parameters()) if isinstance(output, nn.Module) else []  # a tied head has none


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()
