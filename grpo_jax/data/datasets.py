"""Tasks by name, among them any dataset whose rows hold a prompt and a target."""

import inspect
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from grpo_jax.data.gsm8k import gsm8k
from grpo_jax.data.reasoning import reasoning_gym
from grpo_jax.data.splits import open_splits, read_split
from grpo_jax.data.templates import parse_template
from grpo_jax.storage import fetched
from grpo_jax.tasks import Example, Task, arithmetic, countdown, find_answer, find_target_check, find_verifier, stories

# Examples of the options that have no default, for the error that asks for them.
_SUCH_AS = {
    "source": "rows.jsonl",
    "prompt": "{question}",
    "target": "{answer}",
    "verifier": "number_last",
    "name": "gcd",
}


def make_task(name: str, /, **options: Any) -> Task:
    """The task of that name, with its function's own options; files may lie in a bucket.

    Raises ValueError for an unknown name, an option that must be set or a wrong value, TypeError for an unknown option, and
    ImportError naming the package that it needs.

    >>> make_task("arithmetic", operand_max=1).examples[-1]
    Example(prompt='1+1=', target='2')
    """
    functions: tuple[Callable[..., Task], ...] = (arithmetic, stories, countdown, gsm8k, dataset, reasoning_gym)
    tasks = {function.__name__: function for function in functions}
    if name not in tasks:
        raise ValueError(f"unknown task {name!r}; known tasks: {', '.join(tasks)}")
    parameters = inspect.signature(tasks[name]).parameters.values()
    if missing := [p.name for p in parameters if p.default is p.empty and p.name not in options]:
        keys = [f"task.{name}.{option} (such as {_SUCH_AS[option]!r})" for option in missing]
        raise ValueError(f"{', '.join(keys)} must be set")
    for option in ("path", "source"):
        if "://" in str(options.get(option)):
            options[option] = fetched(options[option])
    return tasks[name](**options)


def dataset(
    source: str | os.PathLike[str],
    prompt: str,
    target: str,
    verifier: str,
    split: str = "train",
    data_dir: str | os.PathLike[str] | None = None,
) -> Task:
    """A task of the rows of any dataset, and of any verifier.

    Args:
      source, split, prompt, target, data_dir: see `read_examples`.
      verifier: a key of `grpo_jax.tasks.VERIFIERS`, or ``module:function``; every target must be one that it can use.

    Returns:
      Task without demonstrations.

    Raises:
      ValueError: as `read_examples`; for an unknown verifier; for a target that it cannot use, naming the row.
      ImportError: the verifier or the source needs a package that is not installed.

    >>> import tempfile
    >>> with tempfile.NamedTemporaryFile(suffix=".jsonl") as file:
    ...     _ = file.write(b'{"q": "7+8?", "a": 15}\\n{"q": "7+9?", "a": "many"}'), file.flush()
    ...     str(dataset(file.name, "{q}", "{a}", "number_last", split="train[:1]").verify("It is 15.", "15", False))
    ...     try: dataset(file.name, "{q}", "{a}", "number_last")
    ...     except ValueError as error: print(str(error).removeprefix(file.name))
    'correct'
    :2: the target 'many' is not one number (unparsable)
    """
    verify, check = find_verifier(verifier), find_target_check(verifier)
    examples = read_examples(source, split=split, prompt=prompt, target=target, data_dir=data_dir, check=check)
    return Task(Path(source).absolute().name, examples, verify, answer=find_answer(verifier))


def read_examples(
    source: str | os.PathLike[str],
    *,
    split: str,
    prompt: str,
    target: str,
    data_dir: str | os.PathLike[str] | None = None,
    check: Callable[[str], Any] | None = None,
) -> tuple[Example, ...]:
    """A prompt and a target from every row of a split, in the order of the dataset.

    Rows that are alike are kept: the randomness of a rollout is addressed by the index of the row.

    Args:
      source: a .jsonl, .ndjson or .parquet file, whose rows are the split train, whatever its name; a folder of such files
        named for their splits, train.jsonl and test.jsonl say; a folder that tensorflow-datasets has prepared as
        array_record; or the name of such a dataset, like ``ag_news_subset``.
      split: as tensorflow-datasets writes splits: ``train``, ``test[:10%]``, ``train[100:]+test``.
      prompt: text with fields of the row: ``"{question}\\nAnswer:"``. A field is a text or a number; a number of a JSONL file is
        taken as it is spelled there.
      target: likewise, for the verifier: ``"{answer}"``.
      data_dir: where tensorflow-datasets keeps what it has prepared; None: ``$TFDS_DATA_DIR`` or ~/tensorflow_datasets.
      check: raises ValueError for a target that is refused.

    Raises:
      ValueError: naming the file and line (from 1), or the split and row (from 0), of a row that is broken, lacks a field, or
        whose prompt or target is empty or refused; for a source, split or template that cannot be read.
      ImportError: the source or the split needs the extra ``data``, which is not installed.

    >>> import tempfile
    >>> with tempfile.NamedTemporaryFile(suffix=".jsonl") as file:
    ...     _ = file.write(b'{"question": "7+8?", "answer": 15}'), file.flush()
    ...     read_examples(file.name, split="train", prompt="Q: {question}", target="{answer}")
    (Example(prompt='Q: 7+8?', target='15'),)
    """
    prompts, targets = parse_template(prompt), parse_template(target)
    if not prompts.fields:
        raise ValueError(f"prompt={prompt!r} names no field of a row, such as {{question}}")

    def make(row: Mapping[str, Any]) -> Example:
        example = Example(prompts.render(row), targets.render(row))
        for name, text in example._asdict().items():
            if not text.strip():
                raise ValueError(f"the {name} is empty")
        if check:
            check(example.target)
        return example

    splits = open_splits(source, prompts.fields + targets.fields, data_dir)
    return tuple(read_split(splits, split, make))
