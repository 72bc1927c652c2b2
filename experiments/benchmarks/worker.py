"""A worker's side of `race`; needs the standard library alone, since the peers' interpreters have nothing of ours."""

import json
import os
import sys
from collections.abc import Callable
from typing import Any

Prepared = tuple[dict[str, Any], Callable[[], dict[str, Any]]]


def serve(prepare: Callable[[dict[str, Any]], Prepared]) -> None:
    """Answers a request with what ``prepare`` says of it, and every further line with what its function returns."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what libraries print is no answer
    ready, repeat = prepare(json.loads(sys.stdin.readline()))
    print(json.dumps(ready), file=answers, flush=True)
    for _ in sys.stdin:
        print(json.dumps(repeat()), file=answers, flush=True)
