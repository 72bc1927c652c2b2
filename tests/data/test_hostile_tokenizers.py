"""Tokenizers that crash, hang, or fill the memory: each is refused in one line that names the file, in bounded time."""

import json
import time

import pytest

from grpo_jax.data.tokenizers import HFTokenizer
from tests.data.chat_folders import write_folder
from tests.data.test_tokenizers import byte_level


def replace(pattern, content, kind="String"):
    return {"type": "Replace", "pattern": {kind: pattern}, "content": content}


def sequence(part, steps):
    return {"type": "Sequence", part: steps}


BOMB = [replace("a", "a" * 100) for _ in range(5)]
PRECOMPILED = {"type": "Precompiled", "precompiled_charsmap": "AAAAAAAA"}
VOCABULARY = {
    "type": "WordPiece",
    "unk_token": "[UNK]",
    "continuing_subword_prefix": "##",
    "max_input_chars_per_word": 100,
}
HOSTILE = {
    "a broken table of characters": {"normalizer": PRECOMPILED},
    "one of another size": {"normalizer": PRECOMPILED | {"precompiled_charsmap": "/////w=="}},
    "an expression that takes for ever": {
        "pre_tokenizer": {"type": "Split", "pattern": {"Regex": "(a+)+$"}, "behavior": "Isolated", "invert": False}
    },
    "another": {"normalizer": replace("(a|aa)+$", "b", "Regex")},
    "a decoder that blows texts up": {"decoder": sequence("decoders", BOMB)},
    "a normalizer that does": {"normalizer": sequence("normalizers", BOMB)},
    "one that does in the place of nothing": {"decoder": replace("x*", "a" * 2000, "Regex")},
    "a post-processor of unknown tokens": {
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [{"SpecialToken": {"id": "[NONE]", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
            "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 0}}],
            "special_tokens": {},
        }
    },
    "no token for what it does not know": {"model": VOCABULARY | {"vocab": {"a": 0}}},
    "a number for a model": {"model": 7},
    "a thousand nested normalizers": {
        "normalizer": json.loads('{"type":"Sequence","normalizers":[' * 400 + "]}" * 400)
    },
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_tokenizer_is_refused_in_one_line(tmp_path, name):
    folder = write_folder(tmp_path, byte_level() | HOSTILE[name], {})
    begun = time.monotonic()
    with pytest.raises(ValueError, match=r"tokenizer\.json: ") as refused:
        HFTokenizer(folder)
    assert "\n" not in str(refused.value)
    assert time.monotonic() - begun < 60


@pytest.mark.slow
def test_a_million_added_tokens_are_refused(tmp_path):
    layout = byte_level()
    token = layout["added_tokens"][0]
    layout["added_tokens"] = [token | {"id": 256 + i, "content": f"<{i}>"} for i in range(1_000_000)]
    with pytest.raises(ValueError, match=r"tokenizer\.json: "):
        HFTokenizer(write_folder(tmp_path, layout, {}))


def test_a_panic_on_the_way_is_an_error_of_its_file(tmp_path):
    """One that no trial has met: the library's own exception is no `Exception`, and would end a run in a stack trace."""
    tokenizer = HFTokenizer(write_folder(tmp_path, byte_level(), {}))

    class PanicException(BaseException):
        pass

    class Panicking:
        def encode(self, *_, **__):
            raise PanicException("called `Option::unwrap()`\n on a `None` value")

        decode = encode

    tokenizer._tokenizer = Panicking()
    for act in (lambda: tokenizer.encode("x"), lambda: tokenizer.decode([1])):
        with pytest.raises(
            ValueError, match=r"tokenizer\.json: the tokenizer failed: called `Option::unwrap\(\)` on a"
        ):
            act()
