"""Countdown: make a number out of three given ones; a small decoder learns it from scratch, verified as text.

python launch.py --config=configs/countdown.py
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
    config.rollout.max_completion = 28
    return config
