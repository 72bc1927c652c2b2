"""Prompts and targets made of the fields of a dataset's row."""

import math
import string
from collections.abc import Mapping
from decimal import Decimal
from numbers import Integral, Real
from typing import Any, NamedTuple

from grpo_jax.tasks.rows import Number


class Template(NamedTuple):
    """Text with the names of fields between its pieces; see `parse_template`."""

    pieces: tuple[tuple[str, str | None], ...]

    @property
    def fields(self) -> tuple[str, ...]:
        """The names of the fields, in order."""
        return tuple(field for _, field in self.pieces if field is not None)

    def render(self, row: Mapping[str, Any]) -> str:
        """The text of a row: fields are texts, UTF-8 bytes or finite numbers.

        Raises ValueError naming a field that is missing, neither of these, or not Unicode.

        >>> parse_template("{a} + {b} = ").render({"a": 0.5, "b": b"x"})
        '0.5 + x = '
        """
        return "".join(text if field is None else text + _text(row, field) for text, field in self.pieces)


def parse_template(text: str) -> Template:
    """A template of a format string whose fields are plain names: ``{question}``; ``{{`` and ``}}`` are braces.

    Raises ValueError for what is no format string, and for a field with an attribute, an index, a conversion or a format.

    >>> parse_template("Q: {question}").fields
    ('question',)
    >>> parse_template("{row.question!r}")
    Traceback (most recent call last):
    ...
    ValueError: '{row.question!r}': {row.question} is not the plain name of a field
    """
    try:
        parts = list(string.Formatter().parse(text))
    except ValueError as error:
        raise ValueError(f"{text!r}: {error} (write {{{{ and }}}} for braces)") from None
    for _, field, form, conversion in parts:
        if field is not None and (form or conversion or not field.strip() or set(field) & set(".[]{}")):
            raise ValueError(f"{text!r}: {{{field}}} is not the plain name of a field")
    return Template(tuple((literal, field) for literal, field, _, _ in parts))


def _text(row: Mapping[str, Any], field: str) -> str:
    if field not in row:
        raise ValueError(f"no field {field!r}; there are {list(row)[:20]}")
    value = row[field]
    if isinstance(value, bytes):
        value = value.decode("utf-8")
    elif isinstance(value, Number):
        value = value.text
    elif isinstance(value, Integral) and not isinstance(value, bool):
        value = str(int(value))
    elif isinstance(value, Real | Decimal) and not isinstance(value, bool):
        if not math.isfinite(value):
            raise ValueError(f"field {field!r} is {value}")
        value = str(value)
    if not isinstance(value, str):
        raise ValueError(f"field {field!r} is neither text nor a number, but {type(value).__name__}")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(
            f"field {field!r} holds half a surrogate pair at character {error.start}: no Unicode"
        ) from None
    return value
