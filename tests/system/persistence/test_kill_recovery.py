"""Restarts that lose nothing: killed again and again, a persistent exporter on a named queue ends up with Flower's numbers."""

import random
import signal
import threading

import pytest

from support.exposition import FAMILIES
from support.flower_reference import Flower, difference
from support.processes import directory, wait_until
from support.streams import stream

pytestmark = [pytest.mark.every_release, pytest.mark.short_form, pytest.mark.quorum]

#: So many are sent while an exporter lives.
EVENTS_PER_KILL = 2000


def size(item):
    return len(item) if isinstance(item, list) else 1


def test_kills(services, vhost, pytestconfig):
    """SIGKILL at random moments while events come in: in the end all samples equal Flower's reading of the whole stream."""
    kills, seed = pytestconfig.getoption("--kills"), pytestconfig.first_seed
    print(f"again: tests/run.sh --parity-seed {seed} persistence/test_kill_recovery.py")
    # A task's life has two events, on average nearly.
    chance, items = random.Random(seed), stream(seed, kills * EVENTS_PER_KILL * 5 // 8)
    settings = {
        "broker": {"amqp": {"queue": "flower-exporter", "prefetch": 200}, "reconnect_max": "1s"},
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
    go_on, over = threading.Semaphore(0), threading.Event()

    def send():
        publisher = services.publisher(vhost, harness.exchange)
        sent = 0
        for item in items:
            while sent >= EVENTS_PER_KILL:
                go_on.acquire()
                sent -= EVENTS_PER_KILL
            publisher.send(item)
            sent += size(item)
        over.set()

    def unattended():
        with vhost.connection() as connection:
            return connection.channel().queue_declare("flower-exporter", passive=True).consumer_count == 0

    sender = threading.Thread(target=send, daemon=True)
    sender.start()
    for _ in range(kills):
        go_on.release()
        over.wait(chance.uniform(0, 0.6))
        harness.exporter.send(signal.SIGKILL)
        harness.exporter.wait(5)
        # What was handed out goes back to its place before the next one is served.
        wait_until(unattended, 20, "RabbitMQ has noticed")
        harness.exporter = services.exporter(vhost, settings, ready=False)
        if chance.random() < 0.7:
            harness.exporter.ready()
    for _ in items:
        go_on.release()
    sender.join()
    wait_until(over.is_set, 60, "everything is sent")
    flower = Flower().feed(items).metrics()
    ours = harness.publish(deadline=60)
    ours = type(ours)({key: value for key, value in ours.items() if key[0].startswith(FAMILIES)})
    assert len(flower) > 500
    assert ours == flower, difference(ours, flower)
