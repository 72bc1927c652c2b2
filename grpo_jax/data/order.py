"""The order in which iterations visit the rows of a task."""

import numpy as np


def prompt_order(seed: int, iteration: int, *, num_prompts: int, batch: int) -> np.ndarray:
    """Rows visited in an iteration: the data position is the iteration itself.

    An epoch is a uniform permutation of all rows, a function of (seed, epoch), cut into ⌊N / P⌋ batches; the rows left over wait
    for another epoch. So a resumed run needs no replay, and no iteration holds a row twice (its completions would be the same).

    Grain gives each epoch its own random generator, by its index. Its ``shuffle`` would serve too, but walks through 65,536
    places for an epoch of fewer rows: 18 ms for all of 100 rows, where this takes 0.2 ms (as for 7,473; 20 ms for 10⁶).

    Args:
      seed: of the run, in [0, 2³²).
      iteration: n ≥ 0.
      num_prompts: N rows.
      batch: P ≤ N prompts per iteration.

    Returns:
      [P] int64 rows.

    >>> [sorted(prompt_order(0, n, num_prompts=4, batch=4).tolist()) for n in (0, 1)]
    [[0, 1, 2, 3], [0, 1, 2, 3]]
    """
    import grain

    def permutation(_: int, generator: np.random.Generator) -> np.ndarray:
        return generator.permutation(num_prompts)

    epoch, place = divmod(iteration, num_prompts // batch)
    epochs = grain.MapDataset.range(1).seed(seed).repeat().random_map(permutation)
    return epochs[epoch][place * batch : (place + 1) * batch]
