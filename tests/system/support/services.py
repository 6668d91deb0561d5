"""The services that a test starts: brokers, exporters and workers. A harness publishes events to an exporter."""

import contextlib
import itertools
import re
import uuid

from . import events as ev
from .exporter import Exporter
from .exposition import EXECUTING, MARKER
from .processes import wait_until
from .proxy import Proxy
from .publish import Publisher
from .rabbitmq import RabbitMQ
from .redis import Redis
from .worker import Worker


class Services(contextlib.ExitStack):
    """The running services of one test, on the releases that it tests.

    They are stopped in reverse order, and each exporter must exit with code 0.
    """

    def __init__(self, tested=()):
        super().__init__()
        self.tested = {release.family: release for release in tested}

    def redis(self, **options):
        server = Redis(release=self.tested.get("redis"), **options)
        self.callback(server.stop)
        return server

    def rabbitmq(self, **options):
        """A separate node, for tests that stop it."""
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
        """A network path to the broker that can fail."""
        proxy = Proxy(broker)
        self.callback(proxy.close)
        return proxy

    def harness(self, broker, settings=None, **options):
        return Harness(self, broker, settings, **options)


class Harness:
    """An exporter, and a publisher of events to it. When `publish` returns, the exporter has read the events.

    The exporter may take another `path` to the broker; the publisher always connects to the broker itself.
    """

    def __init__(self, services, broker, settings=None, *, path=None, **options):
        self.exchange = f"celeryev-{uuid.uuid4().hex[:12]}"
        settings = {**(settings or {})}
        settings["events"] = {"exchange": self.exchange, **settings.get("events", {})}
        self.exporter = services.exporter(path or broker, settings, **options)
        self.publisher = services.publisher(broker, self.exchange)
        self.numbers = itertools.count(1000)
        self.publish()

    def metrics(self):
        return self.exporter.metrics().without_marker()

    def publish(self, *items, deadline=20):
        """Publishes events and lists of events (batches), calls functions, and returns the samples after all of them."""
        for item in items:
            if callable(item):
                item()
            else:
                self.publisher.send(item)
        number = self.send_marker()
        self.exporter.wait_for(lambda _: number in self.markers_read(), deadline, "the marker is read")
        return self.metrics()

    def settle(self, deadline=60):
        """Waits until every earlier message is read or lost: publishes markers until one of them is read.

        On Redis a message is lost while the exporter reconnects and while its buffer is full. After a flood this can
        happen even if the exporter is ready and its buffer was empty a moment ago, because the server and the kernel
        still hold earlier messages.
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
        """If the limit of names is reached, the marker's executing tasks are those of (other)."""
        series = re.compile(rf'^{EXECUTING}{{worker="(?:{MARKER}|\(other\))"}} (\d+)', re.M)
        return set(map(int, series.findall(self.exporter.text())))


class SharedServers(contextlib.ExitStack):
    """Servers that several tests use: one for each release and purpose, started when the first test requests it."""

    def __init__(self, vhosts):
        super().__init__()
        self.vhosts, self.servers = vhosts, {}

    def get(self, release, purpose="", start=None):
        key = release.id, purpose
        if key not in self.servers:
            self.servers[key] = (start or self.start)(self.enter_context(Services([release])))
        return self.servers[key]

    def start(self, services):
        [release] = services.tested.values()
        if release.family == "redis":
            return services.redis()
        return services.rabbitmq(vhosts=1 + self.vhosts[release.id]).wait()
