"""Starts commands of several processes, and fails closed."""

import contextlib
import os
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import IO

import psutil


ROOT = Path(__file__).parents[2]
IMPORTABLE = (ROOT, ROOT / "tests", ROOT / "tests" / "engines", ROOT / "benchmarks")  # as in pyproject.toml
POLL_SECONDS = 0.2


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def environment(**extra: str) -> dict[str, str]:
    """The environment of a launched process: this Python's own commands first, the project and helpers importable."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    pythonpath = os.pathsep.join([*map(str, IMPORTABLE), *filter(None, [os.environ.get("PYTHONPATH")])])
    # What DeepSpeed compiles: in a shared cache, a build that was killed leaves a lock that all later ones wait for.
    extensions = str(Path(sys.prefix) / "torch_extensions")
    own = {"PATH": path, "PYTHONPATH": pythonpath, "TORCH_EXTENSIONS_DIR": extensions, "DS_ACCELERATOR": "cpu"}
    return {**os.environ, **own, **extra}


def launch(command: list[str], timeout: float, **extra: str) -> str:
    """What the command printed, run from the repository's root; `extra` is added to its environment."""
    return launch_together([command], timeout, **extra)[0]


def torchrun(script: str | Path, *args: object, ranks: int, timeout: float, **extra: str) -> str:
    """Return what the script printed on all ranks, as `launch`."""
    command = ["torchrun", f"--nproc_per_node={ranks}", f"--master_port={free_port()}", str(script), *map(str, args)]
    return launch(command, timeout, **extra)


def launch_together(commands: list[list[str]], timeout: float, **extra: str) -> list[str]:
    """
    What each command printed. The first that ends with a non-zero exit or by a signal, and running past the limit, is
    an AssertionError with the end of all that was printed. No process that they started is left behind.
    """
    with contextlib.ExitStack() as stack:
        # Not pipes: nobody would read the one while the other is waited for.
        files = [stack.enter_context(tempfile.TemporaryFile()) for _ in commands]
        processes: list[subprocess.Popen] = []
        family: set[psutil.Process] = set()
        stack.callback(_end, processes, family)
        for command, file in zip(commands, files, strict=True):
            processes.append(_start(command, file, environment(**extra)))
        deadline = time.monotonic() + timeout
        while None in (codes := {process.poll() for process in processes}) and codes <= {None, 0}:
            family |= {relative for process in processes for relative in _descendants(process)}
            if time.monotonic() > deadline:
                raise AssertionError(f"ran past {timeout} s\n{_report(processes, files)}")
            time.sleep(POLL_SECONDS)
        assert codes == {0}, f"failed\n{_report(processes, files)}"
        return [_printed(file) for file in files]


def _start(command: list[str], file: IO[bytes], env: dict[str, str]) -> subprocess.Popen:
    return subprocess.Popen(command, cwd=ROOT, env=env, stdout=file, stderr=subprocess.STDOUT, start_new_session=True)


def _descendants(process: subprocess.Popen) -> list[psutil.Process]:
    try:
        return psutil.Process(process.pid).children(recursive=True)
    except psutil.NoSuchProcess:
        return []


def _end(processes: list[subprocess.Popen], family: set[psutil.Process]) -> None:
    # Not by process group: torchrun makes each of its workers the leader of a session of its own.
    family |= {relative for process in processes for relative in _descendants(process)}
    for process in processes:
        process.kill()
        process.wait()
    for relative in family:
        with contextlib.suppress(psutil.NoSuchProcess):
            relative.kill()


def _report(processes: list[subprocess.Popen], files: list[IO[bytes]]) -> str:
    parts = [f"{p.args}: exit {p.poll()}\n{_printed(file)[-6000:]}" for p, file in zip(processes, files, strict=True)]
    return "\n".join(parts)


def _printed(file: IO[bytes]) -> str:
    # Without seeking: the process that writes shares the position.
    return os.pread(file.fileno(), os.fstat(file.fileno()).st_size, 0).decode(errors="replace")
