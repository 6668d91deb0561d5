"""Every way to lose a broker, and what must be true once it is back. Restarts are in test_recovery.py."""

import contextlib
import os
import re
import signal
import socket
import time

import pytest

from support import events as ev
from support.events import W
from support.exposition import EVENTS, EXECUTING, ONLINE, PREFETCHED, RUNTIME
from support.processes import directory, wait_until

pytestmark = [pytest.mark.every_release, pytest.mark.quorum]

RECONNECT_MAX = 2
#: On RabbitMQ each side gives up a silent peer after two to three heartbeats.
IMPATIENT = {"broker": {"amqp": {"heartbeat": "1s"}, "connect_timeout": "1s"}}
#: A worker that goes offline before the outage, and comes back in it.
V = "v@tests"


class Outage:
    """An exporter that has counted some events; then something happens to its broker, and it is `over` again."""

    def __init__(self, services, broker, settings=None, **options):
        self.services, self.broker = services, broker
        settings = {**(settings or {})}
        settings["broker"] = {"reconnect_max": f"{RECONNECT_MAX}s", **settings.get("broker", {})}
        self.harness = services.harness(broker, settings, **options)
        self.exporter = self.harness.exporter
        self.before = self.harness.publish(
            ev.heartbeat(active=5),
            ev.online(V),
            ev.offline(V),
            ev.received("a"),
            ev.received("b"),
            ev.succeeded("c", runtime=1.5),
        )
        assert self.before.one(ONLINE, worker=V) == 0
        assert self.before.one(PREFETCHED, worker=W, task="add") == 2

    def subscriptions(self):
        return self.exporter.log().count("listening for events")

    def assert_not_ready(self, deadline=5):
        """It says that it has no broker, and serves what it knows."""
        wait_until(lambda: self.exporter.healthz(ready=True)[0] == 503, deadline, self.exporter.log)
        assert self.exporter.healthz()[0] == 200
        assert self.harness.metrics().total(EVENTS) == self.before.total(EVENTS)

    def assert_recovered(self, subscriptions=2, deadline=RECONNECT_MAX + 1, broker=None):
        """The broker is back: subscribed soon, counters kept, sets emptied; one heartbeat puts the gauges right."""
        wait_until(
            lambda: self.subscriptions() >= subscriptions and self.exporter.healthz(ready=True)[0] == 200,
            deadline,
            lambda: f"subscribed again\n{self.exporter.log()}",
        )
        self.harness.publisher = self.services.publisher(broker or self.broker, self.harness.exchange)
        after = self.harness.publish(ev.heartbeat(active=3), ev.heartbeat(V, active=1))
        assert (after.one(ONLINE, worker=W), after.one(EXECUTING, worker=W)) == (1, 3)
        assert (after.one(ONLINE, worker=V), after.one(EXECUTING, worker=V)) == (1, 1)
        assert after.one(PREFETCHED, worker=W, task="add") == 0
        kept = {key: value for key, value in self.before.items() if key[0] == EVENTS or key[0].startswith(RUNTIME)}
        assert kept.items() <= after.items() and after.total(EVENTS) == self.before.total(EVENTS)
        assert self.harness.publish(ev.received("d", at=9)).one(PREFETCHED, worker=W, task="add") == 1


@pytest.mark.short_form
@pytest.mark.parametrize("how", ["cut", "reset"])
def test_path_ends(services, broker, how):
    """Connections end, and many attempts fail: back soon all the same."""
    path = services.proxy(broker)
    outage = Outage(services, broker, path=path)
    path.drop()
    getattr(path, how)()
    outage.assert_not_ready()
    attempts = path.attempts
    wait_until(lambda: path.attempts >= attempts + 3, 10, "attempts come as seldom as they will")
    outage.harness.publisher.send(ev.received("lost"))
    path.resume()
    outage.assert_recovered()


def test_backoff_is_reset_by_health(services, broker):
    """Not by a bare connect: who accepts and drops is not hammered, nor who drops what has subscribed."""
    path = services.proxy(broker)
    outage = Outage(services, broker, {"broker": {"reconnect_max": "4s"}}, path=path)

    def seconds_until(condition):
        started = time.monotonic()
        path.cut()
        wait_until(condition, 10, outage.exporter.log)
        return time.monotonic() - started

    def blind():
        count = outage.subscriptions() + 1
        return seconds_until(lambda: outage.subscriptions() == count)

    path.drop()
    attempts = path.attempts + 4
    # Pauses of 0.25, 0.5, 1 and 2 s, or down to half of each.
    assert 1.8 < seconds_until(lambda: path.attempts >= attempts) < 5
    path.resume()
    outage.exporter.ready(4 + 1)
    assert 2 < blind() < 4 + 1, "it has heard nothing"
    outage.harness.publish()
    assert blind() < 2, "it has heard events"


def test_attempt_that_is_never_answered(services, broker):
    """It is waiting on a path that has forgotten it: the next begins `reconnect_max` after it, at the latest."""
    path = services.proxy(broker)
    outage = Outage(services, broker, {"broker": {"connect_timeout": f"{RECONNECT_MAX}s"}}, path=path)
    path.drop()
    path.cut()
    for attempts in (3, 1):
        wanted = path.attempts + attempts
        wait_until(lambda: path.attempts >= wanted, 10, "attempts come as seldom as they will")  # noqa: B023
        path.stall()
    path.resume_for_new_connections()
    outage.assert_recovered()


def test_silent_paths(services, redis, vhost):
    """Half-open, and not a byte comes: noticed within 30 s, with default settings. All at once, as it takes long."""
    defaults = {"broker": {"reconnect_max": "5s"}}
    both, inward, outward = (True, True), (True, False), (False, True)
    outages = []
    for broker, stalled in [(redis, both), (redis, inward), (redis, outward), (vhost, both), (vhost, inward)]:
        path = services.proxy(broker)
        outages.append((path, Outage(services, broker, defaults, path=path)))
        path.stall(*stalled)
    end = time.monotonic() + 30
    for _, outage in outages:
        outage.assert_not_ready(end - time.monotonic())
    for path, outage in outages:
        path.resume()
        outage.assert_recovered(deadline=5 + 1)


@pytest.mark.short_form
@pytest.mark.parametrize("inward, outward", [(True, True), (True, False), (False, True)], ids=["both", "in", "out"])
def test_short_stall_costs_nothing(services, broker, inward, outward):
    """What waited on the way is counted, and the connection is still the same."""
    path = services.proxy(broker)
    outage = Outage(services, broker, path=path)
    path.stall(inward, outward)
    outage.harness.publisher.send([ev.received(f"{n}") for n in range(100)])
    wait_until(lambda: path.held_bytes, 5, "something waits")
    if inward:
        assert outage.harness.metrics().events("received", W) == 2
        path.resume()
    after = outage.exporter.wait_for(lambda m: m.events("received", W) == 102, 5)
    assert after.one(PREFETCHED, worker=W, task="add") == 102
    path.resume()
    assert outage.harness.publish().events("received", W) == 102 and outage.subscriptions() == 1


def test_broker_that_no_longer_hears_us(services, vhost):
    """Its events still come, until it gives us up for want of our heartbeats."""
    path = services.proxy(vhost)
    outage = Outage(services, vhost, IMPATIENT, path=path)
    path.stall(inward=False)
    outage.assert_not_ready()
    path.resume()
    outage.assert_recovered()


def test_broker_that_only_hums(services, vhost):
    """Its heartbeats come and nothing else, no answer either: given up after 15 s, or three heartbeats."""
    path = services.proxy(vhost)
    outage = Outage(services, vhost, IMPATIENT, path=path)
    path.stall()
    end = time.monotonic() + 15 + 5
    while outage.exporter.healthz(ready=True)[0] == 200:
        assert time.monotonic() < end, outage.exporter.log()
        path.send_to_exporter(b"\x08\0\0\0\0\0\0\xce")
        time.sleep(0.2)
    assert "no answer from the broker for 15 s" in outage.exporter.log()
    path.resume_for_new_connections()
    outage.assert_recovered()


def test_stop_on_a_silent_path(services, broker):
    """SIGTERM ends it in time, though nobody answers when it takes its leave."""
    path = services.proxy(broker)
    outage = Outage(services, broker, path=path)
    path.stall()
    outage.exporter.terminate()


def test_frozen_rabbitmq(services, vhost):
    """SIGSTOP: it neither closes nor answers; nor are new connections answered. Redis' is in test_recovery.py."""
    outage = Outage(services, vhost, IMPATIENT)
    node = vhost.server.processes[-1]
    os.killpg(node.pid, signal.SIGSTOP)
    try:
        outage.assert_not_ready(5)
        wait_until(lambda: "no answer from the broker" in outage.exporter.log(), 5, outage.exporter.log)
    finally:
        os.killpg(node.pid, signal.SIGCONT)
    outage.assert_recovered()


@pytest.mark.short_form
def test_rabbitmq_short_of_memory(services, vhost):
    """It blocks all that publish, us too, and answers none of them: no outage, and no worker is silent of its own will."""
    limits = {"state": {"worker_timeout": "5s"}, "events": {"enable_interval": "500ms"}}
    harness = services.harness(vhost, {"broker": {"amqp": {"heartbeat": "5s"}}, **limits})
    assert harness.publish(ev.heartbeat(freq=5), ev.received("a")).one(PREFETCHED, worker=W, task="add") == 1
    vhost.server.ctl("set_vm_memory_high_watermark", "0.000001")
    try:
        wait_until(lambda: "short of memory or disk" in harness.exporter.log(), 10, harness.exporter.log)
        end = time.monotonic() + 15 + 3  # of no answer, were it an outage
        while time.monotonic() < end:
            assert harness.exporter.healthz(ready=True)[0] == 200 and harness.metrics().one(ONLINE, worker=W) == 1
            time.sleep(0.2)
    finally:
        vhost.server.ctl("set_vm_memory_high_watermark", "0.4")
    assert harness.publish(ev.received("b")).one(PREFETCHED, worker=W, task="add") == 2
    assert harness.exporter.log().count("listening for events") == 1


def test_connection_for_broadcasts_is_killed(services, redis):
    """The second connection to Redis is made anew at once, and the subscription does not suffer."""
    path = services.proxy(redis)
    outage = Outage(services, redis, path=path)
    wait_until(lambda: path.attempts == 2, 5, "both connections")
    redis.client().execute_command("CLIENT", "KILL", "TYPE", "normal", "SKIPME", "yes")
    wait_until(lambda: path.attempts == 3, 2, outage.exporter.log)
    outage.harness.publisher = services.publisher(redis, outage.harness.exchange)
    assert outage.harness.publish(ev.received("d")).one(PREFETCHED, worker=W, task="add") == 3
    assert outage.subscriptions() == 1


@pytest.mark.short_form
def test_closed_by_an_administrator(services, vhost):
    outage = Outage(services, vhost)
    vhost.server.ctl("close_all_connections", "--vhost", vhost.vhost, "maintenance")
    outage.assert_recovered()
    assert "maintenance" in outage.exporter.log(), "the log says what the server says"


@pytest.mark.short_form
def test_our_own_queue_is_deleted(services, vhost):
    """Exclusive as it is, an administrator may delete it."""
    outage = Outage(services, vhost)
    queue = re.search(r"on queue (\S+) bound", outage.exporter.log())[1]
    vhost.server.ctl("delete_queue", "-p", vhost.vhost, queue)
    outage.assert_recovered()
    assert "the queue is gone" in outage.exporter.log()


@pytest.mark.short_form
def test_exchange_is_deleted(services, vhost):
    """Nobody tells a consumer: it is declared and bound again within `enable_interval`."""
    harness = services.harness(vhost, {"events": {"enable_interval": "1s"}})
    harness.publish(ev.heartbeat(active=5), ev.received("a"))
    with vhost.connection() as connection:
        connection.channel().exchange_delete(harness.exchange)
    publisher = services.publisher(vhost, harness.exchange)

    def counted():
        publisher.send(ev.heartbeat(active=3))
        return harness.metrics().one(EXECUTING, worker=W) == 3

    wait_until(counted, 1 + 1, harness.exporter.log)
    harness.publisher = publisher
    assert harness.publish(ev.received("b")).events("received", W) == 2
    assert harness.exporter.log().count("listening for events") == 1, "the connection is still the same"


def test_credentials_are_put_right(services, broker):
    """`url_file` is read again on every attempt: a password that has become wrong, and right again."""
    if broker.name == "redis":
        broker.password = "p@ss/w:rd%"
        broker.client().config_set("requirepass", broker.password)
    path = services.proxy(broker)
    file = directory("secret") / "url"
    file.write_text(path.url)
    outage = Outage(services, broker, {"broker": {"url_file": str(file)}}, path=path)
    file.write_text(re.sub(":[^:]*@", ":wrong@", path.url))
    path.cut()
    refused = re.compile("WRONGPASS|ACCESS_REFUSED")
    wait_until(lambda: refused.search(outage.exporter.log()), 5, outage.exporter.log)
    outage.assert_not_ready()
    file.write_text(path.url)
    outage.assert_recovered()


@pytest.mark.short_form
def test_master_behind_an_address_is_demoted(services, redis):
    """Events come from a replica, too, but what is published there reaches no worker: the new master is sought."""
    old, new, path = redis, services.redis(), services.proxy(redis)
    with old.client().pubsub() as worker:
        worker.subscribe("/0.celery.pidbox")
        harness = services.harness(old, {"events": {"enable_interval": "200ms"}}, path=path)
        wait_until(lambda: worker.get_message(ignore_subscribe_messages=True, timeout=0.1), 5, "a broadcast")
    path.redirect_to(new)
    old.client().replicaof("127.0.0.1", new.port)
    wait_until(lambda: new.client().pubsub_numpat() == 1, 10, harness.exporter.log)
    assert "the server has become a replica" in harness.exporter.log()
    harness.publisher = services.publisher(new, harness.exchange)
    assert harness.publish(ev.received("b")).events("received", W) == 1


def test_replica_by_choice(services, redis):
    """Its events are counted, and it is not left for a master that nobody named."""
    redis.client().replicaof("127.0.0.1", services.redis().port)
    harness = services.harness(redis, {"events": {"enable_interval": "100ms"}})
    broadcasts = lambda: redis.client().info("commandstats").get("cmdstat_publish", {"calls": 0})["calls"]  # noqa: E731
    before = broadcasts()
    wait_until(lambda: broadcasts() >= before + 5, 10, "broadcasts")
    assert harness.publish(ev.received()).events("received", W) == 1
    assert harness.exporter.log().count("listening for events") == 1


def named(broker):
    """The file of addresses of `broker.test`, the environment that has it read, and the broker's URL by that name."""
    hosts = directory("hosts") / "hosts"
    env = {"LD_PRELOAD": "libnss_wrapper.so", "NSS_WRAPPER_HOSTS": hosts}
    return hosts, env, broker.url.replace("127.0.0.1", "broker.test")


def test_name_that_does_not_resolve_yet(services, broker):
    """Asked for again on every attempt, until it is there."""
    hosts, env, url = named(broker)
    hosts.write_text("")
    os.utime(hosts, (0, 0))  # the library looks at whole seconds to see that it has changed
    settings = {"broker": {"url": url, "reconnect_max": f"{RECONNECT_MAX}s"}}
    exporter = services.exporter(None, settings, env=env)
    wait_until(lambda: "lookup" in exporter.log(), 5, exporter.log)
    assert exporter.healthz()[0] == 200 and exporter.healthz(ready=True)[0] == 503
    hosts.write_text("127.0.0.1 broker.test\n")
    exporter.ready(RECONNECT_MAX + 1)
    services.publisher(broker).send(ev.received())
    exporter.wait_for(lambda m: m.events("received") == 1)


def test_one_of_several_addresses_is_silent(services, broker):
    """The first that the name stands for drops packets; the next one answers."""
    port = int(re.search(r"127\.0\.0\.1:(\d+)/", broker.url)[1])
    hosts, env, url = named(broker)
    hosts.write_text("127.0.0.9 broker.test\n127.0.0.1 broker.test\n")
    with socket.create_server(("127.0.0.9", port), backlog=0), contextlib.ExitStack() as full:
        for _ in range(2):  # a full backlog lets nobody in
            waiting = full.enter_context(socket.socket())
            waiting.setblocking(False)
            waiting.connect_ex(("127.0.0.9", port))
        harness = services.harness(broker, {"broker": {"url": url}}, env=env)
        worker = services.worker(broker, conf={"event_exchange": harness.exchange}).ready()
        wait_until(lambda: "enabled by remote" in worker.log(), 10, worker.log)
        assert harness.publish(ev.received()).events("received", W) == 1


@pytest.mark.short_form
def test_next_of_the_list(services, broker):
    """The first broker dies, the second is used, its sets empty; and back again when that dies, too."""
    second = services.redis() if broker.name == "redis" else broker  # two nodes of a cluster have the same virtual hosts
    paths = [services.proxy(broker), services.proxy(second)]
    outage = Outage(services, broker, {"broker": {"url": ";".join(path.url for path in paths)}}, path=paths[0])
    paths[0].refuse()
    paths[0].cut()
    outage.assert_recovered(broker=second)
    paths[0].resume()
    paths[1].refuse()
    paths[1].cut()
    wait_until(lambda: outage.subscriptions() == 3, RECONNECT_MAX + 1, outage.exporter.log)
    outage.harness.publisher = services.publisher(broker, outage.harness.exchange)
    after = outage.harness.publish(ev.received("e", at=10))
    assert after.one(PREFETCHED, worker=W, task="add") == 1
    assert after.events("received", W) == outage.before.events("received", W) + 2
