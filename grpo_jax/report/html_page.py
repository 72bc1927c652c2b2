"""report.html: one or two runs on one page that needs no network, to be read in a browser.

Prompts and completions are hostile here. They are JSON of ASCII characters, none of which is markup, inside a script element
that is not run; page.js shows them as text alone; and the page's policy runs that one script and loads nothing. The first line
of the JSON is the runs, and each line that follows a prompt with its completions, which is read when it is opened.
"""

import base64
import hashlib
import json
import re
from collections.abc import Iterator, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

from grpo_jax.files import write_text

SHOWN = 160  # characters of a prompt or target in the table
MARKUP = str.maketrans({"<": r"\u003c", ">": r"\u003e", "&": r"\u0026"})


def write_page(path: Path, stories: Sequence[dict[str, Any]]) -> None:
    """Writes the page of one or two runs.

    Raises:
      ValueError: there is nothing to show of one of them yet.
    """
    for story in stories:
        if not story["prompts"]:
            raise ValueError(f"{story['name']}: nothing to show yet, since its reference has not been measured")
    write_text(path, page(stories))


def page(stories: Sequence[dict[str, Any]], *, live: bool = False) -> str:
    """The page of one or two runs of `grpo_jax.report.run_story.read_run`, the first compared with the second.

    Args:
      stories: of the runs.
      live: the page is served, and asks for newer data where it came from.
    """
    style, script = (_part(name) for name in ("page.css", "page.js"))
    connect = "; connect-src 'self'" if live else ""
    policy = (
        f"default-src 'none'; script-src {_digest(script)}; style-src {_digest(style)}; img-src data:{connect}; "
        "base-uri 'none'; form-action 'none'"
    )
    parts = {"policy": policy, "style": style, "script": script, "data": data(stories), "live": str(live).lower()}
    return re.sub(r"\[\[(\w+)\]\]", lambda found: parts[found[1]], _part("page.html"))


def data(stories: Sequence[dict[str, Any]]) -> str:
    """What the page shows, as lines of `inert` JSON."""
    return "\n".join(_lines(stories))


def _lines(stories: Sequence[dict[str, Any]]) -> Iterator[str]:
    first, *others = stories
    is_joined = all(_asks(story) == _asks(first) for story in others)
    rows = [
        [sample["index"], *(_shortened(sample[name]) for name in ("prompt", "target"))] for sample in first["samples"]
    ]
    runs = [{key: value for key, value in story.items() if key != "samples"} for story in stories]
    yield inert({"runs": runs, "prompts": rows, "joined": is_joined, "latest": _latest(first)})
    compared = stories if is_joined else stories[:1]
    for samples in zip(*(story["samples"] for story in compared), strict=True):
        sides = [{name: sample[name] for name in ("before", "during", "after")} for sample in samples]
        yield inert({name: samples[0][name] for name in ("prompt", "target")} | {"runs": sides})


def _latest(story: dict[str, Any]) -> dict[str, Any] | None:
    """The newest samples of a run that is on its way: "iteration", and "completions", each [place of its prompt, completion]."""
    sampled = [(place, x["during"][-1]) for place, x in enumerate(story["samples"]) if x["during"]]
    if story["standing"] is not None or not sampled:
        return None
    newest = max(probe["iteration"] for _, probe in sampled)
    shown = [[place, probe["completions"][0]] for place, probe in sampled if probe["iteration"] == newest]
    return {"iteration": newest, "completions": shown}


def _asks(story: dict[str, Any]) -> tuple[Any, ...]:
    """What must be the same where two runs are compared prompt by prompt."""
    chosen = (
        [story["config"]["evaluate.prompts"], story["config"]["seed"]] if story["config"]["evaluate.prompts"] else []
    )
    return story["examples"], len(story["samples"]), *chosen


def _shortened(text: str | None) -> str | None:
    return text if text is None or len(text) <= SHOWN else f"{text[:SHOWN]}…"


def inert(value: Any) -> str:
    """A value as JSON that is no markup and no line end, in ASCII.

    >>> print(inert({"text": "</script>\\u2028\\u202e&"}))
    {"text":"\\u003c/script\\u003e\\u2028\\u202e\\u0026"}
    """
    return json.dumps(value, allow_nan=False, separators=(",", ":")).translate(MARKUP)


def _part(name: str) -> str:
    return (files("grpo_jax.report") / name).read_text(encoding="utf-8")


def _digest(text: str) -> str:
    """What a policy of content calls an inline script or style.

    >>> _digest("")
    "'sha256-47DEQpj8HBSa+/TImW+5JCeuQeRkm5NMpJWZG3hSuFU='"
    """
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
