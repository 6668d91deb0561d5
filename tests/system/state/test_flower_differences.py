"""Intentional differences from Flower, where the exporter is right, with the result of Flower.

See also test_worker_timeouts.py, test_task_tracking.py (prefetched tasks and prefetch times) and test_limits.py.
"""

import pytest

from support import events as ev
from support.events import W
from support.exposition import EVENTS, EXECUTING, ONLINE, PREFETCH_TIME, PREFETCHED, RUNTIME
from support.flower_reference import Flower


def test_utcoffset_is_ignored(harness):
    """In Flower, offsets of -5.5 and then -6 hours make a prefetch time of 1,801 s."""
    events = [ev.received(at=0), ev.started(at=1)]
    events[0]["utcoffset"], events[1]["utcoffset"] = -5.5, -6
    assert Flower().feed(events).metrics().one(PREFETCH_TIME, worker=W, task="add") == 1801
    assert harness.publish(*events).one(PREFETCH_TIME, worker=W, task="add") == 1


def test_worker_offline_clears_prefetched(harness):
    """Prefetched is 0, and executing is the value of the event."""
    events = [ev.heartbeat(active=5), ev.received(), ev.offline(active=2)]
    flower = Flower().feed(events).metrics()
    assert (flower.one(EXECUTING, worker=W), flower.one(PREFETCHED, worker=W, task="add")) == (5, 1)
    actual = harness.publish(*events)
    assert (actual.one(EXECUTING, worker=W), actual.one(PREFETCHED, worker=W, task="add")) == (2, 0)
    assert actual.one(ONLINE, worker=W) == 0


DRIFTS = {
    "redelivery": ([ev.received(), ev.received(at=1), ev.started(at=2)], 1),
    "restart": ([ev.heartbeat(), ev.received(), ev.online(at=1)], 1),
    "disorder": ([ev.started(at=2), ev.received(at=1)], 1),
    "end without start": ([ev.received(), ev.failed(at=1)], 1),
    "second revoke": ([ev.received(), ev.revoked(at=1), ev.revoked(at=2)], -1),
    "second start": ([ev.received(), ev.started(at=1), ev.started(at=2)], -1),
}


@pytest.mark.parametrize("events, drift", DRIFTS.values(), ids=DRIFTS)
def test_prefetched_drifts_in_flower(harness, events, drift):
    assert Flower().feed(events).metrics().one(PREFETCHED, worker=W, task="add") == drift
    assert not harness.publish(*events).one(PREFETCHED, worker=W, task="add")


@pytest.mark.parametrize("end", [ev.retried, ev.revoked, ev.rejected, ev.cancelled])
def test_prefetch_time_is_stuck_in_flower(harness, end):
    events = [ev.received(), ev.started(at=4), end(at=5)]
    assert Flower().feed(events).metrics().one(PREFETCH_TIME, worker=W, task="add") == 4
    assert harness.publish(*events).one(PREFETCH_TIME, worker=W, task="add") == 0


def test_prefetch_time_of_a_task_without_a_final_event_is_stuck_in_flower(harness):
    """For example after `raise Ignore()`. The exporter waits for a heartbeat of the idle worker."""
    events = [ev.received(), ev.started(at=4), ev.heartbeat(at=6, active=0)]
    assert Flower().feed(events).metrics().one(PREFETCH_TIME, worker=W, task="add") == 4
    assert harness.publish(*events).one(PREFETCH_TIME, worker=W, task="add") == 0


def test_late_start_sets_a_prefetch_time_in_flower(harness):
    events = [ev.received(), ev.succeeded(at=5, runtime=1.0), ev.started(at=4)]
    assert Flower().feed(events).metrics().one(PREFETCH_TIME, worker=W, task="add") == 4
    assert harness.publish(*events).one(PREFETCH_TIME, worker=W, task="add") == 0


def test_replace_ends_the_prefetch_time(harness):
    """`replace()` ends a task without an event. The next task-received has the same id."""
    events = [ev.received(name="old"), ev.started(at=4), ev.received(at=5, name="new"), ev.started(at=6)]
    assert Flower().feed(events).metrics().one(PREFETCH_TIME, worker=W, task="old") == 4
    actual = harness.publish(*events)
    assert actual.one(PREFETCH_TIME, worker=W, task="old") == 0
    assert actual.one(PREFETCH_TIME, worker=W, task="new") == 1


def test_prefetch_time_is_never_negative(harness):
    events = [ev.received(at=5), ev.started(at=4)]
    assert Flower().feed(events).metrics().one(PREFETCH_TIME, worker=W, task="add") == -1
    actual = harness.publish(*events)
    assert not actual.one(PREFETCH_TIME, worker=W, task="add") and not actual.one(PREFETCHED, worker=W, task="add")


def test_prefetch_time_needs_one_worker(harness):
    events = [ev.received(worker="v@tests"), ev.started(at=4)]
    assert Flower().feed(events).metrics().one(PREFETCH_TIME, worker=W, task="add") == 4
    assert not harness.publish(*events).one(PREFETCH_TIME, worker=W, task="add")


def test_labels_with_the_same_concatenation(harness):
    """In every metric with two labels. Here Flower is also right."""
    events = [
        event
        for uuid, worker, name, extra in [("1", "ab", "c", 1.0), ("2", "a", "bc", 2.0)]
        for event in (
            ev.received(uuid, worker, name=name),
            ev.started(uuid, worker, at=extra),
            ev.succeeded(uuid, worker, at=9, runtime=extra),
            ev.received(f"{uuid}b", worker, name=name),
        )
    ] + [ev.received("2c", "a", name="bc")]
    actual = harness.publish(*events)
    assert [actual.one(PREFETCHED, worker="ab", task="c"), actual.one(PREFETCHED, worker="a", task="bc")] == [1, 2]
    assert [actual.one(f"{RUNTIME}_sum", worker="ab", task="c"), actual.one(f"{RUNTIME}_sum", worker="a", task="bc")] == [
        1,
        2,
    ]
    assert [
        actual.one(EVENTS, worker="ab", task="c", type="task-received"),
        actual.one(EVENTS, worker="a", task="bc", type="task-received"),
    ] == [2, 3]
    assert actual == Flower().feed(events).metrics()


def test_user_defined_events_are_only_counted(harness):
    """They are counted under the name in the event, or the known one."""
    custom = ev.task("progress", at=1, name="other", eta="2030-01-01T00:00:00", runtime=5.0)
    flower = Flower().feed([ev.received(), custom, ev.started(at=2)]).metrics()
    assert flower.one(f"{RUNTIME}_count", worker=W, task="other") == 1
    assert flower.one(PREFETCHED, worker=W, task="add") == 1

    assert harness.publish(ev.received(), custom, ev.task("progress", at=1, runtime=5.0), ev.started(at=2)).short() == {
        ("events", W, "received", "add"): 1,
        ("events", W, "progress", "other"): 1,
        ("events", W, "progress", "add"): 1,
        ("events", W, "started", "add"): 1,
        ("prefetched", W, "add"): 0,
        ("prefetch time", W, "add"): 2,
    }


def test_user_defined_event_does_not_set_a_task_name(harness):
    actual = harness.publish(ev.task("progress", name="other"), ev.started(at=1)).short()
    assert actual == {("events", W, "progress", "other"): 1, ("events", W, "started", ""): 1}


@pytest.mark.parametrize("nameless", [ev.sent, ev.received])
def test_null_name_is_ignored(harness, nameless):
    events = [ev.received(), nameless(at=1, name=None, client=W) if nameless is ev.sent else nameless(at=1, name=None)]
    assert Flower().feed([*events, ev.failed(at=2)]).metrics().events("failed", task="") == 1
    actual = harness.publish(*events, ev.failed(at=2))
    assert actual.events("failed", task="add") == 1
    assert actual.total(EVENTS, task="") == 0


#: JSON values in place of a number. Flower accepts each of them or fails.
NOT_NUMBERS = ["3", "", "NaN", True, False, -1, -0.5, float("nan"), [3], {"a": 3}]


@pytest.mark.parametrize("value", NOT_NUMBERS, ids=repr)
def test_non_numeric_active_is_ignored(harness, value):
    """It neither creates nor changes a series."""
    assert harness.publish(ev.heartbeat(active=value)).short() == {("online", W): 1}
    assert harness.publish(ev.heartbeat(active=4), ev.heartbeat(active=value)).one(EXECUTING, worker=W) == 4


@pytest.mark.parametrize("value", NOT_NUMBERS, ids=repr)
def test_non_numeric_runtime_is_ignored(harness, value):
    actual = harness.publish(ev.sent(), ev.succeeded(runtime=value)).short()
    assert actual == {("events", "gen1@client", "sent", "add"): 1, ("events", W, "succeeded", "add"): 1}


def test_created_and_python_series_are_not_served(harness):
    """There are only the six metrics, although Flower's text contains more."""
    events = [ev.heartbeat(), ev.received(), ev.started(), ev.succeeded(runtime=1.0)]
    assert "_created" in Flower().feed(events).text()
    harness.publish(*events)
    names = {line.split()[2] for line in harness.exporter.text().splitlines() if line.startswith("# TYPE")}
    assert names == {EVENTS, RUNTIME, PREFETCH_TIME, PREFETCHED, ONLINE, EXECUTING}
    for absent in ("_created", "python_", "process_", "flower_exporter_"):
        assert absent not in harness.exporter.text()
