"""Fixtures of all system tests. Each test starts what it needs and stops it; the brokers are real."""

import contextlib
import itertools
import os
import random
import re
import uuid

import pytest

from support import events as ev
from support import processes
from support.exporter import BINARY, Exporter
from support.exposition import MARKER
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


def pytest_configure(config):
    if hasattr(config, "workerinput"):
        config.first_seed = config.workerinput["first_seed"]
    else:
        config.first_seed = random.SystemRandom().randrange(10**9)
        if not os.access(BINARY, os.X_OK):
            pytest.exit(f"no exporter at {BINARY}: build it, or name it in FLOWER_EXPORTER_BIN", returncode=2)


@pytest.hookimpl(optionalhook=True)
def pytest_configure_node(node):
    """With pytest-xdist, all workers must collect the same tests."""
    node.workerinput["first_seed"] = node.config.first_seed


def pytest_report_header(config):
    return f"exporter: {BINARY}; first parity seed: {config.first_seed}"


def pytest_generate_tests(metafunc):
    if "seed" in metafunc.fixturenames:
        one, config = metafunc.config.getoption("--parity-seed"), metafunc.config
        count = config.getoption("--parity-seeds")
        metafunc.parametrize("seed", [one] if one is not None else range(config.first_seed, config.first_seed + count))


def pytest_collection_modifyitems(config, items):
    """Every virtual host of the run is made as RabbitMQ boots: one for each test that wants one, and one to share."""
    config.vhosts = 1 + sum("rabbitmq" in item.name or "vhost" in item.fixturenames for item in items)


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
    """What one test has running. Ends it all in reverse; an exporter must end well."""

    def redis(self, **options):
        server = Redis(**options)
        self.callback(server.stop)
        return server

    def rabbitmq(self, **options):
        """A node of the test's own, for tests that stop it."""
        server = RabbitMQ(**options)
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
        number = next(self.numbers)
        self.publisher.send(ev.marker(number))
        # Where all names are taken, the marker's executing tasks are those of (other).
        read = f'flower_worker_number_of_currently_executing_tasks{{worker="(?:{MARKER}|\\(other\\))"}} {number}\\b'
        self.exporter.wait_for(lambda m: re.search(read, self.exporter.text()), deadline, "the marker is read")
        return self.metrics()


@pytest.fixture
def lab(request):
    with Lab() as lab:
        yield lab


@pytest.fixture(scope="session")
def shared():
    with Lab() as lab:
        yield lab


@pytest.fixture(scope="session")
def shared_redis(shared):
    return shared.redis()


@pytest.fixture(scope="session")
def rabbitmq_node(shared, pytestconfig):
    return shared.rabbitmq(vhosts=pytestconfig.vhosts).wait()


@pytest.fixture(params=["redis", "rabbitmq"])
def broker(request):
    """A broker that nobody else uses: a Redis of one's own, or a virtual host."""
    if request.param == "redis":
        return request.getfixturevalue("lab").redis()
    return request.getfixturevalue("rabbitmq_node").vhost()


@pytest.fixture
def vhost(rabbitmq_node):
    return rabbitmq_node.vhost()


@pytest.fixture
def redis(lab):
    return lab.redis()


@pytest.fixture
def rig(lab, shared_redis):
    """For what does not depend on the broker: a fresh exporter on an event exchange of its own."""
    return lab.rig(shared_redis)
