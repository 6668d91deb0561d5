"""Processes with a separate process group, directory and free ports; nothing remains when the tests end."""

import contextlib
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]
TEST_ENV = ROOT / "target" / "test-env"

#: The processes that the running test has started, for the report of a failure.
started = []


class Reaper:
    """The process that cleans up when the test run is killed."""

    def __init__(self):
        self.process = None

    def send(self, line):
        if self.process is None:
            self.process = subprocess.Popen(
                [sys.executable, "-S", Path(__file__).with_name("reaper.py")],
                stdin=subprocess.PIPE,
                text=True,
                start_new_session=True,
            )
        self.process.stdin.write(line + "\n")
        self.process.stdin.flush()


reaper = Reaper()


def directory(name, owner=None):
    """A new directory that is removed when the tests end. Every user may enter it."""
    path = Path(tempfile.mkdtemp(prefix=f"flower-exporter-{name}-"))
    reaper.send(f"rm {path}")
    path.chmod(0o755)
    if owner:
        shutil.chown(path, owner)
    return path


_ports = {}


def free_port():
    """A loopback port that no other test takes during this run.

    It is outside the kernel's range for outgoing connections, and claimed by an abstract socket with that name.
    """
    while True:
        port = random.SystemRandom().randrange(12000, 32000)
        claim = socket.socket(socket.AF_UNIX)
        with socket.socket() as probe:
            try:
                claim.bind(f"\0flower-exporter-test-port-{port}")
                probe.bind(("127.0.0.1", port))
            except OSError:
                claim.close()
                continue
        _ports[port] = claim
        return port


class Stalls(threading.Thread):
    """Measures for how long this machine ran no thread at all: deadlines are extended by that time."""

    def __init__(self):
        super().__init__(name="stalls", daemon=True)
        self.seconds = 0

    def run(self):
        while True:
            start = time.monotonic()
            time.sleep(0.05)
            late = time.monotonic() - start - 0.05
            self.seconds += late if late > 0.1 else 0


STALLS = Stalls()
STALLS.start()


def wait_until(condition, deadline, what):
    """The first true value of `condition()`; `what` (text or a function) is reported after `deadline` seconds."""
    start, stalled = time.monotonic(), STALLS.seconds
    while True:
        late = time.monotonic() - start > deadline + min(STALLS.seconds - stalled, 5)
        value = condition()
        if value:
            return value
        if late:
            raise AssertionError(f"not within {deadline} s: {what() if callable(what) else what}")
        time.sleep(0.02)


def accepts(port):
    with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
        return True
    return False


class Process:
    """One program in a separate session and process group; stdout, stderr and its temporary files go to one directory.

    A variable of `env` that is None is unset.
    """

    def __init__(self, name, argv, *, env=None, cwd=None, user=None):
        self.name = name
        self.cwd = Path(cwd) if cwd else directory(name, user)
        logs = directory(f"{name}-log", user)
        env = {**os.environ, "TMPDIR": logs, **(env or {})}
        env = {key: str(value) for key, value in env.items() if value is not None}
        self.out, self.err = logs / "stdout", logs / "stderr"
        with open(self.out, "wb") as out, open(self.err, "wb") as err:
            self.popen = subprocess.Popen(
                [str(part) for part in argv],
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=err,
                start_new_session=True,
                cwd=self.cwd,
                env=env,
                user=user,
                group=user,
                extra_groups=[] if user else None,
            )
        self.pid = self.popen.pid
        reaper.send(f"+ {self.pid}")
        started.append(self)

    @property
    def running(self):
        return self.popen.poll() is None

    def log(self):
        return self.out.read_text(errors="replace") + self.err.read_text(errors="replace")

    def send(self, number):
        self.popen.send_signal(number)

    def wait(self, deadline):
        return self.popen.wait(deadline)

    def stop(self, number=signal.SIGTERM, deadline=10):
        """Sends the signal to the leader, then SIGKILL to the group. Returns the leader's exit code."""
        if self.running:
            self.send(number)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.wait(deadline)
        self.kill()
        return self.popen.returncode

    def kill(self):
        """Sends SIGKILL to the whole group, as if the host had failed."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)
        self.wait(10)
        reaper.send(f"- {self.pid}")
