"""A broker that is not available: at the start, for a while, or silently."""

import json
import signal
import time

import pytest

from support import events as ev
from support.events import W
from support.exposition import EVENTS, ONLINE, PREFETCHED, RUNTIME
from support.processes import wait_until
from support.publish import envelope
from support.worker import client

pytestmark = pytest.mark.every_release

RECONNECT_MAX = 2


@pytest.fixture
def restartable_broker(services, broker_release):
    """A broker that the test can stop and start."""
    return services.redis() if broker_release.family == "redis" else services.rabbitmq().wait().vhost()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_counting_resumes_after_a_broker_restart(services, restartable_broker, request, number):
    """Counters are kept. During the outage /healthz is 200 and /healthz?ready is 503. Counting resumes within
    reconnect_backoff_max + 1 s.
    """
    harness = services.harness(restartable_broker, {"broker": {"reconnect_backoff_max": f"{RECONNECT_MAX}s"}, "state": {"worker_timeout": 0}})
    before = harness.publish(ev.heartbeat(), ev.received("a"), ev.received("b"), ev.succeeded("c", runtime=1.5))
    assert before.one(PREFETCHED, worker=W, task="add") == 2

    restartable_broker.stop(number)
    wait_until(lambda: harness.exporter.healthz(ready=True)[0] == 503, 5, "not ready")
    end = time.monotonic() + request.config.getoption("--outage")
    while time.monotonic() < end:
        assert harness.exporter.healthz()[0] == 200
        assert harness.exporter.healthz(ready=True)[0] == 503
        assert harness.metrics().total(EVENTS) == before.total(EVENTS)
        time.sleep(0.1)

    restartable_broker.start()
    harness.exporter.ready(RECONNECT_MAX + 1)
    publisher = services.publisher(restartable_broker, harness.exchange)
    publisher.send(ev.received("d", at=9))
    after = harness.exporter.wait_for(lambda m: m.events("received", W) == 3, 2)
    assert after.one(PREFETCHED, worker=W, task="add") == 1, "sets are cleared after a gap"
    assert after.one(ONLINE, worker=W) == 1
    assert after.one(f"{RUNTIME}_sum", worker=W, task="") == 1.5
    assert after.total(EVENTS) == before.total(EVENTS) + 1
    publisher.send(ev.started("a", at=10))
    after = harness.exporter.wait_for(lambda m: m.events("started", W, "add") == 1, 5, "names are remembered")
    assert after.one(PREFETCHED, worker=W, task="add") == 1


def test_exporter_started_before_its_broker(services, restartable_broker):
    """It serves metrics, waits for the broker, and connects."""
    restartable_broker.stop(signal.SIGKILL)
    exporter = services.exporter(None, {"broker": {"url": restartable_broker.url, "reconnect_backoff_max": "1s"}})
    assert exporter.healthz()[0] == 200 and exporter.healthz(ready=True)[0] == 503
    restartable_broker.start()
    exporter.ready(3)
    services.publisher(restartable_broker).send(ev.received())
    exporter.wait_for(lambda m: m.events("received") == 1)


@pytest.mark.short_form
def test_worker_events_resume_after_a_broker_restart(services, restartable_broker):
    """A real worker that sends events only because of broadcasts, after a restart of its broker."""
    worker = services.worker(restartable_broker).ready()
    exporter = services.exporter(restartable_broker, {"broker": {"reconnect_backoff_max": "1s"}, "events": {"enable_interval": "500ms"}})
    with client(restartable_broker) as app:
        wait_until(lambda: "enabled by remote" in worker.log(), 20, worker.log)
        app.send_task("add", (1, 2))
        exporter.wait_for(lambda m: m.events("succeeded", task="add") == 1)
    restartable_broker.stop(signal.SIGKILL)
    wait_until(lambda: exporter.healthz(ready=True)[0] == 503, 5, "not ready")
    restartable_broker.start()
    exporter.ready(10)
    with client(restartable_broker) as app:
        app.send_task("add", (3, 4))
        exporter.wait_for(lambda m: m.events("succeeded", task="add") == 2, 60)


def test_frozen_redis_is_an_outage(services, redis):
    """The server neither closes connections nor responds."""
    harness = services.harness(redis, {"broker": {"reconnect_backoff_max": "1s", "connect_timeout": "1s"}})
    redis.process.send(signal.SIGSTOP)
    wait_until(lambda: harness.exporter.healthz(ready=True)[0] == 503, 60, "not ready")
    assert harness.exporter.healthz()[0] == 200
    redis.process.send(signal.SIGCONT)
    harness.exporter.ready(10)
    assert harness.publish(ev.received()).events("received") == 1


@pytest.mark.short_form
def test_killed_connections_are_restored(services, redis):
    """An administrator or a firewall closes them."""
    harness = services.harness(redis, {"broker": {"reconnect_backoff_max": "1s"}})
    harness.publish(ev.received())
    for kind in ("pubsub", "normal"):
        redis.client().execute_command("CLIENT", "KILL", "TYPE", kind, "SKIPME", "yes")
        wait_until(lambda: redis.client().pubsub_numpat() == 1, 10, "subscribed again")
        harness.exporter.ready(10)
        harness.publisher.connection.release()
        harness.publisher = services.publisher(redis, harness.exchange)
        count = harness.metrics().events("received", W)
        assert harness.publish(ev.received("again", at=count)).events("received", W) == count + 1


@pytest.mark.short_form
def test_disconnect_of_a_slow_subscriber_is_a_gap(services, redis):
    """Redis disconnects a slow subscriber and discards its unread messages, so the sets are cleared.

    The messages have 14 KB: Valkey 9 does not count those above about 16 KB towards the limit.
    """
    redis.client().config_set("client-output-buffer-limit", "pubsub 1mb 0 0")
    harness = services.harness(redis, {"broker": {"reconnect_backoff_max": "1s"}})
    assert harness.publish(ev.received("before")).one(PREFETCHED, worker=W, task="add") == 1
    message = json.dumps(envelope(json.dumps([ev.received(f"{n}") for n in range(40)]), exchange=harness.exchange))
    assert 12_000 < len(message) < 15_000
    client = redis.client()
    harness.exporter.send(signal.SIGSTOP)
    wait_until(
        lambda: not all(client.publish(f"/0.{harness.exchange}/task.multi", message) for _ in range(100)),
        30,
        "the server has disconnected the subscriber",
    )
    harness.exporter.send(signal.SIGCONT)
    wait_until(lambda: redis.client().pubsub_numpat(), 10, "subscribed again")
    harness.exporter.ready(10)
    assert harness.publish(ev.received("after")).one(PREFETCHED, worker=W, task="add") == 1


def test_different_exchange_is_refused(services, vhost):
    """RabbitMQ refuses the declaration (406): not ready, and the log contains the server's error."""
    with vhost.connection() as connection:
        connection.channel().exchange_declare("celeryev", "fanout", durable=True, auto_delete=False)
        exporter = services.exporter(None, {"broker": {"url": vhost.url, "reconnect_backoff_max": "500ms"}})
        wait_until(
            lambda: "celeryev" in exporter.log() and "406" in exporter.log() or "PRECONDITION" in exporter.log(),
            15,
            exporter.log,
        )
        assert exporter.healthz(ready=True)[0] == 503 and exporter.healthz()[0] == 200
        connection.channel().exchange_delete("celeryev")
        exporter.ready(10)


def test_exclusive_queue_properties(services, vhost):
    """The queue is exclusive, bounded in bytes, has no message TTL, and is deleted with the exporter."""
    exporter = services.exporter(vhost)
    columns = "name", "exclusive", "durable", "arguments"
    listed = [
        line for line in vhost.server.ctl("list_queues", "-p", vhost.vhost, *columns).splitlines() if "celeryev" in line
    ]
    [(_, exclusive, _, arguments)] = [line.split("\t") for line in listed]
    assert exclusive == "true"
    assert '{"x-max-length-bytes",268435456}' in arguments and '{"x-expires",60000}' in arguments
    assert "ttl" not in arguments
    exporter.terminate()
    assert "celeryev" not in vhost.server.ctl("list_queues", "-p", vhost.vhost, "name")
