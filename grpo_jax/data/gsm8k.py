"""GSM8K: 7,473 + 1,319 grade school word problems with reference solutions (Cobbe et al., arXiv 2110.14168; MIT licence).

The official files are read from a folder or downloaded, checked by their digests, and kept by tensorflow-datasets.
"""

import hashlib
import os
import re
import tempfile
import urllib.error
import urllib.request
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from grpo_jax.data.splits import data_extra, open_splits, read_split
from grpo_jax.data.templates import parse_template
from grpo_jax.tasks import Example, Task, find_answer, find_target_check, find_verifier


class Official(NamedTuple):
    """What a file of the dataset must be."""

    sha256: str
    num_rows: int


FILES = {
    "train": Official("17f347dc51477c50d4efb83959dbb7c56297aba886e5544ee2aaed3024813465", 7473),
    "test": Official("3730d312f6e3440559ace48831e51066acaca737f6eabec99bccb9e4b3c39d14", 1319),
}
"""The official files, {split}.jsonl."""

URL = "https://raw.githubusercontent.com/openai/grade-school-math/master/grade_school_math/data"
"""Where they are downloaded from."""

_FORMATS = {  # verifier: how the prompt asks for the answer, and how a solution states it
    "number_hash": ("Finish with the answer, a number, on a line of its own after ####.", "#### {}"),
    "number_boxed": (r"Finish with the answer, a number, in \boxed{}.", r"\boxed{{{}}}"),
    "number_tag": ("Finish with the answer, a number, between <answer> and </answer>.", "<answer>{}</answer>"),
    "number_last": ("Finish with the answer, a number.", "The answer is {}."),
    "math_verify": (r"Finish with the answer, a number, in \boxed{}.", r"\boxed{{{}}}"),
}
_FINAL = re.compile(r"(.*)#### *(-?[0-9][0-9,]*)\s*", re.DOTALL)


def gsm8k(
    path: str | os.PathLike[str] | None = None,
    split: str = "train",
    prompt: str | None = None,
    verifier: str = "number_hash",
    data_dir: str | os.PathLike[str] | None = None,
) -> Task:
    """The problems of GSM8K; the target is the final number of the reference solution, its thousands not separated.

    Args:
      path: folder with the official train.jsonl and test.jsonl; None: they are downloaded, once.
      split: as tensorflow-datasets writes splits: ``train``, ``test``, ``train[:90%]``.
      prompt: text with the field ``{question}``; None: the question, and how the verifier wants the answer.
      verifier: a key of `grpo_jax.tasks.VERIFIERS`, or ``module:function``.
      data_dir: where tensorflow-datasets keeps what it prepares; None: ``$TFDS_DATA_DIR`` or ~/tensorflow_datasets.

    Returns:
      Task whose demonstrations are the reference solutions, which end as the default prompt of the verifier asks.

    Raises:
      ValueError: the files are not the official ones, cannot be had, or are damaged; says what to do. Other rows of this kind
        are what `dataset` is for.
      ImportError: the extra ``data`` is not installed.
    """
    if prompt is None:
        if verifier not in _FORMATS:
            raise ValueError(f"verifier {verifier!r} has no prompt of its own here: set prompt, such as '{{question}}'")
        prompt = "{question}\n" + _FORMATS[verifier][0].replace("{", "{{").replace("}", "}}") + "\n"
    template, answers = parse_template(prompt), parse_template("{answer}")
    if set(template.fields) != {"question"}:
        raise ValueError(f"prompt={prompt!r} must hold the field {{question}}, and no other")

    # Rows as examples and solutions.
    verify, answer, check = find_verifier(verifier), find_answer(verifier), find_target_check(verifier)
    ending = _FORMATS.get(verifier, _FORMATS["number_hash"])[1]

    def make(row: Mapping[str, Any]) -> tuple[Example, str]:
        solution, number = final_answer(answers.render(row))
        if check:
            check(number)
        return Example(template.render(row), number), solution + ending.format(number)

    # The official rows, and no others.
    folder = prepared(path, data_dir)
    splits = open_splits(folder, ("question", "answer"))
    counts = {name: part.num_rows for name, part in splits.items()}
    if counts != {name: file.num_rows for name, file in FILES.items()}:
        raise ValueError(f"{folder} holds {counts} rows, which is not GSM8K: remove it, and it will be made again")
    rows = read_split(splits, split, make)
    solutions = dict(rows)
    return Task("gsm8k", tuple(example for example, _ in rows), verify, None, solutions.__getitem__, answer)


def final_answer(solution: str) -> tuple[str, str]:
    """A reference solution without its last line, and the number there.

    Raises ValueError where it does not end in an integer after ``####``.

    >>> final_answer("2 * 500 = 1000\\n#### 1,000")
    ('2 * 500 = 1000\\n', '1000')
    """
    if not (match := _FINAL.fullmatch(solution)):
        raise ValueError(f"the solution {solution[-60:]!r} does not end in an integer after ####")
    return match[1], str(int(match[2].replace(",", "")))


def prepared(path: str | os.PathLike[str] | None, data_dir: str | os.PathLike[str] | None) -> Path:
    """The folder of the dataset as tensorflow-datasets keeps it, made where it is not there yet from official files only.

    path, data_dir, raises: as for `gsm8k`.
    """
    with data_extra("GSM8K"):
        import tensorflow_datasets as tfds

        from grpo_jax.data.gsm8k_builder import GrpoGsm8k, prepare

    home = Path(os.path.expanduser(tfds.core.constants.DATA_DIR if data_dir is None else data_dir))
    if ":/" in os.fspath(home):
        raise ValueError(f"{home}: GSM8K is kept in a folder of this machine: set data_dir")
    files = {}
    if path is not None:
        files = {split: Path(path) / f"{split}.jsonl" for split in FILES}
        for split, file in files.items():
            if not file.is_file():
                raise ValueError(f"{file}: no such file; GSM8K is train.jsonl and test.jsonl of {URL}")
            _check(file.read_bytes(), split, os.fspath(file))
    elif not (home / GrpoGsm8k.name / str(GrpoGsm8k.VERSION)).exists():
        files = {split: _downloaded(split, home / "downloads" / GrpoGsm8k.name) for split in FILES}
    try:
        return prepare(files, home)
    except OSError as error:
        raise ValueError(
            f"{home}: GSM8K cannot be kept here: {error}; set data_dir to a folder that can be written"
        ) from None


def _downloaded(split: str, folder: Path) -> Path:
    file, url = folder / f"{split}.jsonl", f"{URL}/{split}.jsonl"
    if not file.exists():
        try:
            with urllib.request.urlopen(url, timeout=30) as response:
                content = response.read(16 * 2**20)
        except (OSError, urllib.error.URLError) as error:
            raise ValueError(
                f"{url} cannot be downloaded ({error}): get train.jsonl and test.jsonl where there is network, and set path to "
                "their folder"
            ) from None
        _check(content, split, url)
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=folder, delete=False) as part:
            part.write(content)
        os.replace(part.name, file)
    _check(file.read_bytes(), split, os.fspath(file))
    return file


def _check(content: bytes, split: str, where: str) -> None:
    if (digest := hashlib.sha256(content).hexdigest()) != FILES[split].sha256:
        raise ValueError(
            f"{where} is not the official {split}.jsonl of GSM8K: {len(content)} bytes of sha256 {digest}, "
            f"not {FILES[split].sha256}; for other rows, use the task dataset"
        )
