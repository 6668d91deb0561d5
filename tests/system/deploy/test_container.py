"""The container image, built from the shipped Containerfile and run by podman as documented.

No image can be pulled here, so both base images are made of this machine's files.
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
    """A podman with the runtime base image."""
    podman = Podman()
    shared.callback(podman.close)
    if reason := podman.unavailable():
        pytest.skip(reason)
    return podman


@pytest.fixture(scope="module")
def image(podman):
    podman.image(REVISION=REVISION, CREATED=CREATED)
    return podman.inspect("flower-exporter")


@pytest.fixture
def start_container(services, podman, image):
    """Starts the exporter in a container."""

    def start(broker, settings=None, **options):
        container = Container(podman, broker, settings, **options)
        services.callback(container.kill)
        services.callback(container.terminate)
        return container.ready()

    return start


# --- the image ---------------------------------------------------------------------


def test_build_context_contains_only_sources(podman):
    """It has no target/, .git or tests: only the sources and the files that Cargo.toml names."""
    file = directory("context") / "Containerfile"
    file.write_text("FROM scratch\nCOPY . /context\n")
    podman.build("context", file, ROOT)
    wanted = [ROOT / "Cargo.toml", ROOT / "Cargo.lock", ROOT / "build.rs", *ROOT.glob("benches/*.rs")]
    wanted += [path for path in ROOT.glob("src/**/*") if path.is_file()]
    found = {name.removeprefix("context/") for name, file in podman.files("context").items() if file.isfile()}
    assert {name for name in found if not name.startswith("etc/")} == {str(path.relative_to(ROOT)) for path in wanted}


def test_image_metadata(image):
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


def test_image_adds_program_and_state_directory(podman, image):
    """The base image has no shell."""
    base, files = podman.files("runtime"), podman.files("flower-exporter")
    added = {path: files[path] for path in files.keys() - base.keys() - {"usr/bin"}}
    assert added.keys() == {"usr/bin/flower-exporter", STATE[1:]}
    program, state = added["usr/bin/flower-exporter"], added[STATE[1:]]
    assert (program.uid, program.gid, program.mode & 0o7777) == (0, 0, 0o755)
    assert (state.uid, state.gid, state.mode & 0o7777) == (65532, 65532, 0o755) and state.isdir()
    assert all((files[path].uid, files[path].mode) == (base[path].uid, base[path].mode) for path in base)


def test_container_counts_and_stops(redis, services, start_container):
    """Read-only, without capabilities and as a separate user it counts an event, is healthy, and stops at the stop signal."""
    container = start_container(redis)
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


def test_healthcheck_fails_without_an_exporter(redis, start_container):
    """Exit code 1 and one line if nothing listens on the configured address."""
    container = start_container(redis)
    done = container.podman.run(
        "exec", "--env", "FLOWER_EXPORTER_HTTP__LISTEN=127.0.0.1:9", container.container, *CHECK
    )
    assert done.returncode == 1 and "failed to connect to 127.0.0.1:9" in done.stderr


@pytest.mark.parametrize("source", ["environment", "file"])
def test_invalid_setting_is_one_line(podman, image, source):
    """Exit code 2, and the line contains the source."""
    file = directory("settings") / "flower-exporter.toml"
    file.write_text('[state]\nmax_tasks = "x"\n')
    options, location = {
        "environment": (["--env", "FLOWER_EXPORTER_STATE__MAX_TASKS=x"], "FLOWER_EXPORTER_STATE__MAX_TASKS"),
        "file": (["--volume", f"{file}:/etc/flower-exporter/flower-exporter.toml:ro"], "/etc/flower-exporter/"),
    }[source]
    done = podman.run("run", "--rm", *RUN, "--read-only", *options, "flower-exporter")
    assert done.returncode == 2
    [line] = done.stderr.splitlines()
    assert location in line and '"x"' in line


def test_state_in_a_volume_survives(redis, services, podman, start_container):
    """A new volume belongs to the exporter's user, and the next container restores the state in it."""
    podman("volume", "create", "state")
    options = {"settings": {"STATE__PERSISTENT": "true"}, "volumes": [f"state:{STATE}"]}
    before = start_container(redis, **options)
    services.publisher(redis).send(ev.sent())
    before.wait_for(lambda metrics: metrics.events("sent") == 1)
    before.terminate()
    assert start_container(redis, **options).metrics().events("sent") == 1
