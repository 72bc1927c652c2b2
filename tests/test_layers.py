"""The house: imports go one way, the core needs jax alone, verifiers start without jax, and nothing dangerous is called."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "grpo_jax"
SOURCES = sorted(PACKAGE.rglob("*.py"))

# What each room may import of the others, and of the world beyond the standard library.
ROOMS = {
    "objective": ({"products"}, {"jax", "numpy"}),
    "theory": (set(), {"jax", "numpy"}),  # numpy comes with jax
    "tasks": ({"files"}, {"jsonschema", "math_verify", "re2", "sympy"}),  # inside the functions that need them
    "rollout": ({"objective"}, {"jax"}),
    "models": ({"files", "products", "rollout"}, {"jax", "flax", "numpy", "ml_dtypes"}),
    "data": (
        {"files", "rollout", "storage", "tasks"},
        {
            "jax",
            "numpy",
            "tokenizers",
            "jinja2",
            "grain",
            "tensorflow_datasets",
            "array_record",
            "pyarrow",
            "reasoning_gym",
        },
    ),
    "report": (
        {"files", "objective", "processes", "storage", "theory"},
        {"jax", "numpy", "scipy", "matplotlib", "tensorboardX", "rich"},
    ),
    "train": ({"objective", "rollout"}, {"jax", "optax"}),
    "runs": (
        {
            "environment",
            "files",
            "manifests",
            "objective",
            "processes",
            "storage",
            "theory",
            "tasks",
            "rollout",
            "models",
            "data",
            "report",
            "config",
            "train",
        },
        {"jax", "numpy", "orbax", "absl", "rich"},
    ),
    "sweeps": (
        {"files", "objective", "processes", "storage", "tasks", "data", "report", "config", "train", "runs"},
        {"jax", "numpy", "rich"},
    ),
    "command": (
        {"config", "environment", "manifests", "processes", "runs", "storage", "sweeps"},
        {"absl", "ml_collections"},
    ),
    "config": ({"objective", "tasks", "models", "data", "storage"}, set()),
    "environment": (set(), set()),
    "processes": ({"environment"}, {"jax", "numpy", "orbax"}),
    "manifests": (set(), {"yaml"}),
    "files": ({"storage"}, set()),
    "storage": ({"environment"}, {"etils", "fsspec", "gcsfs"}),  # inside the functions that need them
    "products": (set(), {"jax"}),
    "": ({"objective", "theory"}, set()),
}
# The theory's command line derives Ω from the trainer's own description of an objective, and draws if it can.
COMMAND_LINES = {
    "theory/__main__.py": ({"environment", "objective", "storage"}, {"matplotlib"}),
    "report/__main__.py": ({"environment", "storage"}, {"rich"}),
}


def imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found.add(node.module)
            if node.module == "grpo_jax":
                found |= {f"grpo_jax.{alias.name}" for alias in node.names}
    return found - {"grpo_jax"}


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_go_one_way(path):
    parts = path.relative_to(PACKAGE).parts
    room = parts[0] if len(parts) > 1 else path.stem.replace("__init__", "")
    rooms, world = COMMAND_LINES.get("/".join(parts), ROOMS[room])
    for name in imports(path):
        top = name.split(".")[0]
        if top == "grpo_jax":
            target = name.split(".")[1]
            assert target == room or target in rooms, f"{room} must not import {name}"
        elif top not in sys.stdlib_module_names:
            assert top in world, f"{room} must not import {name}"


def loaded_by(statement: str) -> set[str]:
    code = f"{statement}\nimport sys\nprint(*{{m.split('.')[0] for m in sys.modules}})"
    return set(
        subprocess.run(
            [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
        ).stdout.split()
    )


HEAVY = {
    "array_record",
    "grain",
    "jinja2",
    "jsonschema",
    "math_verify",
    "pyarrow",
    "re2",
    "reasoning_gym",
    "sympy",
    "tensorflow_datasets",
    "flax",
    "optax",
    "orbax",
    "absl",
    "ml_collections",
    "tokenizers",
    "safetensors",
    "matplotlib",
    "tensorboardX",
    "rich",
}


def test_the_core_loads_jax_and_nothing_else_of_the_stack():
    loaded = loaded_by("import grpo_jax as gj; gj.grpo_loss; gj.theory.omega; gj.Objective")
    assert "jax" in loaded
    assert not loaded & HEAVY


def test_the_one_arrow_back_up_is_lazy():
    """grpo_jax.train hands on three functions of runs/, by name, when they are asked for; the rest are its own."""
    from grpo_jax import train

    assert set(train._UPSTAIRS) == {"train", "evaluate", "estimate"}
    for name in train.__all__:
        value = getattr(train, name)
        assert callable(value) and value.__module__.startswith(
            "grpo_jax.runs." if name in train._UPSTAIRS else train.__name__
        )


def test_the_iteration_loads_little():
    """Of ours at most 25 modules, and of the stack jax and optax alone (which bring absl and numpy)."""
    code = "import grpo_jax.train.iteration, sys; print(*sys.modules)"
    modules = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert sum(name.split(".")[0] == "grpo_jax" for name in modules.split()) <= 25
    assert {name.split(".")[0] for name in modules.split()} & (HEAVY | {"jax"}) == {"jax", "optax", "absl"}


def test_verifiers_load_neither_jax_nor_numpy():
    assert not loaded_by("import grpo_jax.tasks") & (HEAVY | {"jax", "jaxlib", "numpy"})


FORBIDDEN = (
    r"\b(eval|exec)\(|pickle|\btorch\b|parse_expr|sympify|yaml\.load\(|allow_pickle=True|shell=True|trust_remote_code"
)
FORBIDDEN += r"|jinja2\.Environment\(|signal\.alarm|os\.fork|except:|jax\.pmap|nnx\.jit"


@pytest.mark.parametrize("path", [*SOURCES, ROOT / "launch.py"], ids=lambda p: str(p.relative_to(ROOT)))
def test_nothing_dangerous_is_called(path):
    """Words in texts and comments are fine; names in code are not."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            node.value = ""
    code = ast.unparse(tree)
    if path.name == "worker_main.py":  # where neither jax nor a thread is
        code = code.replace("os.fork()", "")
    assert not (found := re.search(FORBIDDEN, code)), found


def test_every_public_name_has_a_docstring():
    for path in SOURCES:
        module = ast.parse(path.read_text(encoding="utf-8"))
        assert ast.get_docstring(module), path
        for node in module.body:
            if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
                assert ast.get_docstring(node), f"{path}: {node.name}"
