"""Stop strings: the automaton over tokens against `string in text`, for every tokenizer and any way to split a text."""

import json
import random

import numpy as np
import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import decoders, models

from grpo_jax.data import ByteTokenizer, CharTokenizer, HFTokenizer, stop_table
from grpo_jax.data.stops import LONGEST, token_bytes
from tests.data.chat_folders import make_folders, write_folder

FOLDERS = ("chatml", "headers", "turns", "prepended", "metaspace", "unknown")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return make_folders(tmp_path_factory.mktemp("folders"))


def states(table, ids):
    states = [0]
    for i in ids:
        states.append(int(table[states[-1], i]))
    return states


def assert_stops_where_the_text_does(table, ids, texts, strings):
    """``texts``: after each prefix of ids, the empty one first."""
    for state, text in zip(states(table, ids), texts, strict=True):
        assert (state == len(table) - 1) == any(string in text for string in strings), (text, strings)


@given(data=st.data())
def test_characters_against_the_in_operator(data):
    """Small alphabets, where strings overlap with themselves and with each other."""
    tokenizer = CharTokenizer("abé\n")
    words = st.text("abé\n", min_size=1, max_size=5)
    strings, text = data.draw(st.lists(words, min_size=1, max_size=4)), data.draw(st.text("abé\n", max_size=30))
    table, ids = stop_table(tokenizer, strings), tokenizer.encode(text)
    assert_stops_where_the_text_does(table, ids, [text[:n] for n in range(len(text) + 1)], strings)
    assert (table[:, :3] == np.arange(len(table))[:, None]).all()  # control tokens have no text


@given(data=st.data())
def test_bytes_against_the_in_operator_of_the_decoded_text(data):
    """Any bytes, also such as are no text; a character counts when its last byte is there."""
    tokenizer = ByteTokenizer()
    strings = data.draw(st.lists(st.text("a€é🙂\n", min_size=1, max_size=3), min_size=1, max_size=3))
    pieces = data.draw(
        st.lists(st.sampled_from([*(s.encode() for s in "a€é🙂\n"), b"\xe2", b"\x82", b"\xff"]), max_size=20)
    )
    ids = [3 + byte for byte in b"".join(pieces)]
    texts = [tokenizer.decode(ids[:n]) for n in range(len(ids) + 1)]
    assert_stops_where_the_text_does(stop_table(tokenizer, strings), ids, texts, strings)


def test_any_split_of_a_text_into_tokens_gives_the_same_answer(tmp_path):
    """A byte-level vocabulary with tokens that end inside a character, over a string, and beyond it."""
    pieces = [
        b"\n",
        b".\n\n",
        b"\n\n",
        b"\n\nA",
        b"A",
        b".",
        b"\xe2",
        b"\xe2\x82",
        b"\x82\xac",
        b"\xac",
        b"\xac\n",
        b" ",
        b"U:",
        b":",
    ]
    code = dict(zip([*bytes(range(256))], byte_characters(), strict=True))
    vocabulary = {"".join(code[b] for b in piece): i for i, piece in enumerate(pieces)}
    tokenizer = tokenizers.Tokenizer(models.BPE(vocabulary, []))
    tokenizer.decoder = decoders.ByteLevel()
    folder = write_folder(tmp_path, json.loads(tokenizer.to_str()))
    ours, strings = HFTokenizer(folder), ["\n\n", "€\n", "U:"]
    assert token_bytes(ours) == pieces
    table = stop_table(ours, strings)
    chance, hits = random.Random(0), 0
    for _ in range(500):
        ids = chance.choices(range(len(pieces)), k=12)
        texts = [b"".join(pieces[i] for i in ids[:n]).decode(errors="replace") for n in range(13)]
        assert_stops_where_the_text_does(table, ids, texts, strings)
        hits += states(table, ids)[-1] == len(table) - 1
    assert 100 < hits < 500


def byte_characters():
    """As byte-level BPE writes the bytes 0 … 255, from the library: its alphabet is sorted by code point."""
    printable = [b for b in range(256) if chr(b).isprintable() and chr(b) not in " \xad\xa0"]
    others = iter(sorted(c for c in tokenizers.pre_tokenizers.ByteLevel.alphabet() if ord(c) >= 256))
    return [chr(b) if b in printable else next(others) for b in range(256)]


@pytest.mark.parametrize("name", FOLDERS)
def test_the_bytes_of_tokens_are_what_the_library_decodes(folders, name):
    """Anchored between two letters, so that no leading space is stripped; control tokens have none."""
    tokenizer = HFTokenizer(folders[name])
    texts = token_bytes(tokenizer)
    anchor = tokenizer._tokenizer.token_to_id("e")
    for i, text in enumerate(texts):
        shown = tokenizer.decode([anchor, i, anchor])
        assert shown == f"e{text.decode(errors='replace')}e" or "\ufffd" in shown, (i, text, shown)
    assert any(texts) and not any(texts[i] for i in tokenizer.special_ids)


@pytest.mark.parametrize("name", FOLDERS)
def test_random_tokens_of_a_folder_against_what_the_library_decodes(folders, name):
    check_random_tokens(HFTokenizer(folders[name]))


def test_random_tokens_of_the_story_tokenizer(shared):
    tokenizer = HFTokenizer(shared / "models/stories260k")
    check_random_tokens(tokenizer)
    table = stop_table(tokenizer, ["The end", " Once"])
    for text, stops in (("They ran. The end.", True), ("The en d", False), ("So. Once upon", True), ("atOnce", False)):
        assert (states(table, tokenizer.encode(text))[-1] == len(table) - 1) == stops, text


def check_random_tokens(tokenizer):
    chance, texts = random.Random(1), token_bytes(tokenizer)
    # Bytes that are no characters alone spoil the library's whole run of byte tokens: left to another test.
    usable = [i for i, text in enumerate(texts) if text and text.isascii()]
    anchor = tokenizer._tokenizer.token_to_id("e")
    hits = 0
    for _ in range(60):
        ids, other = chance.choices(usable, k=20), chance.choices(usable, k=20)
        strings = []
        for source in (ids, other, other):
            text = tokenizer.decode([anchor, *source])
            at = chance.randrange(len(text) - 1)
            strings.append(text[at : at + chance.randrange(2, 6)])
        strings = [string for string in strings if len(string) > 1]
        decoded = [tokenizer.decode([anchor, *ids[:n]])[1:] for n in range(21)]
        table = stop_table(tokenizer, strings)
        assert_stops_where_the_text_does(table, ids, decoded, strings)
        hits += states(table, ids)[-1] == len(table) - 1
    assert hits > 10


def test_tokens_without_text_change_nothing_and_the_table_fits_the_model():
    tokenizer = CharTokenizer("ab")
    table = stop_table(tokenizer, ["ab"], vocab_size=9)
    assert (table.shape, table.dtype) == ((3, 9), np.uint8)
    assert table.tolist()[0] == [0, 0, 0, 1, 0, 0, 0, 0, 0]
    assert states(table, [3, 0, 7, 2, 4, 3])[-1] == 2  # b, what came between is no text, and after the end all stays
    assert stop_table(tokenizer, []) is None
    assert stop_table(ByteTokenizer(), ["x" * 300]).dtype == np.uint16


def test_mistakes_are_named(tmp_path):
    letters = CharTokenizer("ab")
    for tokenizer, strings, options, message in (
        (letters, [""], {}, "a stop string is empty"),
        (letters, ["a", "ba\n"], {}, r"no tokens of this vocabulary make the stop string 'ba\\n'"),
        (letters, ["\ud800"], {}, "half of a surrogate pair"),
        (letters, ["\ufffd"], {}, r"U\+FFFD"),
        (ByteTokenizer(), ["x" * LONGEST, "y"], {}, "1,025 bytes together"),
        (letters, ["a"], {"vocab_size": 4}, "the tokenizer has 5 tokens, and the model only 4"),
        (object(), ["a"], {}, "not object"),
    ):
        with pytest.raises(ValueError, match=message):
            stop_table(tokenizer, strings, **options)
    each = decoders.Sequence([decoders.Replace("▁", " "), decoders.Strip(" ", 1, 0)])  # no Fuse: of every token
    for decoder in (decoders.WordPiece(), decoders.BPEDecoder(), each, None):
        library = tokenizers.Tokenizer(models.BPE({"a": 0, "b": 1}, []))
        if decoder is not None:
            library.decoder = decoder
        folder = write_folder(tmp_path / type(decoder).__name__, json.loads(library.to_str()))
        with pytest.raises(ValueError, match=r"tokenizer\.json: stop strings need"):
            stop_table(HFTokenizer(folder), ["a"])
