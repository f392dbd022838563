"""Distillation losses, ours and everyone else's, on whatever device there is: time, bound, memory, error.

    python -m benchmarks.losses              # all cases; at most 9 minutes
    python -m benchmarks.losses --quick      # few cases; at most 2 minutes
    python -m benchmarks.losses --llama      # on a CPU: torchtune's stock path and ours at the Llama 3 shape
    python -m benchmarks.losses --list       # the cases, the implementations, and which of them cannot run here
    python -m benchmarks.losses --only linear --implementations ours liger

Two operations: `softmax` goes from given logits to the gradient of the student's, `linear` from hidden states to the
gradient of the student's. The cases are a main line and variations of one factor at a time, not the full product.
Main line: bf16, V = 128256 (Llama 3), forward KL and cross-entropy half each, T = 1, nothing ignored, frozen heads of
widths 2048 (1B) and 4096 (8B), over N tokens. Variations: V, T, share of ignored tokens, divergence, metrics, loss
without gradient, trainable head, where the labels are; and memory alone for very large N. On a CPU N and widths are
smaller. On a GPU our kernels are measured in all cases before the first peer, since peers that compile for each shape
take most of the time.

Where an implementation lacks something a case asks for (temperature, cross-entropy, ignored tokens), it does what it
can and a note says so; that flatters it. One that cannot run is named with the reason.

**Time** is the median of at least three calls after a warm-up, forward and backward, with a cache flush larger than the
L2 cache before each. On a GPU CUDA events are the clock and the calls are queued without waiting in between, as in
training; beside it stands how long the host takes to queue one. On a CPU each implementation is a process of its own,
and beside its time stands the CPU time of all threads; where others use the machine too, set OMP_NUM_THREADS=1 and
compare that. **Bound**: of softmax operations the bytes that the passes of the mathematics move at the copy bandwidth
measured first; of linear ones the operations of the unavoidable matrix products at the measured bf16 rate, or their
bytes where these take longer (see `_counts.py`); and, of our kernels on a GPU, the instructions that their loops issue,
at the clock that was measured. A kernel whose second pass finds its row in the cache can exceed 100 %. Targets are
shares of the first two, and none asks for more than the device has. **Extra memory** is the high-water mark during a
call above the inputs and the gradients it returns. **Errors** are against fp64: the loss over all tokens, the gradient
in the first 16; most of what linear ones show is the rounding of logits to bf16, which nearly all share.
"""
