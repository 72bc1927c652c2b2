"""Runs a config: python launch.py --config=configs/small.py [--workdir=runs/small] [--config.objective.beta=0.5 …]

A run started again with the same config and run directory resumes, or shows its result if it is finished.
--mode=evaluate measures a checkpoint of the run directory; --mode=estimate says what memory each device needs.
Exit codes: 0 done, 75 preempted (start again to resume), 1 failed, 2 bad command line or config.
"""

import os
import sys
from pathlib import Path

from absl import app, flags, logging
from ml_collections import config_flags

from grpo_jax.environment import prepare_environment, prepare_streams

EXIT_FAILED, EXIT_USAGE, EXIT_PREEMPTED = 1, 2, 75

_CONFIG = config_flags.DEFINE_config_file(
    "config", None, "Config file; its keys are flags: --config.objective.beta=0.5"
)
_WORKDIR = flags.DEFINE_string("workdir", None, "Run directory; runs/NAME of the config file by default.")
_MODE = flags.DEFINE_enum(
    "mode", "train", ["train", "evaluate", "estimate"], "train or resume; measure a checkpoint; or bytes per device."
)
_CHECKPOINT = flags.DEFINE_string(
    "checkpoint", None, "With --mode=evaluate: latest (default), reference, or the number of an iteration."
)
_NAME = flags.DEFINE_string("name", None, "With --mode=evaluate: folder in the run directory's evaluations/.")
_DEVICES = flags.DEFINE_integer(
    "devices", None, "With --mode=estimate: CPU devices that stand for as many accelerators.", lower_bound=1
)


def main(arguments: list[str]) -> None:
    """Does with the config of the command line what --mode says."""
    if len(arguments) > 1:
        stop(f"not understood: {' '.join(arguments[1:])} (flags start with --)", EXIT_USAGE)
    name, _, regime = config_flags.get_config_filename(flags.FLAGS["config"]).partition(":")
    workdir = _WORKDIR.value or Path("runs") / "_".join([Path(name).stem, *([regime] if regime else [])])
    prepare_streams()
    for flag, mode in ((_CHECKPOINT, "evaluate"), (_NAME, "evaluate"), (_DEVICES, "estimate")):
        if flag.value is not None and _MODE.value != mode:
            stop(f"--{flag.name} is for --mode={mode}", EXIT_USAGE)
    if _DEVICES.value is not None:
        os.environ |= {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": str(_DEVICES.value)}
    prepare_environment()
    logging.set_verbosity(logging.WARNING)
    from grpo_jax.config import ConfigError
    from grpo_jax.train import estimate, evaluate, train
    from grpo_jax.train.errors import Preempted, RunError

    try:
        match _MODE.value:
            case "train":
                train(_CONFIG.value, workdir)
            case "evaluate":
                evaluate(_CONFIG.value, workdir, checkpoint=_CHECKPOINT.value or "latest", name=_NAME.value)
            case "estimate":
                estimate(_CONFIG.value)
    except ConfigError as error:
        stop(str(error), EXIT_USAGE)
    except Preempted as error:
        stop(str(error), EXIT_PREEMPTED)
    except (RunError, ValueError, OSError, RuntimeError) as error:
        stop(str(error) or type(error).__name__, EXIT_FAILED)
    except KeyboardInterrupt:
        stop(f"interrupted; the same command resumes the run in {workdir} from its last checkpoint", EXIT_FAILED)


def parse(arguments: list[str]) -> list[str]:
    """absl's parser, with every mistake as one line and exit code 2."""
    try:
        rest = flags.FLAGS(arguments)
    except (flags.Error, OSError) as error:
        lines = [line for line in str(error).splitlines() if line.strip()]
        stop("\n".join(lines[:: len(lines) - 1] if "Traceback" in str(error) else lines), EXIT_USAGE)
    except AttributeError as error:  # an unknown --config.key; ml_collections says which key it may have meant
        stop(f"unknown config key: {error}", EXIT_USAGE)
    except (TypeError, ValueError, KeyError) as error:
        stop(f"bad config value: {error}", EXIT_USAGE)
    try:
        missing = _CONFIG.value is None or not _CONFIG.value.keys()
    except Exception as error:  # the file's own, whatever it is, or that there is none
        file = config_flags.get_config_filename(flags.FLAGS["config"]).partition(":")[0]
        stop(str(error) if Path(file).is_file() else f"--config={file}: no such file from {Path.cwd()}", EXIT_USAGE)
    if missing:
        stop("say which config to run: --config=configs/small.py (--help lists all flags)", EXIT_USAGE)
    return rest


def stop(message: str, code: int) -> None:
    """Ends with one message on stderr."""
    print(f"launch.py: {message}", file=sys.stderr)
    sys.exit(code)


if __name__ == "__main__":
    app.run(main, flags_parser=parse)
