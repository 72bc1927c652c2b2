"""Runs a config: grpo-jax --config=small --workdir=runs/small --config.objective.beta=0.5

A checkout has the same command as python launch.py. --config is a file, or the name of a config that comes with the package.
A run started again with the same config and run directory resumes, or shows its result if it is finished.
--mode=evaluate measures a checkpoint of the run directory; --mode=export --output=FOLDER writes one as a Hugging Face folder
with tokenizer, chat template and a card; --mode=estimate says what memory each device needs, also of a TPU pod that is not
there (--topology=v5e:4x4); --mode=manifest --target=jobset prints what starts the command on such a pod.
--sweep="objective.beta=0.1,0.3,1; seed=0,1" runs every combination one after the other, each in its own directory inside
runs/NAME_sweep; the same command goes on where it was stopped, and with --list only says how far each point is.
On several hosts, the same command on each, with --processes=auto where the machine knows of the others (Cloud TPU, GKE, Slurm,
Open MPI), or --coordinator=HOST:PORT --num_processes=N --process_id=I; the run directory must be a folder that all of them see.
Exit codes: 0 done, 75 preempted by SIGTERM or SIGHUP (start again to resume), 130 interrupted by Ctrl-C, 1 failed, 2 where
another start would not help: a bad command line or config, the directory of something else, or three starts in vain.
"""

import copy
import os
import re
import sys
import traceback
from pathlib import Path
from types import ModuleType
from typing import Any, NoReturn

try:
    from absl import app, flags, logging
    from ml_collections import config_flags
    from ml_collections.config_flags.config_flags import ConfigFileFlagParser
except ModuleNotFoundError as missing:
    raise SystemExit(
        f"grpo_jax: a run needs more than the core, here {missing.name}: pip install 'grpo_jax[train]', "
        "or in a checkout pip install -r requirements.txt"
    ) from None

from grpo_jax.environment import end_on_signals, prepare_environment, prepare_streams, program
from grpo_jax.manifests import STOPS, TARGETS, manifest, parse_cluster

EXIT_FAILED, EXIT_USAGE, EXIT_PREEMPTED, EXIT_INTERRUPTED = 1, STOPS, 75, 130
MISTAKES = (flags.Error, OSError, AttributeError, TypeError, ValueError, KeyError)  # that parsing a flag raises

CONFIGS = next(folder for up in Path(__file__).parents[:2] if (folder := up / "configs").is_dir())
"""The configs that come with the package: in it where it is installed, beside it in a checkout."""


def shipped(name: str) -> str:
    """The file of a config that comes with the package, for its name; what else --config says as it is.

    >>> Path(shipped("small:amplify")).name, shipped("small.py"), shipped("tiny")
    ('small.py:amplify', 'small.py', 'tiny')
    """
    stem, colon, regime = name.partition(":")
    file = CONFIGS / f"{stem}.py"
    return f"{file}{colon}{regime}" if stem.isidentifier() and file.is_file() and not Path(stem).is_file() else name


class _ConfigParser(ConfigFileFlagParser):
    def parse(self, path: str) -> Any:
        return super().parse(shipped(path))


_CONFIG = config_flags.DEFINE_config_file(
    "config", None, "Config file, or the name of a shipped one; its keys are flags: --config.objective.beta=0.5"
)
flags.FLAGS["config"].parser = _ConfigParser("config")
_WORKDIR = flags.DEFINE_string(
    "workdir", None, "Run directory; runs/NAME of the config file by default, runs/NAME_sweep with --sweep."
)
_MODE = flags.DEFINE_enum(
    "mode",
    "train",
    ["train", "evaluate", "export", "estimate", "manifest"],
    "train or resume; measure a checkpoint; write it for other programs; bytes per device; or print what starts this command on "
    "a cluster.",
)
_CHECKPOINT = flags.DEFINE_string(
    "checkpoint", None, "With --mode=evaluate or export: latest (default), reference, average, or an iteration."
)
_OUTPUT = flags.DEFINE_string("output", None, "With --mode=export: the folder to write, which is not there yet.")
_DTYPE = flags.DEFINE_enum(
    "dtype",
    None,
    ["float32", "bfloat16", "float16"],
    "With --mode=export: of the weights; float32 by default, as they are.",
)
_ADAPTERS = flags.DEFINE_boolean(
    "adapters",
    None,
    "With --mode=export of a run with lora.rank: its adapters, as PEFT loads them, in place of a whole model.",
)
_NAME = flags.DEFINE_string(
    "name", None, "With --mode=evaluate: folder in the run directory's evaluations/; with --mode=manifest: of the job."
)
_DEVICES = flags.DEFINE_integer(
    "devices", None, "With --mode=estimate: CPU devices that stand for as many accelerators.", lower_bound=1
)
_TOPOLOGY = flags.DEFINE_string(
    "topology", None, "With --mode=estimate or manifest: v5e:4x4, v6e:8x8, v5p:2x2x1, 2*v5e:4x4 (two slices) or h200:8."
)
_TARGET = flags.DEFINE_enum("target", None, TARGETS, "With --mode=manifest: what starts it.")
_IMAGE = flags.DEFINE_string(
    "image", "grpo_jax", "With --mode=manifest: the container image, built from the Dockerfile."
)
_SWEEP = flags.DEFINE_string(
    "sweep",
    None,
    "Runs every combination of values of config keys, one after the other: 'objective.beta=0.1,0.3,1; seed=0,1,2'. Values are "
    "read as --config.KEY=VALUE is; finished points are skipped, others resumed, failed ones tried again, last.",
)
_PROCESSES = flags.DEFINE_enum("processes", None, ["auto"], "The other processes of this run are found by the machine.")
_COORDINATOR = flags.DEFINE_string("coordinator", None, "HOST:PORT where process 0 of several listens.")
_NUM_PROCESSES = flags.DEFINE_integer("num_processes", None, "How many processes run this command.", lower_bound=1)
_PROCESS_ID = flags.DEFINE_integer("process_id", None, "Which of them this is, from 0 on.", lower_bound=0)
_WAIT = flags.DEFINE_integer("wait", 120, "Seconds to wait for the other processes.", lower_bound=1)
_HEARTBEAT = flags.DEFINE_integer(
    "heartbeat", 100, "Seconds after which a silent process counts as dead, and the others end.", lower_bound=1
)
_EXTEND = flags.DEFINE_boolean(
    "extend",
    False,
    "Goes on with a run whose config had fewer iterations, or another β, learning rate, schedule or warm-up.",
)
_LIST = flags.DEFINE_boolean("list", False, "With --sweep: show every point and how far it is, and run nothing.")


def run() -> None:
    """The command line, as `grpo-jax` and as `launch.py`."""
    end_on_signals()
    # Config files import others as `configs`, in a checkout and where the package is installed.
    sys.modules["configs"] = ModuleType("configs")
    sys.modules["configs"].__path__ = [str(CONFIGS)]
    # What --help shows is of the module that was started.
    sys.modules["__main__"].__doc__ = __doc__
    for flag in flags.FLAGS.get_key_flags_for_module(__name__):
        flags.FLAGS.register_key_flag_for_module(sys.argv[0], flag)
    app.run(main, flags_parser=parse)


def main(arguments: list[str]) -> None:
    """Does with the config of the command line what --mode says."""
    if len(arguments) > 1:
        stop(f"not understood: {' '.join(arguments[1:])} (flags start with --)", EXIT_USAGE)
    name, _, regime = config_flags.get_config_filename(flags.FLAGS["config"]).partition(":")
    words = [Path(name).stem, *([regime] if regime else []), *([] if _SWEEP.value is None else ["sweep"])]
    workdir = _WORKDIR.value or Path("runs") / "_".join(words)
    from grpo_jax import storage

    prepare_streams()
    try:
        workdir = storage.place(workdir)
    except ValueError as error:
        stop(f"--workdir={error}", EXIT_USAGE)
    for flag, modes in (
        (_CHECKPOINT, ("evaluate", "export")),
        (_OUTPUT, ("export",)),
        (_DTYPE, ("export",)),
        (_ADAPTERS, ("export",)),
        (_NAME, ("evaluate", "manifest")),
        (_DEVICES, ("estimate",)),
        (_TOPOLOGY, ("estimate", "manifest")),
        (_TARGET, ("manifest",)),
    ):
        if flag.value is not None and _MODE.value not in modes:
            stop(f"--{flag.name} is for --mode={' or '.join(modes)}", EXIT_USAGE)
    if _CHECKPOINT.value is not None and not re.fullmatch("latest|reference|average|[0-9]{1,9}", _CHECKPOINT.value):
        stop(
            f"--checkpoint={_CHECKPOINT.value!r} must be latest, reference, average, or the number of an iteration",
            EXIT_USAGE,
        )
    if _MODE.value == "export" and _OUTPUT.value is None:
        stop("--mode=export wants --output=FOLDER", EXIT_USAGE)
    if _EXTEND.value and (_MODE.value != "train" or _SWEEP.value is not None):
        stop("--extend is for one run of --mode=train", EXIT_USAGE)
    if _SWEEP.value is not None and _MODE.value not in ("train", "manifest"):
        stop("--sweep is for --mode=train", EXIT_USAGE)
    if _LIST.value and _SWEEP.value is None:
        stop("--list shows the points of a --sweep", EXIT_USAGE)
    check_processes()
    if _DEVICES.value is not None and _TOPOLOGY.value is not None:
        stop("--devices stands for accelerators that --topology compiles for: give one of them", EXIT_USAGE)
    if _DEVICES.value is not None or _TOPOLOGY.value is not None:
        os.environ |= {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": str(_DEVICES.value or 1)}
    prepare_environment()
    logging.set_verbosity(logging.WARNING)
    if _MODE.value == "manifest":
        print_manifest("_".join(words))
        return
    from grpo_jax import processes
    from grpo_jax.config import ConfigError
    from grpo_jax.runs.errors import (
        DirectoryInUse,
        DirectoryUnreachable,
        Interrupted,
        NothingToLearn,
        Preempted,
        RunDirectoryError,
        RunError,
        StartedInVain,
    )
    from grpo_jax.runs.evaluation import evaluate
    from grpo_jax.runs.export import export
    from grpo_jax.runs.loop import train
    from grpo_jax.runs.memory import estimate

    try:
        if _PROCESSES.value or _COORDINATOR.value:
            processes.initialize(
                coordinator=_COORDINATOR.value,
                number=_NUM_PROCESSES.value,
                own=_PROCESS_ID.value,
                timeout=_WAIT.value,
                heartbeat=_HEARTBEAT.value,
            )
        match _MODE.value:
            case "train" if _SWEEP.value is not None:
                sweep(_CONFIG.value, _SWEEP.value, workdir)
            case "train":
                train(_CONFIG.value, workdir, extend=_EXTEND.value)
            case "evaluate":
                evaluate(_CONFIG.value, workdir, checkpoint=_CHECKPOINT.value or "latest", name=_NAME.value)
            case "export":
                checkpoint, dtype = _CHECKPOINT.value or "latest", _DTYPE.value or "float32"
                options: dict[str, Any] = {"checkpoint": checkpoint, "dtype": dtype, "adapters": bool(_ADAPTERS.value)}
                export(_CONFIG.value, workdir, _OUTPUT.value or "", **options)
            case "estimate":
                estimate(_CONFIG.value, topology=_TOPOLOGY.value)
    except ConfigError as error:
        stop(str(error), EXIT_USAGE)
    except (DirectoryInUse, DirectoryUnreachable) as error:
        stop(str(error), EXIT_FAILED)
    except (StartedInVain, NothingToLearn, RunDirectoryError) as error:
        stop(str(error), EXIT_USAGE)
    except Interrupted as error:
        stop(str(error), EXIT_INTERRUPTED)
    except Preempted as error:
        stop(str(error), EXIT_PREEMPTED)
    except (RunError, ValueError, OSError, RuntimeError) as error:
        stop(str(error) or type(error).__name__, EXIT_FAILED)
    except Exception as error:
        if type(error).__module__.partition(".")[0] not in ("gcsfs", "aiohttp", "google"):
            raise
        stop(f"the bucket could not be reached: {' '.join(str(error).split())[:300]}", EXIT_FAILED)


def print_manifest(name: str) -> None:
    """Prints what starts this command line on the hardware of --topology."""
    from grpo_jax.config import validate

    target, topology = _TARGET.value, _TOPOLOGY.value
    if target is None or topology is None or _WORKDIR.value is None:
        stop("--mode=manifest wants --target, --topology, and a --workdir that all hosts see", EXIT_USAGE)
    own = {flag.name for flag in (_MODE, _TARGET, _TOPOLOGY, _IMAGE, _NAME)}
    start = ["python", "launch.py"] if program() == "launch.py" else [program()]
    words = start + [word for word in sys.argv[1:] if word.lstrip("-").partition("=")[0] not in own]
    try:
        if any(word.lstrip("-") in own for word in sys.argv[1:]):
            raise ValueError("with --mode=manifest, write flags as --KEY=VALUE")
        cluster, points = parse_cluster(topology), None
        if target != "slurm" and not str(_WORKDIR.value).startswith("gs://"):
            raise ValueError(f"--workdir={_WORKDIR.value}: a container's folder is lost with it; take gs://BUCKET/NAME")
        of_slice = cluster.hosts * cluster.chips
        if _SWEEP.value is not None:
            points = len(sweep_points(_CONFIG.value, _SWEEP.value, num_devices=of_slice))
        else:
            validate(_CONFIG.value, num_devices=of_slice * cluster.slices)
        job = _NAME.value or re.sub(r"[^a-z0-9-]+", "-", name.lower())
        print(manifest(target, cluster, words, name=job, image=_IMAGE.value, points=points), end="")
    except ValueError as error:
        stop(str(error), EXIT_USAGE)


def check_processes() -> None:
    """Refuses flags of several processes that do not go together."""
    given = [flag.name for flag in (_COORDINATOR, _NUM_PROCESSES, _PROCESS_ID) if flag.value is not None]
    if _PROCESSES.value and given:
        stop(f"--processes=auto finds out what --{given[0]} says: give one of them", EXIT_USAGE)
    if given and len(given) < 3:
        stop("--coordinator, --num_processes and --process_id go together", EXIT_USAGE)
    own, number = _PROCESS_ID.value, _NUM_PROCESSES.value
    if own is not None and number is not None and own >= number:
        stop(f"--process_id={own} must be below --num_processes={number}", EXIT_USAGE)


def sweep(config: Any, text: str, workdir: str | Path) -> None:
    """Runs, resumes or lists the points of --sweep."""
    from grpo_jax.config import ConfigError
    from grpo_jax.sweeps.one_by_one import list_points, run_points

    try:
        points = sweep_points(config, text)
    except ConfigError:
        raise
    except ValueError as error:
        stop(f"--sweep: {error}", EXIT_USAGE)
    if _LIST.value:
        list_points(points, workdir)
        return
    failed = sum(state.name == "failed" for state in run_points(points, workdir))
    if failed:
        stop(f"{failed} of {len(points)} points failed; why is in {Path(workdir) / 'sweep.md'}", EXIT_FAILED)


def sweep_points(config: Any, text: str, num_devices: int | None = None) -> list[Any]:
    """The points of --sweep, for so many devices; ValueError where they cannot run."""
    from grpo_jax.sweeps.points import make_points, parse_grid

    return make_points(config, parse_grid(text), with_value, num_devices=num_devices)


def with_value(config: Any, key: str, text: str) -> Any:
    """A copy of a config with the value that --config.KEY=TEXT would give it; ValueError in one line where it would not."""
    changed, flag_values = copy.deepcopy(config), flags.FlagValues()
    arguments = [program(), f"--config.{key}={text}"]
    try:
        config_flags.DEFINE_config_dict("config", changed, flag_values=flag_values, sys_argv=arguments)
        flag_values(arguments)
    except MISTAKES as error:
        raise ValueError(" ".join(explained(error).split())) from None
    return changed


def parse(arguments: list[str]) -> list[str]:
    """absl's parser, with every mistake as one line and exit code 2."""
    try:
        rest = flags.FLAGS(arguments)
    except MISTAKES as error:
        stop(explained(error), EXIT_USAGE)
    except Exception as error:  # a config file that is not Python, or fails when it is run
        last = traceback.extract_tb(error.__traceback__)[-1]
        where = "" if isinstance(error, SyntaxError) else f" ({last.filename}, line {last.lineno})"
        stop(f"the config file cannot be run: {type(error).__name__}: {error}{where}", EXIT_USAGE)
    try:
        missing = _CONFIG.value is None or not _CONFIG.value.keys()
    except Exception as error:  # the file's own, whatever it is, or that there is none
        file = shipped(config_flags.get_config_filename(flags.FLAGS["config"])).partition(":")[0]
        if Path(file).is_file():
            stop(str(error), EXIT_USAGE)
        names = ", ".join(sorted(path.stem for path in CONFIGS.glob("*.py")))
        stop(f"--config={file}: no such file from {Path.cwd()}; by name there are {names}", EXIT_USAGE)
    if missing:
        stop("say which config to run: --config=small, or a file (--help lists all flags)", EXIT_USAGE)
    return rest


def explained(error: Exception) -> str:
    """What is wrong with a flag, from whatever its parser raised."""
    match error:
        case flags.Error() | OSError():
            lines = [line for line in str(error).splitlines() if line.strip()]
            return "\n".join(lines[:: len(lines) - 1] if "Traceback" in str(error) else lines)
        case AttributeError() | KeyError() if "ml_collections" in raised_in(error):
            # An unknown --config.key; ml_collections says which key it may have meant.
            text = str(error)
            key = re.search(r"Attempting to lookup: ([\w.]+)", text) or re.search(r"'(\w+)\\?'", text)
            meant = re.search(r'Did you mean "(\w+)"', text)
            schema = os.path.relpath(CONFIGS / "default.py")
            hint = f". Did you mean {meant[1]}?" if meant else f": {schema} has them all"
            return f"unknown config key {key[1] if key else error}{hint}"
        case _:
            return f"bad config value: {error}"


def raised_in(error: Exception) -> str:
    """The file whose line raised an error."""
    frames = traceback.extract_tb(error.__traceback__)
    return frames[-1].filename if frames else ""


def stop(message: str, code: int) -> NoReturn:
    """Ends with one message on stderr; of several processes, whatever the others do."""
    print(f"{program()}: {message}", file=sys.stderr)
    if "grpo_jax.processes" in sys.modules and flags.FLAGS.is_parsed() and (_PROCESSES.value or _COORDINATOR.value):
        sys.modules["grpo_jax.processes"].leave(code)
    sys.exit(code)
