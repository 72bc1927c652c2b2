"""Exact texts, patterns and JSON: what is accepted, what each verdict means, and that bombs cost nothing."""

import json
import random
import re
import sys
import time
from typing import Any

import pytest

from grpo_jax.tasks import Verdict, structured
from grpo_jax.tasks.structured import (
    MAX_CHARACTERS,
    MAX_DEPTH,
    answer_exact,
    answer_json,
    check_exact,
    check_json,
    check_regex,
    verify_exact,
    verify_json,
    verify_regex,
)

CORRECT, WRONG, TOO_LONG, UNPARSABLE = Verdict.correct, Verdict.wrong, Verdict.too_long, Verdict.unparsable


@pytest.mark.parametrize(
    ("text", "target", "verdict"),
    [
        ("Paris", "Paris", CORRECT),
        (" \n Paris\t", "Paris ", CORRECT),
        ("paris", "Paris", WRONG),
        ("Paris.", "Paris", WRONG),
        ("New  York", "New York", WRONG),
        ("cafe\u0301", "caf\u00e9", WRONG),
        ("\ud800", "Paris", WRONG),
        ("", "Paris", UNPARSABLE),
        (" \n", "Paris", UNPARSABLE),
        ("x" * 1_000_000, "x", TOO_LONG),
    ],
)
def test_exact(text: str, target: str, verdict: Verdict) -> None:
    assert verify_exact(text, target, False) is verdict
    assert verify_exact(text, target, True) is TOO_LONG
    if verdict is CORRECT:
        assert answer_exact(text) == answer_exact(target)


def test_exact_wants_a_target() -> None:
    check_exact("x")
    with pytest.raises(ValueError, match="empty"):
        check_exact(" \n")
    assert answer_exact(" ") is None


@pytest.mark.parametrize(
    "text",
    ["{}", "[]", "0", "-1.5e+10", '"a"', "true", "null", ' \n{"a": [1, {"b": null}]}\t', "```json\n[1]\n```",
     "```\n[1]\n```", "```json  \n\n [1] \n\n```\n", '"```"', r'"\ud83e\udd86 \u0000 \/"', '{"": {"": ""}}',
     '["[[[[", "}}", "\\"[", "\\\\"]'],
)  # fmt: skip
def test_any_json(text: str) -> None:
    assert verify_json(text, "{}", False) is CORRECT
    assert verify_json(text, "{}", True) is TOO_LONG
    assert json.loads(answer_json(text) or "") == json.loads(text.strip().removeprefix("```json").strip("` \n"))


@pytest.mark.parametrize(
    "text",
    ["", " ", "x", "{", "[1,]", "[1 2]", '{"a" 1}', "{'a': 1}", '{"a": 1,}', "[NaN]", "Infinity", "-Infinity", "[1e999]",
     "-1e309", "01", "+1", ".5", "1.", "0x1", "1_0", "１", "True", "undefined", '"\n"', '"\x00"', r'"\x41"',
     '{"a": 1, "a": 2}', '{"a": {"b": 1, "b": 1}}', "[1] [2]", "[1] // no", "/* no */ [1]", "Here: [1]", "[1]\nDone.",
     "\ufeff[1]", "```json [1] ```", "```json\n[1]", "[1]\n```", "```yaml\n[1]\n```", "```json\n[1]\n```\nDone",
     "```json\n[1]\n```\n```json\n[2]\n```", "9" * 401, "-" + "9" * 401, "\ud800", '"', '"\\'],
)  # fmt: skip
def test_what_is_not_json(text: str) -> None:
    assert verify_json(text, "{}", False) is UNPARSABLE
    assert answer_json(text) is None


@pytest.mark.parametrize(
    ("text", "verdict"),
    [
        ("[" * MAX_DEPTH + "]" * MAX_DEPTH, CORRECT),
        ("[" * (MAX_DEPTH + 1) + "]" * (MAX_DEPTH + 1), TOO_LONG),
        ("[" * 50_000, TOO_LONG),
        ('{"a":' * 10_000, TOO_LONG),
        ("[" * 1_000_000, TOO_LONG),
        ('["' + "[" * 60_000 + '"]', CORRECT),
        ('"' * 60_000, UNPARSABLE),
        ('"\\' * 30_000, UNPARSABLE),
        ('["\\"' * 15_000, UNPARSABLE),
        ("]" * 60_000, UNPARSABLE),
        ("9" * 60_000, UNPARSABLE),
        ("1." + "9" * 60_000, CORRECT),
        ("1e" + "9" * 60_000, UNPARSABLE),
        ("-" * 60_000, UNPARSABLE),
        ("[" + "1," * 30_000 + "1]", CORRECT),
        ("{" + ",".join(f'"{i}":{i}' for i in range(4000)) + "}", CORRECT),
        (" " * (MAX_CHARACTERS - 1) + "1", CORRECT),
        (" " * MAX_CHARACTERS + "1", TOO_LONG),
    ],
)
def test_json_bombs(text: str, verdict: Verdict) -> None:
    start = time.perf_counter()
    assert verify_json(text, "{}", False) is verdict
    assert time.perf_counter() - start < 2


SHAPE = json.dumps(
    {
        "type": "object",
        "required": ["name", "age"],
        "properties": {
            "name": {"type": "string"},
            "age": {"type": "integer"},
            "tags": {"type": "array", "items": {"enum": ["a", "b", 1, None]}, "minItems": 1, "maxItems": 2},
            "home": {"properties": {"zip": {"const": "01234"}}, "additionalProperties": False},
        },
    }
)


@pytest.mark.parametrize(
    ("value", "verdict"),
    [
        ({"name": "Sue", "age": 3}, CORRECT),
        ({"name": "Sue", "age": 3.0, "more": [[]]}, CORRECT),
        ({"name": "Sue", "age": 3.5}, WRONG),
        ({"name": "Sue", "age": True}, WRONG),
        ({"name": "Sue", "age": "3"}, WRONG),
        ({"name": "Sue"}, WRONG),
        ({"name": None, "age": 3}, WRONG),
        ([], WRONG),
        ("name", WRONG),
        ({"name": "Sue", "age": 3, "tags": ["a", 1.0]}, CORRECT),
        ({"name": "Sue", "age": 3, "tags": [None]}, CORRECT),
        ({"name": "Sue", "age": 3, "tags": []}, WRONG),
        ({"name": "Sue", "age": 3, "tags": ["a", "a", "b"]}, WRONG),
        ({"name": "Sue", "age": 3, "tags": [True]}, WRONG),
        ({"name": "Sue", "age": 3, "tags": [0]}, WRONG),
        ({"name": "Sue", "age": 3, "tags": "a"}, WRONG),
        ({"name": "Sue", "age": 3, "home": {"zip": "01234"}}, CORRECT),
        ({"name": "Sue", "age": 3, "home": {"zip": 1234}}, WRONG),
        ({"name": "Sue", "age": 3, "home": {"city": "X"}}, WRONG),
        (
            {"name": "Sue", "age": 3, "home": "nowhere"},
            CORRECT,
        ),  # as in JSON Schema: properties ask nothing of a string
    ],
)
def test_shapes(value: Any, verdict: Verdict) -> None:
    assert verify_json(json.dumps(value), SHAPE, False) is verdict
    assert verify_json(f"```json\n{json.dumps(value, indent=2)}\n```", SHAPE, False) is verdict


@pytest.mark.parametrize(
    ("a", "b", "same"),
    [
        ("1", "1.0", True),
        ("100", "1e2", True),
        ("0", "-0.0", True),
        ("1", "true", False),
        ("0", "false", False),
        ("null", "false", False),
        ('"1"', "1", False),
        ("9007199254740993", "9007199254740992.0", False),
        ('{"a": 1, "b": [2]}', '{"b": [2.0], "a": 1.0}', True),
        ("[1, 2]", "[2, 1]", False),
        ('"\\u00e9"', '"é"', True),
        ("[]", "{}", False),
        ('{"a": null}', "{}", False),
    ],
)
def test_equal_as_json(a: str, b: str, same: bool) -> None:
    assert verify_json(a, f'{{"const": {b}}}', False) is (CORRECT if same else WRONG)
    assert verify_json(b, f'{{"enum": [[[]], {a}]}}', False) is (CORRECT if same else WRONG)
    assert (answer_json(a) == answer_json(b)) is same


@pytest.mark.parametrize("name", ["object", "array", "string", "integer", "number", "boolean", "null"])
def test_types(name: str) -> None:
    values = {
        "{}": "object",
        "[]": "array",
        '""': "string",
        "1": "integer",
        "1.5": "number",
        "true": "boolean",
        "null": "null",
    }
    for text, its_name in values.items():
        right = its_name == name or (name == "number" and its_name == "integer")
        assert verify_json(text, json.dumps({"type": name}), False) is (CORRECT if right else WRONG)


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("{", "is not JSON"),
        ("[]", "wants an object of keys"),
        ("3", "wants an object of keys"),
        ('{"typ": "object"}', "unknown key 'typ'; known: type, const"),
        ('{"type": "text"}', 'type cannot be "text"'),
        ('{"type": ["text"]}', "type cannot be"),
        ('{"type": {}}', "type cannot be"),
        ('{"enum": []}', "enum cannot be"),
        ('{"required": "a"}', "required cannot be"),
        ('{"required": [1]}', "required cannot be"),
        ('{"minItems": -1}', "minItems cannot be"),
        ('{"minItems": true}', "minItems cannot be"),
        ('{"additionalProperties": []}', "additionalProperties cannot be"),
        ('{"items": [{}]}', "items cannot be"),
        ('{"properties": []}', "properties cannot be"),
        ('{"properties": {"a": {"items": {"patern": "x"}}}}', "shape at a.items: unknown key 'patern'"),
        ('{"anyOf": [{}, {"items": {"format": "date"}}]}', "shape at anyOf.1.items: unknown key 'format'"),
        ('{"anyOf": [3]}', "anyOf cannot be"),
        ('{"anyOf": []}', "anyOf cannot be"),
        ('{"minLength": "1"}', "minLength cannot be"),
        ('{"not": 1}', "not cannot be"),
        ('{"items": {"not": {"typ": "object"}}}', "shape at items.not: unknown key 'typ'"),
        ('{"$ref": "#"}', "unknown key '$ref'"),
        ('{"$ref": "file:///etc/passwd"}', "unknown key '$ref'"),
        ('{"properties": {"a": {"$ref": "http://localhost/"}}}', "shape at a: unknown key '$ref'"),
        ('{"$schema": "http://json-schema.org/draft-07/schema#", "pattern": "(a+)+$"}', "unknown key '$schema'"),
        ('{"patternProperties": {"(a+)+$": {}}}', "unknown key 'patternProperties'"),
        ('{"properties": {"a": 3}}', "shape at a: wants an object"),
        ('{"const": NaN}', "NaN is not JSON"),
        ("", "the shape '' is not JSON"),
        ('{"properties": {"\\u001b]0;x\\u0007": 3}}', r"shape at \x1b]0;x\x07: wants an object"),
        ('{"type": "object", "type": "array"}', "a key occurs twice"),
        ("[" * 100_000, "brackets deep"),
    ],
)
def test_bad_shapes_say_what_is_wrong(target: str, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        check_json(target)
    with pytest.raises(ValueError, match=re.escape(message)):
        verify_json("{}", target, False)


@pytest.mark.parametrize(
    ("schema", "right", "wrong"),
    [
        ({"type": ["string", "null"]}, ['"a"', "null"], ["1", "[]"]),
        ({"additionalProperties": {"type": "string"}}, ['{"a": "b"}', "{}", "1"], ['{"a": 1}']),
        ({"minimum": 1, "exclusiveMaximum": 1.5}, ["1", "1.49", '"a"'], ["0", "1.5", "9" * 400]),
        ({"minLength": 2, "maxLength": 3}, ['"ab"', '"🦆🦆🦆"', "1"], ['"a"', '"abcd"']),
        ({"minProperties": 1, "maxProperties": 2}, ['{"a": 1}'], ["{}", '{"a": 1, "b": 2, "c": 3}']),
        ({"prefixItems": [{"const": 1}], "items": False}, ["[1]", "[]"], ["[2]", "[1, 2]"]),
        ({"contains": {"const": 1}}, ["[2, 1.0]"], ["[2, true]", "[]"]),
        ({"propertyNames": {"maxLength": 1}}, ['{"a": 1}'], ['{"ab": 1}']),
        ({"anyOf": [{"type": "integer"}, {"minLength": 2}]}, ["1", '"ab"'], ['"a"']),
        ({"oneOf": [{"type": "integer"}, {"minimum": 2}]}, ["1", "2.5"], ["2", "1.5"]),
        ({"allOf": [{"type": "integer"}, {"minimum": 2}]}, ["2"], ["1", "2.5"]),
        ({"not": {"type": "integer"}}, ['"a"', "1.5"], ["1", "1.0"]),
        ({"if": {"type": "string"}, "then": {"minLength": 1}, "else": {"const": 1}}, ['"a"', "1"], ['""', "2"]),
        ({"title": "A", "description": "B"}, ["1"], []),
    ],
)
def test_more_of_json_schema(schema: Any, right: list[str], wrong: list[str]) -> None:
    assert [verify_json(text, json.dumps(schema), False) for text in right] == [CORRECT] * len(right)
    assert [verify_json(text, json.dumps(schema), False) for text in wrong] == [WRONG] * len(wrong)


BRANCHES = {"anyOf": [{"items": {"enum": [f"word {i}" for i in range(200)]}}] * 3}
NESTED = json.loads('{"items":' * (MAX_DEPTH - 1) + "{}" + "}" * (MAX_DEPTH - 1))


@pytest.mark.parametrize(
    ("text", "schema", "verdict"),
    [
        ("[" + '"a",' * 16_000 + "1]", BRANCHES, WRONG),
        ("[" + '"word 199",' * 5_000 + "1]", {"oneOf": BRANCHES["anyOf"]}, WRONG),
        ("[" + "[]," * 20_000 + "1]", {"items": {"oneOf": [{"type": "array"}, {"type": "integer"}]}}, CORRECT),
        ("[" * MAX_DEPTH + "]" * MAX_DEPTH, NESTED, CORRECT),
        ("[" * (MAX_DEPTH - 1) + "1," * 20_000 + "1" + "]" * (MAX_DEPTH - 1), NESTED, CORRECT),
        ("9" * 400, {"minimum": 1.5, "maximum": 1e308}, WRONG),
        ('"\\ud800"', {"type": "string"}, CORRECT),
    ],
)
def test_bombs_against_a_schema(text: str, schema: Any, verdict: Verdict) -> None:
    start = time.perf_counter()
    assert verify_json(text, json.dumps(schema), False) is verdict
    assert time.perf_counter() - start < 2


@pytest.mark.parametrize(
    ("text", "pattern", "verdict"),
    [
        ("May 1971", "[0-9]{4}", CORRECT),  # JSON Schema asks for a match anywhere
        ("May 1971", "^[0-9]{4}$", WRONG),
        ("a" * 60_000 + "!", "^(a+)+$", WRONG),
        ("x" * 60_000, "(x+x+)+y", WRONG),
        ("\ud800", "^.$", CORRECT),
        ("\ud800", "[a-z?]", WRONG),
    ],
)
def test_patterns_in_a_schema(text: str, pattern: str, verdict: Verdict) -> None:
    pytest.importorskip("re2", reason="needs google-re2")
    start = time.perf_counter()
    target = json.dumps({"items": {"pattern": pattern}})
    assert verify_json(json.dumps([text, 1]), target, False) is verdict
    assert time.perf_counter() - start < 2
    with pytest.raises(ValueError, match="pattern"):
        check_json(json.dumps({"items": {"pattern": f"(?={pattern})"}}))


@pytest.mark.parametrize(("module", "package", "target"), [("jsonschema", "jsonschema", '{"type": "null"}'),
                                                           ("re2", "google-re2", '{"pattern": "missing"}')])  # fmt: skip
def test_a_missing_package_is_named_with_its_extra(
    module: str, package: str, target: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    for function in (structured._validator_class, structured._validator, structured._pattern):
        function.cache_clear()
    with pytest.raises(ImportError, match=rf"needs the package {package}: pip install 'grpo_jax\[verifiers\]'$"):
        check_json(target)


def test_random_values_survive_and_no_others() -> None:
    rng = random.Random(0)

    def value(depth: int) -> Any:
        match rng.randrange(8 if depth else 6):
            case 0:
                return rng.choice([True, False, None])
            case 1:
                return rng.randint(-(10**20), 10**20)
            case 2:
                return rng.uniform(-1, 1) * 10 ** rng.randint(-300, 300)
            case 3 | 4 | 5:
                return "".join(rng.choice('ab"\\[]{}\n\t\0é🦆 ') for _ in range(rng.randrange(8)))
            case 6:
                return [value(depth - 1) for _ in range(rng.randrange(4))]
            case _:
                return {str(rng.randrange(99)): value(depth - 1) for _ in range(rng.randrange(4))}

    values = [value(4) for _ in range(300)]
    for i, one in enumerate(values):
        text, other = json.dumps(one, ensure_ascii=i % 2 == 0, indent=i % 3 or None), values[i - 1]
        assert verify_json(text, json.dumps({"const": one}), False) is CORRECT
        assert json.loads(answer_json(text) or "") == one
        if json.dumps(one) != json.dumps(other):
            assert verify_json(text, json.dumps({"const": other}), False) is WRONG
        if isinstance(one, dict | list):  # what is cut is not JSON
            assert verify_json(text[: rng.randrange(1, len(text))], "{}", False) is UNPARSABLE


@pytest.mark.parametrize(
    ("text", "pattern", "verdict"),
    [
        ("May 1971", "[A-Z][a-z]+ [0-9]{4}", CORRECT),
        (" May 1971\n", "[A-Z][a-z]+ [0-9]{4}", CORRECT),
        ("In May 1971", "[A-Z][a-z]+ [0-9]{4}", WRONG),
        ("May 1971!", "[A-Z][a-z]+ [0-9]{4}", WRONG),
        ("may 1971", "(?i)[A-Z][a-z]+ [0-9]{4}", CORRECT),
        ("a\nb", "a.b", WRONG),
        ("a\nb", "(?s)a.b", CORRECT),
        ("é🦆中", "...", CORRECT),
        ("４", r"\d", WRONG),
        ("a\0b", "a.b", CORRECT),
        ("yes", "yes|no", CORRECT),
        ("yesno", "yes|no", WRONG),
        ("", "a*", CORRECT),
        ("a\ud800", ".*", UNPARSABLE),
        ("a" * 60_000 + "!", "(a+)+$", WRONG),
        ("a" * 60_000, "(a|aa)+b?", CORRECT),
        ("a" * 60_000 + "b", "(a*)*(a*)*(a*)*c", WRONG),
        ("a" * 60_000, "(?:a?){500}a{500}", WRONG),
        ("x" * 60_000, "(x+x+)+y", WRONG),
        ("a" * 70_000, "a*", TOO_LONG),
    ],
)
def test_regex(text: str, pattern: str, verdict: Verdict) -> None:
    pytest.importorskip("re2", reason="needs google-re2")
    start = time.perf_counter()
    assert verify_regex(text, pattern, False) is verdict
    assert time.perf_counter() - start < 2
    assert verify_regex(text, pattern, True) is TOO_LONG


@pytest.mark.parametrize(
    "pattern", ["", "(", "a{2,1}", r"(a)\1", "(?=a)a", "(?<!a)b", "(?P<x>a)(?P=x)", "a" + "{1000}" * 4, "[z-a]", "\ud800"]
)  # fmt: skip
def test_refused_patterns(pattern: str, capfd: pytest.CaptureFixture) -> None:
    pytest.importorskip("re2", reason="needs google-re2")
    with pytest.raises(ValueError, match="pattern"):
        check_regex(pattern)
    if pattern:
        with pytest.raises(ValueError, match="pattern"):
            verify_regex("a", pattern, False)
    assert capfd.readouterr().err == ""
