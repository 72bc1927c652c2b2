"""Text to token ids and back: characters, bytes, or a Hugging Face tokenizer.json. Imports no jax.

The classes share one face: ``encode`` never adds nor forges a control token, ``decode`` never raises, and ``vocab_size``,
``bos_id``, ``eos_id``, ``pad_id``, ``stop_ids`` (all ids that end a completion) say which ids the model must know.
``adds_bos`` says whether a text that stands alone begins with the BOS.
"""

import hashlib
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import tokenizers

from grpo_jax.data.limited import limited
from grpo_jax.files import parse_object, read_bounded, read_bounded_json

TOKENIZER_BYTES = 128 << 20  # of a tokenizer.json; the largest known, of 262,000 tokens, has some 33 MB
JSON_BYTES = 16 << 20  # of the small files beside it
MOST_ADDED = 100_000  # tokens beside those of the model; folders of today have some thousands at most
MOST_GROWTH = 1_000  # of a text by all replacements of a normalizer or decoder
MAX_ID = 1 << 24  # no vocabulary is that large; and ids must fit int32


@cache
def _try_once(path: Path, digest: str) -> None:
    """Tries a tokenizer.json of this digest in a limited process, before anything of it is used in this one."""
    try:
        _check_entries(parse_object(read_bounded(path, TOKENIZER_BYTES), path, unique=False))
        limited("try_tokenizer", file=str(path.absolute()))
    except ValueError as error:
        raise ValueError(f"{path}: not a tokenizer that can be used: {error}") from None


def _check_entries(entries: dict[str, Any]) -> None:
    """Refuses more added tokens than can be looked for in a text, and replacements that make long texts of short ones."""
    added = entries.get("added_tokens")
    if isinstance(added, list) and len(added) > MOST_ADDED:
        raise ValueError(f"{len(added):,} added tokens are more than {MOST_ADDED:,}")
    for part in ("normalizer", "decoder"):
        factor, todo = 1, [entries.get(part)]
        while todo:
            found = todo.pop()
            if isinstance(found, list):
                todo += found
            elif isinstance(found, dict):
                factor *= max(1, len(found["content"])) if isinstance(found.get("content"), str) else 1
                todo += [x for x in found.values() if isinstance(x, dict | list)]
        if factor > MOST_GROWTH:
            raise ValueError(f"the replacements of its {part} may make a text {factor:.2g} times as long")


class _SmallTokenizer:
    """The control tokens of a vocabulary without a file."""

    pad_id: int = 0
    bos_id: int | None = 1
    eos_id: int | None = 2
    stop_ids: tuple[int, ...] = (2,)
    adds_bos: bool = True


class CharTokenizer(_SmallTokenizer):
    """One id per character of an alphabet, after 0 pad, 1 bos, 2 eos.

    ValueError for an alphabet that is empty, repeats a character or holds half of a surrogate pair, and for text outside it.

    >>> digits = CharTokenizer("0123456789+=")
    >>> digits.encode("1+2="), digits.decode([1, 4, 13, 5, 14, 2, 99])
    ([4, 13, 5, 14], '1+2=')
    """

    def __init__(self, alphabet: str) -> None:
        if not alphabet or len(set(alphabet)) != len(alphabet):
            raise ValueError(f"alphabet {alphabet!r} is empty or repeats a character")
        _check_text(alphabet)
        self.alphabet = alphabet
        self.vocab_size = 3 + len(alphabet)
        self._ids = {character: 3 + i for i, character in enumerate(alphabet)}

    def encode(self, text: str) -> list[int]:
        """Ids of the characters, no control token added; ValueError for a character outside the alphabet."""
        unknown = next((character for character in text if character not in self._ids), None)
        if unknown is not None:
            raise ValueError(f"character {unknown!r} is not in the alphabet {self.alphabet!r}")
        return [self._ids[character] for character in text]

    def decode(self, ids: Iterable[int]) -> str:
        """The characters; control tokens and ids outside the vocabulary are skipped."""
        return "".join(self.alphabet[i - 3] for i in map(int, ids) if 3 <= i < self.vocab_size)


class ByteTokenizer(_SmallTokenizer):
    """One id per byte of UTF-8, after 0 pad, 1 bos, 2 eos: any text, without a file.

    >>> tokenizer = ByteTokenizer()
    >>> tokenizer.encode("é="), tokenizer.decode([1, 198, 172, 64, 2]), tokenizer.decode([198, 999, -1])
    ([198, 172, 64], 'é=', '�')
    """

    vocab_size: int = 3 + 256

    def encode(self, text: str) -> list[int]:
        """Ids of the bytes, no control token added; ValueError where half of a surrogate pair stands alone."""
        _check_text(text)
        return [3 + byte for byte in text.encode()]

    def decode(self, ids: Iterable[int]) -> str:
        """The text, U+FFFD for bytes that are not UTF-8; control tokens and ids outside the vocabulary are skipped."""
        return bytes(i - 3 for i in map(int, ids) if 3 <= i < self.vocab_size).decode(errors="replace")


class HFTokenizer:
    """The tokenizer of a Hugging Face folder: tokenizer.json, and the control tokens that its other files name.

    bos, eos and pad come from tokenizer_config.json, else special_tokens_map.json, else config.json, else
    generation_config.json (of several eos ids, the first); pad else is eos, else 0. ``"bos_token": null`` in
    tokenizer_config.json means that there is none, whatever config.json says. ``stop_ids`` are the eos of all four files.

    ``adds_bos`` is what the post-processor of tokenizer.json does to a text, as in transformers 5. Where the file has none, it
    is ``add_bos_token`` of tokenizer_config.json; and where that is missing too, SentencePiece vocabularies (Unigram, or BPE
    with byte fallback) begin with their BOS, and others do not.

    Text that looks like a control token stays text; so do all tokens that tokenizer.json marks special.

    Raises:
      ValueError: naming the file that is missing, too large or unreadable, a control token that the vocabulary lacks or
        that text could forge, or a post-processor that begins a text with anything but the BOS.

    >>> HFTokenizer("nowhere")
    Traceback (most recent call last):
    ...
    ValueError: nowhere/tokenizer.json: no such file
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.folder = Path(folder)
        path = self.folder / "tokenizer.json"
        if not path.is_file():
            raise ValueError(f"{path}: no such file")
        data = read_bounded(path, TOKENIZER_BYTES)
        _try_once(path, hashlib.sha256(data).hexdigest())
        with self._panics_as_errors():
            self._tokenizer = tokenizers.Tokenizer.from_str(data.decode())
        self._tokenizer.encode_special_tokens = True  # "</s>" in text is four characters, not the end
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        if getattr(self._tokenizer.model, "dropout", None) is not None:  # chance has no place in an encoding
            self._tokenizer.model.dropout = None
        self.vocab_size = max(self._tokenizer.get_vocab(with_added_tokens=True).values(), default=-1) + 1
        if self.vocab_size > MAX_ID:
            raise ValueError(f"{path}: its token ids go up to {self.vocab_size - 1}, beyond any vocabulary")
        self._settings = {
            name: read_settings(self.folder / f"{name}.json")
            for name in ("tokenizer_config", "special_tokens_map", "config", "generation_config")
        }
        bos, eos, pad = map(self._control_ids, ("bos", "eos", "pad"))
        self.bos_id: int | None = bos[0] if bos else None
        self.eos_id: int | None = eos[0] if eos else None
        self.pad_id: int = (pad or eos or [0])[0]
        self.stop_ids: tuple[int, ...] = tuple(eos)
        with self._panics_as_errors():
            self.adds_bos = self._adds_bos(path)
        added = self._tokenizer.get_added_tokens_decoder()
        self.special_ids = frozenset(i for i, token in added.items() if token.special)

    def encode(self, text: str) -> list[int]:
        """Ids of the text, no control token added; ValueError where half of a surrogate pair stands alone."""
        _check_text(text)
        with self._panics_as_errors():
            return self._tokenizer.encode(text, add_special_tokens=False).ids

    def parse(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """Ids and character spans of a text in which the special tokens are meant, as in a chat template; none is added."""
        _check_text(text)
        self._tokenizer.encode_special_tokens = False
        try:
            with self._panics_as_errors():
                encoding = self._tokenizer.encode(text, add_special_tokens=False)
        finally:
            self._tokenizer.encode_special_tokens = True
        return encoding.ids, encoding.offsets

    def decode(self, ids: Iterable[int]) -> str:
        """The text, U+FFFD for bytes that are not UTF-8; control tokens and ids outside the vocabulary are skipped."""
        known = [i for i in map(int, ids) if 0 <= i < self.vocab_size]
        with self._panics_as_errors():
            return self._tokenizer.decode(known, skip_special_tokens=True)

    @contextmanager
    def _panics_as_errors(self) -> Iterator[None]:
        """The library panics where it meets what it did not expect, with an exception that is no `Exception`."""
        try:
            yield
        except ValueError:
            raise
        except BaseException as error:
            if isinstance(error, Exception) or type(error).__name__ == "PanicException":
                words = " ".join(str(error).split())[:300]
                raise ValueError(f"{self.folder / 'tokenizer.json'}: the tokenizer failed: {words}") from None
            raise

    def token(self, kind: str) -> str | None:
        """The text of the "bos", "eos", "pad" or "unk" token as tokenizer_config.json or special_tokens_map.json name it."""
        for name in ("tokenizer_config", "special_tokens_map"):
            if f"{kind}_token" not in self._settings[name]:
                continue
            token = self._settings[name][f"{kind}_token"]
            token = token.get("content") if isinstance(token, dict) else token
            if token is None and kind != "bos":  # for the BOS, null says in so many words that there is none
                continue
            if token is not None and (not isinstance(token, str) or any("\ud800" <= c <= "\udfff" for c in token)):
                raise ValueError(f"{self.folder / name}.json: the {kind} token {token!r} is not a text")
            return token
        return None

    def _control_ids(self, kind: str) -> list[int]:
        """Ids named for one purpose, the one to use first, each made special and beyond the reach of text."""
        token = self.token(kind)
        ids = []
        if token is not None:
            ids.append(self._checked(token, self._tokenizer.token_to_id(token), kind))
        unused = kind == "bos" and "bos_token" in self._settings["tokenizer_config"]
        for name in () if unused or (ids and kind != "eos") else ("config", "generation_config"):
            named: Any = self._settings[name].get(f"{kind}_token_id")
            for i in named if isinstance(named, list) else [named]:
                if i is None or (kind == "pad" and i == -1):  # -1: none, in the oldest Llama folders
                    continue
                known = type(i) is int and 0 <= i < self.vocab_size
                ids.append(self._checked(self._tokenizer.id_to_token(i) if known else None, i, kind))
        return list(dict.fromkeys(ids))

    def _checked(self, token: str | None, token_id: Any, kind: str) -> int:
        if token is None or token_id is None:
            name = token_id if token is None else token
            raise ValueError(f"{self.folder}: the {kind} token {name!r} is not in tokenizer.json's vocabulary")
        # Only tokens marked special are kept out of what is encoded and decoded; some files do not mark theirs.
        self._tokenizer.add_special_tokens([tokenizers.AddedToken(token, special=True, normalized=False)])
        if token_id in self.encode(token):
            raise ValueError(
                f"{self.folder}: the text {token!r} is encoded as the {kind} token, so text could forge it"
            )
        return token_id

    def _adds_bos(self, path: Path) -> bool:
        flag = self._settings["tokenizer_config"].get("add_bos_token")
        if not isinstance(flag, bool | None):
            raise ValueError(f"{self.folder}/tokenizer_config.json: add_bos_token is {flag!r}, not true or false")
        if self._tokenizer.post_processor is None:
            model = self._tokenizer.model
            pieces = isinstance(model, tokenizers.models.Unigram) or getattr(model, "byte_fallback", False)
            return self.bos_id is not None and (pieces if flag is None else flag)
        plain, whole = self.encode("x"), self._tokenizer.encode("x", add_special_tokens=True).ids
        starts = range(len(whole) - len(plain) + 1)
        prefix = next((whole[:i] for i in starts if whole[i : i + len(plain)] == plain), whole)
        if prefix not in ([], [self.bos_id]):
            raise ValueError(
                f"{path}: its post-processor begins a text with the ids {prefix}, but the BOS is {self.bos_id}"
            )
        return bool(prefix)


def read_settings(path: Path) -> dict[str, Any]:
    """The object in one of the small files of a folder, {} where there is none; ValueError naming the file for anything else."""
    # A key that occurs twice is allowed here, as it is to transformers, which wrote these files.
    return read_bounded_json(path, JSON_BYTES, unique=False) if path.exists() else {}


def _check_text(text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"text holds half of a surrogate pair at character {error.start}: not valid Unicode") from None
