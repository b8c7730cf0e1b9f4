"""fork.py fails closed and leaves no process behind."""

import os
import signal
import subprocess
import sys
import time

import psutil
import pytest
from fork import fork_script
from launch import environment


LIMIT = 300  # for hangs: seconds that a loaded machine may need for the imports of the server

SCRIPT = """
import os, pathlib, psutil, subprocess, sys, time
started = subprocess.Popen(["sleep", "1000"])
pathlib.Path(sys.argv[2], f"{os.getpid()} {started.pid}").touch()
print("rank", os.environ.get("RANK"), "of", os.environ.get("WORLD_SIZE"), repr(sys.stdin.read()), flush=True)
print("its server has", psutil.Process(os.getppid()).num_threads(), "thread")
exec(sys.argv[1])
"""


@pytest.fixture
def script(tmp_path):
    (tmp_path / "pids").mkdir()
    (tmp_path / "script.py").write_text(SCRIPT)
    yield tmp_path / "script.py"
    pids = [int(pid) for path in (tmp_path / "pids").iterdir() for pid in path.name.split()]
    assert pids
    deadline = time.monotonic() + LIMIT
    while any(psutil.pid_exists(pid) and psutil.Process(pid).status() != "zombie" for pid in pids):
        assert time.monotonic() < deadline
        time.sleep(0.1)


def test_ranks_print(script):
    printed = fork_script(script, "", script.parent / "pids", ranks=2, timeout=LIMIT)
    assert "rank 0 of 2 ''" in printed and "rank 1 of 2 ''" in printed
    assert printed.count("its server has 1 thread") == 2


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("raise RuntimeError('told')", "told"),
        ("sys.exit(3)", "failed: exits .*3"),
        ("os.kill(os.getpid(), 9)", "failed: exits .*-9"),
        ("if os.environ['RANK'] == '0': sys.exit(5)\ntime.sleep(1000)", "failed: exits .*5"),
    ],
)
def test_failure_is_told(script, code, message):
    with pytest.raises(AssertionError, match=message):
        fork_script(script, code, script.parent / "pids", ranks=2, timeout=LIMIT)


def test_limit(script):
    with pytest.raises(AssertionError, match="ran past 10 s\nrank None of None"):
        fork_script(script, "time.sleep(1000)", script.parent / "pids", timeout=10)


def test_processes_end_with_pytest(script):
    code = "import sys; from fork import fork_script; fork_script(*sys.argv[1:], timeout=1000)"
    command = [sys.executable, "-c", code, script, "time.sleep(1000)", script.parent / "pids"]
    process = subprocess.Popen(command, env=environment())
    deadline = time.monotonic() + LIMIT
    while not os.listdir(script.parent / "pids"):
        assert time.monotonic() < deadline
        time.sleep(0.1)
    process.send_signal(signal.SIGKILL)
    process.wait()
