"""The main job, self-contained: a small decoder learns single-digit sums, and GRPO takes it where β says.

    python launch.py --config=configs/small.py

A random decoder of 124,160 parameters with character tokens is warm-started on demonstrations until it answers about 40 % of
the 100 sums "a+b=" right, and is frozen as the reference; 600 iterations of GRPO follow at β = 1, where the predicted p* is
interior (0.77 to 0.83 by seed), and the run ends within 0.004 of it. About a minute and a half on 2 CPU cores. The amplifying
regime, p* ≈ 1: --config=configs/small.py:amplify (β = 0.1).
"""

from ml_collections import ConfigDict

from configs import default


def get_config(regime: str = "interior") -> ConfigDict:
    betas = {"interior": 1.0, "amplify": 0.1}
    if regime not in betas:
        raise ValueError(f"configs/small.py:{regime} is unknown; there are {', '.join(betas)}")
    config = default.get_config()
    config.objective.beta = betas[regime]
    config.data.max_prompt = 5  # BOS and "a+b="
    config.rollout.max_completion = 4
    config.warm_start.learning_rate = 5e-4
    config.warm_start.interval = 2
    config.train.iterations = 600
    config.evaluate.interval = 20
    config.attainable.samples = 192  # R² of this decoder is near 1, and it takes some steps to see that
    config.attainable.steps = 24
    config.optimizer.learning_rate = 3e-4  # sampling noise shifts the point in proportion to it
    config.optimizer.b2 = 0.999  # a short memory shifts the fixed point: see experiments/LOG.md
    return config
