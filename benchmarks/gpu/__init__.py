"""What only a GPU can confirm, in one command of at most 8 minutes that leaves one dated report.

    python -m benchmarks.gpu                             # on a CUDA device
    python -m benchmarks.gpu --sections kernels losses   # some of it
    python -m benchmarks.gpu --rehearse                  # tiny shapes on the CPU, in under two minutes

**kernels**: every divergence from logits and from hidden states against its formula in fp64, value and gradients, over
a grid of vocabularies, dtypes, temperatures and special values, with unwritten memory poisoned. Equal models give
exactly 0; in place equals out of place and repeated calls equal each other, to the bit; rows beyond 2^31 elements,
labels of any layout, metrics, ``torch.compile``, CUDA graphs and a process group. Tolerances are those of the tests:
the error of plain torch in the same dtype and one rounding.

**waits**: how often the host waits for the device in the loss functions and in a step, and where.

**steps**: steps of the true Llama 3.1 8B -> 3.2 1B shapes with random weights, from the shipped configs, LoRA and full
weights, torchtune's stock recipe beside the LoRA one: tokens per second, peak memory, and what ``torchtune_kd/plan``
predicts (**plan**).

**losses**: ``benchmarks.losses`` with the peers that are installed, as far as the rest of the time goes, the cases that
have a target first, and our kernels in all cases before any peer: time, bytes, instructions and matrix products, the
share of the largest bound that is reached, memory, error.

Each part runs in a process of its own with a share of the time. What is missing skips a section with a sentence, a
failure in one does not stop the next, and the report on disk is whole after each. ``benchmarks/README.md`` says what
has to be installed for which.
"""
