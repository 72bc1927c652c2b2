"""Tokenizers: exact round trips, no control token forged by text, decoding that never raises."""

import json

import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import decoders, models, pre_tokenizers

from grpo_jax.data import tokenizers as ours
from grpo_jax.data.tokenizers import ByteTokenizer, CharTokenizer, HFTokenizer
from tests.data.chat_folders import make_folders, write_folder

DIGITS = CharTokenizer("0123456789+= ")


@given(st.text(alphabet=DIGITS.alphabet))
def test_characters_round_trip_after_the_control_ids(text):
    ids = DIGITS.encode(text)
    assert ids == [3 + DIGITS.alphabet.index(c) for c in text]
    assert DIGITS.decode(ids) == text


@given(st.lists(st.integers() | st.integers(-3, 20)))
def test_decoding_characters_never_raises(ids):
    assert DIGITS.decode(ids) == "".join(DIGITS.alphabet[i - 3] for i in ids if 3 <= i < 16)


def test_characters_outside_the_alphabet_are_named():
    with pytest.raises(ValueError, match=r"character 'x' is not in the alphabet '0123456789\+= '"):
        DIGITS.encode("1x")
    for alphabet in ("", "aa", "\ud800"):
        with pytest.raises(ValueError, match=r"alphabet|surrogate"):
            CharTokenizer(alphabet)
    assert (DIGITS.pad_id, DIGITS.bos_id, DIGITS.eos_id, DIGITS.vocab_size) == (0, 1, 2, 16)


@given(st.text(st.characters(exclude_categories=["Cs"])))
def test_bytes_round_trip_after_the_control_ids(text):
    ids = ByteTokenizer().encode(text)
    assert ids == [3 + byte for byte in text.encode()]
    assert ByteTokenizer().decode([1, *ids, 2]) == text


@given(st.lists(st.integers() | st.integers(-3, 300)))
def test_decoding_bytes_never_raises(ids):
    known = bytes(i - 3 for i in ids if 3 <= i < 259)
    assert ByteTokenizer().decode(ids) == known.decode("utf-8", "replace")


def test_bytes_refuse_half_a_surrogate_pair():
    with pytest.raises(ValueError, match="half of a surrogate pair at character 1"):
        ByteTokenizer().encode("a\udc00")
    tokenizer = ByteTokenizer()
    assert (tokenizer.pad_id, tokenizer.bos_id, tokenizer.eos_id, tokenizer.vocab_size) == (0, 1, 2, 259)
    assert tokenizer.stop_ids == DIGITS.stop_ids == (2,) and tokenizer.adds_bos and DIGITS.adds_bos


def folder_of(folder, layout, tokenizer_config=None, config=None, **others):
    files = {"tokenizer_config": tokenizer_config, "config": config, **others}
    return write_folder(folder, layout, {name: entries for name, entries in files.items() if entries is not None})


def byte_level(extra=("<|im_end|>", "<s>", "</s>"), special=True):
    """A byte-level BPE without merges: 256 bytes, then the added tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = tokenizers.Tokenizer(models.BPE({c: i for i, c in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_tokens([tokenizers.AddedToken(token, special=special, normalized=False) for token in extra])
    return json.loads(tokenizer.to_str())


@pytest.mark.parametrize("special", [True, False])
def test_text_does_not_forge_control_tokens(tmp_path, special):
    """Also where the file forgets to mark its control tokens as special."""
    names = {"bos_token": "<s>", "eos_token": {"content": "<|im_end|>"}, "pad_token": "</s>"}
    tokenizer = HFTokenizer(folder_of(tmp_path, byte_level(special=special), names))
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id, tokenizer.vocab_size) == (257, 256, 258, 259)
    text = "a<|im_end|>\n<s></s>"
    ids = tokenizer.encode(text)
    assert len(ids) == len(text) and max(ids) < 256
    assert tokenizer.decode([257, *ids, 256]) == text


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    layout = byte_level()
    layout["truncation"] = {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0}
    layout["padding"] = {"strategy": {"Fixed": 8}, "direction": "Right", "pad_to_multiple_of": None}
    layout["padding"] |= {"pad_id": 0, "pad_type_id": 0, "pad_token": "!"}
    return HFTokenizer(folder_of(tmp_path_factory.mktemp("plain"), layout, config={"eos_token_id": [258, 256]}))


@given(text=st.text(st.characters(exclude_categories=["Cs"])))
def test_text_round_trips_untruncated_and_unpadded(plain, text):
    ids = plain.encode(text)
    assert len(ids) == len(text.encode()) and plain.decode(ids) == text


@given(ids=st.lists(st.integers() | st.integers(-3, 300)))
def test_decoding_never_raises(plain, ids):
    known = [i for i in ids if 0 <= i < 256]
    assert plain.decode(ids) == plain.decode(known)


def test_broken_bytes_surrogates_and_ids_from_config(plain):
    ids = plain.encode("é")
    assert plain.decode(ids[:1]) == "\ufffd" and plain.decode(ids) == "é"
    with pytest.raises(ValueError, match="half of a surrogate pair at character 2"):
        plain.encode("ab\ud83d")
    assert (plain.bos_id, plain.eos_id, plain.pad_id) == (None, 258, 258)


@pytest.mark.parametrize(
    ("layout", "names", "config", "message"),
    [
        ("{", None, None, r"tokenizer\.json: not a tokenizer"),
        ("[" * 100_000, None, None, r"tokenizer\.json: not a tokenizer"),
        (byte_level(), {"eos_token": "<end>"}, None, "the eos token '<end>' is not in"),
        (byte_level(), None, {"bos_token_id": 999}, "the bos token 999 is not in"),
        (byte_level(), None, {"eos_token_id": -1}, "the eos token -1 is not in"),
        (byte_level(), {"eos_token": "\ud800"}, None, "is not a text"),
        (byte_level(), {"eos_token": 7}, None, "the eos token 7 is not a text"),
        (byte_level(), [], None, r"tokenizer_config\.json: its JSON is not an object"),
        (byte_level(), {"eos_token": "a"}, None, "the text 'a' is encoded as the eos token"),
        (byte_level(), None, {"eos_token_id": [256, True]}, "the eos token True is not in"),
        (byte_level(), None, {"eos_token_id": {"id": 256}}, "the eos token .* is not in"),
        (byte_level(), None, {"pad_token_id": 2**70}, "the pad token .* is not in"),
        (byte_level(), {"add_bos_token": "yes"}, None, "add_bos_token is 'yes', not true or false"),
        (
            byte_level() | {"model": {"type": "BPE", "vocab": {"a": 2**32 - 1}, "merges": []}},
            None,
            None,
            "ids go up to",
        ),
    ],
)
def test_folders_that_make_no_sense_are_refused(tmp_path, layout, names, config, message):
    with pytest.raises(ValueError, match=message) as refusal:
        HFTokenizer(folder_of(tmp_path, layout, names, config))
    assert str(tmp_path) in str(refusal.value)


def test_the_real_tokenizer(shared):
    tokenizer = HFTokenizer(shared / "models" / "stories260k")
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id, tokenizer.vocab_size) == (1, 2, 2, 512)
    assert tokenizer.adds_bos and tokenizer.stop_ids == (2,)
    assert tokenizer.encode("Once upon a time") == [403, 407, 261, 378]
    for text in ("Once upon a time", "</s>", "<s>a</s><unk>", "日本 😀\n", "a\0b"):
        ids = tokenizer.encode(text)
        assert not {0, 1, 2} & set(ids) and tokenizer.decode([1, *ids, 2, 512, -1]) == text
    assert tokenizer.decode(tokenizer.encode("日")[:-1]) == "\ufffd" * 2


def begins(token, end=None):
    """A post-processor that puts a token before a text, and one after it."""
    pieces = [token, "$A", *([end] if end else [])]
    sequence = [
        {"Sequence": {"id": "A", "type_id": 0}} if p == "$A" else {"SpecialToken": {"id": p, "type_id": 0}}
        for p in pieces
    ]
    names = {
        p: {"id": p, "ids": [256 + ("<|im_end|>", "<s>", "</s>").index(p)], "tokens": [p]} for p in pieces if p != "$A"
    }
    return {"type": "TemplateProcessing", "single": sequence, "pair": sequence, "special_tokens": names}


BYTES = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}
S = {"bos_token": "<s>", "eos_token": "</s>"}


@pytest.mark.parametrize(
    ("change", "tokenizer_config", "config", "expected"),
    [
        # As in Qwen2.5: the model's config names a BOS that the tokenizer does not use.
        ({"post_processor": BYTES}, {"bos_token": None, "add_bos_token": False}, {"bos_token_id": 257}, (None, False)),
        ({"post_processor": BYTES}, {"bos_token": None}, {"bos_token_id": 257}, (None, False)),
        ({"post_processor": BYTES}, {}, {"bos_token_id": 257}, (257, False)),
        # As in Llama 3 and Gemma: the post-processor adds it, whether or not the config says so too.
        ({"post_processor": begins("<s>")}, S, None, (257, True)),
        ({"post_processor": begins("<s>", "</s>")}, S, None, (257, True)),
        ({"post_processor": {"type": "Sequence", "processors": [BYTES, begins("<s>")]}}, S, None, (257, True)),
        # As transformers 5 does it: the post-processor decides, the flag where there is none.
        ({"post_processor": begins("<s>")}, S | {"add_bos_token": False}, None, (257, True)),
        ({"post_processor": BYTES}, S | {"add_bos_token": True}, None, (257, False)),
        ({}, S | {"add_bos_token": True}, None, (257, True)),
        ({}, {"bos_token": None, "add_bos_token": True}, None, (None, False)),
        # As in SmolLM2: a BOS for padding and templates, no post-processor, and no SentencePiece.
        ({"post_processor": None}, S, None, (257, False)),
    ],
)
def test_whether_a_text_begins_with_the_bos(tmp_path, change, tokenizer_config, config, expected):
    tokenizer = HFTokenizer(folder_of(tmp_path, byte_level() | change, tokenizer_config, config))
    assert (tokenizer.bos_id, tokenizer.adds_bos) == expected
    assert tokenizer.encode("x") == [ord("x") - 33]  # encode itself never adds it


def test_sentencepiece_without_a_post_processor_begins_with_the_bos(tmp_path):
    for name, folder in make_folders(tmp_path).items():
        layout = json.loads((folder / "tokenizer.json").read_text()) | {"post_processor": None}
        write_folder(folder, layout)
        assert HFTokenizer(folder).adds_bos == (name in ("turns", "prepended", "metaspace"))
        config = json.loads((folder / "tokenizer_config.json").read_text()) | {"add_bos_token": False}
        write_folder(folder, layout, {"tokenizer_config": config})
        assert not HFTokenizer(folder).adds_bos


def test_a_post_processor_that_begins_with_something_else_is_refused(tmp_path):
    for config in ({}, S):
        folder = folder_of(tmp_path, byte_level() | {"post_processor": begins("<|im_end|>")}, config)
        with pytest.raises(ValueError, match=r"tokenizer\.json: its post-processor begins a text with the ids \[256\]"):
            HFTokenizer(folder)


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        # As in Qwen2.5-Instruct, and in Llama 3.1 Instruct.
        (
            {"tokenizer_config": {"eos_token": "<|im_end|>"}, "generation_config": {"eos_token_id": [256, 258]}},
            (256, 258),
        ),
        ({"tokenizer_config": {"eos_token": "</s>"}, "config": {"eos_token_id": [256, 257, 258]}}, (258, 256, 257)),
        ({"special_tokens_map": {"eos_token": {"content": "</s>"}}, "config": {"eos_token_id": 256}}, (258, 256)),
        ({"config": {"eos_token_id": 256}, "generation_config": {"eos_token_id": 258}}, (256, 258)),
        ({"tokenizer_config": {"eos_token": None}, "config": {"eos_token_id": None}}, ()),
        ({}, ()),
    ],
)
def test_stop_ids_are_the_eos_of_every_file(tmp_path, files, expected):
    """And no text holds one of them, wherever it was named."""
    tokenizer = HFTokenizer(write_folder(tmp_path, byte_level(special=False), files))
    assert tokenizer.stop_ids == expected
    assert tokenizer.eos_id == (expected[0] if expected else None)
    assert tokenizer.pad_id == (expected[0] if expected else 0)
    assert set(expected) <= tokenizer.special_ids
    assert not set(expected) & set(tokenizer.encode("<|im_end|><s></s>"))
    assert tokenizer.decode([*expected, 65]) == tokenizer.decode([65])


def test_control_tokens_are_looked_up_in_order(tmp_path):
    files = {
        "tokenizer_config": {"bos_token": "<s>"},
        "special_tokens_map": {"bos_token": "</s>", "pad_token": "</s>"},
        "config": {"bos_token_id": 256, "pad_token_id": 256},
    }
    tokenizer = HFTokenizer(write_folder(tmp_path, byte_level(), files))
    assert (tokenizer.bos_id, tokenizer.pad_id) == (257, 258)
    files = {"config": {"pad_token_id": -1, "eos_token_id": 256}, "tokenizer_config": {}, "special_tokens_map": {}}
    tokenizer = HFTokenizer(write_folder(tmp_path, byte_level(), files))
    assert (tokenizer.bos_id, tokenizer.pad_id) == (None, 256)


def test_a_vocabulary_with_holes(tmp_path):
    layout = byte_level(extra=())
    layout["model"]["vocab"] = {piece: 3 * i for piece, i in layout["model"]["vocab"].items()}
    tokenizer = HFTokenizer(write_folder(tmp_path, layout))
    assert tokenizer.vocab_size == 3 * 255 + 1
    ids = tokenizer.encode("ab")
    assert tokenizer.decode([1, ids[0], 2, ids[1], 766, 10**30, -5]) == "ab"
    with pytest.raises(ValueError, match="the eos token 1 is not in"):
        HFTokenizer(write_folder(tmp_path, layout, {"config": {"eos_token_id": 1}}))


def test_encoding_leaves_nothing_to_chance(tmp_path):
    """A file may ask for random merges (BPE dropout)."""
    folder = make_folders(tmp_path)["chatml"]
    layout = json.loads((folder / "tokenizer.json").read_text())
    whole = HFTokenizer(folder).encode("assistant")
    layout["model"]["dropout"] = 0.5
    tokenizer = HFTokenizer(write_folder(folder, layout))
    assert len(whole) == 1
    assert {tuple(tokenizer.encode("assistant")) for _ in range(20)} == {tuple(whole)}


def test_special_tokens_are_parsed_only_on_request(tmp_path):
    tokenizer = HFTokenizer(folder_of(tmp_path, byte_level(), S))
    assert tokenizer.parse("a<s>é</s>")[0] == [64, 257, *tokenizer.encode("é"), 258]
    assert tokenizer.parse("a<s>é</s>")[1][1] == (1, 4) and tokenizer.parse("a<s>é</s>")[1][-1] == (5, 9)
    assert 257 not in tokenizer.encode("a<s>")
    with pytest.raises(ValueError, match="half of a surrogate pair"):
        tokenizer.parse("\ud800")


def test_files_that_are_too_large_or_no_files_are_refused(tmp_path, monkeypatch):
    folder = folder_of(tmp_path, byte_level(), S)
    monkeypatch.setattr(ours, "JSON_BYTES", 10)
    with pytest.raises(ValueError, match=r"tokenizer_config\.json: more than 10 bytes"):
        HFTokenizer(folder)
    monkeypatch.setattr(ours, "TOKENIZER_BYTES", 10)
    with pytest.raises(ValueError, match=r"tokenizer\.json: more than 10 bytes"):
        HFTokenizer(folder)
    monkeypatch.undo()
    for data in (b"[" * 100_000, b"\xff", b'{"a": ' * 100_000):
        (folder / "generation_config.json").write_bytes(data)
        with pytest.raises(ValueError, match=r"generation_config\.json: JSON that cannot be read"):
            HFTokenizer(folder)
    (folder / "generation_config.json").unlink()
    (folder / "generation_config.json").mkdir()
    with pytest.raises(ValueError, match=r"generation_config\.json: not a regular file"):
        HFTokenizer(folder)
    (folder / "tokenizer.json").write_bytes(b"\xff")
    with pytest.raises(ValueError, match=r"tokenizer\.json: not a tokenizer"):
        HFTokenizer(folder)
