"""Restarts that lose nothing: a persistent exporter on a named queue, killed repeatedly, has the same numbers as Flower."""

import random
import signal
import threading

import pytest

from support.exposition import FAMILIES
from support.flower_reference import Flower, difference
from support.processes import directory, wait_until
from support.streams import stream

pytestmark = [pytest.mark.every_release, pytest.mark.short_form, pytest.mark.quorum]

#: The number of events that are sent before each kill.
EVENTS_PER_KILL = 2000


def size(item):
    return len(item) if isinstance(item, list) else 1


def test_kills_lose_nothing(services, vhost, pytestconfig):
    """SIGKILL at random times while events arrive. In the end all samples equal Flower's for the full stream."""
    kills, seed = pytestconfig.getoption("--kills"), pytestconfig.first_seed
    print(f"repeat with: tests/run.sh --parity-seed {seed} persistence/test_kill_recovery.py")
    # Each task of a stream has nearly two events on average.
    rng, items = random.Random(seed), stream(seed, kills * EVENTS_PER_KILL * 5 // 8)
    settings = {
        "broker": {"amqp": {"queue": "flower-exporter", "prefetch_count": 200}, "reconnect_backoff_max": "1s"},
        "state": {
            "persistent": True,
            "db": str(directory("state") / "state"),
            "worker_timeout": 0,
            "purge_offline_workers": 0,
        },
    }
    assert sum(map(size, items)) >= kills * EVENTS_PER_KILL
    harness = services.harness(vhost, settings)
    settings["events"] = {"exchange": harness.exchange}
    permits, done = threading.Semaphore(0), threading.Event()

    def send():
        publisher = services.publisher(vhost, harness.exchange)
        sent = 0
        for item in items:
            while sent >= EVENTS_PER_KILL:
                permits.acquire()
                sent -= EVENTS_PER_KILL
            publisher.send(item)
            sent += size(item)
        done.set()

    def has_no_consumer():
        with vhost.connection() as connection:
            return connection.channel().queue_declare("flower-exporter", passive=True).consumer_count == 0

    sender = threading.Thread(target=send, daemon=True)
    sender.start()
    for _ in range(kills):
        permits.release()
        done.wait(rng.uniform(0, 0.6))
        harness.exporter.send(signal.SIGKILL)
        harness.exporter.wait(5)
        # RabbitMQ requeues unacknowledged messages in their order before it delivers to the next consumer.
        wait_until(has_no_consumer, 20, "RabbitMQ has detected the disconnect")
        harness.exporter = services.exporter(vhost, settings, ready=False)
        if rng.random() < 0.7:
            harness.exporter.ready()
    for _ in items:
        permits.release()
    sender.join()
    wait_until(done.is_set, 60, "everything is sent")
    flower = Flower().feed(items).metrics()
    actual = harness.publish(deadline=60)
    actual = type(actual)({key: value for key, value in actual.items() if key[0].startswith(FAMILIES)})
    assert len(flower) > 500
    assert actual == flower, difference(actual, flower)
