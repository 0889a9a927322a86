"""The package as it is shipped: what wheel and sdist hold, that a wheel alone works, and the files of the container."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tomllib
import zipfile
from pathlib import Path
from types import ModuleType

import pytest
import yaml
from packaging.requirements import Requirement

import hf_freeze
from tests.recipes.scripts import load_script

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
LEFT_OUT = shutil.ignore_patterns(
    ".git", ".venv", "__pycache__", "*.egg-info", "build", "dist", "out", ".*_cache", ".hypothesis"
)


def script(name: str) -> ModuleType:
    """A file of scripts/ as a module."""
    return load_script(ROOT / "scripts" / f"{name}.py")


def build(kind: str, source: Path, target: Path) -> Path:
    """Builds in a copy: setuptools writes into the tree that it builds."""
    code = f"from setuptools import build_meta; print(build_meta.build_{kind}({str(target)!r}))"
    done = subprocess.run([sys.executable, "-c", code], cwd=source, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return target / done.stdout.splitlines()[-1]


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The sdist, and the wheel that is built from it alone."""
    folder = tmp_path_factory.mktemp("built")
    shutil.copytree(ROOT, folder / "tree", ignore=LEFT_OUT, symlinks=True)
    sdist = build("sdist", folder / "tree", folder)
    with tarfile.open(sdist) as archive:
        archive.extractall(folder / "unpacked", filter="data")
    (unpacked,) = (folder / "unpacked").iterdir()
    return sdist, build("wheel", unpacked, folder)


def test_the_wheel_holds_the_package_its_types_reviews_and_templates_and_nothing_else(built: tuple[Path, Path]) -> None:
    names = set(zipfile.ZipFile(built[1]).namelist())
    assert {name.split("/")[0] for name in names} == {"hf_freeze", f"hf_freeze-{PROJECT['version']}.dist-info"}
    assert "hf_freeze/py.typed" in names
    for folder in ("summarization/data/shipped_reviews", "templates"):
        data = {f"hf_freeze/{folder}/{path.name}" for path in (ROOT / "hf_freeze" / folder).iterdir() if path.is_file()}
        assert data
        assert data <= names
    modules = {path.relative_to(ROOT).as_posix() for path in (ROOT / "hf_freeze").rglob("*.py")}
    assert modules == {name for name in names if name.endswith(".py")}
    assert any(name.endswith("/LICENSE") for name in names)


def test_the_sdist_holds_what_its_tests_and_recipes_need(built: tuple[Path, Path]) -> None:
    with tarfile.open(built[0]) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    wanted = {"README.md", "CHANGELOG.md", "CONTRIBUTING.md", "LICENSE", "Makefile", "Dockerfile", ".dockerignore"}
    assert wanted | {"constraints.txt", "accelerate_config.yaml", "scripts/run_docker_steps.py"} <= names
    for folder in ("tests", "recipes"):
        files = {path.relative_to(ROOT).as_posix() for path in (ROOT / folder).rglob("*.py")}
        assert files <= names
    assert not [name for name in names if "__pycache__" in name]


def test_the_metadata_has_the_license_and_extras_only_for_what_is_optional(built: tuple[Path, Path]) -> None:
    wheel = zipfile.ZipFile(built[1])
    text = wheel.read(f"hf_freeze-{PROJECT['version']}.dist-info/METADATA").decode()
    assert "License-Expression: Apache-2.0" in text
    assert set(re.findall(r"^Provides-Extra: (.+)$", text, re.MULTILINE)) == {"plots", "notebooks", "dev"}
    needed = {Requirement(line).name.lower().replace("_", "-") for line in PROJECT["dependencies"]}
    assert {"torch", "transformers", "accelerate", "datasets", "evaluate", "peft"} <= needed


SMOKE = """
import torch
from transformers import LlamaConfig, LlamaForCausalLM
import hf_freeze
from hf_freeze import FreezePlan, freeze, verify_frozen
from hf_freeze.pages import render_page
from hf_freeze.summarization import shipped_reviews
print(hf_freeze.__file__)
sizes = {"vocab_size": 64, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2}
model = LlamaForCausalLM(LlamaConfig(**sizes))
report = freeze(model, FreezePlan(decoder_blocks=2))
ids = torch.arange(8)[None]
model(input_ids=ids, labels=ids).loss.backward()
torch.optim.SGD(model.parameters(), lr=0.1).step()
print(verify_frozen(model, report))
print(len(shipped_reviews()["test"].dataset) > 0)
print("<h1>" in render_page("layers.html", title="", texts="", pictures=[]))
"""


@pytest.mark.slow
def test_the_wheel_alone_freezes_reads_its_reviews_and_tells_its_version(
    built: tuple[Path, Path], tmp_path: Path
) -> None:
    place = tmp_path / "venv"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(place)], check=True)
    python = str(place / "bin" / "python")
    pip = [sys.executable, "-m", "pip", "--python", python, "install", "--no-deps", "--no-index", str(built[1])]
    subprocess.run(pip, check=True, capture_output=True)
    # Dependencies come from this environment; a .pth file in a folder that a .pth file names is not read, so this
    # checkout, which is installed there in editable mode, is not seen.
    (site,) = place.glob("lib/python*/site-packages")
    (site / "dependencies.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    env |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}

    def run(*command: str) -> str:
        done = subprocess.run([python, *command], cwd=tmp_path, env=env, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr[-3000:]
        return done.stdout

    told = run("-c", SMOKE).splitlines()
    assert Path(told[0]).is_relative_to(place)
    assert "unchanged" in told[1]
    assert told[2:] == ["True", "True"]
    assert run("-m", "hf_freeze.cli", "--version").strip() == f"hf-freeze {PROJECT['version']}"


# ------------------------------------------------------------------------------------------------------------- versions


def test_one_version_everywhere() -> None:
    assert hf_freeze.__version__ == PROJECT["version"]
    first = re.search(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert first
    assert first[1] == PROJECT["version"]


def test_the_pinned_versions_are_within_the_bounds_and_every_dependency_has_a_lower_one() -> None:
    pinned = dict(
        line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines() if line and line[0] != "#"
    )
    optional = [line for lines in PROJECT["optional-dependencies"].values() for line in lines]
    for line in [*PROJECT["dependencies"], *optional]:
        requirement = Requirement(line)
        if requirement.name == PROJECT["name"]:
            continue
        assert any(each.operator == ">=" for each in requirement.specifier), line
        if requirement.name in pinned:
            assert requirement.specifier.contains(pinned[requirement.name]), line
    names = {Requirement(line).name for line in PROJECT["dependencies"]}
    left = names - pinned.keys()
    assert left <= {"filelock"}, f"not in constraints.txt: {left}"


def test_lower_bounds_are_read_and_others_may_be_given() -> None:
    chosen = script("check_versions").chosen_versions
    assert chosen("lowest", ["torch>=2.6", "rich>=13,<20"], {"torch": "2.13.0"}) == ["torch==2.13.0", "rich==13"]
    assert chosen("default", ["torch>=2.6", "rich>=13,<20"], {"torch": "2.13.0"}) == ["torch==2.13.0"]
    with pytest.raises(SystemExit, match=r"--at touch: no dependency\. These are: torch"):
        chosen("default", ["torch>=2.6"], {"touch": "1"})
    assert len(chosen("lowest", PROJECT["dependencies"], {})) == len(PROJECT["dependencies"])


def test_the_hooks_of_pre_commit_are_the_tools_of_this_environment() -> None:
    (local,) = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    assert local["repo"] == "local"
    assert [hook["id"] for hook in local["hooks"]] == ["ruff", "ruff-format", "mypy"]
    assert all(hook["entry"].startswith(".venv/bin/") for hook in local["hooks"])


# ------------------------------------------------------------------------------------------------------------ container


def test_the_image_runs_the_demo_as_an_ordinary_user_from_pinned_versions() -> None:
    steps = script("run_docker_steps").parse((ROOT / "Dockerfile").read_text())
    names = [name for name, _ in steps]
    values = dict(steps)
    assert names.index("FROM") == 1
    assert values["FROM"].endswith("-slim")
    assert values["USER"] not in ("root", "0")
    assert names.index("USER") < names.index("CMD")
    assert values["CMD"] == '["accelerate", "launch", "/app/recipes/summarize_reviews.py"]'
    assert values["VOLUME"] == "/data"
    assert "HF_HOME=/data/" in values["ENV"]
    assert "HF_FREEZE_CACHE=/data/" in values["ENV"]
    installs = [part for name, rest in steps if name == "RUN" for part in rest.split("&&") if "pip install" in part]
    assert installs
    assert all("-c constraints.txt" in part or "==" in part for part in installs)
    assert {name: rest for name, rest in steps if name == "ARG"}


def test_the_image_sees_what_it_copies_and_nothing_of_git_tests_or_runs(tmp_path: Path) -> None:
    steps = script("run_docker_steps")
    files = steps.context_files(ROOT)
    tops = {path.parts[0] for path in files}
    assert tops == {
        "LICENSE", "README.md", "accelerate_config.yaml", "constraints.txt", "hf_freeze", "pyproject.toml", "recipes",
    }  # fmt: skip
    assert not [path for path in files if "__pycache__" in path.parts]
    copied = [rest.split()[:-1] for name, rest in steps.parse((ROOT / "Dockerfile").read_text()) if name == "COPY"]
    for source in (name for names in copied for name in names):
        assert any(path == Path(source) or Path(source) in path.parents for path in files), source
    (tmp_path / "a").mkdir()
    for name in ("a/kept.py", "a/left.log", "b.txt", ".secret"):
        (tmp_path / name).write_text("")
    (tmp_path / ".dockerignore").write_text("*\n!a\n**/*.log\n")
    assert steps.context_files(tmp_path) == [Path("a/kept.py")]


def test_an_instruction_that_the_script_does_not_know_is_refused() -> None:
    steps = script("run_docker_steps")
    assert steps.parse("# a\nFROM x\nRUN a && \\\n    b\n") == [("FROM", "x"), ("RUN", "a &&  b")]
    with pytest.raises(SystemExit, match=r"the Dockerfile has ADD x /; this script knows ARG, FROM"):
        steps.parse("FROM x\nADD x /\n")
    assert steps.fill("$A/${B}/$C", {"A": "1", "B": "2"}) == "1/2/"


def test_people_of_this_machine_are_not_in_the_image(tmp_path: Path) -> None:
    (tmp_path / "passwd").write_text(
        "root:x:0:0::/root:/bin/sh\nann:x:1000:1000::/home/ann:/bin/sh\nnobody:x:65534:1::/:/x\n"
    )
    (tmp_path / "group").write_text("root:x:0:\nann:x:1000:\n")
    (tmp_path / "shadow").write_text("root:*:1\nann:secret:1\n")
    script("run_docker_steps").drop_people(tmp_path)
    assert "ann" not in "".join(path.read_text() for path in tmp_path.iterdir())
    assert "nobody" in (tmp_path / "passwd").read_text()
