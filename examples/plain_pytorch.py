"""Distil a tiny language model into a smaller one in plain PyTorch: `python examples/plain_pytorch.py`.

Both read sequences in which a token mostly decides the next one. The teacher learns them from the labels, then the
student learns from the teacher. `linear_kd_loss` takes hidden states and output heads: logits of all tokens never
exist at once. Legend: B sequences, S tokens of each, V vocabulary, D hidden width.
"""

import argparse

import torch
from torch import Tensor, nn

from torchtune_kd.kernels import linear_kd_loss

VOCAB = 512
IGNORED = -100


class TinyLM(nn.Module):
    """An embedding, one recurrent layer and an output head."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCAB, width)
        self.body = nn.GRU(width, width, batch_first=True)
        self.head = nn.Linear(width, VOCAB, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        """Hidden states ``[B, S, D]`` of tokens ``[B, S]``; the loss applies the head."""
        return self.body(self.embed(tokens))[0]


def batch(device: str, sequences: int = 16, length: int = 33) -> tuple[Tensor, Tensor]:
    """Inputs and labels ``[B, S]``: each label is the next token, except in a prompt of random length."""
    tokens = torch.randint(VOCAB, (sequences, length))
    for i in range(1, length):
        follows = torch.rand(sequences) < 0.9
        tokens[follows, i] = (3 * tokens[follows, i - 1] + 7) % VOCAB
    labels = tokens[:, 1:].clone()
    prompt = torch.randint(length // 2, (sequences, 1))
    labels[torch.arange(length - 1) < prompt] = IGNORED
    # The labels stay on the CPU: there the loss finds the valid tokens without waiting for the device.
    return tokens[:, :-1].to(device), labels


def train_teacher(teacher: TinyLM, steps: int, device: str) -> None:
    optimizer = torch.optim.AdamW(teacher.parameters(), lr=1e-2)
    for _ in range(steps):
        tokens, labels = batch(device)
        loss = linear_kd_loss(teacher(tokens), teacher.head.weight, None, None, labels, kd_ratio=0.0)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def distil(student: TinyLM, teacher: TinyLM, steps: int, device: str) -> list[float]:
    """Train the student; returns KL(teacher‖student) per token at T = 1, one number for each step."""
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-2)
    history = []
    for step in range(steps):
        tokens, labels = batch(device)
        with torch.no_grad():
            teacher_hidden = teacher(tokens)
        loss, metrics = linear_kd_loss(
            student(tokens),
            student.head.weight,
            teacher_hidden,
            teacher.head.weight.detach(),
            labels,
            divergence="forward_kl",
            temperature=2.0,
            kd_ratio=0.5,
            return_metrics=("kl", "top1_agreement"),
        )
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        kl, agreement = (metrics[name] / metrics["num_tokens"] for name in ("kl", "top1_agreement"))
        history.append(kl)
        if step % max(1, steps // 10) == 0 or step == steps - 1:
            print(f"step {step:4d}  loss {loss:.3f}  kl {kl:.3f}  top1_agreement {agreement:.2f}")
    return torch.stack(history).tolist()


def main(arguments: list[str] | None = None) -> list[float]:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--steps", type=int, default=100, help="of each of the two trainings")
    args = parser.parse_args(arguments)
    torch.manual_seed(0)
    teacher, student = TinyLM(128).to(args.device), TinyLM(48).to(args.device)
    train_teacher(teacher, args.steps, args.device)
    return distil(student, teacher.requires_grad_(False), args.steps, args.device)


if __name__ == "__main__":
    main()
