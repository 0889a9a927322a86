"""Installs every dependency at the lower bound that pyproject.toml states, and runs a part of the tests there.

    python scripts/check_lower_bounds.py
        a new virtual environment in a temporary folder; needs a package index
    python scripts/check_lower_bounds.py --at torch=2.13.0 --at peft=0.18.0
        the same with other versions of some packages, to find a bound that holds
    python scripts/check_lower_bounds.py --folder /tmp/bounds --tests tests/test_plan.py
        in a folder that stays, with tests of your choice

The upper end is constraints.txt, the versions that `make test` installs and runs everything with. On Linux an old torch
brings a CUDA build of several gigabytes; --at torch=VERSION takes one that is at hand.
"""

import argparse
import re
import shlex
import subprocess
import sys
import tempfile
import tomllib
from pathlib import Path

ROOT = Path(__file__).parent.parent
TESTS = (
    "tests/test_plan.py", "tests/test_freezing.py", "tests/test_adapters.py", "tests/test_prefix_training.py",
    "tests/test_delta.py", "tests/test_rouge.py", "tests/test_reviews.py", "tests/test_card.py",
)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--at", action="append", default=[], metavar="NAME=VERSION", help="instead of the bound")
    parser.add_argument("--folder", help="where the environment is made; none: a temporary folder")
    parser.add_argument("--tests", nargs="*", default=TESTS, help="what pytest runs; nothing: the install alone")
    args = parser.parse_args()
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    asked = lower_bounds(project["dependencies"], dict(pair.split("=", 1) for pair in args.at))
    print("\n".join(asked), flush=True)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(args.folder or temporary)
        step(sys.executable, "-m", "venv", str(folder))
        python = str(folder / "bin" / "python")
        step(python, "-m", "pip", "install", "--quiet", *asked, "pytest", "hypothesis", "psutil", "matplotlib")
        step(python, "-m", "pip", "install", "--quiet", "--no-deps", str(ROOT))
        if args.tests:
            step(python, "-m", "pytest", "-q", "-m", "not slow", *args.tests)


def lower_bounds(dependencies: list[str], others: dict[str, str]) -> list[str]:
    """Each dependency at its lower bound, or at the version that is given for it.

    >>> lower_bounds(["torch>=2.6", "rich>=13,<20"], {"torch": "2.13.0"})
    ['torch==2.13.0', 'rich==13']
    """
    found = {}
    for text in dependencies:
        name, bound = re.match(r"([\w.-]+)\s*>=\s*([\w.]+)", text).groups()
        found[name] = bound
    if unknown := others.keys() - found.keys():
        sys.exit(f"error: --at {', '.join(sorted(unknown))}: no dependency. These are: {', '.join(found)}.")
    return [f"{name}=={version}" for name, version in (found | others).items()]


def step(*command: str) -> None:
    print(f"$ {shlex.join(command)}", flush=True)
    if code := subprocess.run(command, cwd=ROOT, check=False).returncode:
        sys.exit(f"error: that ended with {code}. Raise the bound in pyproject.toml, or mend what fails.")


if __name__ == "__main__":
    main()
