"""The folder works alone: copied under another name, beside the original, and loaded by Hugging Face `kernels`.

`tests/test_package.py` reads the imports of every file in it.
"""

import json
import os
import re
import shutil
import subprocess
import sys
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path

import pytest

KERNELS = Path(find_spec("torchtune_kd.kernels").origin).parent

# Starts every script below. `check` compares both functions of a module with the objective in fp64, written out.
PRELUDE = """
import sys
from pathlib import Path

import torch

def objective(s, t, labels):
    s, t = s.double(), t.double()
    valid = labels != -100
    log_p, log_q = (t / 2).log_softmax(-1), (s / 2).log_softmax(-1)
    kl = (log_p.exp() * (log_p - log_q)).sum(-1)
    ce = torch.nn.functional.cross_entropy(s[valid], labels[valid], reduction="none")
    return (0.25 * ce + 0.75 * 4 * kl[valid]).mean()

def check(module, backend):
    torch.manual_seed(0)
    hidden, teacher_hidden = torch.randn(5, 8, requires_grad=True), torch.randn(5, 16)
    head, teacher_head = torch.randn(50, 8, requires_grad=True), torch.randn(50, 16) / 4
    labels = torch.tensor([3, -100, 49, 0, -100])
    keywords = dict(temperature=2.0, kd_ratio=0.75, backend=backend)
    truth = objective(hidden @ head.T, teacher_hidden @ teacher_head.T, labels)
    expected = torch.autograd.grad(truth, (hidden, head))
    for loss in (
        module.softmax_kd_loss(hidden @ head.T, teacher_hidden @ teacher_head.T, labels, **keywords),
        module.linear_kd_loss(hidden, head, teacher_hidden, teacher_head, labels, **keywords),
    ):
        torch.testing.assert_close(loss.double(), truth, rtol=1e-5, atol=0)
        for got, wanted in zip(torch.autograd.grad(loss, (hidden, head)), expected):
            torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-6)
"""

# Raises where anything of torchtune or of this project is imported.
REFUSE = """
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("torchtune", "torchtune_kd", "torchao"):
            raise ImportError(f"{name} was imported")

sys.meta_path.insert(0, Refuse())
"""


def run(script, folder, **environment):
    """Run PRELUDE and `script` in a fresh process that starts in `folder` and interprets Triton."""
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"} | environment
    command = [sys.executable, "-W", "ignore", "-c", PRELUDE + script]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


@pytest.fixture
def copy(tmp_path):
    """A folder that holds a copy of the kernels under another name."""
    shutil.copytree(KERNELS, tmp_path / "kd_kernels", ignore=shutil.ignore_patterns("__pycache__"))
    return tmp_path


@pytest.mark.slow
@pytest.mark.parametrize("runs_on", ["torch", "triton"])
def test_a_copy_works_where_torchtune_cannot_be_imported(copy, runs_on):
    # PyTorch itself would load this project's plug-in otherwise
    run(REFUSE + f"import kd_kernels; check(kd_kernels, {runs_on!r})", copy, TORCH_DEVICE_BACKEND_AUTOLOAD="0")


def test_refusal_refuses(tmp_path):
    """The test above is empty where this one fails."""
    script = "\ntry: import torchtune\nexcept ImportError as e: print(e)"
    assert run(REFUSE + script, tmp_path, TORCH_DEVICE_BACKEND_AUTOLOAD="0") == "torchtune was imported\n"


@pytest.mark.slow
def test_a_copy_works_beside_the_original(copy):
    """Each registers operators of its own, and `torch.compile` keeps each in its graph."""
    script = """
import kd_kernels, torchtune_kd.kernels

s, t = torch.randn(4, 50, requires_grad=True), torch.randn(4, 50)
used = {}

def look(graph, inputs):
    used[name] = [str(node.target) for node in graph.graph.nodes if "softmax_kd" in str(node.target)]
    return graph

for name, module in {"copy": kd_kernels, "original": torchtune_kd.kernels}.items():
    check(module, "torch")
    check(module, "triton")
    compiled = torch.compile(lambda s: module.softmax_kd_loss(s, t), fullgraph=True, backend=look)
    loss = compiled(s)
    torch.testing.assert_close(loss, module.softmax_kd_loss(s, t))
    torch.testing.assert_close(torch.autograd.grad(loss, s), torch.autograd.grad(module.softmax_kd_loss(s, t), s))
    torch.compiler.reset()
print(*(name for names in used.values() for name in names))
"""
    assert run(script, copy).split() == ["kd_kernels.softmax_kd.default", "torchtune_kd_kernels.softmax_kd.default"]


def test_importing_the_kernels_is_light(tmp_path):
    """Neither Triton, whose import takes longer than all of ours, nor torchtune, nor the compiler."""
    script = """
before = set(sys.modules)
import torchtune_kd.kernels
new = set(sys.modules) - before
assert "torchtune_kd.kernels._api" in new
for heavy in ("triton", "torchtune", "torch._dynamo", "torch._inductor"):
    assert not any(name == heavy or name.startswith(heavy + ".") for name in new), heavy
assert "torchtune" not in sys.modules
"""
    run(script, tmp_path)


def test_metadata_names_a_module_of_its_own():
    """Hugging Face `kernels` imports the folder as the module `id`, after which operators are named."""
    fields = json.loads((KERNELS / "metadata.json").read_text())
    assert fields.keys() == {"name", "id", "version", "license", "python-depends", "backend"}
    assert re.fullmatch(r"[a-z][-a-z0-9]*[a-z0-9]", fields["name"])  # else `kernels` refuses it
    assert fields["id"].isidentifier()
    assert fields["id"] != "torchtune_kd_kernels"  # where the original registers its operators
    assert isinstance(fields["version"], int)
    assert fields["python-depends"] == []  # `kernels` knows few names here, not Triton's
    assert fields["backend"] == {"type": "cuda"}


@pytest.mark.skipif(
    "kernels" not in {dist.name for dist in metadata.distributions()},
    reason="the Hugging Face package `kernels` is not installed",
)
@pytest.mark.parametrize("layout", ["as it is", "in a build folder"])
def test_hugging_face_kernels_loads_the_folder(layout, tmp_path):
    folder, backend = KERNELS, ""
    if layout == "in a build folder":  # as a repository on the Hub holds it
        folder, backend = tmp_path / "repository", ", backend='cpu'"
        shutil.copytree(KERNELS, folder / "build" / "torch-cpu", ignore=shutil.ignore_patterns("__pycache__"))
    script = f"""
from kernels import get_local_kernel

kd = get_local_kernel(Path({str(folder)!r}){backend})
assert kd.__name__ == "torchtune_kd_kernels_v1" and "torchtune_kd.kernels" not in sys.modules
assert "softmax_kd_loss" in kd.__all__
check(kd, "torch")
check(kd, "triton")
import torchtune_kd.kernels
check(torchtune_kd.kernels, "torch")
"""
    run(script, tmp_path, HF_HUB_OFFLINE="1")
