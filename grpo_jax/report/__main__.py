"""Two evaluations compared on the command line: python -m grpo_jax.report compare A B (--help has examples).

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
from grpo_jax.storage import named

EXAMPLES = """example:
  python -m grpo_jax.report compare runs/a/evaluations/reference-gsm8k-test runs/a/evaluations/iteration-150-gsm8k-test \\
      --figure=compare.png --json=compare.json"""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ValueError(message)


def main(arguments: Sequence[str]) -> int:
    """Runs one command line and returns the exit code."""
    try:
        options = _parser().parse_args(arguments)
        if not 0 < options.confidence < 1:
            raise ValueError(f"--confidence={options.confidence:g} must be inside (0, 1)")
        comparison = compare(named(options.a), named(options.b), common=options.common, confidence=options.confidence)
        if options.json is not None:
            Path(options.json).write_text(json.dumps(comparison, indent=1, allow_nan=False) + "\n", encoding="utf-8")
        if options.figure is not None:
            plot_comparison(Path(options.figure), comparison)
    except (ValueError, OSError) as error:
        text = f"{error.filename}: {error.strerror}" if isinstance(error, OSError) and error.filename else str(error)
        print(f"grpo_jax.report: {' '.join(text.split())}", file=sys.stderr)
        return 2
    print("\n".join(comparison_lines(comparison)))
    return 0


def _parser() -> argparse.ArgumentParser:
    shape: dict[str, Any] = {"formatter_class": argparse.RawDescriptionHelpFormatter, "epilog": EXAMPLES}
    parser = _Parser(prog="python -m grpo_jax.report", description=__doc__, allow_abbrev=False, **shape)
    commands = parser.add_subparsers(dest="command", required=True, metavar="compare")
    text = "Two evaluations prompt by prompt: mean difference, paired tests, and the prompts that changed most."
    command = commands.add_parser("compare", help=text, description=text, allow_abbrev=False, **shape)
    command.add_argument("a", help="directory of an evaluation: before, or the baseline")
    command.add_argument("b", help="directory of the other")
    command.add_argument("--common", action="store_true", help="compare the prompts that both have, where they differ")
    command.add_argument("--confidence", type=float, default=0.95, help="of the interval; default: 0.95")
    command.add_argument("--figure", help="PNG to write: success under b over success under a, prompt by prompt")
    command.add_argument("--json", help="file to write the numbers to, every prompt's included")
    return parser


if __name__ == "__main__":
    prepare_streams()
    sys.exit(main(sys.argv[1:]))
