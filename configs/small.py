"""The main job, self-contained: a 100k-parameter decoder learns single-digit sums and goes where β says.

python launch.py --config=configs/small.py
"""

from ml_collections import ConfigDict

from configs import default


def get_config() -> ConfigDict:
    return default.get_config()
