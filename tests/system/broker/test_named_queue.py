"""A named queue on RabbitMQ collects events while the exporter is down, and no event is counted twice."""

import signal
import threading
import time

import pytest

from support import events as ev
from support.events import W
from support.exposition import EVENTS, EXECUTING, ONLINE, PREFETCHED
from support.processes import directory, wait_until

pytestmark = [pytest.mark.every_release, pytest.mark.short_form, pytest.mark.quorum]

QUEUE = {"broker": {"amqp": {"queue": "flower-exporter"}, "reconnect_backoff_max": "1s"}}


def test_events_sent_while_down_are_counted(services, vhost):
    """The next exporter counts them. Events that are already counted are not delivered again."""
    harness = services.harness(vhost, QUEUE)
    assert harness.publish(ev.received("a"), ev.received("b")).events("received", W) == 2
    harness.exporter.terminate()
    for n in range(500):
        harness.publisher.send(ev.received(f"down-{n}"))
    settings = {**QUEUE, "events": {"exchange": harness.exchange}}
    exporter = services.exporter(vhost, settings)
    after = exporter.wait_for(lambda m: m.events("received", W) >= 500)
    assert after.events("received", W) == 500


def test_disconnect_loses_and_duplicates_nothing(services, vhost):
    """RabbitMQ closes the connection repeatedly under load. It redelivers messages that are not acknowledged."""
    harness = services.harness(vhost, QUEUE)
    sent, enough = [0], threading.Event()

    def send():
        publisher = services.publisher(vhost, harness.exchange)
        while not enough.wait(0.002):
            publisher.send([ev.received(f"{sent[0] + k}") for k in range(20)])
            sent[0] += 20

    sender = threading.Thread(target=send)
    sender.start()
    for cuts in range(1, 4):
        vhost.server.close_consumers()
        wait_until(lambda: harness.exporter.log().count("subscribed to") > cuts, 20, "subscribed again")  # noqa: B023
    enough.set()
    sender.join()
    after = harness.exporter.wait_for(lambda m: m.events("received", W) >= sent[0])
    assert after.events("received", W) == sent[0]
    assert after.one(PREFETCHED, worker=W, task="add") == sent[0], "no gap, so the set is complete"
    assert harness.publish(ev.heartbeat()).events("received", W) == sent[0]


def test_overflow_while_down_is_logged(services, vhost):
    """The oldest events are lost, although the exporter empties the queue quickly."""
    amqp = {"queue": "flower-exporter", "queue_max_bytes": "64KiB", "prefetch_count": 2}
    settings = {"broker": {"amqp": amqp}, "events": {"enable_interval": "200ms"}}
    harness = services.harness(vhost, settings)
    harness.exporter.terminate()
    for batch in range(100):
        harness.publisher.send([ev.received(f"{batch}-{n}") for n in range(20)])
    harness.exporter = services.exporter(vhost, {**settings, "events": {**settings["events"], "exchange": harness.exchange}})
    assert 0 < harness.publish().total(EVENTS) < 100 * 20
    wait_until(lambda: "RabbitMQ queue is near broker.amqp.queue_max_bytes" in harness.exporter.log(), 10, harness.exporter.log)


def test_second_exporter_stands_by_and_takes_over(services, vhost):
    """It is not ready, and the log and /healthz say so. Nothing is lost or counted twice when the first one is gone."""
    amqp = {**QUEUE["broker"]["amqp"], "heartbeat": "1s"}
    settings = {"broker": {**QUEUE["broker"], "amqp": amqp}}
    harness = services.harness(vhost, settings)
    harness.publish(ev.received("a"))
    standby = services.exporter(None, {**settings, "broker": {**settings["broker"], "url": vhost.url}, "events": {"exchange": harness.exchange}})
    wait_until(lambda: standby.healthz()[1]["broker"]["state"] == "standby", 3 + 5 + 3, standby.log)
    assert standby.healthz()[0] == 200
    status, health = standby.healthz(ready=True)
    assert status == 503 and "on standby" in health["reason"]
    assert len(standby.log_lines("on standby")) == 1
    assert harness.publish(ev.received("b")).events("received", W) == 2
    assert standby.metrics().events("received", W) == 0
    harness.exporter.kill()
    harness.publisher.send(ev.received("c"))
    standby.ready(5)
    harness.exporter = standby
    assert harness.publish().events("received", W) in (1, 2), "c, and b, which was not acknowledged"


def test_changed_queue_arguments_are_explained(services, vhost):
    """The log explains the server's 406 error and its remedy once."""
    services.exporter(vhost, QUEUE).terminate()
    changed = {"broker": {"amqp": {"queue": "flower-exporter", "queue_max_bytes": "1MiB"}, "reconnect_backoff_max": "200ms"}}
    exporter = services.exporter(None, {"broker": {**changed["broker"], "url": vhost.url}})
    wait_until(lambda: "delete_queue -p VHOST flower-exporter" in exporter.log(), 10, exporter.log)
    assert exporter.healthz(ready=True)[0] == 503
    with vhost.connection() as connection:
        connection.channel().queue_delete("flower-exporter")
    exporter.ready(10)
    assert exporter.log().count("delete_queue") == 1


def test_deleted_queue_is_declared_again(services, vhost):
    """The queue is deleted while it has a consumer. This is a gap."""
    harness = services.harness(vhost, QUEUE)
    assert harness.publish(ev.received("a")).one(PREFETCHED, worker=W, task="add") == 1
    with vhost.connection() as connection:
        connection.channel().queue_delete("flower-exporter")
    wait_until(lambda: harness.exporter.log().count("subscribed to") == 2, 10, harness.exporter.log)
    after = harness.publish(ev.heartbeat())
    assert after.one(PREFETCHED, worker=W, task="add") == 0
    assert after.total(EVENTS) == 1


def test_rabbitmq_restart_is_a_gap(services):
    """A restart empties even a durable queue, so the sets of prefetched tasks are cleared. A disconnect keeps them."""
    vhost = services.rabbitmq().wait().vhost()
    harness = services.harness(vhost, QUEUE)
    assert harness.publish(ev.received("a")).one(PREFETCHED, worker=W, task="add") == 1
    vhost.stop(signal.SIGKILL)
    wait_until(lambda: harness.exporter.healthz(ready=True)[0] == 503, 5, "not ready")
    vhost.start()
    harness.exporter.ready(10)
    harness.publisher = services.publisher(vhost, harness.exchange)
    after = harness.publish(ev.received("b"))
    assert after.one(PREFETCHED, worker=W, task="add") == 1
    assert after.events("received", W) == 2


def test_worker_event_that_is_late_after_a_connect_has_no_effect(services, vhost):
    """RabbitMQ may deliver newer messages first until it notices that the previous connection is gone."""
    harness = services.harness(vhost, QUEUE)
    samples = harness.publish(ev.heartbeat(at=10, active=1), ev.received("a", at=11), ev.offline(at=9), ev.online(at=9))
    assert (samples.one(ONLINE, worker=W), samples.one(EXECUTING, worker=W)) == (1, 1)
    assert samples.one(PREFETCHED, worker=W, task="add") == 1
    other = services.harness(vhost)
    assert other.publish(ev.heartbeat(at=10), ev.offline(at=9)).one(ONLINE, worker=W) == 0, "clocks may step"


def test_redelivered_worker_event_that_is_late_has_no_effect(services, vhost):
    """Long after the connect, only a redelivered message may be late."""
    amqp = {**QUEUE["broker"]["amqp"], "heartbeat": "1s", "prefetch_count": 3}
    harness = services.harness(vhost, {"broker": {"amqp": amqp}})
    connected = time.monotonic()
    harness.publish(ev.heartbeat(at=10))
    while time.monotonic() < connected + 3.5:
        time.sleep(0.1)
    assert harness.publish(ev.offline(at=9)).one(ONLINE, worker=W) == 0, "delivered in order"
    harness.publish(ev.heartbeat(at=10))
    harness.exporter.send(signal.SIGSTOP)
    with vhost.connection() as connection:
        channel = connection.channel()
        harness.publisher.send(ev.received("a", at=11))
        harness.publisher.send(ev.received("b", at=11))
        wait_until(lambda: queue_depth(channel) == 0, 1, "both are delivered")
        harness.publisher.send(ev.offline(at=9))
        wait_until(lambda: queue_depth(channel) == 1, 1, "one is left")
        channel.basic_reject(channel.basic_get("flower-exporter").delivery_tag, requeue=True)
    harness.exporter.send(signal.SIGCONT)
    samples = harness.publish()
    assert samples.events("received", W) == 2
    assert samples.one(ONLINE, worker=W) == 1


def queue_depth(channel):
    return channel.queue_declare("flower-exporter", passive=True).message_count


def persistent(**amqp):
    state = {"persistent": True, "db": str(directory("state") / "state"), "worker_timeout": 0}
    broker = {"amqp": {**QUEUE["broker"]["amqp"], **amqp}, "reconnect_backoff_max": "1s"}
    return {"broker": broker, "state": state}


def wait_until_no_consumer(vhost):
    """Waits until RabbitMQ has detected that the consumer is gone and has requeued its messages."""

    def has_no_consumer():
        with vhost.connection() as connection:
            return connection.channel().queue_declare("flower-exporter", passive=True).consumer_count == 0

    wait_until(has_no_consumer, 20, "the queue has no consumer")


def test_continuity_survives_24_restarts(services, vhost):
    """No event is lost, so no restart clears the set of prefetched tasks."""
    settings = persistent()
    harness = services.harness(vhost, settings)
    settings["events"] = {"exchange": harness.exchange}
    harness.publish(ev.received("a"))
    for restart in range(24):
        harness.exporter.terminate()
        harness.exporter = services.exporter(vhost, settings)
        assert harness.publish().one(PREFETCHED, worker=W, task="add") == 1, f"restart {restart + 1}"


def test_events_survive_24_early_kills(services, vhost):
    """The exporter is killed 24 times as soon as it has subscribed. No event was acknowledged, and in the end all are counted."""
    settings = persistent()
    harness = services.harness(vhost, settings)
    settings["events"] = {"exchange": harness.exchange}
    harness.exporter.terminate()
    for number in range(50):
        harness.publisher.send(ev.received(f"{number}"))
    for _ in range(24):
        exporter = services.exporter(vhost, settings, ready=False, terminate=False)
        wait_until(lambda: "subscribed to" in exporter.log(), 20, exporter.log)  # noqa: B023
        exporter.kill()
        wait_until_no_consumer(vhost)
    harness.exporter = services.exporter(vhost, settings)
    assert harness.publish().events("received", W) == 50


def test_existing_queue_is_used_after_default_type_changed(services, vhost, rabbitmq_release):
    """The default queue type of the virtual host changes after the queue was declared."""
    if rabbitmq_release.number < (4,):
        pytest.skip("RabbitMQ 3.x has one default type")
    harness = services.harness(vhost, QUEUE)
    harness.exporter.terminate()
    other = "classic" if rabbitmq_release.quorum else "quorum"
    vhost.server.ctl("update_vhost_metadata", vhost.vhost, "--default-queue-type", other)
    harness.exporter = services.exporter(vhost, {**QUEUE, "events": {"exchange": harness.exchange}}, ready=False)
    wait_until(lambda: harness.exporter.healthz(ready=True)[0] == 200, 5, harness.exporter.log)
    assert harness.publish(ev.received("a")).events("received", W) == 1
