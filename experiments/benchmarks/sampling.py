"""Group sampling of fixed and of ragged lengths, against the yardstick and the peers; tokens after the end do not count.

python -m experiments.benchmarks.sampling [--quick] [--vocabularies=1024,32000] [--lengths=fixed,ragged] [--repeats=7]
"""

from functools import partial

from absl import app, flags

from experiments.benchmarks import race

if __name__ == "__main__":
    race.define_flags()
    flags.adopt_module_key_flags(race)
    app.run(partial(race.run, "sampling"))
