"""Countdown: a small decoder learns to make a number out of three given ones, verified as text in worker processes.

    python launch.py --config=configs/countdown.py

A random decoder of 125,120 parameters is warm-started on the solutions of 200 puzzles until it solves about 40 %; GRPO follows.
An expression has many spellings, so the verifier reads it: there is no comparing tokens here. Some seven minutes on 2 CPU cores;
success rises from 0.42 to 0.77, where 0.82 is predicted.
"""

from ml_collections import ConfigDict

from configs import default


def get_config() -> ConfigDict:
    config = default.get_config()
    config.task.name = "countdown"
    config.task.countdown.num_examples = 200
    config.task.countdown.num_numbers = 3
    config.task.countdown.max_number = 9
    config.task.countdown.max_total = 40
    config.task.countdown.prompt = "{numbers} = {total}? "
    config.data.max_prompt = 24
    config.warm_start.learning_rate = 2e-3
    config.warm_start.interval = 10
    config.rollout.max_completion = 28  # <answer>(9+8)*7</answer> and the stop token
    config.train.iterations = 300
    config.optimizer.learning_rate = 3e-4
    config.optimizer.b2 = 0.999
    config.evaluate.interval = 25
    config.evaluate.final_samples = 128
    return config
