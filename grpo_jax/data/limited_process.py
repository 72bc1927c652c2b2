"""The main of the process that meets what came with a model first: one JSON request in, one JSON reply out; see limited.py.

jinja2's sandbox keeps a chat template from the interpreter, but not from the clock or the memory, and nothing keeps a tokenizer
from either: that is what the limits of this process are for. It imports nothing of this package, so that they meet neither
jax nor the model.
"""

import contextlib
import datetime
import json
import os
import random
import resource
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NoReturn

# Of address space and of CPU time. The interpreter and jinja2 take some 50 MB; the largest known tokenizer, of 262,000 tokens,
# some 500 MB and 2 s.
LIMITS = {"render": (512 << 20, 2), "try_tokenizer": (2 << 30, 10)}
OUTPUT_CHARACTERS = 1_000_000  # of one rendering
TOKEN_CHARACTERS = 1_000  # of a token, on the average of a row
REPLY_BYTES = 64 << 20  # of the file that the reply is written to: four renderings, in ASCII
# What templates of Llama 3 write without a clock; a run must not depend on the day.
DATE = datetime.datetime(2024, 7, 26)


def main() -> None:
    """Reads {"path", "work", "request"}, writes {"done": what the work gives} or {"error": why not}."""
    read = json.load(sys.stdin)
    sys.path[:] = read["path"]
    memory, seconds = LIMITS[read["work"]]
    _limit(memory, seconds)
    reply: dict[str, Any]
    try:
        works: dict[str, Callable[..., Any]] = {"render": render, "try_tokenizer": try_tokenizer}
        reply = {"done": works[read["work"]](**read["request"])}
    except MemoryError:
        reply = {"error": f"it takes more than {memory >> 20} MB of memory"}
    except BaseException as error:
        reply = {"error": " ".join(f"{type(error).__name__}: {error}".split())[:1000]}
    sys.stdout.write(json.dumps(reply))


def _limit(memory: int, seconds: int) -> None:
    seconds += int(time.process_time())  # a slow start is not its own
    for kind, value in (("AS", memory), ("CPU", seconds), ("FSIZE", REPLY_BYTES), ("CORE", 0)):
        with contextlib.suppress(AttributeError, ValueError, OSError):  # a system may lack or refuse one
            resource.setrlimit(getattr(resource, f"RLIMIT_{kind}"), (value, value))


def try_tokenizer(file: str) -> None:
    """Loads a tokenizer.json, encodes texts of many kinds, and decodes every token and long rows of them."""
    import tokenizers

    with open(file, "rb") as opened:
        tokenizer = tokenizers.Tokenizer.from_str(opened.read().decode())
    words = "".join(map(chr, range(32, 127))), "é日本語 🙂\u200d \u0301\ufeff", "Question: 5 + 7 = ?\n\nAnswer:\t12"
    runs = [character * 3000 for character in 'a0 .x\n_-="▁'] + [
        "ab" * 1500,
        "x y " * 800,
        "(" * 3000,
        "1,234.5 " * 400,
    ]
    # Where expressions that nest try every way.
    runs += [character * 60 + end for character in "abxy0 ." for end in "!b\n"]
    for text in (*words, *runs, "".join(words) * 20):
        _check_size(len(tokenizer.encode(text, add_special_tokens=False).ids), 8 * len(text.encode()))
    tokenizer.encode("x", add_special_tokens=True)
    ids = sorted(tokenizer.get_vocab(with_added_tokens=True).values())
    dice = random.Random(0)
    for row in [ids[i : i + 100] for i in range(0, len(ids), 100)] + [
        dice.choices(ids, k=1000) for _ in range(20) if ids
    ]:
        _check_size(len(tokenizer.decode(row, skip_special_tokens=False)), TOKEN_CHARACTERS * len(row))
    for i in ids[:: max(1, len(ids) // 2000)]:
        _check_size(len(tokenizer.decode([i] * 100, skip_special_tokens=False)), 100 * TOKEN_CHARACTERS)


def _check_size(size: int, most: int) -> None:
    if size > most:
        raise ValueError(f"a text of {size} where {most} are plenty")


def render(template: str, conversations: Sequence[Any], variables: Mapping[str, Any]) -> list[str]:
    """The conversations as a chat template writes them, in jinja2's sandbox."""
    from jinja2 import TemplateError, nodes
    from jinja2.ext import Extension, loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """{% generation %} ... {% endgeneration %} marks what the assistant said; here it is only its text."""

        tags = {"generation"}  # noqa: RUF012 (jinja2 declares it so)

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True)).set_lineno(line)

    def raise_exception(message: str) -> NoReturn:
        raise TemplateError(message)

    def tojson(value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, **other: Any) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, **other)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols]
    )
    environment.filters["tojson"] = tojson
    environment.globals |= {"raise_exception": raise_exception, "strftime_now": DATE.strftime}
    compiled = environment.from_string(template)
    rendered = []
    for messages in conversations:
        pieces, size = [], 0
        for piece in compiled.generate(messages=messages, **variables):
            size += len(piece)
            if size > OUTPUT_CHARACTERS:
                raise ValueError(f"it writes more than {OUTPUT_CHARACTERS} characters")
            pieces.append(piece)
        rendered.append("".join(pieces))
    return rendered


if __name__ == "__main__":
    main()
    sys.stdout.flush()
    os._exit(0)  # nothing that a template left behind runs
