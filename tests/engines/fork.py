"""
Runs a script, alone or as the ranks of a launch, in processes that have imported the libraries already.

A new process needs nine seconds for these imports. Here each process of pytest has a server that imports them once,
and forks. Tests of the launchers, and of what an import does, start processes of their own: launch.py.
"""

import contextlib
import multiprocessing
import os
import runpy
import signal
import sys
import tempfile
import threading
import time
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from pathlib import Path

from launch import ROOT, environment, free_port


# A fork copies one thread, so the server must have no other: conftest.py asks OpenBLAS and OpenMP for one, this asks
# pyarrow's allocator, and autograd starts its own with the first backward, which the server never calls.
os.environ.setdefault("JE_ARROW_MALLOC_CONF", "background_thread:false")
SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(
    ["pytest", "transformers.trainer", "deepspeed", "peft", "datasets", "matplotlib.pyplot", "sklearn.datasets"]
)


def fork_script(script: str | Path, *args: object, timeout: float, ranks: int = 0) -> str:
    """
    Return what the script printed, run from the repository's root: as `torchrun --nproc_per_node=ranks` would, or
    without a launcher for 0 ranks. The first process that ends with a non-zero exit or by a signal, and running past
    the limit, is an AssertionError with the end of all that was printed. No process is left behind.
    """
    size, port = str(ranks), str(free_port())
    shared = {"WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    launched = [environment(**shared, RANK=str(rank), LOCAL_RANK=str(rank)) for rank in range(ranks)]
    argv = [str(ROOT / script), *map(str, args)]
    with tempfile.NamedTemporaryFile() as file:
        processes = [SERVER.Process(target=_run, args=(argv, env, file.name)) for env in launched or [environment()]]
        try:
            codes = _exit_codes(processes, timeout)
        finally:
            _end(processes)
        printed = Path(file.name).read_text(errors="replace")
    ending = f"ran past {timeout} s" if codes <= {None, 0} else f"failed: exits {codes}"
    assert codes == {0}, f"{argv} {ending}\n{printed[-6000:]}"
    return printed


def _exit_codes(processes: list[BaseProcess], timeout: float) -> set[int | None]:
    """Return when all have ended, when one has failed, or at the limit. None stands for one that still runs."""
    for process in processes:
        process.start()  # the first one waits for the server's imports
    deadline = time.monotonic() + timeout
    while None in (codes := {process.exitcode for process in processes}) and codes <= {None, 0}:
        running = [process.sentinel for process in processes if process.exitcode is None]
        if not wait(running, max(0, deadline - time.monotonic())):
            break
    return codes


def _end(processes: list[BaseProcess]) -> None:
    for process in processes:
        if process.pid is not None:
            with contextlib.suppress(ProcessLookupError):  # it may not have made its group yet
                os.killpg(process.pid, signal.SIGKILL)  # with all that it started
            process.kill()
            process.join()


def _run(argv: list[str], env: dict[str, str], output: str) -> None:
    os.setsid()
    threading.Thread(target=_end_with_pytest, daemon=True).start()
    multiprocessing.set_start_method(None, force=True)  # else what the script starts is forked by this server too
    os.environ.clear()
    os.environ.update(env)
    os.chdir(ROOT)
    file = os.open(output, os.O_WRONLY | os.O_APPEND)
    for standard in (1, 2):
        os.dup2(file, standard)
    sys.argv = argv
    sys.path.insert(0, str(Path(argv[0]).parent))
    runpy.run_path(argv[0], run_name="__main__")


def _end_with_pytest() -> None:
    multiprocessing.parent_process().join()
    os.killpg(0, signal.SIGKILL)
