"""The container image, built and run by podman as documented; the Compose file, as far as it goes without images.

No image can be pulled here, so both bases are made of this machine's files; the Containerfile is the shipped one.
"""

import json
import tomllib

import pytest

from support import events as ev
from support.container import CONTAINERFILE, RUN, Container, Podman
from support.processes import ROOT, directory

pytestmark = pytest.mark.packaging

HERE = CONTAINERFILE.parent
WORKER = HERE / "worker.Containerfile"
PACKAGE = tomllib.loads((ROOT / "Cargo.toml").read_text())["package"]
REVISION, CREATED = "c0ffee0123456789c0ffee0123456789c0ffee01", "2026-01-02T03:04:05Z"
CHECK = ["/usr/bin/flower-exporter", "--healthcheck"]
STATE = "/var/lib/flower-exporter"


@pytest.fixture(scope="module")
def podman(shared):
    """With the base that the image runs on."""
    podman = Podman()
    shared.callback(podman.close)
    if reason := podman.cannot():
        pytest.skip(reason)
    return podman


@pytest.fixture(scope="module")
def image(podman):
    podman.image(REVISION=REVISION, CREATED=CREATED)
    return podman.inspect("flower-exporter")


@pytest.fixture
def contained(services, podman, image):
    """Starts the exporter in a container."""

    def start(broker, settings=None, **options):
        container = Container(podman, broker, settings, **options)
        services.callback(container.kill)
        services.callback(container.terminate)
        return container.ready()

    return start


# --- the image ---------------------------------------------------------------------


def test_context(podman):
    """No target/, no .git, no tests: the sources, and what Cargo.toml names."""
    file = directory("context") / "Containerfile"
    file.write_text("FROM scratch\nCOPY . /context\n")
    podman.build("context", file, ROOT)
    wanted = [ROOT / "Cargo.toml", ROOT / "Cargo.lock", ROOT / "build.rs", *ROOT.glob("benches/*.rs")]
    wanted += [path for path in ROOT.glob("src/**/*") if path.is_file()]
    found = {name.removeprefix("context/") for name, file in podman.files("context").items() if file.isfile()}
    assert {name for name in found if not name.startswith("etc/")} == {str(path.relative_to(ROOT)) for path in wanted}


def test_metadata(image):
    config = image["Config"]
    assert config["User"] == "65532:65532"
    assert config["Entrypoint"] == ["/usr/bin/flower-exporter"] and not config.get("Cmd")
    assert config["StopSignal"] == "SIGTERM"
    assert list(config["ExposedPorts"]) == ["9555/tcp"]
    assert image["Healthcheck"]["Test"] == ["CMD", *CHECK]
    prefix = "org.opencontainers.image."
    labels = {key.removeprefix(prefix): value for key, value in config["Labels"].items() if key.startswith(prefix)}
    assert labels.pop("description")
    assert labels == {
        "title": PACKAGE["name"],
        "licenses": PACKAGE["license"],
        "version": PACKAGE["version"],
        "revision": REVISION,
        "created": CREATED,
        "base.name": "localhost/runtime",
    }


def test_content(podman, image):
    """Beside its base, which has no shell, there is the program, and a place for its state."""
    base, files = podman.files("runtime"), podman.files("flower-exporter")
    added = {path: files[path] for path in files.keys() - base.keys() - {"usr/bin"}}
    assert added.keys() == {"usr/bin/flower-exporter", STATE[1:]}
    program, state = added["usr/bin/flower-exporter"], added[STATE[1:]]
    assert (program.uid, program.gid, program.mode & 0o7777) == (0, 0, 0o755)
    assert (state.uid, state.gid, state.mode & 0o7777) == (65532, 65532, 0o755) and state.isdir()
    assert all((files[path].uid, files[path].mode) == (base[path].uid, base[path].mode) for path in base)


def test_runs(redis, services, contained):
    """Read-only, without capabilities, as its own user: counts an event, is healthy, and ends at its signal."""
    container = contained(redis)
    services.publisher(redis).send(ev.sent())
    container.wait_for(lambda metrics: metrics.events("sent") == 1)
    status = dict(line.split(":\t", 1) for line in open(f"/proc/{container.inner}/status").read().splitlines())
    assert set(status["Uid"].split() + status["Gid"].split()) == {"65532"}
    assert int(status["CapBnd"], 16) == 0 and status["NoNewPrivs"] == "1"
    healthy = container.execute(*CHECK)
    assert healthy.returncode == 0 and json.loads(healthy.stdout)["status"] == "ok"
    assert container.execute("/bin/sh", "-c", "true").returncode == 127
    assert f"({REVISION[:12]}, " in container.execute(CHECK[0], "--version").stdout
    container.terminate()
    assert "stopping" in container.log()


def test_unhealthy(redis, contained):
    """Nobody answers where the settings say: that is a code, and a line."""
    container = contained(redis)
    done = container.podman.run(
        "exec", "--env", "FLOWER_EXPORTER_HTTP__LISTEN=127.0.0.1:9", container.container, *CHECK
    )
    assert done.returncode == 1 and "no exporter at 127.0.0.1:9" in done.stderr


@pytest.mark.parametrize("source", ["environment", "file"])
def test_wrong_setting(podman, image, source):
    """Code 2, and the one line that says where."""
    file = directory("settings") / "flower-exporter.toml"
    file.write_text('[state]\nmax_tasks = "x"\n')
    options, where = {
        "environment": (["--env", "FLOWER_EXPORTER_STATE__MAX_TASKS=x"], "FLOWER_EXPORTER_STATE__MAX_TASKS"),
        "file": (["--volume", f"{file}:/etc/flower-exporter/flower-exporter.toml:ro"], "/etc/flower-exporter/"),
    }[source]
    done = podman.run("run", "--rm", *RUN, "--read-only", *options, "flower-exporter")
    assert done.returncode == 2
    [line] = done.stderr.splitlines()
    assert where in line and '"x"' in line


def test_state(redis, services, podman, contained):
    """A new volume belongs to the exporter's user, and the next container goes on with what is in it."""
    podman("volume", "create", "state")
    options = {"settings": {"STATE__PERSISTENT": "true"}, "volumes": [f"state:{STATE}"]}
    before = contained(redis, **options)
    services.publisher(redis).send(ev.sent())
    before.wait_for(lambda metrics: metrics.events("sent") == 1)
    before.terminate()
    assert contained(redis, **options).metrics().events("sent") == 1
