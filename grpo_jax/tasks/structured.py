"""Completions whose form is the task: a given text, text that matches a pattern, JSON of a wanted shape.

The whole completion counts, without the white space around it; one that did not stop by itself is ``too_long``.
"""

import functools
import json
import math
import re
from collections.abc import Callable
from typing import Any

from grpo_jax.tasks.task import Verdict

MAX_CHARACTERS = 64 * 1024
"""A longer completion is ``too_long`` unread."""
MAX_DEPTH = 64
"""JSON with more brackets open at a time is ``too_long``: no verdict depends on how much stack there is."""
_MAX_DIGITS = 400  # of a JSON integer; Python reads at most 4300

_TYPES = ("object", "array", "string", "integer", "number", "boolean", "null")
_STRINGS_AND_BRACKETS = re.compile(r'"(?:[^"\\]|\\.?)*+(?:"|\Z)|[][{}]', re.DOTALL)  # linear: every attempt matches


def verify_exact(completion: str, target: str, truncated: bool) -> Verdict:
    """Correct iff the completion is the target, character for character and with case, white space around both aside.

    Nothing is normalised: ``é`` in one and in two characters differ. An empty completion is ``unparsable``.

    >>> [str(verify_exact(text, "Paris", False)) for text in (" Paris\\n", "paris", "Paris.", " ")]
    ['correct', 'wrong', 'wrong', 'unparsable']
    """
    if truncated or len(completion) > MAX_CHARACTERS:
        return Verdict.too_long
    text = completion.strip()
    if not text:
        return Verdict.unparsable
    return Verdict.correct if text == target.strip() else Verdict.wrong


def answer_exact(completion: str) -> str | None:
    """The completion without the white space around it; None where nothing is left."""
    return completion.strip() or None


def check_exact(target: str) -> None:
    """Raises ValueError for an empty target, which nothing could meet."""
    if not target.strip():
        raise ValueError("the target is empty")


def verify_regex(completion: str, target: str, truncated: bool) -> Verdict:
    """Correct iff the pattern of the target matches the whole completion, white space around it aside.

    The pattern is one of RE2 (https://github.com/google/re2/wiki/Syntax): no back-references, no looking around; in return
    the time is linear in the completion for every pattern. ``.`` does not match a newline; ``(?s)`` at the front lets it.
    A completion that is not Unicode (half a surrogate pair) is ``unparsable``. Needs the package google-re2. Raises
    ValueError for a pattern that RE2 refuses.

    >>> import pytest; _ = pytest.importorskip("re2")
    >>> [str(verify_regex(text, "[A-Z][a-z]+ [0-9]{4}", False)) for text in ("May 1971 ", "In May 1971", "")]
    ['correct', 'wrong', 'wrong']
    """
    pattern = _pattern(target)
    if truncated or len(completion) > MAX_CHARACTERS:
        return Verdict.too_long
    try:
        text = completion.strip().encode()
    except UnicodeEncodeError:
        return Verdict.unparsable
    return Verdict.correct if pattern.fullmatch(text) else Verdict.wrong


def check_regex(target: str) -> None:
    """Raises ValueError for a pattern that RE2 refuses, such as one with a back-reference, and for an empty one."""
    if not target:
        raise ValueError("the pattern is empty")
    _pattern(target)


def verify_json(completion: str, target: str, truncated: bool) -> Verdict:
    """Correct iff the completion is JSON, bare or in one ```` ```json ```` fence, and has the shape the target asks for.

    JSON as in RFC 8259: no ``NaN``, no comments, no trailing commas; and no key twice, no number beyond a float or of more
    than 400 digits. What is not such JSON, or stands beside it, is ``unparsable``; JSON of another shape is ``wrong``.

    target: a JSON object with some of these keys of JSON Schema, which mean the same there: ``type``, ``const``, ``enum``,
    ``properties``, ``required``, ``additionalProperties`` (true or false), ``items``, ``minItems``, ``maxItems``. ``{}`` asks
    for any JSON, ``{"const": …}`` for one value exactly. Raises ValueError for another target.

    >>> shape = '{"type": "object", "required": ["age"], "properties": {"age": {"type": "integer"}}}'
    >>> [str(verify_json(text, shape, False)) for text in ('{"age": 3}', '{"age": "3"}', "{}", "age: 3")]
    ['correct', 'wrong', 'wrong', 'unparsable']
    >>> verify_json("```json\\n[1, 2.0]\\n```", '{"const": [1, 2]}', False)
    <Verdict.correct: 'correct'>
    """
    schema = _schema(target)
    if truncated or len(completion) > MAX_CHARACTERS or _depth(completion) > MAX_DEPTH:
        return Verdict.too_long
    try:
        value = _read(_without_fence(completion.strip()))
    except ValueError:
        return Verdict.unparsable
    return Verdict.correct if _has_shape(value, schema) else Verdict.wrong


def answer_json(completion: str) -> str | None:
    """The value in one spelling, keys in order, ``1`` for ``1.0``; None where ``verify_json`` would not read it.

    >>> answer_json('```\\n{"b": 1.0, "a": [true, 1e2]}\\n```')
    '{"a":[true,100],"b":1}'
    """
    if len(completion) > MAX_CHARACTERS or _depth(completion) > MAX_DEPTH:
        return None
    try:
        return _spell(_read(_without_fence(completion.strip())))
    except ValueError:
        return None


def check_json(target: str) -> None:
    """Raises ValueError for a target that is not a shape, naming the key that is not understood.

    >>> check_json('{"type": "array", "items": {"pattern": "a+"}}')
    Traceback (most recent call last):
    ...
    ValueError: shape at items: unknown key 'pattern'; known: type, const, enum, properties, required, additionalProperties, \
items, minItems, maxItems
    """
    _schema(target)


@functools.lru_cache(maxsize=4096)
def _pattern(target: str) -> Any:
    import re2

    options = re2.Options()
    options.log_errors = False
    try:
        return re2.compile(target.encode(), options)
    except (re2.error, UnicodeEncodeError) as error:
        raise ValueError(f"pattern {target[:100]!r}: {error}") from None


def _without_fence(text: str) -> str:
    first, newline, rest = text.partition("\n")
    if first.rstrip() in ("```json", "```") and newline and rest.endswith("```"):
        return rest.removesuffix("```").strip()
    return text


def _depth(text: str) -> int:
    deepest = depth = 0
    for match in _STRINGS_AND_BRACKETS.finditer(text):
        depth += {"[": 1, "{": 1, "]": -1, "}": -1}.get(match[0], 0)
        deepest = max(deepest, depth)
    return deepest


def _read(text: str) -> Any:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        if len(dict(pairs)) < len(pairs):
            raise ValueError("a key occurs twice")
        return dict(pairs)

    def finite(digits: str) -> float:
        value = float(digits)
        if not math.isfinite(value):
            raise ValueError(f"{digits[:20]} is beyond every float")
        return value

    def whole(digits: str) -> int:
        if len(digits) > _MAX_DIGITS:
            raise ValueError(f"a number of {len(digits)} digits")
        return int(digits)

    def refuse(name: str) -> None:
        raise ValueError(f"{name} is not JSON")

    return json.loads(text, object_pairs_hook=unique, parse_float=finite, parse_int=whole, parse_constant=refuse)


@functools.lru_cache(maxsize=4096)
def _schema(target: str) -> dict[str, Any]:
    if _depth(target) > MAX_DEPTH:
        raise ValueError(f"the shape is more than {MAX_DEPTH} brackets deep")
    try:
        schema = _read(target)
    except ValueError as error:
        raise ValueError(f"the shape {target[:100]!r} is not JSON: {error}") from None
    _check_schema(schema, "")
    return schema


def _check_schema(schema: Any, where: str) -> None:
    def fail(message: str) -> None:
        raise ValueError(f"shape{f' at {repr(where[:200])[1:-1]}' if where else ''}: {message}")

    if not isinstance(schema, dict):
        fail("wants an object of keys and what they ask for")
    for key, wanted in schema.items():
        if key not in _KEYS:
            fail(f"unknown key {key[:40]!r}; known: {', '.join(_KEYS)}")
        if not _KEYS[key](wanted):
            fail(f"{key} cannot be {_spell(wanted)[:100]}")
    for name, inner in schema.get("properties", {}).items():
        _check_schema(inner, f"{where}.{name}".lstrip("."))
    if "items" in schema:
        _check_schema(schema["items"], f"{where}.items".lstrip("."))


def _is_count(value: Any) -> bool:
    return type(value) is int and value >= 0


_KEYS: dict[str, Callable[[Any], bool]] = {
    "type": lambda wanted: wanted in _TYPES,
    "const": lambda wanted: True,
    "enum": lambda wanted: isinstance(wanted, list) and bool(wanted),
    "properties": lambda wanted: isinstance(wanted, dict),
    "required": lambda wanted: isinstance(wanted, list) and all(isinstance(name, str) for name in wanted),
    "additionalProperties": lambda wanted: isinstance(wanted, bool),
    "items": lambda wanted: isinstance(wanted, dict),
    "minItems": _is_count,
    "maxItems": _is_count,
}


def _has_shape(value: Any, schema: dict[str, Any]) -> bool:
    """As JSON Schema 2020-12 has it: what asks about objects or arrays lets everything else pass."""
    if "type" in schema and not _has_type(value, schema["type"]):
        return False
    if "const" in schema and not _same(value, schema["const"]):
        return False
    if "enum" in schema and not any(_same(value, allowed) for allowed in schema["enum"]):
        return False
    if isinstance(value, dict):
        properties = schema.get("properties", {})
        return (
            all(name in value for name in schema.get("required", ()))
            and (schema.get("additionalProperties", True) or all(name in properties for name in value))
            and all(_has_shape(value[name], inner) for name, inner in properties.items() if name in value)
        )
    if isinstance(value, list):
        return schema.get("minItems", 0) <= len(value) <= schema.get("maxItems", math.inf) and all(
            _has_shape(item, schema.get("items", {})) for item in value
        )
    return True


def _has_type(value: Any, name: str) -> bool:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return {
        "object": isinstance(value, dict),
        "array": isinstance(value, list),
        "string": isinstance(value, str),
        "integer": number and value == math.floor(value),
        "number": number,
        "boolean": isinstance(value, bool),
        "null": value is None,
    }[name]


def _same(a: Any, b: Any) -> bool:
    """Equal as JSON: 1 is 1.0, and true is not 1."""
    return _spell(a) == _spell(b)


def _spell(value: Any) -> str:
    def whole(value: Any) -> Any:
        if isinstance(value, float) and value.is_integer():
            return int(value)
        if isinstance(value, list):
            return [whole(item) for item in value]
        return {key: whole(item) for key, item in value.items()} if isinstance(value, dict) else value

    return json.dumps(whole(value), sort_keys=True, separators=(",", ":"))
