"""What is measured: one case is one operation at one shape; a plan is a list of them, the most important first.

Legend: N tokens, V vocabulary.
"""

from typing import NamedTuple

LLAMA, SMOLLM2, QWEN, GPT2 = 128256, 49152, 151936, 50257  # vocabularies
MEMORY_TOKENS = (32768, 65536)  # ours alone, in the linear operation


class Case(NamedTuple):
    """One operation at one shape. The defaults are the main line on a GPU."""

    op: str = "softmax"  # or "linear"
    tokens: int = 8192  # N
    vocab: int = LLAMA  # V
    divergence: str = "forward_kl"
    kd_ratio: float = 0.5
    temperature: float = 1.0
    ignored: float = 0.0
    gradient: bool = True
    trainable_head: bool = False
    labels_on_device: bool = False  # linear only: ours finds the valid tokens where the labels are
    widths: tuple[int, int] = (2048, 4096)  # student, teacher; linear only
    peers: str = "all"  # "few": on a GPU without those that the main line shows to be slower; "none": ours alone
    metrics: str = ""  # "kl", or "all" of them: of ours alone

    @property
    def n_ignored(self) -> int:
        return round(self.tokens * self.ignored)

    @property
    def n_valid(self) -> int:
        return self.tokens - self.n_ignored

    @property
    def name(self) -> str:
        """Return what `--only` searches and the report prints."""
        loss = self.divergence + (f" + {1 - self.kd_ratio:g} CE" if self.kd_ratio < 1 else "")
        parts = [self.op, loss, f"N={self.tokens}", f"V={self.vocab}", f"T={self.temperature:g}"]
        parts += [f"{self.ignored:.0%} ignored"]
        if self.op == "linear":
            parts += ["trainable head" if self.trainable_head else "frozen head"]
            parts += [f"widths {self.widths[0]}/{self.widths[1]}"]
        if self.labels_on_device:
            parts += ["labels on the device"]
        if self.metrics:
            parts += ["all metrics" if self.metrics == "all" else f"metric {self.metrics}"]
        parts += ["with gradient" if self.gradient else "loss only"]
        return ", ".join(parts)


def plan(device: str, quick: bool = False) -> list[Case]:
    """The cases for a type of device, ``cuda`` or ``cpu``."""
    if device == "cuda":
        return _quick_gpu() if quick else _gpu()
    softmax = Case(tokens=128, vocab=SMOLLM2 if quick else LLAMA)
    linear = softmax._replace(op="linear", widths=(1024, 2048))
    return _quick_cpu(softmax, linear) if quick else _cpu(softmax, linear)


def _quick_gpu() -> list[Case]:
    """Those with a target."""
    softmax, linear = Case(), Case(op="linear")
    return [
        softmax,
        softmax._replace(temperature=2.0, peers="few"),
        softmax._replace(divergence="jsd", kd_ratio=1.0),
        linear,
        linear._replace(ignored=0.5, peers="few"),
        linear._replace(ignored=0.5, labels_on_device=True, peers="none"),
        *(linear._replace(tokens=tokens, peers="none") for tokens in MEMORY_TOKENS),
    ]


def _quick_cpu(softmax: Case, linear: Case) -> list[Case]:
    return [softmax, linear, linear._replace(ignored=0.5), linear._replace(divergence="jsd")]


def _gpu() -> list[Case]:
    softmax, linear = (Case(op=op, peers="few") for op in ("softmax", "linear"))
    alone = softmax._replace(temperature=2.0, peers="none")
    return [
        *_quick_gpu(),
        # one factor at a time, those first that differ most in what they compute
        linear._replace(trainable_head=True),
        alone._replace(divergence="jsd"),
        *(alone._replace(divergence=name) for name in ("skew_forward_kl", "skew_reverse_kl")),
        *(alone._replace(metrics=metrics) for metrics in ("kl", "all")),
        alone._replace(divergence="jsd", metrics="all"),
        linear._replace(temperature=2.0),
        linear._replace(divergence="jsd"),
        *(alone._replace(divergence=name) for name in ("reverse_kl", "symmetric_kl", "tvd")),
        *(case._replace(tokens=1024) for case in (softmax, linear)),
        softmax._replace(gradient=False),
        linear._replace(gradient=False),
        softmax._replace(divergence="jsd", kd_ratio=1.0, gradient=False),
        *(softmax._replace(ignored=share) for share in (0.5, 0.8)),
        linear._replace(ignored=0.8),
        *(softmax._replace(vocab=vocab) for vocab in (SMOLLM2, QWEN, GPT2)),
        *(linear._replace(vocab=vocab) for vocab in (SMOLLM2, QWEN)),
        *(case._replace(tokens=tokens) for case in (softmax, linear) for tokens in (4096, 16384)),
        softmax._replace(divergence="reverse_kl"),
    ]


def _cpu(softmax: Case, linear: Case) -> list[Case]:
    """The variations are of a smaller case than the main line: process after process, that is what fits."""
    main = _quick_cpu(softmax, linear)
    softmax, linear = (case._replace(tokens=64, vocab=SMOLLM2) for case in (softmax, linear))
    return [
        *main,
        *(case._replace(tokens=256) for case in main[:2]),
        # one factor at a time
        softmax,
        linear,
        linear._replace(trainable_head=True),
        softmax._replace(gradient=False),
        linear._replace(gradient=False),
        *(softmax._replace(ignored=share) for share in (0.5, 0.8)),
        linear._replace(ignored=0.8),
        *(case._replace(temperature=2.0) for case in (softmax, linear)),
        softmax._replace(divergence="reverse_kl"),
        softmax._replace(divergence="symmetric_kl"),
        softmax._replace(divergence="jsd", kd_ratio=1.0),
        *(softmax._replace(metrics=metrics, temperature=2.0, peers="none") for metrics in ("kl", "all")),
        softmax._replace(vocab=QWEN),
        linear._replace(vocab=QWEN),
    ]
