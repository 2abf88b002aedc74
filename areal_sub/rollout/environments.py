"""From `rollout.openai.agent_env` to an environment that is there: found as it is, or built once.

    a folder with bin/python     a virtual (or conda) environment, as it is
    an executable                an interpreter, as it is
    *.txt                        requirements, installed by pip into an environment of ours
    pylock.toml, pylock.*.toml   a lock (PEP 751), likewise: exactly what it names, hashes checked
    a folder with package.json   `npm ci` (`npm install` without a lock) into a folder of ours;
                                 with a `node_modules` of its own, as it is

What is built lies in the user's cache, under a key of the content, the interpreter and the machine,
and is used by all runs. Invariants: a folder counts only once its mark is there, which is written
last; one process builds it, others wait for the lock; all waits have the deadline of the caller.
Called by the trainer, before anything else of a run is started, with the user's own rights and
settings: pip and npm find their indexes as they do for the user.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import platform
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from areal_sub.errors import WorkflowError
from areal_sub.rollout.interpreters import ASK_TIMEOUT_S, ask, find_python, output_of, python_in
from areal_sub.rollout.requirements import local_files, requirements_of_lock

Say = Callable[[str], None]

LOCK_POLL_S = 0.2
MAX_SHOWN_LINES = 15
_MARK = ".complete"


@dataclass(frozen=True, slots=True, kw_only=True)
class Environment:
    """Where an agent runs."""

    python: str = ""  # the interpreter; "": our own
    programs: tuple[str, ...] = ()  # folders to put in front of PATH
    readable: tuple[str, ...] = ()  # folders that it needs
    env: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class _Wanted:
    """What to build: `files` are written into the folder first; `steps` then run, in order."""

    key: str
    label: str
    steps: Callable[[Path], list[list[str]]]
    files: Mapping[str, bytes] = field(default_factory=dict)
    cwd: Path | None = None


def cache_folder(environ: Mapping[str, str]) -> Path:
    base = environ.get("XDG_CACHE_HOME", "")
    return (Path(base) if base.startswith("/") else Path.home() / ".cache") / "areal-sub"


def prepare(
    agent_env: str | None, agent_python: str | None, *, cache: Path, timeout_s: float, say: Say
) -> Environment:
    """Find or build it. Raises `WorkflowError` with the last lines of what failed."""
    if agent_env is None:
        if agent_python is not None:
            return _of_interpreter(find_python(agent_python), agent_python)
        return Environment()
    path = Path.cwd() / Path(agent_env).expanduser()
    builder = _Builder(cache / "environments", time.monotonic() + timeout_s, timeout_s, say)
    if path.is_dir() and (path / "package.json").is_file():
        return _node(path, builder)
    if path.is_dir() and (python := python_in(path)) is not None:
        return _of_interpreter(python, agent_env)
    if path.is_file() and os.access(path, os.X_OK) and path.suffix not in (".txt", ".toml"):
        return _of_interpreter(path, agent_env)
    if path.is_file() and (path.suffix == ".txt" or _is_lock(path)):
        return _of_requirements(path, agent_python, builder)
    what = "holds neither bin/python nor package.json" if path.is_dir() else "is none of these"
    raise WorkflowError(
        f"rollout.openai.agent_env={agent_env}: {path} "
        + (what if path.exists() else "is not there")
        + "; give a virtual environment's folder, an interpreter, a requirements file (*.txt), a "
        "lock (pylock.toml), or a folder with a package.json"
    )


def own_environment() -> Environment:
    """Our own, for a program: where `python` is the interpreter that this process runs in."""
    return replace(_of_interpreter(Path(sys.executable), sys.executable), python="")


def _of_interpreter(python: Path, given: str) -> Environment:
    _, base_prefix, implementation = ask(python, given)
    if implementation != "cpython":
        raise WorkflowError(f"{given}: {python} is {implementation}; agents need CPython")
    prefix = python.parent.parent
    is_virtual = (prefix / "pyvenv.cfg").is_file()
    # The sandbox shows an interpreter its own folders; programs that use it need them, too.
    readable = [str(prefix), base_prefix] if is_virtual else [base_prefix]
    env = {"VIRTUAL_ENV": str(prefix)} if is_virtual else {}
    for packages in prefix.glob("lib/python3*/site-packages"):
        # Without it tiktoken fetches its vocabularies from the internet. LiteLLM brings them.
        tokenizers = packages / "litellm" / "litellm_core_utils" / "tokenizers"
        if tokenizers.is_dir():
            env["TIKTOKEN_CACHE_DIR"] = str(tokenizers)
    return Environment(
        python=str(python), programs=(str(python.parent),), readable=tuple(readable), env=env
    )


def _of_requirements(path: Path, agent_python: str | None, builder: _Builder) -> Environment:
    base = find_python(agent_python) if agent_python else Path(sys.executable)
    version, base_prefix, _ = ask(base, agent_python or str(base))
    content = _read(path)
    if _is_lock(path):
        requirements, options = requirements_of_lock(content, path), ["--no-deps"]
    else:
        requirements, options = content, []
    number = version.split()[0]
    # Under its own name in its own folder, so that what it refers to is found.
    named = str(path) if not options else "requirements.txt"

    def steps(folder: Path) -> list[list[str]]:
        pip = [str(folder / "bin" / "python"), "-I", "-m", "pip", "--disable-pip-version-check"]
        install = [*pip, "install", "--no-input", "--progress-bar", "off", *options]
        requirements_file = named if not options else str(folder / named)
        return [
            [str(base), "-I", "-m", "venv", str(folder)],
            [*install, "-r", requirements_file],
        ]

    wanted = _Wanted(
        key=_digest("python", version, base_prefix, str(base), requirements, *local_files(path)),
        label=f"{path} for Python {number}",
        steps=steps,
        files={} if not options else {named: requirements},
        cwd=path.parent,
    )
    return _of_interpreter(builder.build(wanted) / "bin" / "python", str(path))


def _node(path: Path, builder: _Builder) -> Environment:
    if (path / "node_modules").is_dir():
        return _of_node_modules(path)
    npm = shutil.which("npm")
    if npm is None:
        raise WorkflowError(
            f"rollout.openai.agent_env: {path / 'package.json'} needs npm, which is not on the PATH"
        )
    files = {"package.json": _read(path / "package.json")}
    if (path / "package-lock.json").is_file():
        files["package-lock.json"] = _read(path / "package-lock.json")
    command = "ci" if "package-lock.json" in files else "install"
    # No scripts: they are code of strangers, and nothing confines it here. Who needs them runs
    # npm, and names the folder that then has a node_modules.
    quiet = ["--ignore-scripts", "--no-audit", "--no-fund", "--no-update-notifier"]
    wanted = _Wanted(
        key=_digest("node", output_of([npm, "--version"], npm), *files.values()),
        label=f"{path / 'package.json'}",
        steps=lambda folder: [[npm, command, *quiet, "--prefix", str(folder)]],
        files=files,
    )
    return _of_node_modules(builder.build(wanted))


def _of_node_modules(folder: Path) -> Environment:
    modules = folder / "node_modules"
    return Environment(
        programs=(str(modules / ".bin"),),
        readable=(str(folder),),
        env={"NODE_PATH": str(modules), **_node_options()},
    )


def _node_options() -> dict[str, str]:
    """Node's own HTTP parser is WebAssembly, for which V8 reserves 10 GB of address space as a
    guard: more than a child may have. Checks in the code do instead, where this Node knows them."""
    env = {"NODE_OPTIONS": "--disable-wasm-trap-handler"}
    node = shutil.which("node")
    if node is None:
        return {}
    try:
        asked = subprocess.run(
            [node, "--version"],
            env={**os.environ, **env},
            capture_output=True,
            stdin=subprocess.DEVNULL,
            timeout=ASK_TIMEOUT_S,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise WorkflowError(f"rollout.openai.agent_env: {node} cannot be used: {error}") from None
    return env if asked.returncode == 0 else {}


class _Builder:
    """Builds into `root`, until a moment."""

    def __init__(self, root: Path, deadline: float, timeout_s: float, say: Say) -> None:
        self._root = root
        self._deadline = deadline
        self._timeout_s = timeout_s
        self._say = say

    def build(self, wanted: _Wanted) -> Path:
        """The folder, complete. Raises `WorkflowError`."""
        folder = self._root / wanted.key
        if (folder / _MARK).is_file():
            return folder
        self._root.mkdir(mode=0o755, parents=True, exist_ok=True)
        with self._locked(wanted):
            if (folder / _MARK).is_file():  # built by whom we waited for
                return folder
            started_at = time.monotonic()
            log = self._root / f"{wanted.key}.log"
            self._say(f"building the agents' environment from {wanted.label} (log: {log})")
            shutil.rmtree(folder, ignore_errors=True)  # what a crash has left
            try:
                self._run_steps(wanted, folder, log)
            except BaseException:
                shutil.rmtree(folder, ignore_errors=True)
                raise
            (folder / _MARK).write_text(f"{wanted.label}\n")
            self._say(f"built in {time.monotonic() - started_at:.0f} s: {folder}")
        return folder

    def _run_steps(self, wanted: _Wanted, folder: Path, log: Path) -> None:
        with log.open("w", encoding="utf-8") as output:
            for number, step in enumerate(wanted.steps(folder)):
                if number == 0:
                    folder.mkdir()
                    folder.chmod(0o755)  # agents may run as another user
                for name, content in wanted.files.items():
                    (folder / name).write_bytes(content)
                output.write(f"$ {' '.join(step)}\n")
                output.flush()
                code = self._run(step, wanted.cwd or folder, output.fileno())
                if code == 0:
                    continue
                ended = (
                    f"ended with code {code}"
                    if code is not None
                    else (
                        f"did not end within {self._timeout_s:g} s"
                        " (rollout.openai.agent_env_timeout_s)"
                    )
                )
                lines = log.read_text(encoding="utf-8", errors="replace").rstrip().split("\n")
                tail = "\n  ".join(lines[-MAX_SHOWN_LINES:])
                raise WorkflowError(
                    f"rollout.openai.agent_env: {wanted.label} cannot be installed: "
                    f"{_name_of(step)} {ended}:\n  {tail}\nall of it: {log}"
                )

    def _run(self, step: Sequence[str], cwd: Path, output: int) -> int | None:
        """The exit code; None where the time was up."""
        try:
            process = subprocess.Popen(
                step,
                cwd=cwd,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                umask=0o022,
                start_new_session=True,
            )
        except OSError as error:
            raise WorkflowError(f"rollout.openai.agent_env: {step[0]}: {error.strerror}") from None
        try:
            return process.wait(timeout=max(0.0, self._deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            return None
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()

    @contextlib.contextmanager
    def _locked(self, wanted: _Wanted) -> Iterator[None]:
        """flock, so that a builder that dies holds up nobody."""
        path = self._root / f"{wanted.key}.lock"
        told = False
        with path.open("w") as file:
            while True:
                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError:
                    pass
                if not told:
                    self._say(f"waiting for another run, which builds {wanted.label}")
                    told = True
                if time.monotonic() > self._deadline:
                    raise WorkflowError(
                        f"rollout.openai.agent_env: another process has been building "
                        f"{wanted.label} for {self._timeout_s:g} s (it holds {path})"
                    )
                time.sleep(LOCK_POLL_S)
            yield


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise WorkflowError(f"rollout.openai.agent_env: {path}: {error.strerror}") from None


def _is_lock(path: Path) -> bool:
    return path.suffix == ".toml" and (path.name == "pylock.toml" or path.name[:7] == "pylock.")


def _name_of(step: Sequence[str]) -> str:
    words = [word for word in step[1:4] if not word.startswith("-")]
    return " ".join([Path(step[0]).name, *words[:1]])


def _digest(*parts: Any) -> str:
    digest = hashlib.sha256()
    for part in (platform.machine(), *parts):
        raw = part if isinstance(part, bytes) else str(part).encode()
        digest.update(len(raw).to_bytes(8, "little") + raw)
    return digest.hexdigest()[:24]
