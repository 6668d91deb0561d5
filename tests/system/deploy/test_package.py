"""The Debian package and its unit: on a clean Debian, under a real systemd."""

import contextlib
import ctypes
import fcntl
import os
import re
import shutil
import stat
import subprocess
from pathlib import Path

import pytest

from support import events as ev
from support.debian import Debian, Service, unavailable
from support.events import W
from support.exposition import ONLINE
from support.processes import ROOT, TEST_ENV, free_port, wait_until

pytestmark = pytest.mark.packaging

UNIT = ROOT / "deploy/systemd/flower-exporter.service"
SETTINGS = "/etc/flower-exporter/flower-exporter.toml"
URL = "/etc/flower-exporter/broker-url"
STATE = "/var/lib/private/flower-exporter"
DEFAULT_URL = "amqp://guest:guest@localhost:5672//\n"


@pytest.fixture(scope="session")
def package(testrun_uid):
    """Of the sources, built quickly rather than well, and once for all processes of this run."""
    with open(TEST_ENV / "package", "a+") as note:
        fcntl.flock(note, fcntl.LOCK_EX)
        note.seek(0)
        run, _, path = note.read().partition(" ")
        if run != testrun_uid:
            path = build_package()
            note.truncate(0)
            note.write(f"{testrun_uid} {path}")
        return Path(path)


def build_package():
    path = f"{TEST_ENV / 'tools/bin'}:{os.environ['PATH']}"
    done = subprocess.run(
        ["nice", "-n", "19", ROOT / "deploy/debian/build.sh", "dev"],
        env={**os.environ, "PATH": path},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()[-1]


@pytest.fixture
def debian(package):
    if reason := unavailable():
        pytest.skip(reason)
    machine = Debian()
    shutil.copy(package, machine.shared / "package.deb")
    yield machine
    machine.kill()


@pytest.fixture
def service(debian):
    """Installed where nothing was, and started; what it listens on is set, as other secrets would be, beside the unit."""
    service = Service(debian, free_port())
    debian.put("/etc/default/flower-exporter", f"FLOWER_EXPORTER_HTTP__LISTEN=127.0.0.1:{service.port}\n", 0o600)
    debian("dpkg", "--install", "/mnt/package.deb")
    return service


@pytest.fixture
def connected(service, shared_redis):
    """The same at a real broker."""
    service.debian.put(URL, shared_redis.url, 0o600)
    service.debian("systemctl", "restart", service.NAME)
    return service.ready()


def drop_in(service, *lines):
    service.debian.put(f"/etc/systemd/system/{service.NAME}.d/test.conf", "\n".join(["[Service]", *lines, ""]))
    service.debian("systemctl", "daemon-reload")


# --- the package -------------------------------------------------------------------


def files(debian):
    """Everything but what lives in memory, and the package manager's and systemd's own books."""
    found = debian("find", "/", "-xdev", "-not", "-path", "/tmp/*", "-not", "-path", "/mnt/*").splitlines()
    books = re.compile(r"/var/(cache|log)/|/var/lib/(dpkg|systemd)/|/var/lib/private$|/etc/\.updated|/var/\.updated")
    return {path for path in found if not books.match(path)}


def test_install_and_remove(debian):
    """Removed, it leaves settings and state; purged, nothing. Both are what they were when it is installed again."""
    before = files(debian)
    debian("dpkg", "--install", "/mnt/package.deb")
    version = debian("flower-exporter", "--version")
    assert re.fullmatch(r"flower-exporter \d+\.\d+\.\d+ \(([0-9a-f]{12}, )?[\w-]+-linux-gnu\)\n", version)
    shown = debian("flower-exporter", "--check-config")
    assert f"# {SETTINGS}" in shown and "default" in shown
    assert debian("stat", "-c", "%a %U", URL, SETTINGS).split() == ["600", "root", "644", "root"]
    assert debian("cat", URL) == DEFAULT_URL
    page = debian("man", "--warnings", "flower-exporter")
    assert all(word in page for word in ("--check-config", "SIGHUP", "EXIT STATUS", URL))
    completion = '''. /usr/share/bash-completion/completions/flower-exporter
        COMP_WORDS=(flower-exporter --he) COMP_CWORD=1
        _flower__exporter flower-exporter --he flower-exporter
        echo ${COMPREPLY[@]}'''
    assert debian("bash", "-c", completion).split() == ["--healthcheck", "--help"]

    debian.put(URL, "redis://mine", 0o600)
    debian.put(f"{STATE}/state", "state")
    debian("dpkg", "--remove", "flower-exporter")
    left = {SETTINGS, URL, f"{STATE}/state"}
    folders = {str(Path(path).parent) for path in left} | {"/var/lib/flower-exporter"}
    # Debian's way to keep whether the unit is enabled.
    kept = {f"/etc/systemd/system/{path}flower-exporter.service" for path in ("", "multi-user.target.wants/")}
    assert files(debian) - before - folders == left | kept
    debian("dpkg", "--install", "/mnt/package.deb")
    assert debian("cat", URL) == "redis://mine"
    debian.put("/etc/default/flower-exporter", "FLOWER_EXPORTER_LOG__LEVEL=debug\n", 0o600)
    debian("dpkg", "--purge", "flower-exporter")
    assert files(debian) == before


def test_upgrade(connected):
    """The new one takes over; the settings are those of before."""
    main = connected.main
    connected.debian.put(SETTINGS, "[state]\nmax_tasks = 7\n")
    connected.debian("dpkg", "--install", "--force-confold", "/mnt/package.deb")
    connected.ready()
    assert connected.main != main and connected.show("NRestarts") == "0"
    assert "redis://" in connected.debian("cat", URL) and "max_tasks = 7" in connected.debian("cat", SETTINGS)


# --- the unit ----------------------------------------------------------------------


def test_exposure():
    """The unit is locked up as far as an exporter can be."""
    done = subprocess.run(
        ["systemd-analyze", "security", "--offline=true", "--threshold=15", "--no-pager", UNIT],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert float(re.search(r"Overall exposure level .*: ([0-9.]+)", done.stdout)[1]) <= 1.5


def test_verify(service):
    """systemd has nothing to say against the unit: its program and its manual page are there."""
    done = service.debian.run("systemd-analyze", "verify", "--man=yes", "/lib/systemd/system/flower-exporter.service")
    assert (done.stdout + done.stderr, done.returncode) == ("", 0)


def test_life(connected, services, shared_redis):
    """Started, connected, reloaded, stopped: systemd knows at each step, and shows how it stands."""
    services.publisher(shared_redis).send([ev.heartbeat(), ev.sent()])
    connected.wait_for(lambda metrics: metrics.one(ONLINE, worker=W) == 1)
    wait_until(
        lambda: re.fullmatch(r"connected to the broker; \d+ events, the last \d s ago", connected.show("StatusText")),
        20,
        lambda: connected.show("StatusText"),
    )
    assert connected.show("ActiveState", "NRestarts") == ["active", "0"]
    user = Path(f"/proc/{connected.main}").stat().st_uid
    assert 61184 <= user <= 65519, "a user of systemd's own making"

    main = connected.main
    connected.debian.put(SETTINGS, "[log]\nlevel = 'debug'\n")
    connected.debian("systemctl", "reload", connected.NAME)
    wait_until(lambda: "settings read again" in connected.log(), 10, connected.log)
    wait_until(lambda: connected.show("ActiveState") == "active", 10, connected.log)
    assert connected.main == main

    connected.debian("systemctl", "stop", connected.NAME)
    assert connected.show("ActiveState", "Result", "ExecMainStatus") == ["inactive", "success", "0"]
    assert connected.own_lines()[-1] == "INFO stopping"


def test_state(connected, services, shared_redis):
    """Counters outlive a restart, in the directory that systemd made; and the process is seen by its own metrics."""
    connected.debian.put(SETTINGS, "[state]\npersistent = true\n[metrics]\nself_metrics = true\n")
    connected.debian("systemctl", "restart", connected.NAME)
    connected.ready()
    services.publisher(shared_redis).send(ev.sent())
    connected.wait_for(lambda metrics: metrics.events("sent") == 1)
    connected.debian("systemctl", "restart", connected.NAME)
    connected.ready()
    assert connected.metrics().events("sent") == 1
    seen = connected.text()
    assert all(f"process_{name} " in seen for name in ("start_time_seconds", "resident_memory_bytes", "open_fds"))
    state = Path(f"/proc/{connected.main}/root{STATE}")
    assert stat.S_IMODE(state.stat().st_mode) == 0o700 and stat.S_IMODE((state / "state").stat().st_mode) == 0o600


def test_journal(connected):
    """Each line once, with its priority and without a clock of its own."""
    [warning] = connected.own_lines("-p", "warning")
    assert "cannot connect to the broker" in warning
    assert all(re.match(r"(INFO|WARN) [a-z]", line) for line in connected.own_lines()), connected.own_lines()


PTRACE_ATTACH, PTRACE_DETACH, WALL = 16, 17, 0x40000000


@contextlib.contextmanager
def standing_still(thread):
    """One thread, while the others go on."""
    libc = ctypes.CDLL(None, use_errno=True)
    assert libc.ptrace(PTRACE_ATTACH, thread, 0, 0) == 0, os.strerror(ctypes.get_errno())
    try:
        yield
    except BaseException:
        libc.ptrace(PTRACE_DETACH, thread, 0, 0)
        raise

    def ended():
        pid, status = os.waitpid(thread, WALL | os.WNOHANG)
        return pid and not os.WIFSTOPPED(status)

    wait_until(ended, 10, "the thread, which was killed, ends: its process does when we have seen it")


@pytest.mark.parametrize("name", ["flower-ingest", "flower-broker", "flower-exporter"])
def test_watchdog(connected, name):
    """Whichever loop stands still, systemd kills the exporter and starts it again. While all turn it does not."""
    drop_in(connected, "WatchdogSec=6s", "RestartSec=100ms")
    connected.debian("systemctl", "restart", connected.NAME)
    connected.ready()
    main = connected.main
    before = connected.show("WatchdogTimestampMonotonic")
    wait_until(lambda: connected.show("WatchdogTimestampMonotonic") != before, 10, "the watchdog is fed")
    [thread] = [
        int(task.name) for task in Path(f"/proc/{main}/task").iterdir() if (task / "comm").read_text().strip() == name
    ]
    with standing_still(thread):
        wait_until(lambda: "Watchdog timeout" in connected.log(), 30, connected.log)
    wait_until(lambda: connected.show("NRestarts") == "1", 20, connected.log)
    connected.ready()
    assert connected.main != main


# --- mistakes ----------------------------------------------------------------------


def taken_port(service):
    service.debian.put("/etc/default/flower-exporter", f"FLOWER_EXPORTER_HTTP__LISTEN=127.0.0.1:{service.blocked}\n")


def settings(text):
    return lambda service: service.debian.put(SETTINGS, text)


def url(text):
    return lambda service: service.debian.put(URL, text, 0o600)


@pytest.mark.parametrize(
    ("mistake", "said"),
    [
        (url("reddis://secret@host"), "expected a broker URL|reddis"),
        (url(""), "broker-url.*expected a broker URL"),
        (settings("[state]\npersistant = true\n"), f"{SETTINGS}.*unknown key state.persistant"),
        (taken_port, "http.listen = .*cannot listen there.*in use"),
    ],
    ids=["URL", "empty URL", "unknown key", "port"],
)
def test_mistakes(service, shared_redis, mistake, said):
    """One line in the journal says what and where; systemd shows it as the status, and does not try again."""
    service.debian("systemctl", "stop", service.NAME)
    service.blocked = shared_redis.port
    service.debian.put(URL, shared_redis.url, 0o600)
    mistake(service)
    lines = len(service.own_lines())
    assert service.debian.run("systemctl", "start", service.NAME).returncode == 1
    [line] = service.own_lines()[lines:]
    assert re.search(said, line) and "secret" not in line, line
    assert service.show("Result", "ExecMainStatus", "NRestarts") == ["exit-code", "2", "0"]
    assert service.show("StatusText") == line.removeprefix("flower-exporter: ")
    assert service.own_lines("-p", "err") == [line]


def test_missing_credential(service, shared_redis):
    """Nothing is started, and the journal says in one line what to do; done, systemd starts it by itself."""
    service.debian("systemctl", "stop", service.NAME)
    service.debian("rm", URL)
    assert service.debian.run("systemctl", "start", service.NAME).returncode == 1
    [line] = [line for line in service.log().splitlines() if URL in line]
    assert line == f"no {URL}: write the URL of the broker to it, with mode 0600"
    service.debian.put(URL, shared_redis.url, 0o600)
    service.ready()


def test_missing_state_directory(connected):
    """Metrics are served; the journal says in one line that they will not outlive a restart, and so does /healthz."""
    connected.debian.put(SETTINGS, "[state]\npersistent = true\ndb = '/var/lib/elsewhere/state'\n")
    lines = len(connected.own_lines())
    connected.debian("systemctl", "restart", connected.NAME)
    connected.ready()
    said = "the state cannot be saved to /var/lib/elsewhere/state and would not survive a restart"
    [line] = [line for line in connected.own_lines()[lines:] if "saved" in line]
    assert line.startswith(f"WARN {said}") and "No such file" in line
    [warning] = connected.healthz()[1]["warnings"]
    assert warning.startswith(said)


def test_build_says_what_is_missing():
    """Without cargo-deb the script ends before it builds anything, and says how to get it."""
    tools = {Path(shutil.which(name)).parent for name in ("bash", "cargo")}
    path = ":".join(map(str, tools))
    assert shutil.which("cargo-deb", path=path) is None
    done = subprocess.run(
        [ROOT / "deploy/debian/build.sh"], env={"PATH": path}, stdin=subprocess.DEVNULL, capture_output=True, text=True
    )
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == "== cargo-deb is missing: cargo install --locked cargo-deb\n"
