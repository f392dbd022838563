"""Time small bf16 products in this process; a script, since the package ``benchmarks`` sets OMP_WAIT_POLICY."""

import sys
import time

import torch

TOKENS, WIDTH, INNER = 256, 576, 1536  # of a layer of SmolLM2-135M


def main(seconds: float) -> None:
    x = torch.randn(TOKENS, WIDTH, dtype=torch.bfloat16)  # [N, D]
    up = torch.randn(INNER, WIDTH, dtype=torch.bfloat16) / WIDTH**0.5  # [I, D]
    down = torch.randn(WIDTH, INNER, dtype=torch.bfloat16) / INNER**0.5  # [D, I]

    def iteration() -> None:
        h = x
        for _ in range(4):
            h = torch.nn.functional.linear(torch.nn.functional.silu(torch.nn.functional.linear(h, up)), down)

    iteration()
    count, start = 0, time.perf_counter()
    while (elapsed := time.perf_counter() - start) < seconds:
        iteration()
        count += 1
    print(elapsed / count)


if __name__ == "__main__":
    main(float(sys.argv[1]))
