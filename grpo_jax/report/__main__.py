"""What was measured, on the command line: python -m grpo_jax.report compare | html | serve (--help has examples).

Exit codes: 0 done, 2 bad command line or input, with one line on stderr that says what.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from grpo_jax.environment import prepare_streams
from grpo_jax.report.comparison import compare, comparison_lines, plot_comparison
from grpo_jax.storage import named, place

COMPARE = """example:
  python -m grpo_jax.report compare runs/a/evaluations/reference-gsm8k-test runs/a/evaluations/iteration-150-gsm8k-test \\
      --figure=compare.png --json=compare.json"""
HTML = """examples:
  python -m grpo_jax.report html runs/small
  python -m grpo_jax.report html runs/small runs/other --output=both.html"""
SERVE = """example:
  python -m grpo_jax.report serve runs/small --port=8000"""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ValueError(message)


def main(arguments: Sequence[str]) -> int:
    """Runs one command line and returns the exit code."""
    try:
        options = _parser().parse_args(arguments)
        options.run_command(options)
    except (ValueError, OSError) as error:
        text = f"{error.filename}: {error.strerror}" if isinstance(error, OSError) and error.filename else str(error)
        print(f"grpo_jax.report: {' '.join(text.split())}", file=sys.stderr)
        return 2
    return 0


def _compare(options: argparse.Namespace) -> None:
    if not 0 < options.confidence < 1:
        raise ValueError(f"--confidence={options.confidence:g} must be inside (0, 1)")
    comparison = compare(named(options.a), named(options.b), common=options.common, confidence=options.confidence)
    if options.json is not None:
        Path(options.json).write_text(json.dumps(comparison, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    if options.figure is not None:
        plot_comparison(Path(options.figure), comparison)
    print("\n".join(comparison_lines(comparison)))


def _html(options: argparse.Namespace) -> None:
    from grpo_jax.report.html_page import write_page
    from grpo_jax.report.run_story import read_run  # which needs jax

    folders = _folders(options)
    default = "report.html" if len(folders) == 1 else f"report-{folders[1].name}.html"
    output = folders[0] / default if options.output is None else place(options.output)
    write_page(output, [read_run(folder) for folder in folders])
    print(output)


def _serve(options: argparse.Namespace) -> None:
    from grpo_jax.report.server import make_server

    if not 0 <= options.port < 1 << 16:
        raise ValueError(f"--port={options.port} must be 0 (any that is free) to 65535")
    with make_server(_folders(options), options.port) as server:
        print(f"http://127.0.0.1:{server.server_port}/ shows it to this machine; Ctrl-C ends it", flush=True)
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            print()


def _folders(options: argparse.Namespace) -> list[Path]:
    return [place(name) for name in (options.run, options.other) if name is not None]


def _parser() -> argparse.ArgumentParser:
    shape: dict[str, Any] = {"formatter_class": argparse.RawDescriptionHelpFormatter, "allow_abbrev": False}
    parser = _Parser(prog="python -m grpo_jax.report", description=__doc__, **shape)
    commands = parser.add_subparsers(dest="command", required=True, metavar="compare, html, serve")

    text = "Two evaluations prompt by prompt: mean difference, paired tests, and the prompts that changed most."
    command = commands.add_parser("compare", help=text, description=text, epilog=COMPARE, **shape)
    command.set_defaults(run_command=_compare)
    command.add_argument("a", help="directory of an evaluation: before, or the baseline")
    command.add_argument("b", help="directory of the other")
    command.add_argument("--common", action="store_true", help="compare the prompts that both have, where they differ")
    command.add_argument("--confidence", type=float, default=0.95, help="of the interval; default: 0.95")
    command.add_argument("--figure", help="PNG to write: success under b over success under a, prompt by prompt")
    command.add_argument("--json", help="file to write the numbers to, every prompt's included")

    text = "One page of a run, or of two, that opens from disk: curves, ledger, prompts, completions token by token."
    command = commands.add_parser("html", help=text, description=text, epilog=HTML, **shape)
    command.set_defaults(run_command=_html)
    _add_runs(command)
    command.add_argument("--output", help="file to write; default: report.html in RUN, report-OTHER.html for two")

    text = "The same page while the run goes on, served to browsers of this machine alone."
    command = commands.add_parser("serve", help=text, description=text, epilog=SERVE, **shape)
    command.set_defaults(run_command=_serve)
    _add_runs(command)
    command.add_argument("--port", type=int, default=0, help="to listen at; default: any that is free")
    return parser


def _add_runs(command: argparse.ArgumentParser) -> None:
    command.add_argument("run", metavar="RUN", help="run directory, finished or not")
    command.add_argument("other", metavar="OTHER", nargs="?", help="another, to compare it with")


if __name__ == "__main__":
    prepare_streams()
    sys.exit(main(sys.argv[1:]))
