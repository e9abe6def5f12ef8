"""The house rules that a reader can't check by eye: imports go down only, and importing has no side effects."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "jaxvision"
RANKS = {
    "core": 0,
    "quant": 1,
    "optim": 1,
    "losses": 1,
    "metrics": 1,
    "models": 2,
    "data": 2,
    "engine": 3,
    "methods": 4,
    "tools": 6,
    "benchmarks": 5,
    "main": 5,
}
FILES = sorted(path for path in PACKAGE.rglob("*.py") if path != PACKAGE / "__init__.py")


def imported(path: Path) -> set[str]:
    """The jaxvision modules that a file imports, wherever in the file."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
        elif isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
    return {name for name in names if name.startswith("jaxvision.")}


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_go_down(path):
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    layer = parts[0]
    for name in imported(path):
        other = name.split(".")[1]
        if other not in RANKS:
            continue
        below = RANKS[other] < RANKS[layer]
        assert below or other == layer, f"{path.name} in {layer} imports {name}"
        if layer == other == "methods" and len(name.split(".")) > 2:
            assert name.split(".")[2] == parts[1], f"method {parts[1]} imports sideways: {name}"


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_no_tensorflow_and_torch_only_in_benchmarks(path):
    heads = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            heads.add(node.module.split(".")[0])
        elif isinstance(node, ast.Import):
            heads |= {alias.name.split(".")[0] for alias in node.names}
    assert "tensorflow" not in heads
    if "benchmarks" not in path.parts:
        assert not heads & {"torch", "timm", "torchvision"}


def test_every_layer_is_ranked():
    folders = {path.name for path in PACKAGE.iterdir() if path.is_dir() and path.name != "__pycache__"}
    assert folders <= RANKS.keys()


def test_importing_every_module_starts_no_backend():
    """One fresh process imports the whole package; no JAX backend, TensorFlow or PyTorch may appear."""
    names = [
        ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts)
        for path in FILES
        if path.parent.name != "benchmarks" and path.name != "__init__.py"
    ]
    program = (
        "import importlib, sys\n"
        f"for name in {names!r}: importlib.import_module(name)\n"
        "from jax._src import xla_bridge\n"
        "assert not xla_bridge._backends, 'a backend was started'\n"
        "assert not {'torch', 'tensorflow'} & sys.modules.keys()\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=PACKAGE.parent)
    assert done.returncode == 0, done.stderr
