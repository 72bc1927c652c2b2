"""Text to token ids and back, for a toy alphabet or a Hugging Face tokenizer.json. Imports no jax.

Both classes share one face: ``encode`` never adds nor forges a control token, ``decode`` never raises, and ``vocab_size``,
``bos_id``, ``eos_id``, ``pad_id`` say which ids the model must know.
"""

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import tokenizers


class CharTokenizer:
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
        self.pad_id: int = 0
        self.bos_id: int | None = 1
        self.eos_id: int | None = 2
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


class HFTokenizer:
    """The tokenizer of a Hugging Face folder: tokenizer.json, and the control tokens that its configs name.

    bos and eos come from tokenizer_config.json, else from config.json (of several eos ids, the first); pad likewise, else
    eos, else 0. Text that looks like a control token stays text. ValueError naming the file that is missing or unreadable,
    or a control token that the vocabulary lacks or that text could forge.

    >>> HFTokenizer("nowhere")
    Traceback (most recent call last):
    ...
    ValueError: nowhere/tokenizer.json: no such file
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        folder = Path(folder)
        path = folder / "tokenizer.json"
        if not path.is_file():
            raise ValueError(f"{path}: no such file")
        try:
            self._tokenizer = tokenizers.Tokenizer.from_str(path.read_text(encoding="utf-8"))
        except Exception as error:  # the library raises nothing more specific
            raise ValueError(f"{path}: not a tokenizer: {error}") from None
        self._tokenizer.encode_special_tokens = True  # "</s>" in text is four characters, not the end
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self.vocab_size = max(self._tokenizer.get_vocab(with_added_tokens=True).values(), default=-1) + 1
        self.bos_id = self._control_id(folder, "bos")
        self.eos_id = self._control_id(folder, "eos")
        pad_id = self._control_id(folder, "pad")
        self.pad_id: int = next((i for i in (pad_id, self.eos_id) if i is not None), 0)

    def encode(self, text: str) -> list[int]:
        """Ids of the text, no control token added; ValueError where half of a surrogate pair stands alone."""
        _check_text(text)
        return self._tokenizer.encode(text, add_special_tokens=False).ids

    def decode(self, ids: Iterable[int]) -> str:
        """The text, U+FFFD for bytes that are not UTF-8; control tokens and ids outside the vocabulary are skipped."""
        known = [i for i in map(int, ids) if 0 <= i < self.vocab_size]
        return self._tokenizer.decode(known, skip_special_tokens=True)

    def _control_id(self, folder: Path, kind: str) -> int | None:
        token = _read_json(folder / "tokenizer_config.json").get(f"{kind}_token")
        token = token.get("content") if isinstance(token, dict) else token
        found: Any = _read_json(folder / "config.json").get(f"{kind}_token_id")
        found = found[0] if isinstance(found, list) and found else found
        if token is not None:
            found = self._tokenizer.token_to_id(token) if isinstance(token, str) else None
        elif found is None:
            return None
        elif type(found) is int and 0 <= found < self.vocab_size:
            token = self._tokenizer.id_to_token(found)
        if token is None or found is None:
            raise ValueError(f"{folder}: the {kind} token {token or found!r} is not in tokenizer.json's vocabulary")
        # Only tokens marked special are kept out of what is encoded and decoded; some files do not mark theirs.
        self._tokenizer.add_special_tokens([tokenizers.AddedToken(token, special=True, normalized=False)])
        if found in self.encode(token):
            raise ValueError(f"{folder}: the text {token!r} is encoded as the {kind} token, so text could forge it")
        return found


def _check_text(text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"text holds half of a surrogate pair at character {error.start}: not valid Unicode") from None


def _read_json(path: Path) -> dict[str, Any]:
    """The object in a file, {} where there is none."""
    if not path.exists():
        return {}
    try:
        entries = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: JSON that cannot be read: {error}") from None
    if not isinstance(entries, dict):
        raise ValueError(f"{path}: its JSON is not an object")
    return entries
