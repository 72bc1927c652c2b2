"""Tasks of reasoning-gym (an optional package), as generators of prompts: its own scoring runs answers as code, ours does not."""

from grpo_jax.tasks import Example, Task, find_answer, find_target_check, find_verifier

AUDITED_VERSION = "0.1.25"
AUDITED = {
    "basic_arithmetic": "number_tag",
    "binary_alternation": "number_tag",
    "chain_sum": "number_tag",
    "count_bits": "number_tag",
    "count_primes": "number_tag",
    "decimal_chain_sum": "number_tag",
    "gcd": "number_tag",
    "gsm_symbolic": "number_tag",
    "largest_island": "number_tag",
    "lcm": "number_tag",
    "leg_counting": "number_tag",
    "letter_counting": "number_tag",
    "maze": "number_tag",
    "number_format": "number_tag",
    "products": "number_tag",
    "rectangle_count": "number_tag",
    "rotten_oranges": "number_tag",
    "self_reference": "number_tag",
    "simple_equations": "number_tag",
    "simple_geometry": "number_tag",
    "base_conversion": "exact",
    "caesar_cipher": "exact",
    "color_cube_rotation": "exact",
    "manipulate_matrix": "exact",
    "needle_haystack": "exact",
    "rotate_matrix": "exact",
    "spell_backward": "exact",
    "spiral_matrix": "exact",
    "string_insertion": "exact",
    "string_manipulation": "exact",
    "string_splitting": "exact",
    "string_synthesis": "exact",
    "word_sequence_reversal": "exact",
    "word_sorting": "exact",
}
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
