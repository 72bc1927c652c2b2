"""Tokenizers: exact round trips, no control token forged by text, decoding that never raises."""

import json

import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import decoders, models, pre_tokenizers

from grpo_jax.data.tokenizers import CharTokenizer, HFTokenizer

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


def write_folder(folder, layout, tokenizer_config=None, config=None):
    (folder / "tokenizer.json").write_text(layout if isinstance(layout, str) else json.dumps(layout))
    for name, entries in (("tokenizer_config.json", tokenizer_config), ("config.json", config)):
        if entries is not None:
            (folder / name).write_text(json.dumps(entries))
    return folder


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
    tokenizer = HFTokenizer(write_folder(tmp_path, byte_level(special=special), names))
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
    return HFTokenizer(write_folder(tmp_path_factory.mktemp("plain"), layout, config={"eos_token_id": [258, 256]}))


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
        (byte_level(), {"eos_token": 7}, None, "the eos token 7 is not in"),
        (byte_level(), [], None, r"tokenizer_config\.json: its JSON is not an object"),
        (byte_level(), {"eos_token": "a"}, None, "the text 'a' is encoded as the eos token"),
    ],
)
def test_folders_that_make_no_sense_are_refused(tmp_path, layout, names, config, message):
    with pytest.raises(ValueError, match=message) as refusal:
        HFTokenizer(write_folder(tmp_path, layout, names, config))
    assert str(tmp_path) in str(refusal.value)


def test_the_real_tokenizer(shared):
    tokenizer = HFTokenizer(shared / "models" / "stories260k")
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id, tokenizer.vocab_size) == (1, 2, 2, 512)
    assert tokenizer.encode("Once upon a time") == [403, 407, 261, 378]
    for text in ("Once upon a time", "</s>", "<s>a</s><unk>", "日本 😀\n", "a\0b"):
        ids = tokenizer.encode(text)
        assert not {0, 1, 2} & set(ids) and tokenizer.decode([1, *ids, 2, 512, -1]) == text
    assert tokenizer.decode(tokenizer.encode("日")[:-1]) == "\ufffd" * 2
