"""Every way to lose a broker, and what must hold once it is back. Broker restarts are in test_recovery.py."""

import os
import re
import signal
import time

import pytest

from support import events as ev
from support.events import W
from support.exposition import EVENTS, EXECUTING, ONLINE, PREFETCHED, RUNTIME
from support.processes import directory, wait_until

pytestmark = [pytest.mark.every_release, pytest.mark.quorum]

RECONNECT_MAX = 2
#: On RabbitMQ each side closes the connection after two to three missed heartbeats.
SHORT_TIMEOUTS = {"broker": {"amqp": {"heartbeat": "1s"}, "connect_timeout": "1s"}}
#: A worker that goes offline before the outage and comes back during it.
V = "v@tests"


class Outage:
    """An exporter that has counted some events before the outage of its broker."""

    def __init__(self, services, broker, settings=None, **options):
        self.services, self.broker = services, broker
        settings = {**(settings or {})}
        settings["broker"] = {"reconnect_backoff_max": f"{RECONNECT_MAX}s", **settings.get("broker", {})}
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
        return self.exporter.log().count("subscribed to")

    def assert_not_ready(self, deadline=5):
        """The exporter is not ready, but alive and serving its metrics."""
        wait_until(lambda: self.exporter.healthz(ready=True)[0] == 503, deadline, self.exporter.log)
        assert self.exporter.healthz()[0] == 200
        assert self.harness.metrics().total(EVENTS) == self.before.total(EVENTS)

    def assert_recovered(self, subscriptions=2, deadline=RECONNECT_MAX + 1, broker=None):
        """After the outage: subscribed soon, counters kept, sets cleared; one heartbeat corrects the gauges."""
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
def test_reconnects_after_connections_end(services, broker, how):
    """Connections end and several attempts fail. The exporter reconnects soon after the path is restored."""
    path = services.proxy(broker)
    outage = Outage(services, broker, path=path)
    path.drop()
    getattr(path, how)()
    outage.assert_not_ready()
    attempts = path.attempts
    wait_until(lambda: path.attempts >= attempts + 3, 10, "attempts with the maximum backoff")
    outage.harness.publisher.send(ev.received("lost"))
    path.resume()
    outage.assert_recovered()


def test_backoff_is_reset_by_received_events(services, broker):
    """Not by a mere connect or subscription: a broker that drops connections is not flooded with attempts."""
    path = services.proxy(broker)
    outage = Outage(services, broker, {"broker": {"reconnect_backoff_max": "4s"}}, path=path)

    def seconds_until(condition):
        started = time.monotonic()
        path.cut()
        wait_until(condition, 10, outage.exporter.log)
        return time.monotonic() - started

    def seconds_disconnected():
        count = outage.subscriptions() + 1
        return seconds_until(lambda: outage.subscriptions() == count)

    path.drop()
    attempts = path.attempts + 4
    # Pauses of 0.25, 0.5, 1 and 2 s, with jitter down to half of each.
    assert 1.8 < seconds_until(lambda: path.attempts >= attempts) < 5
    path.resume()
    outage.exporter.ready(4 + 1)
    assert 2 < seconds_disconnected() < 4 + 1, "no events received"
    outage.harness.publish()
    assert seconds_disconnected() < 2, "events received"


def test_unanswered_attempt_times_out(services, broker):
    """The attempt stalls on a path that no longer forwards it. The next one starts within `reconnect_backoff_max`."""
    path = services.proxy(broker)
    outage = Outage(services, broker, {"broker": {"connect_timeout": f"{RECONNECT_MAX}s"}}, path=path)
    path.drop()
    path.cut()
    for attempts in (3, 1):
        wanted = path.attempts + attempts
        wait_until(lambda: path.attempts >= wanted, 10, "attempts with the maximum backoff")  # noqa: B023
        path.stall()
    path.resume_for_new_connections()
    outage.assert_recovered()


def test_stalled_paths_are_detected_within_30_seconds(services, redis, vhost):
    """Half-open connections, with default settings. All cases run concurrently because they take long."""
    defaults = {"broker": {"reconnect_backoff_max": "5s"}}
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
def test_short_stall_loses_nothing(services, broker, inward, outward):
    """Delayed events are counted, and the connection stays the same."""
    path = services.proxy(broker)
    outage = Outage(services, broker, path=path)
    path.stall(inward, outward)
    outage.harness.publisher.send([ev.received(f"{n}") for n in range(100)])
    wait_until(lambda: path.held_bytes, 5, "data is delayed")
    if inward:
        assert outage.harness.metrics().events("received", W) == 2
        path.resume()
    after = outage.exporter.wait_for(lambda m: m.events("received", W) == 102, 5)
    assert after.one(PREFETCHED, worker=W, task="add") == 102
    path.resume()
    assert outage.harness.publish().events("received", W) == 102 and outage.subscriptions() == 1


def test_stalled_outgoing_path_is_an_outage(services, vhost):
    """Events still arrive until the broker closes the connection because it receives no heartbeats."""
    path = services.proxy(vhost)
    outage = Outage(services, vhost, SHORT_TIMEOUTS, path=path)
    path.stall(inward=False)
    outage.assert_not_ready()
    path.resume()
    outage.assert_recovered()


def test_broker_that_only_sends_heartbeats_times_out(services, vhost):
    """It sends heartbeats but no reply: the exporter disconnects after 15 s, or three heartbeats."""
    path = services.proxy(vhost)
    outage = Outage(services, vhost, SHORT_TIMEOUTS, path=path)
    path.stall()
    end = time.monotonic() + 15 + 5
    while outage.exporter.healthz(ready=True)[0] == 200:
        assert time.monotonic() < end, outage.exporter.log()
        path.send_to_exporter(b"\x08\0\0\0\0\0\0\xce")
        time.sleep(0.2)
    assert "broker did not respond within 15 s" in outage.exporter.log()
    path.resume_for_new_connections()
    outage.assert_recovered()


def test_stops_in_time_on_a_stalled_path(services, broker):
    """SIGTERM stops it in time although the broker does not respond when it disconnects."""
    path = services.proxy(broker)
    outage = Outage(services, broker, path=path)
    path.stall()
    outage.exporter.terminate()


def test_frozen_rabbitmq_is_an_outage(services, vhost):
    """After SIGSTOP it neither closes connections nor responds, also to new ones. For Redis see test_recovery.py."""
    outage = Outage(services, vhost, SHORT_TIMEOUTS)
    node = vhost.server.processes[-1]
    os.killpg(node.pid, signal.SIGSTOP)
    try:
        outage.assert_not_ready(5)
        wait_until(lambda: "broker did not respond within" in outage.exporter.log(), 5, outage.exporter.log)
    finally:
        os.killpg(node.pid, signal.SIGCONT)
    outage.assert_recovered()


@pytest.mark.short_form
def test_rabbitmq_memory_alarm_is_no_outage(services, vhost):
    """RabbitMQ blocks all publishers, including the exporter and workers. No worker times out."""
    limits = {"state": {"worker_timeout": "5s"}, "events": {"enable_interval": "500ms"}}
    harness = services.harness(vhost, {"broker": {"amqp": {"heartbeat": "5s"}}, **limits})
    assert harness.publish(ev.heartbeat(freq=5), ev.received("a")).one(PREFETCHED, worker=W, task="add") == 1
    vhost.server.ctl("set_vm_memory_high_watermark", "0.000001")
    try:
        wait_until(lambda: "RabbitMQ alarm: publishers are blocked" in harness.exporter.log(), 10, harness.exporter.log)
        end = time.monotonic() + 15 + 3  # longer than the response timeout
        while time.monotonic() < end:
            assert harness.exporter.healthz(ready=True)[0] == 200 and harness.metrics().one(ONLINE, worker=W) == 1
            time.sleep(0.2)
    finally:
        vhost.server.ctl("set_vm_memory_high_watermark", "0.4")
    assert harness.publish(ev.received("b")).one(PREFETCHED, worker=W, task="add") == 2
    assert harness.exporter.log().count("subscribed to") == 1


def test_killed_broadcast_connection_is_restored(services, redis):
    """The exporter reopens the second connection to Redis for the next broadcast, and the subscription is not affected."""
    path = services.proxy(redis)
    outage = Outage(services, redis, {"events": {"enable_interval": "500ms"}}, path=path)
    wait_until(lambda: path.attempts == 2, 5, "both connections")
    redis.client().execute_command("CLIENT", "KILL", "TYPE", "normal", "SKIPME", "yes")
    wait_until(lambda: path.attempts == 3, 2, outage.exporter.log)
    outage.harness.publisher = services.publisher(redis, outage.harness.exchange)
    assert outage.harness.publish(ev.received("d")).one(PREFETCHED, worker=W, task="add") == 3
    assert outage.subscriptions() == 1


@pytest.mark.short_form
def test_connection_closed_by_an_administrator_is_restored(services, vhost):
    outage = Outage(services, vhost)
    vhost.server.ctl("close_all_connections", "--vhost", vhost.vhost, "maintenance")
    outage.assert_recovered()
    assert "maintenance" in outage.exporter.log(), "the log contains the server's reason"


@pytest.mark.short_form
def test_deleted_exclusive_queue_is_declared_again(services, vhost):
    """An administrator can delete even an exclusive queue."""
    outage = Outage(services, vhost)
    queue = re.search(r"subscribed to queue (\S+) bound", outage.exporter.log())[1]
    vhost.server.ctl("delete_queue", "-p", vhost.vhost, queue)
    outage.assert_recovered()
    assert "consumer cancelled (queue deleted)" in outage.exporter.log()


@pytest.mark.short_form
def test_deleted_event_exchange_is_declared_again(services, vhost):
    """RabbitMQ does not notify consumers. The exporter declares and binds it again within `enable_interval`."""
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
    assert harness.exporter.log().count("subscribed to") == 1, "the connection stays the same"


def test_url_file_is_read_on_every_attempt(services, broker):
    """The password in `url_file` becomes wrong, and is corrected later."""
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
def test_fails_over_to_the_next_broker(services, broker):
    """The first broker fails and the second one is used, with cleared sets; and the other way around later."""
    second = services.redis() if broker.name == "redis" else broker  # two nodes of a RabbitMQ cluster have the same virtual hosts
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
