"""The README and the pages: what they say exists, and their code runs."""

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

import grpo_jax
from experiments import objectives
from grpo_jax.objective import NAMED

ROOT = Path(__file__).resolve().parent.parent
TEXT = (ROOT / "README.md").read_text(encoding="utf-8")
DOCS = sorted((ROOT / "docs").glob("*.md"))
PAGES = [ROOT / "README.md", *DOCS, ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md"]
PAGES += [ROOT / "experiments/README.md", ROOT / "experiments/LOG.md"]


def name_of(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def test_it_is_short():
    lines = TEXT.splitlines()
    assert len(lines) <= 150
    assert max(map(len, lines)) <= 140


def test_it_leads_with_exactly_two_commands_whose_files_exist():
    """.ci/run executes both as they are written; here, that they are two, first, and name real files."""
    blocks = re.findall(r"```sh\n(.*?)```", TEXT, re.S)
    commands = blocks[0].strip().splitlines()
    assert len(commands) == 2
    assert TEXT.index("<!-- commands -->") < TEXT.index("## ")
    for command in commands:
        for name in re.findall(r"[\w./]+\.(?:txt|py)\b", command):
            assert (ROOT / name).is_file(), name


def test_every_path_of_the_tree_and_every_link_exists():
    tree = re.search(r"## The house.*?```\n(.*?)```", TEXT, re.S).group(1)
    folder = ROOT
    for line in tree.splitlines():
        indent, name = re.match(r"( *)(\S+)", line).groups()
        base = ROOT if not indent else folder
        if not indent and name.endswith("/"):
            folder = ROOT / name
        assert (base / name).exists(), name


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_every_link_leads_somewhere(page):
    """To a file or folder; whether an anchor exists is for `mkdocs build --strict` to say."""
    for link in re.findall(r"\]\((?!http|#)([^)#]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8")):
        assert (page.parent / link).exists(), link


def test_the_tree_names_every_room():
    rooms = {path.parent.name for path in (ROOT / "grpo_jax").glob("*/__init__.py")}
    assert rooms <= set(re.findall(r"^  (\w+)/", TEXT, re.M))


def test_the_python_example_runs():
    (code,) = re.findall(r"```python\n(.*?)```", TEXT, re.S)
    scope = {
        "rewards": jnp.zeros((2, 8)).at[:, 0].set(1.0),
        "hidden": jnp.ones((16, 3, 4)),
        "unembedding": jnp.ones((4, 5)),
        "targets": jnp.zeros((16, 3), jnp.int32),
        "old_logps": None,
        "ref_logps": jnp.full((16, 3), -1.0),
        "mask": jnp.ones((16, 3), bool),
    }
    exec(code, scope)
    assert jax.numpy.isfinite(scope["loss"])
    said = float(re.search(r"ends: (0\.\d+)", code).group(1))
    point = scope["gj"].theory.flow_point(0.2, beta=1.0, weights=scope["gj"].theory.Group(8, epsilon=1e-4))
    assert float(point) == pytest.approx(said, abs=5e-4)


PAGE = " ".join(
    " ".join(page.read_text(encoding="utf-8").split()) for page in [*DOCS, ROOT / "CONTRIBUTING.md"]
)  # a citation may go over a line's end


@pytest.mark.parametrize("name", re.findall(r"`(tests/\w+/\w+\.py::\w+)`", PAGE))
def test_every_test_that_the_page_cites_exists(name):
    path, _, function = name.partition("::")
    assert f"\ndef {function}(" in (ROOT / path).read_text(encoding="utf-8")


@pytest.mark.parametrize(("names", "path"), re.findall(r"\[((?:`\w+`(?:, )?)+)\]\(\.\./([^)]+)\)", PAGE))
def test_every_function_that_the_page_cites_exists(names, path):
    for name in re.findall(r"`(\w+)`", names):
        assert re.search(rf"^(?:def|class) {name}\b", (ROOT / path).read_text(encoding="utf-8"), re.M), name


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_every_command_names_files_that_exist(page):
    """launch.py's configs, modules of `python -m`, and Python files of other commands."""
    text = page.read_text(encoding="utf-8")
    for path in re.findall(r"--config=(configs/\w+\.py)", text):
        assert (ROOT / path).is_file(), path
    for module in re.findall(r"python -m ((?:experiments|examples|grpo_jax|tests)[\w.]*\w)", text):
        path = ROOT / module.replace(".", "/")
        assert path.with_suffix(".py").is_file() or (path / "__main__.py").is_file(), module


def test_what_the_commands_of_the_theory_print_is_what_the_page_shows():
    """`explain` needs no run; `plan` of runs/small is left to the eye."""
    page = (ROOT / "docs/running.md").read_text(encoding="utf-8")
    command, shown = re.search(r"\$ python -m grpo_jax\.theory (explain [^\n]*)\n(.*?)```", page, re.S).groups()
    done = subprocess.run(
        [sys.executable, "-m", "grpo_jax.theory", *command.split()],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == shown.strip()


@pytest.mark.parametrize(
    "path", [*map(name_of, PAGES), "pyproject.toml", ".ci/run", "Makefile", "mkdocs.yml", ".github/workflows/ci.yml"]
)
def test_no_placeholder_is_left(path):
    assert not re.search(
        r"TODO|FIXME|[A-Z]{3,}_(?:TIMES?|OUTPUT|TABLE|NOTE|ENTRY|SECTION)\b", (ROOT / path).read_text(encoding="utf-8")
    )


def test_the_page_of_objectives_shows_what_its_command_measures():
    """Of four tables the one that is quick to make; the others' rows are those of the objectives there are."""
    page = (ROOT / "docs/objectives.md").read_text(encoding="utf-8")
    empty = {"ends": [], "named": [], "recursions": []}
    fresh = objectives.markdown(empty | {"gradients": objectives.gradients()})["gradients"]
    shown = re.search(r"<!-- gradients -->\n(.*?)<!-- end gradients -->", page, re.S).group(1)
    rounding = re.compile(r"\d+e-\d+")  # errors of float32, which differ by machine
    assert rounding.sub("0", shown) == rounding.sub("0", fresh)
    assert {float(x) < 2e-6 for x in rounding.findall(shown)} == {True}
    for name, objective in NAMED.items():
        assert (f"| `{name}` | " in page) or objective.anchor == "previous"


def test_the_version_is_one_wherever_it_stands():
    """In the package, which pyproject.toml reads; in the citation; and at the head of the newest release's changes."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    assert project["tool"]["setuptools"]["dynamic"]["version"] == {"attr": "grpo_jax.__version__"}
    changes = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    version, date = re.search(r"^## (\d+\.\d+\.\d+) · (\d{4}-\d\d-\d\d)$", changes, re.M).groups()
    citation = (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    assert version == grpo_jax.__version__
    assert f"\nversion: {version}\ndate-released: {date}\n" in citation


def test_hooks_makefile_and_workflow_run_what_ci_runs():
    checks = [f".venv/bin/{check}" for check in ("ruff check .", "ruff format --check .", "mypy")]
    for path in (".ci/run", "Makefile", ".pre-commit-config.yaml"):
        assert all(check in (ROOT / path).read_text(encoding="utf-8") for check in checks), path
    for path in ("Makefile", ".github/workflows/ci.yml"):
        assert "bash .ci/run" in (ROOT / path).read_text(encoding="utf-8"), path


def test_the_fast_loop_names_tests_that_exist():
    paths = re.search(r"^FAST := (.*)$", (ROOT / "Makefile").read_text(encoding="utf-8"), re.M).group(1).split()
    assert all((ROOT / path).exists() for path in paths)
    assert f'pytest -m "not slow" {" ".join(paths)}' in (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
