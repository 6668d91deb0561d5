"""Fixtures of all system tests. Each test starts what it needs and stops it; the brokers are real."""

import collections
import contextlib
import itertools
import os
import random
import re
import uuid

import pytest

from support import events as ev
from support import matrix, processes, releases
from support.exporter import BINARY, Exporter
from support.exposition import EXECUTING, MARKER
from support.processes import wait_until
from support.proxy import Proxy
from support.publish import Publisher
from support.rabbitmq import RabbitMQ
from support.redis import Redis
from support.worker import Worker


def pytest_addoption(parser):
    parser.addoption(
        "--parity-seeds", type=int, default=3, help="random streams for each test that takes any, and broker"
    )
    parser.addoption("--parity-seed", type=int, help="this one stream only: to repeat a failure")
    parser.addoption("--outage", type=float, default=5, help="for how many seconds brokers are away")
    parser.addoption("--sustained", type=float, default=2, help="seconds of as many events as the machine can send")
    parser.addoption("--sustained-rate", type=float, help="so many events a second instead, all of which must count")
    parser.addoption("--names", type=int, default=200_000, help="distinct task names; the long form is 10 million")
    parser.addoption("--kills", type=int, default=8, help="SIGKILLs of a persistent exporter; the long form is 50")
    parser.addoption("--faults", type=int, default=12, help="random faults under load; the long form is 200")
    parser.addoption("--fault-seed", type=int, help="these faults: to repeat a failure")
    parser.addoption("--all-servers", action="store_true", help="run in full on every release of every server")
    parser.addoption("--server", action="append", help="run in full on this release alone, for example valkey-9.1")
    parser.addoption("--matrix", help="write the table of releases and test files to this file")


def pytest_configure(config):
    config.addinivalue_line("markers", "every_release: the test also runs on other releases, see support/releases.py")
    config.addinivalue_line("markers", "short_form: the test is in the short form, which always runs on the newest")
    config.addinivalue_line("markers", "quorum: the test also runs where quorum is the default queue type")
    if hasattr(config, "workerinput"):
        config.first_seed = config.workerinput["first_seed"]
    else:
        config.first_seed = random.SystemRandom().randrange(10**9)
        if not os.access(BINARY, os.X_OK):
            pytest.exit(f"no exporter at {BINARY}: build it, or name it in FLOWER_EXPORTER_BIN", returncode=2)
        known = {release.id for release in [*(r for family in releases.releases().values() for r in family)]}
        known |= {release.id for release in releases.with_quorum(releases.releases()["rabbitmq"])}
        if unknown := set(config.getoption("--server") or ()) - known:
            pytest.exit(f"--server {', '.join(unknown)}: not here; there are {', '.join(sorted(known))}", returncode=2)
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


#: Fixtures that stand for a release, and the families that each may come from.
RELEASES = {
    "broker_release": ["redis", "rabbitmq"],
    "redis_release": ["redis"],
    "rabbitmq_release": ["rabbitmq"],
    "prometheus_release": ["prometheus"],
}


def parametrize_releases(metafunc):
    """A test runs once for each release. One that takes two servers takes the n-th of each, or the last there is."""
    wanted = [name for name in RELEASES if name in metafunc.fixturenames]
    chosen = [[one for family in RELEASES[name] for one in chosen_releases(metafunc, family)] for name in wanted]
    if any(chosen):
        chosen = [found or [releases.own(RELEASES[name][0])] for name, found in zip(wanted, chosen)]
        rows = [[found[min(n, len(found) - 1)] for found in chosen] for n in range(max(map(len, chosen)))]
    else:
        rows = [[None] * len(wanted)]  # deselected
    if wanted:
        # Fixtures of a whole module may depend on a Prometheus.
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
    """Every virtual host of the run is made as RabbitMQ boots: one for each test that wants one, and one to share."""
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
    """A failure shows the last words of the processes that the test had started."""
    report = (yield).get_result()
    if report.failed:
        for process in processes.started:
            text = process.log()
            report.sections.append((f"{process.name} ({process.pid})", text[-6000:]))


@pytest.fixture(autouse=True)
def _forget_processes():
    yield
    processes.started.clear()


class Lab(contextlib.ExitStack):
    """What one test has running, on the releases that it tests. Ends it all in reverse; an exporter must end well."""

    def __init__(self, tested=()):
        super().__init__()
        self.tested = {release.family: release for release in tested}

    def redis(self, **options):
        server = Redis(release=self.tested.get("redis"), **options)
        self.callback(server.stop)
        return server

    def rabbitmq(self, **options):
        """A node of the test's own, for tests that stop it."""
        server = RabbitMQ(release=self.tested.get("rabbitmq"), **options)
        self.callback(server.stop)
        return server

    def exporter(self, broker=None, settings=None, *, ready=True, terminate=True, **options):
        exporter = Exporter(broker, settings, **options)
        self.callback(exporter.kill)
        if terminate:
            self.callback(exporter.terminate)
        if ready:
            exporter.ready() if broker else exporter.listening()
        return exporter

    def worker(self, broker, *args, **options):
        worker = Worker(broker, *args, **options)
        self.callback(worker.kill)
        return worker

    def publisher(self, broker, exchange="celeryev"):
        return self.enter_context(Publisher(broker, exchange))

    def proxy(self, broker):
        """A path to the broker that can fail."""
        proxy = Proxy(broker)
        self.callback(proxy.close)
        return proxy

    def rig(self, broker, settings=None, **options):
        return Rig(self, broker, settings, **options)


class Rig:
    """An exporter, and a publisher of events to it: what is played has been read when `play` returns.

    The exporter may take another `path` to the broker; the publisher is always right at it.
    """

    def __init__(self, lab, broker, settings=None, *, path=None, **options):
        self.exchange = f"celeryev-{uuid.uuid4().hex[:12]}"
        settings = {**(settings or {})}
        settings["events"] = {"exchange": self.exchange, **settings.get("events", {})}
        self.exporter = lab.exporter(path or broker, settings, **options)
        self.publisher = lab.publisher(broker, self.exchange)
        self.numbers = itertools.count(1000)
        self.play()

    def metrics(self):
        return self.exporter.metrics().without_marker()

    def play(self, *items, deadline=20):
        """Publishes events (or lists of them: batches; functions are called) and returns the samples after them all."""
        for item in items:
            if callable(item):
                item()
            else:
                self.publisher.send(item)
        number = self.send_marker()
        self.exporter.wait_for(lambda _: number in self.markers_read(), deadline, "the marker is read")
        return self.metrics()

    def settle(self, deadline=60):
        """Waits until everything sent before has been read or lost: sends markers until one of them is read.

        On Redis a message is lost while the exporter reconnects and while its buffer is full. After a flood either may
        still be so although the exporter is ready and its buffer was empty a moment ago: what the server or the kernel
        holds for it comes first.
        """
        sent = set()

        def read():
            sent.add(self.send_marker())
            return sent & self.markers_read()

        wait_until(read, deadline, lambda: f"one of {len(sent)} markers is read\n{self.exporter.log()}")

    def send_marker(self):
        number = next(self.numbers)
        self.publisher.send(ev.marker(number))
        return number

    def markers_read(self):
        """Where all names are taken, the marker's executing tasks are those of (other)."""
        series = re.compile(rf'^{EXECUTING}{{worker="(?:{MARKER}|\(other\))"}} (\d+)', re.M)
        return set(map(int, series.findall(self.exporter.text())))


@pytest.fixture
def lab(request):
    with Lab(tested_releases(request.node)) as lab:
        yield lab


class Shared(contextlib.ExitStack):
    """Servers that several tests use: one of each release and purpose, started when the first test asks for it."""

    def __init__(self, vhosts):
        super().__init__()
        self.vhosts, self.servers = vhosts, {}

    def get(self, release, purpose="", start=None):
        key = release.id, purpose
        if key not in self.servers:
            self.servers[key] = (start or self.start)(self.enter_context(Lab([release])))
        return self.servers[key]

    def start(self, lab):
        [release] = lab.tested.values()
        if release.family == "redis":
            return lab.redis()
        return lab.rabbitmq(vhosts=1 + self.vhosts[release.id]).wait()


@pytest.fixture(scope="session")
def session_lab():
    """For what the tests of a module share."""
    with Lab() as lab:
        yield lab


@pytest.fixture(scope="session")
def shared(pytestconfig):
    with Shared(pytestconfig.vhosts) as shared:
        yield shared


@pytest.fixture(scope="session")
def shared_redis(shared):
    return shared.get(releases.own("redis"))


@pytest.fixture(scope="session")
def rabbitmq_node(shared):
    """The node of Debian's own release that tests share."""
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
def broker(lab, shared, broker_release):
    """A broker that no other test uses: a separate Redis, or a virtual host."""
    return lab.redis() if broker_release.family == "redis" else shared.get(broker_release).vhost()


@pytest.fixture
def vhost(shared, rabbitmq_release):
    return shared.get(rabbitmq_release).vhost()


@pytest.fixture
def redis(lab, redis_release):
    return lab.redis()


@pytest.fixture
def rig(lab, shared_redis):
    """For what does not depend on the broker: a fresh exporter on an event exchange of its own."""
    return lab.rig(shared_redis)
