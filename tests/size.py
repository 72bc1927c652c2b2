"""How much there is to read: python -m tests.size [FOLDER] counts the lines of code, of docstrings and of comments of each room.

A line of code has something on it besides a comment or a docstring. The reading set is what one must read to understand the
method; README.md lists it, and tests/test_size.py bounds it.
"""

import ast
import io
import re
import sys
import tokenize
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
READING_LIMIT = 5500  # lines of the reading set, all kinds


def count(path: Path) -> Counter[str]:
    """{"code", "docstrings", "comments", "lines"} of one file."""
    text = path.read_text(encoding="utf-8")
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    docstrings: set[int] = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, documented) and ast.get_docstring(node, clean=False) is not None:
            docstrings |= set(range(node.body[0].lineno, (node.body[0].end_lineno or 0) + 1))
    skipped = {tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER, tokenize.ENCODING}
    code: set[int] = set()
    comments: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type == tokenize.COMMENT:
            comments.add(token.start[0])
        elif token.type not in skipped:
            code |= set(range(token.start[0], token.end[0] + 1))
    code -= docstrings
    return Counter(code=len(code), docstrings=len(docstrings), comments=len(comments), lines=text.count("\n"))


def by_room(package: Path) -> dict[str, Counter[str]]:
    """The counts of each folder of a package, its own files under ".", and of all under "total"."""
    rooms: dict[str, Counter[str]] = {}
    for path in sorted(package.rglob("*.py")):
        relative = path.relative_to(package)
        for room in (relative.parts[0] if len(relative.parts) > 1 else ".", "total"):
            rooms.setdefault(room, Counter()).update(count(path))
    return dict(sorted(rooms.items(), key=lambda item: item[0] == "total"))


def reading_set(readme: Path = ROOT / "README.md") -> list[Path]:
    """The files between the marks of README.md that begin and end the reading set; a folder stands for its files."""
    marked = re.search(r"<!-- reading set -->(.*?)<!-- end -->", readme.read_text(encoding="utf-8"), re.DOTALL)
    assert marked, "README.md marks no reading set"
    names = re.findall(r"\[[^]]*\]\(([^)]+)\)", marked[1])
    paths = [readme.parent / name for name in names]
    return [file for path in paths for file in (sorted(path.glob("*.py")) if path.is_dir() else [path])]


if __name__ == "__main__":
    for name, counted in by_room(Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT / "grpo_jax").items():
        print(f"{name:12}", *(f"{counted[kind]:7,} {kind}" for kind in ("code", "docstrings", "comments", "lines")))
