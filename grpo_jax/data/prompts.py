"""Prompts as token arrays, and the order in which iterations visit them."""

from typing import NamedTuple, Protocol

import jax.numpy as jnp
import numpy as np

from grpo_jax.rollout import PromptBatch
from grpo_jax.tasks import Task


class Tokenizer(Protocol):
    """What the trainer needs of a tokenizer."""

    @property
    def vocab_size(self) -> int: ...

    @property
    def bos_id(self) -> int | None: ...

    @property
    def eos_id(self) -> int | None: ...

    @property
    def pad_id(self) -> int: ...

    def encode(self, text: str) -> list[int]: ...

    def decode(self, ids: list[int]) -> str: ...


class PromptSet(NamedTuple):
    """All prompts of a task, as NumPy arrays on the host.

    Attributes:
      tokens: [N, S] int32, left-padded.  mask: [N, S] bool.
      answers: [N, T] int32, right-padded demonstrations, stop token included.  answer_mask: [N, T] bool; all False where the
        task has no demonstrations.
    """

    tokens: np.ndarray
    mask: np.ndarray
    answers: np.ndarray
    answer_mask: np.ndarray


def encode_prompts(
    task: Task, tokenizer: Tokenizer, *, stop_id: int, max_prompt: int, max_completion: int
) -> PromptSet:
    """Encodes every prompt (BOS first, where the tokenizer has one) and every demonstration of a task.

    Args:
      task: prompts.
      tokenizer: of the model.
      stop_id: the token that ends a completion.
      max_prompt: S at most; the array is as wide as the longest prompt.
      max_completion: T.

    Returns:
      `PromptSet` of N = len(task.examples) rows.

    Raises:
      ValueError: a prompt that the tokenizer cannot encode, that is empty, or that is longer than ``max_prompt`` tokens: the
        question would have to be cut; or an answer longer than ``max_completion``, which could never be given. Names the prompt.
    """
    prompts, answers = [], []
    for row, example in enumerate(task.examples):
        try:
            ids = ([] if tokenizer.bos_id is None else [tokenizer.bos_id]) + tokenizer.encode(example.prompt)
            answer = [*tokenizer.encode(task.demonstrations(example)), stop_id] if task.demonstrations else []
        except ValueError as error:
            raise ValueError(f"prompt {row} of task {task.name!r} ({example.prompt[:60]!r}): {error}") from error
        if not 0 < len(ids) <= max_prompt:
            raise ValueError(
                f"prompt {row} of task {task.name!r} ({example.prompt[:60]!r}) has {len(ids)} tokens; "
                f"data.max_prompt={max_prompt} allows 1 to {max_prompt}"
            )
        if len(answer) > max_completion:
            raise ValueError(
                f"the answer to prompt {row} of task {task.name!r} ({example.prompt[:60]!r}) has {len(answer)} tokens, its stop "
                f"token included; rollout.max_completion={max_completion} allows {max_completion}"
            )
        prompts.append(ids)
        answers.append(answer)
    width = max(map(len, prompts))
    tokens = np.full((len(prompts), width), tokenizer.pad_id, np.int32)
    mask = np.zeros(tokens.shape, bool)
    answer_tokens = np.full((len(prompts), max_completion), tokenizer.pad_id, np.int32)
    answer_mask = np.zeros(answer_tokens.shape, bool)
    for row, (ids, answer) in enumerate(zip(prompts, answers, strict=True)):
        tokens[row, width - len(ids) :], mask[row, width - len(ids) :] = ids, True
        answer_tokens[row, : len(answer)], answer_mask[row, : len(answer)] = answer, True
    return PromptSet(tokens, mask, answer_tokens, answer_mask)


def prompt_batch(prompts: PromptSet, index: np.ndarray) -> PromptBatch:
    """The prompts of the given rows."""
    return PromptBatch(*map(jnp.asarray, (prompts.tokens[index], prompts.mask[index], index.astype(np.int32))))


def prompt_order(seed: int, iteration: int, *, num_prompts: int, batch: int) -> np.ndarray:
    """Rows visited in an iteration: the data position is the iteration itself.

    An epoch is a permutation of all rows, a function of (seed, epoch), cut into ⌊N / P⌋ batches; the rows left over wait for
    another epoch. So a resumed run needs no replay, and no iteration holds a row twice (its completions would be the same).

    Args:
      seed: of the run.
      iteration: n ≥ 0.
      num_prompts: N rows.
      batch: P ≤ N prompts per iteration.

    Returns:
      [P] int64 rows.

    >>> [sorted(prompt_order(0, n, num_prompts=4, batch=4).tolist()) for n in (0, 1)]
    [[0, 1, 2, 3], [0, 1, 2, 3]]
    """
    epoch, place = divmod(iteration, num_prompts // batch)
    order = np.random.default_rng((seed, epoch)).permutation(num_prompts)
    return order[place * batch : (place + 1) * batch]
