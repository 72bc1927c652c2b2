"""What pages are made of: text that cannot act, intervals as text, and how a page begins."""

from typing import Any, TypeAlias

Lines: TypeAlias = list[tuple[str, str]]
"""(label, text) or (quantity, value): what a run says on the terminal, and what stands at the head of a page."""


def escaped(text: str) -> str:
    """Text whose control characters, line ends among them, are spelled out.

    >>> print(escaped(chr(27) + "[2J"))
    \\x1b[2J
    """
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def inline(text: str) -> str:
    """Model output as one line of Markdown code: control characters escaped, so that nothing in it acts."""
    return escaped(text).replace("`", "ˋ")


def interval_text(interval: dict[str, Any], confidence: float, sign: str = "") -> str:
    """A mean and its interval; the mean alone where the interval has no ends.

    ``sign="+"`` also shows the plus of positive numbers.

    >>> interval_text({"mean": 0.5, "low": 0.4, "high": 0.625}, 0.95)
    '0.5000   95% [0.4000, 0.6250]'
    """
    mean, low, high = interval["mean"], interval["low"], interval["high"]
    ends = "" if low is None else f"   {confidence:.0%} [{low:{sign}.4f}, {high:{sign}.4f}]"
    return f"{mean:{sign}.4f}{ends}"


def page_start(title: str, header: Lines, table: Lines, figure_text: str) -> list[str]:
    """The lines of a page up to its samples: title, header, table, figure."""
    lines = [f"# {title}", "", *(f"- **{label}**: {text}" for label, text in header)]
    lines += ["", "| quantity | value |", "|---|---|", *(f"| {name} | {value} |" for name, value in table)]
    return [*lines, "", f"![{figure_text}](figure.png)", "", "## Samples", ""]
