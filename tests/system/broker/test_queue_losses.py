"""Losses of a named queue are reported, and nothing that was kept is reported as lost or counted twice."""

import os
import subprocess
import threading
import time

import pytest

from support import events as ev
from support.events import W
from support.exposition import EVENTS, ONLINE, PREFETCHED
from support.processes import directory, wait_until

pytestmark = [pytest.mark.every_release, pytest.mark.short_form]

QUEUE = "flower-exporter"
SELF_METRICS = {"metrics": {"self_metrics": True}}


def settings(exchange=None, heartbeat="2s", state=None, **amqp):
    amqp = {"queue": QUEUE, "heartbeat": heartbeat, **amqp}
    events = {"events": {"exchange": exchange}} if exchange else {}
    return {"broker": {"amqp": amqp, "reconnect_backoff_max": "500ms"}, **SELF_METRICS, **events, **(state or {})}


def saved():
    return {"state": {"persistent": True, "db": str(directory("state") / "state"), "worker_timeout": 0}}


def gaps(exporter):
    """The gaps that were counted, by cause."""
    return {dict(labels)["cause"]: value for (name, labels), value in exporter.metrics().items() if name == "flower_exporter_gaps_total" and value}


def prefetched(samples):
    return samples.one(PREFETCHED, worker=W, task="add")


@pytest.fixture(params=["classic", "quorum"])
def queue_type(request, vhost):
    """A queue that exists as a quorum queue is used as it is."""
    if request.param == "quorum":
        with vhost.connection() as connection:
            arguments = {"x-queue-type": "quorum", "x-expires": 3_600_000, "x-max-length-bytes": 256 << 20}
            connection.channel().queue_declare(QUEUE, durable=True, auto_delete=False, arguments=arguments)
    return request.param


def test_half_open_cut_counts_nothing_twice(services, vhost, queue_type):
    """The exporter's side of a path dies, and RabbitMQ notices only later. Acknowledgments on the way are lost."""
    path = services.proxy(vhost)
    harness = services.harness(vhost, settings(prefetch_count=200), path=path)
    sent, stop = [0], threading.Event()

    def send():
        publisher = services.publisher(vhost, harness.exchange)
        while not stop.wait(0.005):
            publisher.send(ev.received(f"{sent[0]}"))
            sent[0] += 1

    sender = threading.Thread(target=send)
    sender.start()
    try:
        harness.exporter.wait_for(lambda m: m.events("received", W) > 300, 20)
        path.stall(inward=False)
        time.sleep(0.5)
        path.stall()
        harness.exporter.wait_for(lambda m: m.one("flower_exporter_broker_connected") == 0, 20)
        path.resume_for_new_connections()
        harness.exporter.ready(20)
        time.sleep(2)
    finally:
        stop.set()
        sender.join()
    samples = harness.exporter.wait_for(lambda m: m.events("received", W) >= sent[0], 20)
    assert harness.publish().events("received", W) == sent[0] == prefetched(samples)
    assert gaps(harness.exporter) == {}


LOSSES = {
    "purge": ({}, "queue_recreated"),
    "message TTL": ({"message_ttl": "1s"}, "queue_recreated"),
    "overflow": ({"queue_max_bytes": "64KiB"}, "queue_overflow"),
    "deletion": ({}, "queue_recreated"),
    "another client": ({}, "queue_overflow"),
}


@pytest.mark.parametrize("with_state", [False, True], ids=["disconnected", "restarted"])
@pytest.mark.parametrize("loss", LOSSES)
def test_loss_while_away_is_reported(services, vhost, loss, with_state):
    """The sets of prefetched tasks are cleared."""
    amqp, cause = LOSSES[loss]
    path = services.proxy(vhost)
    options = settings(state=saved() if with_state else None, **amqp)
    harness = services.harness(vhost, options, path=path)
    options["events"] = {"exchange": harness.exchange}
    assert prefetched(harness.publish(*[ev.received(f"{n}") for n in range(20)])) == 20
    if with_state:
        harness.exporter.terminate()
    else:
        path.refuse()
        path.cut()
        wait_until(lambda: consumers(vhost) == 0, 10, "no consumer")
    with vhost.connection() as connection:
        channel = connection.channel()
        if loss == "purge":
            channel.queue_purge(QUEUE)
        elif loss == "message TTL":
            wait_until(lambda: depth(vhost) == 0, 10, "the messages have expired")
        elif loss == "overflow":
            for n in range(100):
                harness.publisher.send(ev.sent(f"{n}", args="x" * 1000))
        elif loss == "deletion":
            channel.queue_delete(QUEUE)
        else:
            harness.publisher.send(ev.sent("new"))
            wait_until(lambda: depth(vhost) > 1, 5, "the new message")
            for _ in range(depth(vhost) - 1):
                channel.basic_get(QUEUE, no_ack=True)
    if with_state:
        harness.exporter = services.exporter(vhost, options)
    else:
        path.resume()
        harness.exporter.ready(10)
    exporter = harness.exporter
    wait_until(lambda: gaps(exporter), 10, exporter.log)
    assert gaps(exporter) == {cause: 1}
    assert not prefetched(exporter.metrics())
    [line] = [line for line in exporter.log_lines("events were missed") if "WARN" in line]
    assert cause in line
    assert cause in exporter.healthz()[1]["losses"]
    assert harness.publish(ev.received("after")).events("received", W) >= 1
    assert prefetched(exporter.metrics()) == 1


def consumers(vhost):
    with vhost.connection() as connection:
        return connection.channel().queue_declare(QUEUE, passive=True).consumer_count


def depth(vhost):
    with vhost.connection() as connection:
        return connection.channel().queue_declare(QUEUE, passive=True).message_count


def test_other_address_of_the_same_broker_is_no_loss(services, vhost):
    """With several URLs that lead to one broker, nothing is lost, and the sets are kept."""
    paths = [services.proxy(vhost), services.proxy(vhost)]
    options = settings()
    options["broker"]["url"] = ";".join(path.url for path in paths)
    harness = services.harness(vhost, options, path=paths[0])
    assert prefetched(harness.publish(ev.received("a"))) == 1
    for path in paths:
        before = harness.exporter.log().count("subscribed to")
        path.refuse()
        path.cut()
        wait_until(lambda: harness.exporter.log().count("subscribed to") > before, 10, harness.exporter.log)  # noqa: B023
        path.resume()
    samples = harness.publish(ev.received("b"))
    assert prefetched(samples) == 2 and samples.events("received", W) == 2
    assert gaps(harness.exporter) == {}


#: Blocks fdatasync while a file exists.
PRELOAD = r"""
#include <dlfcn.h>
#include <stdlib.h>
#include <unistd.h>
static int held(int file, const char *name) {
    while (access(getenv("HUNG_DISK"), F_OK) == 0) usleep(10000);
    return ((int (*)(int)) dlsym(RTLD_NEXT, name))(file);
}
int fdatasync(int file) { return held(file, "fdatasync"); }
int fsync(int file) { return held(file, "fsync"); }
"""


@pytest.fixture(scope="module")
def hung_disk():
    """The environment of a process whose fdatasync does not return while the file exists, and that file."""
    home = directory("preload")
    (home / "hang.c").write_text(PRELOAD)
    subprocess.run(["cc", "-shared", "-fPIC", "-D_GNU_SOURCE", "-o", home / "hang.so", home / "hang.c", "-ldl"], check=True)
    return {"LD_PRELOAD": home / "hang.so", "HUNG_DISK": home / "hung"}, home / "hung"


def test_overflow_while_connected_is_reported(services, vhost, hung_disk):
    """The disk hangs, so the queue drops its oldest messages beyond the prefetch window."""
    env, hung = hung_disk
    options = settings(state=saved(), queue_max_bytes="64KiB", prefetch_count=10)
    harness = services.harness(vhost, options, env=env)
    assert prefetched(harness.publish(ev.received("a"))) == 1
    hung.touch()
    try:
        for n in range(300):
            harness.publisher.send(ev.sent(f"{n}", args="x" * 1000))
            time.sleep(0.01)
    finally:
        os.unlink(hung)
    wait_until(lambda: gaps(harness.exporter), 30, harness.exporter.log)
    assert set(gaps(harness.exporter)) == {"queue_overflow"}
    samples = harness.publish()
    assert not prefetched(samples) and samples.total(EVENTS, type="task-sent") < 300


def test_hung_disk_pauses_timeouts_and_stops_no_delivery(services, vhost, hung_disk):
    """Deliveries stop at the prefetch window. No worker times out. A warning follows, and after 30 s messages flow again."""
    env, hung = hung_disk
    state = {"state": {**saved()["state"], "worker_timeout": "3s"}}
    harness = services.harness(vhost, settings(heartbeat="10s", state=state, prefetch_count=20), env=env)
    beat = ev.without(ev.heartbeat(), "freq")
    harness.publish(beat)
    hung.touch()
    try:
        start, seen = time.monotonic(), 0
        while time.monotonic() < start + 25:
            harness.publisher.send([beat, ev.sent(f"{time.monotonic()}")])
            samples = harness.exporter.metrics()
            assert samples.one(ONLINE, worker=W) == 1, harness.exporter.log()
            seen = samples.total(EVENTS)
            time.sleep(0.25)
        warnings = " ".join(harness.exporter.healthz()[1]["warnings"])
        assert "taking more than 5 s" in warnings and "worker timeouts paused" in warnings
        harness.exporter.wait_for(lambda m: m.total(EVENTS) > seen + 30, 20)
        assert "hanging for more than 30 s" in " ".join(harness.exporter.healthz()[1]["warnings"])
    finally:
        os.unlink(hung)
    wait_until(lambda: harness.exporter.healthz()[1]["warnings"] == [], 20, harness.exporter.log)
    assert harness.publish(ev.received("after")).events("received", W) == 1
