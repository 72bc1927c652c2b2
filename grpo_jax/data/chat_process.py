"""The main of the process that renders a chat template: one JSON request in, one JSON reply out, then it ends; see chat.py.

jinja2's sandbox keeps a template from the interpreter, but not from the clock or the memory: that is what the limits of
this process are for. It imports nothing of this package, so that a template meets neither jax nor the model.
"""

import contextlib
import datetime
import json
import os
import resource
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

MEMORY_BYTES = 512 << 20  # of address space; the interpreter and jinja2 take some 50 MB of it
CPU_SECONDS = 2
OUTPUT_CHARACTERS = 1_000_000  # of one rendering
REPLY_BYTES = 64 << 20  # of the file that the reply is written to: four renderings, in ASCII
# What templates of Llama 3 write without a clock; a run must not depend on the day.
DATE = datetime.datetime(2024, 7, 26)


def main() -> None:
    """Reads {"path", "template", "conversations", "variables"}, writes {"rendered": [text, ...]} or {"error": why}."""
    request = json.load(sys.stdin)
    sys.path[:] = request["path"]
    _limit()
    reply: dict[str, Any]
    try:
        reply = {"rendered": _render(**{k: request[k] for k in ("template", "conversations", "variables")})}
    except MemoryError:
        reply = {"error": f"it takes more than {MEMORY_BYTES >> 20} MB of memory"}
    except BaseException as error:
        reply = {"error": f"{type(error).__name__}: {error}"[:1000]}
    sys.stdout.write(json.dumps(reply))


def _limit() -> None:
    seconds = CPU_SECONDS + int(time.process_time())  # a slow start is not the template's
    for kind, value in (("AS", MEMORY_BYTES), ("CPU", seconds), ("FSIZE", REPLY_BYTES), ("CORE", 0)):
        with contextlib.suppress(AttributeError, ValueError, OSError):  # a system may lack or refuse one
            resource.setrlimit(getattr(resource, f"RLIMIT_{kind}"), (value, value))


def _render(template: str, conversations: Sequence[Any], variables: Mapping[str, Any]) -> list[str]:
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
