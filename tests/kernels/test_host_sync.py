"""No code that a GPU's tensors go through makes the host wait for their values: read from the source.

A value of a tensor is read by ``.item()`` and its like, by a Python branch on a tensor, and by an index of booleans,
whose length is its count. Code behind ``host_can_read``, which is true on the CPU alone, may do all that, and a
line of ``linear_kd_loss`` asks for the number of valid tokens. The operations that the calls really make are counted in
test_host_waits.py.
"""

import ast
from pathlib import Path

import pytest

import torchtune_kd.kernels as kernels

FOLDER = Path(kernels.__file__).parent
GUARD = "host_can_read"

# Methods, or functions of torch, that hand a value to the host.
READS = {"item", "cpu", "tolist", "numpy", "nonzero", "argwhere", "unique", "masked_select", "is_nonzero", "equal"}
READS |= {"allclose", "synchronize", "repeat_interleave", "bincount"}
# What a tensor tells without its values.
METADATA = {"shape", "dtype", "device", "ndim", "requires_grad", "is_cuda", "dim", "numel", "size", "stride", "nbytes"}
METADATA |= {
    "element_size",
    "is_contiguous",
    "is_meta",
    "is_floating_point",
    "is_complex",
    "is_inference",
    "type",
    "grad_fn",
}
HOST_FUNCTIONS = {"len", "isinstance", "type", "hasattr", "getattr", "range", "id"}
HOST_FUNCTIONS |= {"Walk", "_is_batch", "resolve_backend"}
# Functions of torch whose results are no tensors.
NO_TENSORS = {"compiler", "cuda", "is_grad_enabled", "is_autocast_enabled", "get_autocast_dtype", "finfo", "Size"}


class Function(ast.NodeVisitor):
    """Notes in ``found`` where one function reads values; ``tensors`` and ``masks`` are the names it knows as such."""

    def __init__(self, node: ast.FunctionDef) -> None:
        self.found: list[str] = []
        arguments = (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)
        annotated = [(a.arg, ast.unparse(a.annotation)) for a in arguments if a.annotation is not None]
        self.tensors = {name for name, kind in annotated if kind in ("Tensor", "Tensor | None", "torch.Tensor")}
        self.masks: set[str] = set()
        self.lists: set[str] = set()  # of tensors: whether one is empty is no secret
        self.walk(node.body)

    def walk(self, statements: list[ast.stmt]) -> None:
        """In order; leaves out what a guard keeps from tensors of a GPU."""
        for statement in statements:
            if isinstance(statement, ast.If) and (kind := _guard(statement.test)):
                if kind == "CPU":
                    self.walk(statement.orelse)
                    continue
                self.walk(statement.body)
                if isinstance(statement.body[-1], (ast.Return, ast.Raise)):
                    return  # the rest is for the CPU
                continue
            self.visit(statement)

    def is_tensor(self, node: ast.AST) -> bool:
        """Return whether the expression is or holds a tensor, as far as names tell."""
        if isinstance(node, ast.Name):
            return node.id in self.tensors
        if isinstance(node, ast.Attribute):
            return node.attr not in METADATA and self.is_tensor(node.value)
        if isinstance(node, ast.Compare):
            strings = any(isinstance(c, ast.Constant) and isinstance(c.value, str) for c in node.comparators)
            if strings or any(isinstance(op, (ast.Is, ast.IsNot, ast.In, ast.NotIn)) for op in node.ops):
                return False
        if isinstance(node, ast.Call):
            name = ast.unparse(node.func)
            if name in HOST_FUNCTIONS or name.split(".")[-1] in METADATA:
                return False
            if name.startswith("torch."):
                return name.split(".")[1] not in NO_TENSORS
        if isinstance(node, (ast.GeneratorExp, ast.ListComp)):
            for each in node.generators:
                if self.is_tensor(each.iter):
                    self.tensors |= {name.id for name in ast.walk(each.target) if isinstance(name, ast.Name)}
            return self.is_tensor(node.elt)
        return any(self.is_tensor(child) for child in ast.iter_child_nodes(node))

    def is_list(self, node: ast.AST) -> bool:
        if isinstance(node, ast.Name):
            return node.id in self.lists
        return isinstance(node, (ast.List, ast.ListComp, ast.Tuple, ast.GeneratorExp))

    def is_mask(self, node: ast.AST) -> bool:
        if isinstance(node, ast.Name):
            return node.id in self.masks
        if isinstance(node, ast.UnaryOp):
            return isinstance(node.op, ast.Invert) and self.is_tensor(node.operand)
        if isinstance(node, ast.BinOp) and isinstance(node.op, (ast.BitAnd, ast.BitOr)):
            return self.is_mask(node.left) or self.is_mask(node.right)
        if isinstance(node, ast.IfExp):
            return self.is_mask(node.body) or self.is_mask(node.orelse)
        return isinstance(node, ast.Compare) and self.is_tensor(node)

    def note(self, node: ast.AST) -> None:
        self.found.append(f"line {node.lineno}: {ast.unparse(node).splitlines()[0]}")

    def branch(self, node: ast.AST) -> None:
        if self.is_tensor(node) and not self.is_list(node):
            self.note(node)

    def visit_Assign(self, node: ast.Assign) -> None:
        self.generic_visit(node)
        for target in node.targets:
            for name in (n.id for n in ast.walk(target) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)):
                kinds = (self.tensors, self.is_tensor), (self.masks, self.is_mask), (self.lists, self.is_list)
                for names, belongs in kinds:
                    (names.add if belongs(node.value) else names.discard)(name)

    def visit_If(self, node: ast.If) -> None:
        self.visit(node.test)
        self.branch(node.test)
        self.walk(node.body)
        self.walk(node.orelse)

    def visit_For(self, node: ast.For) -> None:
        self.visit(node.iter)
        self.walk(node.body)

    def visit_With(self, node: ast.With) -> None:
        for item in node.items:
            self.visit(item.context_expr)
        self.walk(node.body)

    def visit_FunctionDef(self, node: ast.FunctionDef) -> None:
        inner = Function(node)
        self.found += inner.found

    def visit_Call(self, node: ast.Call) -> None:
        name = ast.unparse(node.func)
        read = isinstance(node.func, ast.Attribute) and node.func.attr in READS
        cast = name in ("bool", "int", "float") and any(map(self.is_tensor, node.args))
        moved = name.endswith(".to") and any(ast.unparse(a) in ("'cpu'", "torch.device('cpu')") for a in node.args)
        if read or cast or moved:
            self.note(node)
        self.generic_visit(node)

    def visit_Subscript(self, node: ast.Subscript) -> None:
        if self.is_mask(node.slice):
            self.note(node)
        self.generic_visit(node)


def _visit_test(self: Function, node: ast.AST) -> None:
    self.branch(node.test)
    self.generic_visit(node)


def _visit_logic(self: Function, node: ast.BoolOp) -> None:
    for value in node.values:
        self.branch(value)
    self.generic_visit(node)


def _visit_not(self: Function, node: ast.UnaryOp) -> None:
    if isinstance(node.op, ast.Not):
        self.branch(node.operand)
    self.generic_visit(node)


Function.visit_While = Function.visit_Assert = Function.visit_IfExp = _visit_test
Function.visit_BoolOp, Function.visit_UnaryOp = _visit_logic, _visit_not


def _guard(test: ast.expr) -> str | None:
    """ "CPU" or "GPU": where the branch is taken, if ``host_can_read`` decides."""
    parts = test.values if isinstance(test, ast.BoolOp) and isinstance(test.op, ast.And) else [test]
    for part in parts:
        negated = isinstance(part, ast.UnaryOp) and isinstance(part.op, ast.Not)
        call = part.operand if negated else part
        if isinstance(call, ast.Call) and ast.unparse(call.func) == GUARD:
            return "GPU" if negated else "CPU"
    return None


def waits(source: str) -> list[str]:
    """Where the source reads values of tensors that may be a GPU's; kernels themselves run on the GPU."""
    tree, found = ast.parse(source), []
    for node in tree.body:
        for function in node.body if isinstance(node, ast.ClassDef) else [node]:
            decorators = [ast.unparse(d) for d in getattr(function, "decorator_list", [])]
            if isinstance(function, ast.FunctionDef) and not any("triton.jit" in d for d in decorators):
                found += Function(function).found
    return found


# The only wait: products of ignored tokens would take longer.
ALLOWED = {"_plan.py": ["(labels != ignore_index).nonzero()"]}


FILES = sorted(str(path.relative_to(FOLDER)) for path in FOLDER.rglob("*.py"))


@pytest.mark.parametrize("file", FILES)
def test_no_file_reads_values(file):
    found = [where.partition(": ")[2] for where in waits((FOLDER / file).read_text())]
    assert found == ALLOWED.get(file, [])


def mutated(file: str, old: str, new: str) -> list[str]:
    source = (FOLDER / file).read_text()
    assert source.count(old) >= 1, f"{file} no longer holds {old!r}: choose another place to break"
    return waits(source.replace(old, new))[len(ALLOWED.get(file, [])) :]


# Each line makes the host wait for a GPU, in the code as it stands.
MUTATIONS = [
    ("_plan.py", "return Tokens(None, labels, (labels != ignore_index).sum())", "labels[labels >= 0]"),
    ("_plan.py", "if len(index) == len(labels):", "if labels.min() >= 0:"),
    ("_triton/shards.py", "if host_can_read(labels.device):", "if plan.want_grad:"),
    ("_triton/shards.py", "everywhere = None", "everywhere = None if valid.any() else labels"),
    ("_softmax.py", "if valid is not None and host_can_read(student.device):", "if valid is not None:"),
    ("_checks.py", "if not host_can_read(labels.device):", "if labels is None:"),
    ("_softmax.py", "scale = remaining_scale(", "if grad_loss == 1:\n        return grad\n    scale = ("),
    ("_softmax.py", "grad[..., plan.vocab :] = 0", "grad[~valid] = 0"),
    ("_plan.py", "loss = loss / count.clamp(min=1)", "loss = loss / max(1, int(count))"),
    ("_plan.py", "loss = loss / count.clamp(min=1)", "loss = loss / count.item()"),
    ("_linear.py", "grads.bias[:vocab] += student.sum(0, dtype=dtype)", "grads.bias[:vocab] += hidden.cpu()"),
]


@pytest.mark.parametrize(("file", "old", "new"), MUTATIONS)
def test_a_wait_in_the_code_would_be_found(file, old, new):
    assert mutated(file, old, new)


WAITING = [
    "x.sum().item()",
    "x.tolist()",
    "x.to('cpu')",
    "torch.equal(x, y)",
    "torch.nonzero(x)",
    "bool(x)",
    "float(x.max())",
    "y[x > 0]",
    "y[x > 0] = 0",
    "keep = x != y\n    y[keep]",
    "z = x + 1\n    if z.max() > 0: pass",
    "while x.any(): pass",
    "assert (x >= 0).all()",
    "z = 1 if x[0] else 2",
    "z = y is not None and x.any()",
    "z = not x.any()",
    "if any(t > 0 for t in (x, y)): pass",
    "z = [x, y]\n    if z[0] > 0: pass",
    "for i in range(3):\n        if x[i]: pass",
]
FREE = [
    "if x is None: pass",
    "if y is not None and x.shape[0] > 3: pass",
    "if x.dim() == 0 or x.dtype == torch.float32: pass",
    "if len(x) == len(y): pass",
    "if any(t.requires_grad for t in (x, y)): pass",
    "z = [x, y]\n    if z: pass",
    "z = x.numel()\n    if z: pass",
    "z = (x > 0).sum()",
    "keep = x != y\n    z = y.where(keep, 0)",
    "z = int(x.shape[0])",
    "if not host_can_read(x.device): return\n    x.item()",
    "if y is not None and host_can_read(x.device): x.item()",
]


@pytest.mark.parametrize("body", WAITING)
def test_reading_a_value_is_found(body):
    assert waits(f"def f(x: Tensor, y: Tensor | None):\n    {body}")


@pytest.mark.parametrize("body", FREE)
def test_reading_no_value_is_let_pass(body):
    assert waits(f"def f(x: Tensor, y: Tensor | None):\n    {body}") == []
