"""Verifiers of whole completions: a certain text, text that matches a pattern, JSON that meets a schema.

The whole completion counts, without the white space around it; one that did not stop by itself is ``too_long``.
"""

import functools
import json
import math
import re
from collections.abc import Iterator
from typing import Any

from grpo_jax.files import unique_keys
from grpo_jax.tasks.answers import nesting
from grpo_jax.tasks.task import Verdict

MAX_CHARACTERS = 64 * 1024
"""A longer completion is ``too_long`` unread."""
MAX_DEPTH = 64
"""JSON with more brackets open at a time is ``too_long``, so that no verdict depends on the size of the stack."""
_MAX_DIGITS = 400  # of a JSON integer; Python reads at most 4300

_NEEDS = "this verifier needs the package {}: pip install 'grpo_jax[verifiers]'"

_SCHEMA: dict[str, Any] = {"type": ["object", "boolean"]}
_SCHEMAS = {"type": "array", "items": _SCHEMA, "minItems": 1}
_COUNT = {"type": "integer", "minimum": 0}
_NUMBER, _TEXT = {"type": "number"}, {"type": "string"}
_TYPE = {"enum": ["object", "array", "string", "integer", "number", "boolean", "null"]}
_KEYWORDS: dict[str, Any] = {
    "type": {"anyOf": [_TYPE, {"type": "array", "items": _TYPE, "minItems": 1}]},
    "const": {},
    "enum": {"type": "array", "minItems": 1},
    "properties": {"type": "object"},
    "required": {"type": "array", "items": _TEXT},
    "additionalProperties": _SCHEMA,
    "items": _SCHEMA,
    **dict.fromkeys(("minItems", "maxItems", "minLength", "maxLength", "minProperties", "maxProperties"), _COUNT),
    **dict.fromkeys(("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"), _NUMBER),
    **dict.fromkeys(("pattern", "title", "description"), _TEXT),
    **dict.fromkeys(("prefixItems", "allOf", "anyOf", "oneOf"), _SCHEMAS),
    **dict.fromkeys(("not", "if", "then", "else", "contains", "propertyNames"), _SCHEMA),
}
"""The keywords of JSON Schema that are understood, and what each may be set to, as a schema.

Not here: ``$ref``, by which a completion could make a check take exponential time (and which could name a file or a host);
``$schema``, which would bring back the package's own rules; ``patternProperties``, whose patterns the package gives to Python's
slow ``re``; ``uniqueItems``, which takes quadratic time; ``multipleOf``, which fails for large numbers; and what asks nothing
of a value, such as ``format`` and ``default``.
"""

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

    The pattern is one of RE2 (https://github.com/google/re2/wiki/Syntax), without back-references or look-around. In return,
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

    JSON as in RFC 8259, without ``NaN``, comments or trailing commas, without a key that occurs twice in an object, and without
    numbers beyond a float or of more than 400 digits. A completion that is not such JSON, or holds more than it, is
    ``unparsable``; JSON of another shape is ``wrong``.

    target: a JSON Schema (https://json-schema.org/draft/2020-12) of the keywords in ``_KEYWORDS``; a ``pattern`` is one of
    RE2. ``{}`` asks for any JSON, ``{"const": …}`` for one value exactly. Needs the package jsonschema, and google-re2 for a
    pattern. Raises ValueError for a target that is no such schema.

    >>> import pytest; _ = pytest.importorskip("jsonschema")
    >>> shape = '{"type": "object", "required": ["age"], "properties": {"age": {"type": "integer"}}}'
    >>> [str(verify_json(text, shape, False)) for text in ('{"age": 3}', '{"age": "3"}', "{}", "age: 3")]
    ['correct', 'wrong', 'wrong', 'unparsable']
    >>> verify_json("```json\\n[1, 2.0]\\n```", '{"const": [1, 2]}', False)
    <Verdict.correct: 'correct'>
    """
    validator = _validator(target)
    if truncated or len(completion) > MAX_CHARACTERS or _depth(completion) > MAX_DEPTH:
        return Verdict.too_long
    try:
        value = _read(_without_fence(completion.strip()))
    except ValueError:
        return Verdict.unparsable
    return Verdict.correct if validator.is_valid(value) else Verdict.wrong


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
    """Raises ValueError for a target that is not a schema as `verify_json` wants it, naming the key that is not understood.

    >>> import pytest; _ = pytest.importorskip("jsonschema")
    >>> check_json('{"type": "array", "items": {"minLength": "1"}}')
    Traceback (most recent call last):
    ...
    ValueError: shape at items: minLength cannot be "1"
    """
    _validator(target)


@functools.lru_cache(maxsize=4096)
def _pattern(target: str) -> Any:
    try:
        import re2
    except ModuleNotFoundError:
        raise ImportError(_NEEDS.format("google-re2")) from None
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
    return nesting(piece for piece in _STRINGS_AND_BRACKETS.findall(text) if piece[0] != '"')


def _read(text: str) -> Any:
    def finite(digits: str) -> float:
        value = float(digits)
        if not math.isfinite(value):
            raise ValueError(f"{digits[:20]} is beyond every float")
        return int(value) if value.is_integer() else value  # 1.0 is 1 in JSON

    def whole(digits: str) -> int:
        if len(digits) > _MAX_DIGITS:
            raise ValueError(f"a number of {len(digits)} digits")
        return int(digits)

    def refuse(name: str) -> None:
        raise ValueError(f"{name} is not JSON")

    return json.loads(text, object_pairs_hook=unique_keys, parse_float=finite, parse_int=whole, parse_constant=refuse)


@functools.lru_cache(maxsize=4096)
def _validator(target: str) -> Any:
    """What checks values against the schema that a target is; it reads no file and no network."""
    if _depth(target) > MAX_DEPTH:
        raise ValueError(f"the shape is more than {MAX_DEPTH} brackets deep")
    try:
        schema = _read(target)
    except ValueError as error:
        raise ValueError(f"the shape {target[:100]!r} is not JSON: {error}") from None
    _check_schema(schema, "")
    return _validator_class()(schema)


def _check_schema(schema: Any, place: str) -> None:
    """Refuses a keyword that JSON Schema would ignore: misspelled, it would ask for nothing, and reward anything."""
    where = f"shape at {repr(place[1:201])[1:-1]}" if place else "shape"
    if not isinstance(schema, dict):
        raise ValueError(f"{where}: wants an object of keys and what they ask for")
    for key, wanted in schema.items():
        if key not in _KEYWORDS:
            raise ValueError(f"{where}: unknown key {key[:40]!r}; known: {', '.join(_KEYWORDS)}")
        if not _validator_class()(_KEYWORDS[key]).is_valid(wanted):
            raise ValueError(f"{where}: {key} cannot be {_spell(wanted)[:100]}")
        if key == "pattern":
            _pattern(wanted)
        inner = {}
        if key == "properties":
            inner = wanted
        elif _KEYWORDS[key] is _SCHEMA:
            inner = {key: wanted}
        elif _KEYWORDS[key] is _SCHEMAS:
            inner = {f"{key}.{i}": each for i, each in enumerate(wanted)}
        for name, each in inner.items():
            if not isinstance(each, bool):  # true and false are schemas, too
                _check_schema(each, f"{place}.{name}")


@functools.cache
def _validator_class() -> Any:
    """The package's validator with three keywords of our own.

    Some completions would cost its ``pattern`` exponential time; its ``anyOf`` and ``oneOf`` keep every error of every branch.
    """
    try:
        from jsonschema import Draft202012Validator, ValidationError
        from jsonschema.validators import extend
    except ModuleNotFoundError:
        raise ImportError(_NEEDS.format("jsonschema")) from None

    def pattern(validator: Any, wanted: str, value: Any, schema: Any) -> Iterator[Any]:
        if isinstance(value, str) and not _pattern(wanted).search(value.encode(errors="surrogatepass")):
            yield ValidationError("it does not match the pattern")

    def any_of(validator: Any, wanted: list[Any], value: Any, schema: Any) -> Iterator[Any]:
        if not any(validator.evolve(schema=each).is_valid(value) for each in wanted):
            yield ValidationError("it meets none of the schemas")

    def one_of(validator: Any, wanted: list[Any], value: Any, schema: Any) -> Iterator[Any]:
        if sum(validator.evolve(schema=each).is_valid(value) for each in wanted) != 1:
            yield ValidationError("it does not meet exactly one of the schemas")

    return extend(Draft202012Validator, {"pattern": pattern, "anyOf": any_of, "oneOf": one_of})


def _spell(value: Any) -> str:
    return json.dumps(value, sort_keys=True, separators=(",", ":"))
