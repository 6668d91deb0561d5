"""Fixtures of all system tests. Each test starts what it needs and stops it; the brokers are real."""

import collections
import os
import random

import pytest

from support import matrix, processes, releases
from support.exporter import BINARY
from support.processes import wait_until
from support.prometheus import Prometheus
from support.services import Services, SharedServers
from support.tls import certificates


def pytest_addoption(parser):
    parser.addoption(
        "--parity-seeds", type=int, default=3, help="random streams for each test that uses them, and for each broker"
    )
    parser.addoption("--parity-seed", type=int, help="only this stream: to repeat a failure")
    parser.addoption("--outage", type=float, default=5, help="duration of broker outages in seconds")
    parser.addoption("--sustained", type=float, default=2, help="seconds of sending events at full speed")
    parser.addoption("--sustained-rate", type=float, help="events per second instead of full speed; all must be counted")
    parser.addoption("--names", type=int, default=200_000, help="number of distinct task names; the long form is 10 million")
    parser.addoption("--kills", type=int, default=8, help="SIGKILLs of a persistent exporter; the long form is 50")
    parser.addoption("--faults", type=int, default=12, help="random faults under load; the long form is 200")
    parser.addoption("--queue-faults", type=int, default=10, help="random faults on a named queue; the long form is 400")
    parser.addoption("--fault-seed", type=int, help="seed of the faults: to repeat a failure")
    parser.addoption("--incident-speed", type=float, default=10, help="how much faster than the shipped rules; the long form is 1")
    parser.addoption("--all-servers", action="store_true", help="run in full on every release of every server")
    parser.addoption("--server", action="append", help="run in full only on this release, for example valkey-9.1")
    parser.addoption("--matrix", help="write the table of releases and test files to this file")


def pytest_configure(config):
    if hasattr(config, "workerinput"):
        config.first_seed = config.workerinput["first_seed"]
    else:
        config.first_seed = random.SystemRandom().randrange(10**9)
        if not os.access(BINARY, os.X_OK):
            pytest.exit(f"no exporter at {BINARY}: build it, or set FLOWER_EXPORTER_BIN", returncode=2)
        known = {release.id for release in [*(r for family in releases.releases().values() for r in family)]}
        known |= {release.id for release in releases.with_quorum(releases.releases()["rabbitmq"])}
        if unknown := set(config.getoption("--server") or ()) - known:
            pytest.exit(f"--server {', '.join(unknown)}: not installed; choose from {', '.join(sorted(known))}", returncode=2)
        if config.getoption("--matrix"):
            config.pluginmanager.register(matrix.Matrix(config.getoption("--matrix")))


@pytest.hookimpl(optionalhook=True)
def pytest_configure_node(node):
    """With pytest-xdist, all workers must collect the same tests."""
    node.workerinput["first_seed"] = node.config.first_seed


def pytest_report_header(config):
    found = [release.title for family in releases.releases().values() for release in family]
    unavailable = f"; unavailable: {', '.join(releases.missing())}, see target/test-env/servers" if releases.missing() else ""
    return [f"exporter: {BINARY}; first parity seed: {config.first_seed}", f"servers: {', '.join(found)}{unavailable}"]


def pytest_generate_tests(metafunc):
    if "seed" in metafunc.fixturenames:
        one, config = metafunc.config.getoption("--parity-seed"), metafunc.config
        count = config.getoption("--parity-seeds")
        metafunc.parametrize("seed", [one] if one is not None else range(config.first_seed, config.first_seed + count))
    parametrize_releases(metafunc)


#: Fixtures that are a release, and the families of each.
RELEASES = {
    "broker_release": ["redis", "rabbitmq"],
    "redis_release": ["redis"],
    "rabbitmq_release": ["rabbitmq"],
    "prometheus_release": ["prometheus"],
}


def parametrize_releases(metafunc):
    """A test runs once for each release. A test of two servers combines the n-th releases, or the last ones."""
    wanted = [name for name in RELEASES if name in metafunc.fixturenames]
    chosen = [[one for family in RELEASES[name] for one in chosen_releases(metafunc, family)] for name in wanted]
    if any(chosen):
        chosen = [found or [releases.own(RELEASES[name][0])] for name, found in zip(wanted, chosen)]
        rows = [[found[min(n, len(found) - 1)] for found in chosen] for n in range(max(map(len, chosen)))]
    else:
        rows = [[None] * len(wanted)]  # deselected
    if wanted:
        # Module-scoped fixtures may depend on a Prometheus.
        scope = "module" if wanted == ["prometheus_release"] else "function"
        ids = ["-".join(one.id if one else "none" for one in row) for row in rows]
        metafunc.parametrize(wanted, rows, ids=ids, scope=scope)


def chosen_releases(metafunc, family):
    marks = {mark.name for mark in metafunc.definition.iter_markers()}
    every, config = releases.releases()[family], metafunc.config
    if family == "prometheus":
        chosen = every
    elif "every_release" not in marks:
        return [releases.own(family)]
    elif config.getoption("--all-servers") or config.getoption("--server"):
        chosen = every
    else:
        chosen = [releases.own(family), *(releases.newest(family) if "short_form" in marks else [])]
    if "quorum" in marks:
        chosen = [*chosen, *releases.with_quorum(chosen)]
    only = config.getoption("--server")
    return [release for release in chosen if not only or release.id in only]


def pytest_collection_modifyitems(config, items):
    """RabbitMQ creates all virtual hosts of the run at boot: one for each test that needs one, and a shared one."""
    deselected = [item for item in items if None in tested_releases(item)]
    config.hook.pytest_deselected(items=deselected)
    items[:] = [item for item in items if item not in deselected]
    config.vhosts = collections.Counter()
    for item in items:
        for release in tested_releases(item):
            config.vhosts[release.id] += 1
            if item.get_closest_marker("every_release") or release.family == "prometheus":
                item.user_properties.append(("release", release.title))
    if config.getoption("--matrix"):
        items[:] = [item for item in items if item.user_properties]


def tested_releases(item):
    parameters = item.callspec.params if hasattr(item, "callspec") else {}
    return [parameters[name] for name in RELEASES if name in parameters]


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item, call):
    """The report of a failure contains the end of the log of each process that the test started."""
    report = (yield).get_result()
    if report.failed:
        for process in processes.started:
            text = process.log()
            report.sections.append((f"{process.name} ({process.pid})", text[-6000:]))


@pytest.fixture(autouse=True)
def _forget_processes():
    yield
    processes.started.clear()


@pytest.fixture
def services(request):
    with Services(tested_releases(request.node)) as services:
        yield services


@pytest.fixture(scope="session")
def session_services():
    """Services that the tests of a module share."""
    with Services() as services:
        yield services


@pytest.fixture(scope="session")
def shared(pytestconfig):
    with SharedServers(pytestconfig.vhosts) as shared:
        yield shared


@pytest.fixture(scope="session")
def shared_redis(shared):
    return shared.get(releases.own("redis"))


@pytest.fixture(scope="session")
def rabbitmq_node(shared):
    """The shared node of Debian's own release."""
    return shared.get(releases.own("rabbitmq"))


@pytest.fixture
def redis_release():
    return releases.own("redis")


@pytest.fixture
def rabbitmq_release():
    return releases.own("rabbitmq")


@pytest.fixture
def broker_release():
    return releases.own("redis")


@pytest.fixture(scope="module")
def prometheus_release():
    return releases.own("prometheus")


@pytest.fixture
def broker(services, shared, broker_release):
    """A broker that no other test uses: a separate Redis or virtual host."""
    return services.redis() if broker_release.family == "redis" else shared.get(broker_release).vhost()


@pytest.fixture
def vhost(shared, rabbitmq_release):
    return shared.get(rabbitmq_release).vhost()


@pytest.fixture
def redis(services, redis_release):
    return services.redis()


@pytest.fixture
def harness(services, shared_redis):
    """A new exporter on a separate event exchange, for tests that do not depend on the broker."""
    return services.harness(shared_redis)


@pytest.fixture
def scraped(services, redis):
    """An exporter with a Prometheus server that scrapes it every second."""

    def start(release, settings=None, features=(), scrape=None):
        harness = services.harness(redis, settings)
        prometheus = Prometheus([harness.exporter.port], rules=[], release=release, features=features, scrape=scrape)
        services.callback(prometheus.kill)
        prometheus.ready()
        wait_until(lambda: prometheus.instant("up == 1"), 20, "a scrape")
        return harness, prometheus

    return start


@pytest.fixture(scope="session")
def pki():
    """A certificate authority for brokers and their clients."""
    return certificates()
