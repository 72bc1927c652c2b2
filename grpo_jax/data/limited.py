"""Work on files that came with a model, in a process with limits on time, memory and output; see limited_process.py."""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

WALL_SECONDS = 60.0  # a backstop: the limit that decides is of CPU time, the same on a busy machine


def limited(work: str, **request: Any) -> Any:
    """What that process makes of a request.

    Args:
      work: "render" a chat template, or "try_tokenizer".
      **request: JSON-able; see the functions of these names.

    Raises:
      ValueError: it failed, or went beyond a limit; says which.
    """
    everything = {"path": [os.path.abspath(path) for path in sys.path], "work": work, "request": request}
    libraries = ("LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH")
    environment = {name: os.environ[name] for name in libraries if name in os.environ}
    # One thread: each takes address space, of which there is a limit.
    environment |= {"PYTHONHASHSEED": "0", "RAYON_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    with tempfile.TemporaryFile() as file:  # a file, not a pipe: the system holds its size to the process's limit
        try:
            done = subprocess.run(
                [sys.executable, "-B", "-P", str(Path(__file__).with_name("limited_process.py"))],
                input=json.dumps(everything).encode(),
                stdout=file,
                stderr=subprocess.DEVNULL,
                cwd="/",
                env=environment,
                start_new_session=True,
                timeout=WALL_SECONDS,
            )
        except subprocess.TimeoutExpired:
            raise ValueError(f"it was not done within {WALL_SECONDS:.0f} s") from None
        file.seek(0)
        reply = file.read()
    if done.returncode != 0:
        raise ValueError(f"its process ended with {done.returncode}, beyond its limit of CPU time or memory")
    answer = json.loads(reply)
    if "error" in answer:
        raise ValueError(answer["error"])
    return answer["done"]
