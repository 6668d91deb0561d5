"""Limits of names: memory is bounded, and totals stay correct."""

import pytest

from support import events as ev
from support.events import W
from support.exposition import EVENTS, FAMILIES, ONLINE, PREFETCHED, RUNTIME

OTHER = "(other)"


def warnings(exporter):
    return [line for line in exporter.log().splitlines() if OTHER in line]


def test_max_label_sets_counts_the_rest_as_other(services, shared_redis):
    """Beyond the limit, new (worker, task) label sets are counted under task `(other)` of their worker."""
    harness = services.harness(shared_redis, {"metrics": {"max_label_sets": 10}})
    samples = harness.publish(
        *[
            event
            for n in range(50)
            for event in (
                ev.received(f"{n}", name=f"task{n}"),
                ev.started(f"{n}", at=n),
                ev.succeeded(f"{n}", at=n, runtime=1.0),
                ev.received(f"{n}+", name=f"task{n}"),
            )
        ]
    )
    tasks = {dict(labels)["task"] for name, labels in samples if name == EVENTS and dict(labels)["worker"] == W}
    assert OTHER in tasks and 5 <= len(tasks) <= 12
    assert samples.total(EVENTS, worker=W) == 200
    assert samples.total(f"{RUNTIME}_count", worker=W) == 50
    assert samples.total(PREFETCHED, worker=W) == 50
    assert samples.one(EVENTS, worker=W, task="task0", type="task-received") == 2
    # Existing label sets continue.
    assert harness.publish(ev.received("again", name="task0")).one(EVENTS, worker=W, task="task0", type="task-received") == 3
    assert len(warnings(harness.exporter)) == 1, "the log contains one warning"
    samples = harness.publish(*[ev.started(f"{n}+", at=n) for n in range(50)], ev.started("again"))
    assert samples.total(PREFETCHED) == 0, "entries are removed under their first name"


def test_event_types_beyond_64_are_counted_as_other(harness):
    samples = harness.publish(*[ev.task(f"custom{n}") for n in range(200)], *[ev.received("x"), ev.started("x")] * 2)
    types = {dict(labels)["type"] for name, labels in samples if name == EVENTS}
    assert len(types) <= 65 and OTHER in types
    assert len(types) >= 60
    assert samples.total(EVENTS, worker=W) == 204
    assert samples.total(PREFETCHED, worker=W) == 0
    assert len(warnings(harness.exporter)) == 1, "the log contains one warning"


@pytest.mark.parametrize("letter", ["x", "é", "算", "💐"])
def test_long_labels_are_truncated(harness, letter):
    """To 256 bytes at a character boundary, followed by an ellipsis."""
    size = len(letter.encode())
    fits, long = letter * (256 // size), letter * 1000
    samples = harness.publish(
        ev.received("1", name=fits),
        ev.received("2", name=long),
        ev.received("3", name=long + "other"),
        ev.heartbeat(long),
        ev.task(long),
        ev.started("2", at=1),
    )
    assert samples.events("received", W, fits) == 1
    tasks = {dict(labels)["task"] for name, labels in samples if name == EVENTS} - {fits, ""}
    [truncated] = tasks
    for label in (truncated, *({dict(labels)["worker"] for name, labels in samples if name == ONLINE})):
        assert label.endswith("…") and set(label[:-1]) == {letter}
        assert 256 - 3 - size < len(label[:-1].encode()) <= 256
    assert samples.events("received", W, truncated) == 2
    assert samples.one(PREFETCHED, worker=W, task=truncated) == 1
    [kind] = {dict(labels)["type"] for name, labels in samples if name == EVENTS} - {"task-received", "task-started"}
    assert kind.startswith("task-") and kind.endswith("…") and len(kind.encode()) <= 256 + 3


def test_max_workers_evicts_clients_and_offline_workers_first(services, shared_redis):
    """Clients are evicted before offline workers, and those before online workers. Eviction removes all series."""
    harness = services.harness(shared_redis, {"state": {"max_workers": 6}})
    workers = ["live1@h", "live2@h", "off@h"]
    harness.publish(
        *[event for worker in workers for event in (ev.heartbeat(worker), ev.received(worker, worker))],
        ev.offline("off@h"),
    )
    samples = harness.publish(*[ev.sent(f"c{n}", f"gen{n}@client") for n in range(40)])
    assert set(workers) < samples.labels("worker")
    assert len(samples.labels("worker") - {OTHER}) <= 6
    samples = harness.publish(
        ev.heartbeat("live3@h"), ev.heartbeat("live4@h"), ev.heartbeat("live5@h"), ev.heartbeat("live6@h")
    )
    assert {"live1@h", "live2@h", "live3@h", "live4@h"} <= samples.labels("worker")
    assert "off@h" not in samples.labels("worker")
    assert not [key for key in samples if ("worker", "off@h") in key[1]]


def test_series_are_bounded_with_many_workers(services, shared_redis):
    """300 hostnames with a limit of 20 workers."""
    harness = services.harness(shared_redis, {"state": {"max_workers": 20}})
    harness.publish(*[event for n in range(300) for event in (ev.heartbeat(f"w{n}@h"), ev.received(f"{n}", f"w{n}@h"))])
    samples = harness.metrics()
    assert 10 <= len(samples.labels("worker") - {OTHER}) <= 20
    assert {name for name, _ in samples} <= {*FAMILIES, *(f"{RUNTIME}_{part}" for part in ("bucket", "sum", "count"))}
    if OTHER in samples.labels("worker"):
        assert samples.total(EVENTS, type="task-received") == 300
        assert len(warnings(harness.exporter)) == 1
