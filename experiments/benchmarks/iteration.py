"""The whole GRPO step (sampling, rewards, update), fixed and ragged lengths, against the yardstick and the peers.

python -m experiments.benchmarks.iteration [--quick] [--vocabularies=1024,32000] [--lengths=fixed,ragged] [--repeats=7]
"""

from functools import partial

from absl import app, flags

from experiments.benchmarks import race

if __name__ == "__main__":
    race.define_flags()
    flags.adopt_module_key_flags(race)
    app.run(partial(race.run, "iteration"))
