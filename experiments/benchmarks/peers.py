"""Builds the interpreters of the peers, at the versions that the tables name, and says how to name them to the benchmarks.

python -m experiments.benchmarks.peers FOLDER
"""

import subprocess
import sys
import venv
from pathlib import Path

TORCH = "https://download.pytorch.org/whl/cpu"
PEERS = {
    "trl": [["torch==2.13.0", "--index-url", TORCH], ["transformers==5.23.0", "trl==1.16.0"]],
    "tunix": [["google-tunix==0.1.7", "jax==0.10.2", "flax==0.12.8"]],
}


def build(folder: Path) -> list[str]:
    """Builds what is not there yet; lines for a shell."""
    lines = []
    for name, installs in PEERS.items():
        home = folder / name
        python = home / "bin" / "python"
        done = home / "complete"  # an interrupted installation leaves an interpreter that cannot do the work
        if not done.exists():
            venv.create(home, clear=True, with_pip=True)
            for packages in installs:
                subprocess.run([python, "-m", "pip", "install", *packages], check=True)
            done.touch()
        lines.append(f"export GRPO_JAX_{name.upper()}_PYTHON={python}")
    return lines


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python -m experiments.benchmarks.peers FOLDER")
    print("\n".join(build(Path(sys.argv[1]).resolve())))
