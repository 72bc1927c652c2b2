"""Prompts as token arrays."""

from typing import NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from grpo_jax.data.chat import ChatFormat
from grpo_jax.rollout import PromptBatch
from grpo_jax.tasks import Task

LEAST_SHARED = 16  # tokens; a shorter beginning is not worth a pass of its own


class Tokenizer(Protocol):
    """What the trainer needs of a tokenizer: see `grpo_jax.data.tokenizers`."""

    vocab_size: int
    bos_id: int | None
    eos_id: int | None
    pad_id: int
    stop_ids: tuple[int, ...]
    adds_bos: bool

    def encode(self, text: str) -> list[int]: ...

    def decode(self, ids: list[int]) -> str: ...


class PromptSet(NamedTuple):
    """All prompts of a task, as NumPy arrays on the host.

    Attributes:
      tokens: [N, S] int32, left-padded.  mask: [N, S] bool.
      answers: [N, T] int32, the tokens of the demonstrations (not of the targets), right-padded, stop token included.
      answer_mask: [N, T] bool, True on those tokens; all False where the task has no demonstrations.
      num_shared: K, tokens that all prompts begin with, where it pays to run them once for all; else 0.
    """

    tokens: np.ndarray
    mask: np.ndarray
    answers: np.ndarray
    answer_mask: np.ndarray
    num_shared: int = 0


def encode_prompts(
    task: Task,
    tokenizer: Tokenizer,
    *,
    stop_id: int,
    max_prompt: int,
    max_completion: int,
    too_long: str = "error",
    chat: ChatFormat | None = None,
) -> tuple[Task, PromptSet]:
    """Encodes every prompt and every demonstration of a task; none is ever cut.

    A prompt is ``chat.encode(text)``, or without a chat the tokenizer's ids, the BOS before them where it ``adds_bos``. Text is
    taken as it is: NUL, a byte-order mark and U+2028 are characters like others, and what looks like a special token is text.

    Args:
      task: prompts.
      tokenizer: of the model.
      stop_id: the token that ends a demonstration.
      max_prompt: S at most; the array is as wide as the longest prompt.
      max_completion: T.
      too_long: ``"error"``, or ``"drop"`` to leave out the examples whose prompt has more than ``max_prompt`` tokens or whose
        demonstration has more than ``max_completion``, its stop token included.
      chat: of the model, or None for a model that continues text.

    Returns:
      The task with the examples that fit, in their order (so ``len`` says how many were dropped, for one limit or the
      other), and their `PromptSet`: row i is example i.

    Raises:
      ValueError: a prompt that the tokenizer cannot encode (half of a surrogate pair, say) or that is empty, whatever
        ``too_long`` says; one that is too long, naming the first and the limits that would hold all; or no
        prompt that fits.

    >>> from grpo_jax.data import CharTokenizer
    >>> from grpo_jax.tasks import arithmetic
    >>> task, prompts = encode_prompts(
    ...     arithmetic("+", 10), CharTokenizer("0123456789+="), stop_id=2, max_prompt=6, max_completion=4, too_long="drop"
    ... )
    >>> len(task.examples), prompts.tokens.shape, prompts.answers.shape  # of 121: not "10+10="
    (120, (120, 6), (120, 4))
    """
    if too_long not in ("error", "drop"):
        raise ValueError(f"too_long={too_long!r} is neither 'error' nor 'drop'")
    if not task.examples:
        raise ValueError(f"task {task.name!r} has no prompts")

    # The tokens of every example, and the rows that fit.
    encoded = [_encode(task, row, tokenizer, chat, stop_id) for row in range(len(task.examples))]
    fitting = [
        row for row, (ids, answer) in enumerate(encoded) if len(ids) <= max_prompt and len(answer) <= max_completion
    ]
    if not fitting or (too_long == "error" and len(fitting) < len(encoded)):
        raise ValueError(_too_long(task, encoded, fitting, max_prompt, max_completion))

    # Prompts end at the right edge, and answers begin at the left.
    width = max(len(encoded[row][0]) for row in fitting)
    tokens = np.full((len(fitting), width), tokenizer.pad_id, np.int32)  # [N, S]
    mask = np.zeros(tokens.shape, bool)
    answers = np.full((len(fitting), max_completion), tokenizer.pad_id, np.int32)  # [N, T]
    answer_mask = np.zeros(answers.shape, bool)
    for i, (ids, answer) in enumerate(encoded[row] for row in fitting):
        tokens[i, width - len(ids) :], mask[i, width - len(ids) :] = ids, True
        answers[i, : len(answer)], answer_mask[i, : len(answer)] = answer, True
    if len(fitting) < len(encoded):
        task = task._replace(examples=tuple(task.examples[row] for row in fitting))
    return task, PromptSet(tokens, mask, answers, answer_mask, _num_shared([encoded[row][0] for row in fitting]))


def prompt_batch(prompts: PromptSet, index: np.ndarray | jax.Array) -> PromptBatch:
    """The prompts of the given rows, with what all prompts share apart."""
    tokens, mask, shared = prompts.tokens[index], prompts.mask[index], None
    if K := prompts.num_shared:
        # Padded on the left, a row of n tokens has its first K in the columns from S − n on, and none of its others before K.
        shared = jnp.asarray(np.broadcast_to(tokens[0][mask[0]][:K], (len(index), K)))
        tokens, mask = tokens[:, K:], (mask & (mask.cumsum(-1) > K))[:, K:]
    rows = index.astype(np.int32)
    return PromptBatch(jnp.asarray(tokens), jnp.asarray(mask), jnp.asarray(rows), shared)


def _num_shared(prompts: list[list[int]]) -> int:
    """How many tokens all prompts begin with; one is left to each. 0 where they are less than a quarter, or fewer than 16.

    >>> _num_shared([[*range(20), 1, 2], [*range(20), 1]]), _num_shared([[5, 6], [5, 7]])
    (20, 0)
    """
    first, last = min(prompts), max(prompts)  # in the order of lists: what these two share, all share
    differing = (i for i, (a, b) in enumerate(zip(first, last, strict=False)) if a != b)
    most = min(map(len, prompts)) - 1
    shared = min(next(differing, most), most)
    return shared if shared >= max(LEAST_SHARED, sum(map(len, prompts)) / len(prompts) / 4) else 0


_Encoded = tuple[list[int], list[int]]  # the ids of a prompt, and of its demonstration, [] where the task has none


def _encode(task: Task, row: int, tokenizer: Tokenizer, chat: ChatFormat | None, stop_id: int) -> _Encoded:
    example = task.examples[row]
    try:
        if chat is not None:
            ids = chat.encode(example.prompt)
        else:
            first = [tokenizer.bos_id] if tokenizer.adds_bos and tokenizer.bos_id is not None else []
            ids = [*first, *tokenizer.encode(example.prompt)]
        if not ids:
            raise ValueError("it has no tokens")
        return ids, [*tokenizer.encode(task.demonstrations(example)), stop_id] if task.demonstrations else []
    except ValueError as error:
        raise ValueError(f"{_describe(task, row)}: {error}") from error


def _too_long(task: Task, encoded: list[_Encoded], fitting: list[int], max_prompt: int, max_completion: int) -> str:
    """Which example is the first that does not fit, how many do not, and which limits would hold all."""
    row = min(set(range(len(encoded))) - set(fitting))
    (size, answer_size), count = map(len, encoded[row]), len(encoded) - len(fitting)
    longest, longest_answer = (max(map(len, column)) for column in zip(*encoded, strict=True))
    if size > max_prompt:
        first = f"{_describe(task, row)} has {size} tokens; data.max_prompt={max_prompt} allows {max_prompt}"
    else:
        first = (
            f"the answer to {_describe(task, row)} has {answer_size} tokens, its stop token included; "
            f"rollout.max_completion={max_completion} allows {max_completion}"
        )
    limits = [f"data.max_prompt={longest}"] if longest > max_prompt else []
    limits += [f"rollout.max_completion={longest_answer}"] if longest_answer > max_completion else []
    drop = ", data.too_long='drop' leaves them out" if fitting else ""
    return f"{first}. {count} of {len(encoded)} prompts do not fit: {' and '.join(limits)} would hold all{drop}"


def _describe(task: Task, row: int) -> str:
    return f"prompt {row} of task {task.name!r} ({task.examples[row].prompt[:60]!r})"
