"""The Debian package and its unit, on a clean Debian with a real systemd."""

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
    """The package, built without optimization, and once for all processes of this run."""
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
    """Installed on a clean system and started. /etc/default sets the address, as it would set secrets."""
    service = Service(debian, free_port())
    debian.put("/etc/default/flower-exporter", f"FLOWER_EXPORTER_HTTP__LISTEN=127.0.0.1:{service.port}\n", 0o600)
    debian("dpkg", "--install", "/mnt/package.deb")
    return service


@pytest.fixture
def connected(service, shared_redis):
    """The service, connected to a real broker."""
    service.debian.put(URL, shared_redis.url, 0o600)
    service.debian("systemctl", "restart", service.NAME)
    return service.ready()


def drop_in(service, *lines):
    service.debian.put(f"/etc/systemd/system/{service.NAME}.d/test.conf", "\n".join(["[Service]", *lines, ""]))
    service.debian("systemctl", "daemon-reload")


# --- the package -------------------------------------------------------------------


def files(debian):
    """All files on disk except the databases of the package manager and systemd."""
    found = debian("find", "/", "-xdev", "-not", "-path", "/tmp/*", "-not", "-path", "/mnt/*").splitlines()
    databases = re.compile(r"/var/(cache|log)/|/var/lib/(dpkg|systemd)/|/var/lib/private$|/etc/\.updated|/var/\.updated")
    return {path for path in found if not databases.match(path)}


def test_install_remove_and_purge(debian):
    """Removal keeps configuration and state, which the next installation uses. Purging removes everything."""
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
    # Debian keeps whether the unit is enabled in these files.
    kept = {f"/etc/systemd/system/{path}flower-exporter.service" for path in ("", "multi-user.target.wants/")}
    assert files(debian) - before - folders == left | kept
    debian("dpkg", "--install", "/mnt/package.deb")
    assert debian("cat", URL) == "redis://mine"
    debian.put("/etc/default/flower-exporter", "FLOWER_EXPORTER_LOG__LEVEL=debug\n", 0o600)
    debian("dpkg", "--purge", "flower-exporter")
    assert files(debian) == before


def test_upgrade_keeps_the_configuration(connected):
    """The upgrade restarts the service."""
    main = connected.main
    connected.debian.put(SETTINGS, "[state]\nmax_tasks = 7\n")
    connected.debian("dpkg", "--install", "--force-confold", "/mnt/package.deb")
    connected.ready()
    assert connected.main != main and connected.show("NRestarts") == "0"
    assert "redis://" in connected.debian("cat", URL) and "max_tasks = 7" in connected.debian("cat", SETTINGS)


# --- the unit ----------------------------------------------------------------------


def test_unit_is_hardened():
    """`systemd-analyze security` reports an exposure of at most 1.5."""
    done = subprocess.run(
        ["systemd-analyze", "security", "--offline=true", "--threshold=15", "--no-pager", UNIT],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert float(re.search(r"Overall exposure level .*: ([0-9.]+)", done.stdout)[1]) <= 1.5


def test_systemd_verifies_the_unit(service):
    """There is no warning: the program and the manual page exist."""
    done = service.debian.run("systemd-analyze", "verify", "--man=yes", "/lib/systemd/system/flower-exporter.service")
    assert (done.stdout + done.stderr, done.returncode) == ("", 0)


def test_systemd_follows_start_reload_and_stop(connected, services, shared_redis):
    """At each step systemd has the right state, and displays the exporter's status."""
    services.publisher(shared_redis).send([ev.heartbeat(), ev.sent()])
    connected.wait_for(lambda metrics: metrics.one(ONLINE, worker=W) == 1)
    wait_until(
        lambda: re.fullmatch(r"connected to broker; \d+ events, last one \d s ago", connected.show("StatusText")),
        20,
        lambda: connected.show("StatusText"),
    )
    assert connected.show("ActiveState", "NRestarts") == ["active", "0"]
    user = Path(f"/proc/{connected.main}").stat().st_uid
    assert 61184 <= user <= 65519, "a dynamic user of systemd"

    main = connected.main
    connected.debian.put(SETTINGS, "[log]\nlevel = 'debug'\n")
    connected.debian("systemctl", "reload", connected.NAME)
    wait_until(lambda: "configuration reloaded" in connected.log(), 10, connected.log)
    wait_until(lambda: connected.show("ActiveState") == "active", 10, connected.log)
    assert connected.main == main

    connected.debian("systemctl", "stop", connected.NAME)
    assert connected.show("ActiveState", "Result", "ExecMainStatus") == ["inactive", "success", "0"]
    assert connected.own_lines()[-1] == "INFO stopping"


def test_state_survives_a_service_restart(connected, services, shared_redis):
    """The state is in the directory that systemd created. The process metrics are available under the unit's restrictions."""
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


def test_journal_lines_have_priorities(connected):
    """Each line occurs once, with its priority and without a timestamp."""
    [warning] = connected.own_lines("-p", "warning")
    assert "failed to connect to broker" in warning
    assert all(re.match(r"(INFO|WARN) [a-z]", line) for line in connected.own_lines()), connected.own_lines()


PTRACE_ATTACH, PTRACE_DETACH, WALL = 16, 17, 0x40000000


@contextlib.contextmanager
def stopped(thread):
    """Stops one thread while the others continue."""
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

    wait_until(ended, 10, "the killed thread ends: its process only ends after its tracer has waited for it")


@pytest.mark.parametrize("name", ["flower-ingest", "flower-broker", "flower-exporter"])
def test_watchdog_restarts_a_stuck_exporter(connected, name):
    """If any loop is stuck, systemd kills and restarts the exporter. Otherwise it does not."""
    drop_in(connected, "WatchdogSec=6s", "RestartSec=100ms")
    connected.debian("systemctl", "restart", connected.NAME)
    connected.ready()
    main = connected.main
    before = connected.show("WatchdogTimestampMonotonic")
    wait_until(lambda: connected.show("WatchdogTimestampMonotonic") != before, 10, "the watchdog is notified")
    [thread] = [
        int(task.name) for task in Path(f"/proc/{main}/task").iterdir() if (task / "comm").read_text().strip() == name
    ]
    with stopped(thread):
        wait_until(lambda: "Watchdog timeout" in connected.log(), 30, connected.log)
    wait_until(lambda: connected.show("NRestarts") == "1", 20, connected.log)
    connected.ready()
    assert connected.main != main


# --- invalid settings --------------------------------------------------------------


def port_in_use(service):
    service.debian.put("/etc/default/flower-exporter", f"FLOWER_EXPORTER_HTTP__LISTEN=127.0.0.1:{service.blocked}\n")


def settings(text):
    return lambda service: service.debian.put(SETTINGS, text)


def url(text):
    return lambda service: service.debian.put(URL, text, 0o600)


@pytest.mark.parametrize(
    ("make_invalid", "message"),
    [
        (url("reddis://secret@host"), "expected a broker URL|reddis"),
        (url(""), "broker-url.*expected a broker URL"),
        (settings("[state]\npersistant = true\n"), f"{SETTINGS}.*unknown key state.persistant"),
        (port_in_use, "failed to bind .*in use"),
    ],
    ids=["URL", "empty URL", "unknown key", "port"],
)
def test_invalid_settings_are_one_journal_line(service, shared_redis, make_invalid, message):
    """The line contains cause and location. systemd displays it as the status and does not restart the service."""
    service.debian("systemctl", "stop", service.NAME)
    service.blocked = shared_redis.port
    service.debian.put(URL, shared_redis.url, 0o600)
    make_invalid(service)
    lines = len(service.own_lines())
    assert service.debian.run("systemctl", "start", service.NAME).returncode == 1
    [line] = service.own_lines()[lines:]
    assert re.search(message, line) and "secret" not in line, line
    assert service.show("Result", "ExecMainStatus", "NRestarts") == ["exit-code", "2", "0"]
    assert service.show("StatusText") == line.removeprefix("flower-exporter: ")
    assert service.own_lines("-p", "err") == [line]


def test_missing_url_file_is_explained(service, shared_redis):
    """The service does not start, and one journal line contains the remedy. systemd starts it when the file exists."""
    service.debian("systemctl", "stop", service.NAME)
    service.debian("rm", URL)
    assert service.debian.run("systemctl", "start", service.NAME).returncode == 1
    [line] = [line for line in service.log().splitlines() if URL in line]
    assert line == f"no {URL}: write the URL of the broker to it, with mode 0600"
    service.debian.put(URL, shared_redis.url, 0o600)
    service.ready()


def test_missing_state_directory_is_a_warning(connected):
    """Metrics are served. One journal line and /healthz contain a warning that the state is not saved."""
    connected.debian.put(SETTINGS, "[state]\npersistent = true\ndb = '/var/lib/missing/state'\n")
    lines = len(connected.own_lines())
    connected.debian("systemctl", "restart", connected.NAME)
    connected.ready()
    [line] = [line for line in connected.own_lines()[lines:] if "failed to save state" in line]
    assert line.startswith("WARN failed to save state") and "No such file" in line
    [warning] = connected.healthz()[1]["warnings"]
    assert warning.startswith("failed to save state")
    assert all("/var/lib/missing/state" in text for text in (line, warning))


def test_build_script_explains_missing_tools():
    """Without cargo-deb the script exits before it builds anything, and prints how to install it."""
    tools = {Path(shutil.which(name)).parent for name in ("bash", "cargo")}
    path = ":".join(map(str, tools))
    assert shutil.which("cargo-deb", path=path) is None
    done = subprocess.run(
        [ROOT / "deploy/debian/build.sh"], env={"PATH": path}, stdin=subprocess.DEVNULL, capture_output=True, text=True
    )
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == "== cargo-deb is missing: cargo install --locked cargo-deb\n"
