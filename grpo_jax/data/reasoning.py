"""Tasks of reasoning-gym (an optional package), as generators of prompts: its own scoring runs answers as code, ours does not."""

from grpo_jax.tasks import Example, Task, find_answer, find_target_check, find_verifier

AUDITED_VERSION = "0.1.25"
AUDITED = dict.fromkeys(
    ["basic_arithmetic", "binary_alternation", "chain_sum", "count_bits", "count_primes", "decimal_chain_sum", "gcd",
     "gsm_symbolic", "largest_island", "lcm", "leg_counting", "letter_counting", "maze", "number_format", "products",
     "rectangle_count", "rotten_oranges", "self_reference", "simple_equations", "simple_geometry"],
    "number_tag",
) | dict.fromkeys(
    ["base_conversion", "caesar_cipher", "color_cube_rotation", "manipulate_matrix", "needle_haystack", "rotate_matrix",
     "spell_backward", "spiral_matrix", "string_insertion", "string_manipulation", "string_splitting",
     "string_synthesis", "word_sequence_reversal", "word_sorting"],
    "exact",
)  # fmt: skip
"""Generators whose questions have one right answer, and the verifier that judges it.

Not here: those with several right answers (n_queens, jugs, word_ladder) or several spellings of it (time_intervals,
fraction_simplification, bitwise_arithmetic), with rounding (decimal_arithmetic, power_function), with two answers to guess from
(circuit_logic, syllogism), with a rule to guess (number_sequence, arc_1d), without an answer (rubiks_cube) or with an empty one
(ab), one that depends on more than its seed (list_functions), and slow ones (zebra_puzzles, 60 ms each).
"""

_INSTRUCTIONS = {"number_tag": "\nGive the answer, a number, between <answer> and </answer>.", "exact": ""}
_DEMONSTRATIONS = {"number_tag": "<answer>{}</answer>", "exact": "{}"}


def reasoning_gym(name: str, num_examples: int = 1000, seed: int = 0) -> Task:
    """Prompts of a generator of reasoning-gym, judged by a verifier of ours.

    Args:
      name: a key of `AUDITED`, tested for right answers, junk and each other's answers.
      num_examples: prompts, at least 1.
      seed: of the generator; the same prompts on every machine and Python, for the same version of the package.

    Returns:
      Task whose demonstrations are the right answers.

    Raises:
      ValueError: a name that is not on the list, or an item that is not as audited.
      ImportError: reasoning-gym is not installed.

    >>> import pytest; _ = pytest.importorskip("reasoning_gym")
    >>> task = reasoning_gym("gcd", num_examples=2)
    >>> [str(task.verify(f"<answer>{task.examples[0].target}</answer>", target, False)) for _, target in task.examples]
    ['correct', 'wrong']
    """
    if name not in AUDITED:
        raise ValueError(f"{name!r} is not one of reasoning-gym's audited generators: {', '.join(AUDITED)}")
    if num_examples < 1:
        raise ValueError(f"num_examples={num_examples} must be at least 1")
    try:
        from reasoning_gym import create_dataset
    except ModuleNotFoundError:
        raise ImportError(
            f"task 'reasoning_gym' needs the package reasoning-gym: pip install reasoning-gym=={AUDITED_VERSION}"
        ) from None
    verifier, check = AUDITED[name], find_target_check(AUDITED[name])
    examples = []
    for index, item in enumerate(create_dataset(name, size=num_examples, seed=seed)):
        try:
            if not all(isinstance(item[key], str) and item[key].strip() for key in ("question", "answer")):
                raise ValueError("its question or answer is no text")
            example = Example(item["question"] + _INSTRUCTIONS[verifier], item["answer"])
            if check:
                check(example.target)
        except ValueError as error:
            raise ValueError(f"reasoning-gym's {name}[{index}]: {error}") from None
        examples.append(example)

    def demonstration(example: Example) -> str:
        return _DEMONSTRATIONS[verifier].format(example.target)

    return Task(name, tuple(examples), find_verifier(verifier), None, demonstration, find_answer(verifier))
