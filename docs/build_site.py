"""What the site adds to the pages of docs/: the repository's other pages, its linked sources, the reference, and equations.

The files link to each other as they lie in the repository, so that they can be read there. On the site a link to a module of
the package leads to its reference, and one to any other source to a page that shows it. `mkdocs build --strict` fails on a
link that leads nowhere.
"""

import ast
import posixpath
import re
from html import unescape
from pathlib import Path
from typing import Any

import griffe
from latex2mathml.converter import convert
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parent.parent
PAGES = {  # outside docs/: file of the repository → page of the site
    "README.md": "index.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "experiments/README.md": "experiments.md",
    "experiments/LOG.md": "log.md",
}
LINK = re.compile(r"(!?)\[([^\[\]]*)\]\((?!https?:|#)([^)#\s]+)(#[^)\s]*)?\)")
LANGUAGES = {".py": "python", ".json": "json", ".cff": "yaml"}


def on_files(files: Files, config: Any) -> Files:
    """Adds the pages of `PAGES`, one for every source that a page links to, and the reference of every room."""
    texts = {f"docs/{file.src_uri}": file.content_string for file in files.documentation_pages()}
    for path, page in PAGES.items():
        texts[path] = (ROOT / path).read_text(encoding="utf-8")
        files.append(File.generated(config, page, content=texts[path]))
    for path, text in texts.items():
        for _, _, link, _ in LINK.findall(text):
            source = posixpath.normpath(posixpath.join(posixpath.dirname(path), link))
            page = f"source/{source}.md"
            if (
                _page(source) is None
                and _module(source) is None
                and (ROOT / source).is_file()
                and page not in files.src_uris
            ):
                files.append(File.generated(config, page, content=_listing(source)))
    for page, text in _reference().items():
        files.append(File.generated(config, page, content=text))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Turns links between files of the repository into links between pages of the site."""
    here = next((path for path, uri in PAGES.items() if uri == page.file.src_uri), f"docs/{page.file.src_uri}")

    def moved(match: re.Match[str]) -> str:
        image, text, link, anchor = match.groups()
        target = posixpath.normpath(posixpath.join(posixpath.dirname(here), link))
        if (module := _module(target)) is not None:
            names = re.findall(r"`(\w+)`", text)
            if names and module.count(".") > 1:
                return ", ".join(f"[`{name}`][{module}.{name}]" for name in names)
            return f"[{text}][{module}]"
        uri = _page(target) or f"source/{target}.md"
        uri = posixpath.relpath(uri, posixpath.dirname(page.file.src_uri) or ".")
        return f"{image}[{text}]({uri}{anchor or ''})"

    return markdown if page.file.src_uri.startswith(("reference/", "source/")) else LINK.sub(moved, markdown)


def on_page_content(html: str, **_: Any) -> str:
    """Equations as MathML, which browsers draw without a script. An & is written &amp; in HTML, and parts columns in LaTeX."""
    inline = lambda m: convert(unescape(m[1]))  # noqa: E731
    html = re.sub(r'(?s)<span class="arithmatex">\\\((.*?)\\\)</span>', inline, html)
    display = lambda m: f'<div class="equation">{convert(unescape(m[1].strip()), display="block")}</div>'  # noqa: E731
    return re.sub(r'(?s)<div class="arithmatex">\\\[(.*?)\\\]</div>', display, html)


class Docstrings(griffe.Extension):
    """Says of docstrings what a parser of Google's style does not see in them.

    Doctests become fenced code. Names that share a description stay together. What is returned begins with its type, so that
    no colon of its text is taken for the end of one.
    """

    def on_instance(self, *, obj: griffe.Object, **_: Any) -> None:
        if obj.docstring is None:
            return
        text = fenced(obj.docstring.value)
        text = re.sub(r"^ +\w+(?:, \w+)+: ", lambda names: names[0].replace(", ", ",\u00a0"), text, flags=re.M)
        if isinstance(obj, griffe.Function) and obj.returns is not None:
            text = re.sub(r"^Returns:\n +", lambda start: f"{start[0]}{obj.returns}: ", text, flags=re.M)
        obj.docstring.value = text


def fenced(docstring: str) -> str:
    """A docstring with a fence around every doctest: from its >>> to the next empty line."""
    lines: list[str] = []
    inside = False
    for line in [*docstring.splitlines(), ""]:
        if not inside and line.lstrip().startswith(">>>"):
            inside = True
            indent = line[: len(line) - len(line.lstrip())]
            lines.append(f"{indent}```pycon")
        elif inside and not line.strip():
            inside = False
            lines.append(f"{indent}```")
        lines.append(line)
    return "\n".join(lines[:-1])


def _page(path: str) -> str | None:
    """The page or figure of the site that a file of the repository is."""
    return PAGES.get(path) or (path.removeprefix("docs/") if path.startswith("docs/") else None)


def _module(path: str) -> str | None:
    """The dotted name of a module or room of the package."""
    return path.removesuffix(".py").replace("/", ".") if path.startswith("grpo_jax/") else None


def _listing(path: str) -> str:
    text = (ROOT / path).read_text(encoding="utf-8")
    language = LANGUAGES.get(Path(path).suffix, "text")
    return f"---\nsearch:\n  exclude: true\n---\n\n# {path}\n\n````{language}\n{text}````\n"


def _reference() -> dict[str, str]:
    """The pages of the reference: one per room, which asks mkdocstrings for its docstring and that of every module."""
    package = ROOT / "grpo_jax"
    rooms = [folder for folder in sorted(package.iterdir()) if (folder / "__init__.py").exists()]
    index = (
        "# Reference\n\n::: grpo_jax\n    options: {show_root_heading: false, members: []}\n\n| room | |\n|---|---|\n"
    )
    pages = {}
    for room in rooms:
        index += f"| [`{room.name}`]({room.name}.md) | {_first_line(room / '__init__.py')} |\n"
        name = f"grpo_jax.{room.name}"
        text = f"::: {name}\n    options: {{heading_level: 1, show_root_full_path: true, members: []}}\n\n"
        for module in sorted(room.glob("*.py")):
            if not module.name.startswith("__"):
                text += f"::: {name}.{module.stem}\n\n"
        pages[f"reference/{room.name}.md"] = text
    index += "\nOn the ground floor:\n\n"
    for module in sorted(package.glob("*.py")):
        if not module.name.startswith("__"):
            index += f"::: grpo_jax.{module.stem}\n\n"
    return pages | {"reference/index.md": index}


def _first_line(path: Path) -> str:
    docstring = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
    return docstring.partition("\n")[0]
