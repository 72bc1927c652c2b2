"""Texts that end a completion, as an automaton over token ids: whatever the tokens, the text decides.

The strings are found by the automaton of Aho and Corasick over their UTF-8 bytes. A token is a word of bytes, so each takes a
state to a state, and the whole becomes one table that a sampler can step with one look-up per token.
"""

import json
import re
from collections import deque
from collections.abc import Container, Iterable, Sequence

import numpy as np

from grpo_jax.data.prompts import Tokenizer
from grpo_jax.data.tokenizers import ByteTokenizer, CharTokenizer, HFTokenizer

LONGEST = 1024  # bytes of all strings together; the table has at most a state for each, and a column for each token


def stop_table(tokenizer: Tokenizer, strings: Sequence[str], *, vocab_size: int | None = None) -> np.ndarray | None:
    """The automaton that, fed the tokens of a completion, ends in its last state once their text contains one of the strings.

    The next state is ``table[state, token]``; state 0 is the start, and the last state is never left. What counts is the text:
    a token ".\\n\\n" completes "\\n\\n", and so do two tokens, and the bytes of one character in several tokens. A token of a
    SentencePiece vocabulary has its leading space, at the start of a completion too. Control tokens have no text.

    Args:
      tokenizer: one of those of this package.
      strings: to look for.
      vocab_size: of the model, where it is larger than the tokenizer's: tokens that no text has.

    Returns:
      [states, V] in the smallest unsigned integer type, at most one state per byte of the strings, and one more; None where
      there are no strings.

    Raises:
      ValueError: a string that is empty, not valid Unicode or not to be made of the tokens, strings that are too long, a
        tokenizer whose tokens have no text of their own, or a model with fewer tokens than its tokenizer.

    Source: A. V. Aho and M. J. Corasick, Commun. ACM 18 (1975), 333.

    >>> digits = CharTokenizer("0123456789+= ")
    >>> table = stop_table(digits, ["=1", "+"])
    >>> state = 0
    >>> for token in digits.encode("2==1"):
    ...     state = int(table[state, token])
    >>> table.shape, state
    ((3, 16), 2)
    """
    if not strings:
        return None
    words = list(dict.fromkeys(map(_checked, strings)))
    if sum(map(len, words)) > LONGEST:
        raise ValueError(
            f"the stop strings have {sum(map(len, words)):,} bytes together; at most {LONGEST:,} are possible"
        )
    texts = token_bytes(tokenizer)
    columns = len(texts) if vocab_size is None else vocab_size
    if columns < len(texts):
        raise ValueError(f"the tokenizer has {len(texts):,} tokens, and the model only {columns:,}")
    different, which = np.unique(np.array([*texts, *[b""] * (columns - len(texts))], object), return_inverse=True)
    for word in words:
        table = _over_tokens(_automaton([word]), different)
        if len(table) - 1 not in _reachable(table):
            raise ValueError(
                f"no tokens of this vocabulary make the stop string {word.decode()!r}: it would never be found"
            )
    return _over_tokens(_automaton(words), different)[:, which]


def token_bytes(tokenizer: Tokenizer) -> list[bytes]:
    """The text of every token id in UTF-8, in the middle of a text; empty for control tokens and ids without a token.

    >>> token_bytes(CharTokenizer("0é"))
    [b'', b'', b'', b'0', b'\\xc3\\xa9']
    """
    match tokenizer:
        case CharTokenizer():
            return [b""] * 3 + [character.encode() for character in tokenizer.alphabet]
        case ByteTokenizer():
            return [b""] * 3 + [bytes([byte]) for byte in range(256)]
        case HFTokenizer():
            return _of_folder(tokenizer)
    raise ValueError(f"stop strings need a tokenizer whose tokens are texts, not {type(tokenizer).__name__}")


def _of_folder(tokenizer: HFTokenizer) -> list[bytes]:
    library = tokenizer._tokenizer  # the library's own object, whose decoder says what its tokens mean
    where = tokenizer.folder / "tokenizer.json"

    # What the decoder does to the tokens of a text, step by step.
    decoder = json.loads(library.decoder.__getstate__()) if library.decoder is not None else {"type": "none"}
    steps = decoder["decoders"] if decoder["type"] == "Sequence" else [decoder]
    replacements: list[tuple[str, str]] = []
    byte_level = byte_fallback = fused = False
    for step in steps:
        match step:
            case {"type": "ByteLevel"}:
                byte_level = True
            case {"type": "ByteFallback"}:
                byte_fallback = True
            case {"type": "Replace", "pattern": {"String": str(old)}, "content": str(new)}:
                replacements.append((old, new))
            case {"type": "Metaspace", "replacement": str(old)}:
                replacements.append((old, " "))
            case {"type": "Fuse"}:
                fused = True
            case {"type": "Strip", "stop": 0} if fused:  # the first space of a whole text
                pass
            case _:
                raise ValueError(f"{where}: stop strings need a byte-level or SentencePiece decoder, not {step!r:.60}")
    if not (byte_level or replacements or byte_fallback):
        raise ValueError(f"{where}: stop strings need a decoder that joins tokens into text")

    # The same done to each token alone.
    texts = [b""] * tokenizer.vocab_size
    for text, i in library.get_vocab(with_added_tokens=True).items():
        if i in tokenizer.special_ids:
            continue
        if byte_level:
            texts[i] = bytes(BYTES[c] for c in text) if all(c in BYTES for c in text) else text.encode()
        elif byte_fallback and re.fullmatch("<0x[0-9A-Fa-f]{2}>", text):
            texts[i] = bytes([int(text[3:5], 16)])
        else:
            for old, new in replacements:
                text = text.replace(old, new)
            texts[i] = text.encode()
    return texts


def _byte_characters() -> dict[str, int]:
    """The character by which byte-level BPE writes each byte: itself where it is printable, else the next from U+0100 on."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(others)}


BYTES = _byte_characters()


def _checked(string: str) -> bytes:
    if not string:
        raise ValueError("a stop string is empty: every completion would end before its first token")
    try:
        word = string.encode()
    except UnicodeEncodeError:
        raise ValueError(f"the stop string {string!r} holds half of a surrogate pair: not valid Unicode") from None
    if "\ufffd" in string:
        raise ValueError(f"the stop string {string!r} holds U+FFFD, which only stands for bytes that are not a text")
    return word


def _automaton(words: Iterable[bytes]) -> np.ndarray:
    """[states, 256] next state per byte; the last state is entered where any of the words ends, and never left."""
    children: list[dict[int, int]] = [{}]
    ends: set[int] = set()
    for word in words:
        node = 0
        for byte in word:
            if byte not in children[node]:
                children[node][byte] = len(children)
                children.append({})
            node = children[node][byte]
        ends.add(node)
    step = np.zeros((len(children), 256), np.int64)
    longest_suffix = [0] * len(children)  # the longest proper suffix of a node's text that is a node
    queue = deque([0])
    while queue:  # nodes by length, so that every shorter one is complete
        node = queue.popleft()
        if longest_suffix[node] in ends:
            ends.add(node)
        if node:
            step[node] = step[longest_suffix[node]]
        for byte, child in children[node].items():
            longest_suffix[child] = step[node, byte] if node else 0
            step[node, byte] = child
            queue.append(child)
    return _with_one_end(step, ends)


def _with_one_end(step: np.ndarray, ends: set[int]) -> np.ndarray:
    """Merges the states ``ends`` into one, the last, which nothing leaves, and drops what only they led to."""
    others = sorted(_reachable(step, ends) - ends)
    last = len(others)
    number = np.full(len(step), last)
    number[others] = np.arange(last)
    return np.concatenate([number[step[others]], np.full((1, 256), last)]).astype(np.min_scalar_type(last))


def _reachable(table: np.ndarray, ends: Container[int] = ()) -> set[int]:
    """The states to which a way leads from state 0; it may end in one of ``ends``, but not lead through it."""
    reached, queue = {0}, deque([0])
    while queue:
        for state in map(int, np.unique(table[queue.popleft()])):
            if state not in reached:
                reached.add(state)
                if state not in ends:
                    queue.append(state)
    return reached


def _over_tokens(step: np.ndarray, texts: Sequence[bytes] | np.ndarray) -> np.ndarray:
    """[states, V] next state per token, from [states, 256] per byte."""
    lengths = np.array([len(text) for text in texts])
    order = np.argsort(-lengths, kind="stable")  # the tokens that go on after n bytes come first
    starts = np.cumsum(lengths[order]) - lengths[order]
    data = np.frombuffer(b"".join(texts[i] for i in order), np.uint8)
    state = np.repeat(np.arange(len(step), dtype=step.dtype)[:, None], len(lengths), axis=1)
    for n in range(lengths.max(initial=0)):
        going_on = int(np.searchsorted(-lengths[order], -n, side="left"))  # tokens of more than n bytes
        state[:, :going_on] = step[state[:, :going_on], data[starts[:going_on] + n]]
    table = np.empty_like(state)
    table[:, order] = state
    return table
