"""Runs the steps of the Dockerfile one by one where there is no Docker, in an empty root with a clean environment.

    python scripts/run_docker_steps.py
        all steps, then the default command; Linux, as root
    python scripts/run_docker_steps.py --bind /srv/wheels --pass PIP_FIND_LINKS --command-arguments="--max_steps 4"
        with a folder and a variable of this machine, and a shorter command
    python scripts/run_docker_steps.py --root /tmp/image --keep
        leaves what was made, to be looked at

What it does: ARG, ENV, WORKDIR, COPY (through .dockerignore), RUN, USER and CMD, under a root in a mount namespace of
its own that holds only this machine's /usr and /etc, the Python that runs this script, and what earlier steps made. The
default command runs as the Dockerfile's user. What it does not do: pull the base image (this machine's system stands in
for it), keep layers, publish, or give a GPU. A Dockerfile with any other instruction is refused.
"""

import argparse
import fnmatch
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

KNOWN = ("ARG", "FROM", "ENV", "WORKDIR", "RUN", "COPY", "USER", "VOLUME", "CMD")
PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("context", nargs="?", default=".", help="the folder with Dockerfile and .dockerignore")
    parser.add_argument("--build-arg", action="append", default=[], metavar="NAME=VALUE", help="as for docker build")
    parser.add_argument("--bind", action="append", default=[], help="a folder of this machine to see inside, read-only")
    parser.add_argument("--pass", action="append", default=[], dest="passed", help="a variable of this machine")
    parser.add_argument("--root", help="an empty folder to build in; none: a temporary one")
    parser.add_argument("--keep", action="store_true", help="leave the root there")
    parser.add_argument("--command", help="what to run at the end instead of CMD")
    parser.add_argument("--command-arguments", default="", help="put behind the command that runs at the end")
    parser.add_argument("--inside", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.inside:  # in a mount namespace of its own: what is mounted now is gone when this ends
        run_steps(args, Path(args.root))
        return
    if os.geteuid() != 0:
        sys.exit("error: run_docker_steps.py was started by an ordinary user; mounting needs root, as Docker does.")
    root = Path(args.root or tempfile.mkdtemp(prefix="docker_steps_"))
    root.mkdir(parents=True, exist_ok=True)
    if any(root.iterdir()):
        sys.exit(f"error: --root {root} was asked for; it is not empty. Choose another folder.")
    own = [sys.executable, os.path.abspath(__file__), *sys.argv[1:], "--inside", "--root", str(root)]
    try:
        done = subprocess.run(["unshare", "--mount", "--pid", "--fork", "--kill-child", *own], check=False)
    finally:
        if not args.keep:
            shutil.rmtree(root)
    sys.exit(done.returncode)


def parse(text: str) -> list[tuple[str, str]]:
    """The instructions of a Dockerfile, continued lines joined."""
    lines = [line for line in text.splitlines() if line.strip() and not line.lstrip().startswith("#")]
    joined = re.sub(r"\\\n\s*", " ", "\n".join(lines))
    steps = [(line.split(None, 1)[0].upper(), line.split(None, 1)[1].strip()) for line in joined.splitlines()]
    for name, rest in steps:
        if name not in KNOWN:
            raise SystemExit(f"error: the Dockerfile has {name} {rest}; this script knows {', '.join(KNOWN)} only.")
    return steps


def context_files(context: Path) -> list[Path]:
    """Files that Docker would see, relative to the context: the last pattern of .dockerignore that fits decides."""
    ignore = context / ".dockerignore"
    lines = ignore.read_text().splitlines() if ignore.exists() else []
    rules = [(line.lstrip("!"), line.startswith("!")) for line in map(str.strip, lines) if line and line[0] != "#"]

    def seen(path: Path) -> bool:
        names = [path.as_posix(), *(parent.as_posix() for parent in path.parents if parent != Path())]
        kept = True
        for pattern, keep in rules:
            anywhere = pattern.removeprefix("**/")
            if any(
                fnmatch.fnmatch(Path(name).name, anywhere) if anywhere != pattern else
                fnmatch.fnmatch(name, pattern) and name.count("/") == pattern.count("/")
                for name in names
            ):  # fmt: skip
                kept = keep
        return kept

    found = []
    for folder, folders, files in os.walk(context):
        here = Path(folder).relative_to(context)
        folders[:] = [name for name in folders if here != Path() or name not in (".git", ".venv")]  # long to walk
        found += [here / name for name in files if seen(here / name)]
    return sorted(found)


def fill(text: str, values: dict[str, str]) -> str:
    """Puts values in for $NAME and ${NAME}, as Docker does outside of RUN."""
    return re.sub(r"\$(?:\{(\w+)\}|(\w+))", lambda found: values.get(found[1] or found[2], ""), text)


def run_steps(args: argparse.Namespace, root: Path) -> None:
    context = Path(args.context).resolve()
    steps = parse((context / "Dockerfile").read_text())
    given = dict(pair.split("=", 1) for pair in args.build_arg)
    files = context_files(context)
    make_root(root, args.bind)
    arguments = {name: os.environ[name] for name in args.passed if name in os.environ}  # of RUN, as ARG is
    environment, place, user, command = {"PATH": f"{sys.base_prefix}/bin:{PATH}"}, "/", "root", []
    for name, rest in steps:
        started = time.perf_counter()
        if name == "ARG":
            key, _, value = rest.partition("=")
            arguments[key] = given.get(key, value.strip('"'))
        elif name == "ENV":
            for pair in shlex.split(rest):
                key, value = pair.split("=", 1)
                environment[key] = fill(value, environment | arguments)
        elif name == "WORKDIR":
            place = os.path.join(place, fill(rest, environment))
            (root / place.lstrip("/")).mkdir(parents=True, exist_ok=True)
        elif name == "COPY":
            copy(context, files, root / place.lstrip("/"), shlex.split(rest))
        elif name == "USER":
            user = rest
        elif name == "CMD":
            command = json.loads(rest) if rest.startswith("[") else ["/bin/sh", "-c", rest]
        elif name == "RUN":
            run(root, ["/bin/sh", "-c", rest], environment | arguments, place, user)
        told = "skipped: this machine's system" if name == "FROM" else f"{time.perf_counter() - started:.1f} s"
        print(f"ok  {name} {rest}  ({told})", flush=True)
    command = shlex.split(args.command) if args.command else command
    started = time.perf_counter()
    run(root, [*command, *shlex.split(args.command_arguments)], environment, place, user)
    print(f"ok  as {user}: {shlex.join(command)} {args.command_arguments}  ({time.perf_counter() - started:.1f} s)")


def make_root(root: Path, binds: list[str]) -> None:
    """An empty system: this machine's programs and a copy of its settings, nobody's files."""
    for name in ("bin", "sbin", "lib", "lib32", "lib64", "libx32"):
        outside = Path("/", name)
        if outside.is_symlink():
            (root / name).symlink_to(os.readlink(outside))
        elif outside.is_dir():
            mount(outside, root / name)
    mount(Path("/usr"), root / "usr")
    shutil.copytree("/etc", root / "etc", symlinks=True)
    drop_people(root / "etc")
    for folder in dict.fromkeys([sys.base_prefix, *binds]):
        if not folder.startswith("/usr/"):
            mount(Path(folder), root / folder.lstrip("/"))
    for name, mode in (("tmp", 0o1777), ("var/tmp", 0o1777), ("root", 0o755), ("home", 0o755), ("opt", 0o755)):
        (root / name).mkdir(parents=True, exist_ok=True)
        (root / name).chmod(mode)
    for name in ("proc", "dev"):
        (root / name).mkdir()
    subprocess.run(["mount", "-t", "proc", "proc", str(root / "proc")], check=True)
    subprocess.run(["mount", "--rbind", "/dev", str(root / "dev")], check=True)


def drop_people(etc: Path) -> None:
    """Leaves the accounts of the system only, as a base image has them: this machine's people may hold a wanted id."""
    people = set()
    for name in ("passwd", "group"):
        lines = (etc / name).read_text().splitlines()
        people |= {line.split(":")[0] for line in lines if 1000 <= int(line.split(":")[2]) < 65534}
    for name in ("passwd", "group", "shadow", "gshadow"):
        path = etc / name
        if path.exists():
            lines = path.read_text().splitlines()
            path.write_text("".join(f"{line}\n" for line in lines if line.split(":")[0] not in people))


def mount(outside: Path, inside: Path) -> None:
    inside.mkdir(parents=True, exist_ok=True)
    subprocess.run(["mount", "--bind", str(outside), str(inside)], check=True)
    subprocess.run(["mount", "-o", "remount,ro,bind", str(inside)], check=True)


def copy(context: Path, files: list[Path], place: Path, names: list[str]) -> None:
    """COPY a b target/ and COPY folder target."""
    *sources, target = names
    for source in sources:
        found = [path for path in files if path == Path(source) or Path(source) in path.parents]
        if not found:
            raise SystemExit(f"error: COPY {source}: there is no such file, or .dockerignore leaves it out.")
        for path in found:
            inner = path.relative_to(source) if path != Path(source) else Path(path.name)
            to = place / target / inner
            to.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(context / path, to)


def run(root: Path, command: list[str], environment: dict[str, str], place: str, user: str) -> None:
    """Runs a command in the root as a user, in namespaces that end with it; a failure ends the script."""
    accounts = dict(line.split(":", 1) for line in (root / "etc/passwd").read_text().splitlines())
    home = accounts[user].split(":")[4]
    inner = f"cd {shlex.quote(place)} && exec {shlex.join(command)}"
    changed = ["chroot", f"--userspec={user}", str(root), "/bin/sh", "-c", inner]
    done = subprocess.run(changed, env={"HOME": home, **environment}, stdin=subprocess.DEVNULL, check=False)
    if done.returncode:
        raise SystemExit(f"error: as {user}, in {place}: {shlex.join(command)} ended with {done.returncode}.")


if __name__ == "__main__":
    main()
