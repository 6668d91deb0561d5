"""Event sequences on which Flower is right and reimplementations are easily wrong: compared with Flower's own result."""

import pytest

from support import events as ev
from support.events import W
from support.flower_reference import Flower

ADD = W, "add"

#: The events, and the expected samples without the events counter and the runtimes.
SEQUENCES = {
    "active of worker-online makes no executing series": ([ev.online(active=3)], {("online", W): 1}),
    "worker-offline of an unknown worker makes online 0": ([ev.offline()], {("online", W): 0}),
    "worker-offline of an unknown worker with active tasks makes no executing series": ([ev.offline(active=2)], {("online", W): 0}),
    "a heartbeat's active": ([ev.heartbeat(active=3)], {("online", W): 1, ("executing", W): 3}),
    "a heartbeat without active, as in a reply to the broadcast": (
        [ev.without(ev.heartbeat(), "active", "processed", "loadavg")],
        {("online", W): 1},
    ),
    "a heartbeat without timestamp": (
        [ev.without(ev.heartbeat(active=1), "timestamp")],
        {("online", W): 1, ("executing", W): 1},
    ),
    "an active that is a float": ([ev.heartbeat(active=2.5)], {("online", W): 1, ("executing", W): 2.5}),
    "only sent": ([ev.sent()], {}),
    "only received": ([ev.received()], {("prefetched", *ADD): 1}),
    "received, started": (
        [ev.received(), ev.started(at=1.25)],
        {("prefetched", *ADD): 0, ("prefetch time", *ADD): 1.25},
    ),
    "received, started, succeeded": (
        [ev.received(), ev.started(at=1), ev.succeeded(at=2, runtime=1.0)],
        {("prefetched", *ADD): 0, ("prefetch time", *ADD): 0},
    ),
    "received, started, failed": (
        [ev.received(), ev.started(at=1), ev.failed(at=2)],
        {("prefetched", *ADD): 0, ("prefetch time", *ADD): 0},
    ),
    "started, succeeded, then sent": ([ev.started(), ev.succeeded(at=1, runtime=1.0), ev.sent(at=-1)], {}),
    "received, started, then sent": (
        [ev.received(), ev.started(at=1), ev.sent(at=-1)],
        {("prefetched", *ADD): 0, ("prefetch time", *ADD): 1},
    ),
    "the last writer of a pair's prefetch time wins": (
        [ev.received("a"), ev.received("b"), ev.started("a", at=1), ev.started("b", at=2), ev.succeeded("a", at=3)],
        {("prefetched", *ADD): 0, ("prefetch time", *ADD): 0},
    ),
    "revoked without received": ([ev.revoked()], {}),
    "rejected without received": ([ev.rejected()], {}),
    "sent and revoked without received": ([ev.sent(), ev.revoked()], {}),
    "received, revoked: no prefetch time": ([ev.received(), ev.revoked(at=1)], {("prefetched", *ADD): 0}),
    "received, rejected: no prefetch time": ([ev.received(), ev.rejected(at=1)], {("prefetched", *ADD): 0}),
    "received with an eta": ([ev.received(eta="2030-01-01T00:00:00"), ev.started(at=1), ev.succeeded(at=2)], {}),
    "an eta that is empty": ([ev.received(eta="")], {("prefetched", *ADD): 1}),
    "the eta of a later received replaces that of sent": (
        [ev.sent(eta="2030-01-01T00:00:00"), ev.received(eta=None)],
        {("prefetched", *ADD): 1},
    ),
    "the name of a later sent replaces that of received": (
        [ev.received(name="b", eta="2030-01-01T00:00:00"), ev.sent(name="add"), ev.failed(at=1)],
        {},
    ),
    "whole seconds": ([ev.received(at=1), ev.started(at=3)], {("prefetched", *ADD): 0, ("prefetch time", *ADD): 2}),
    "a runtime of whole seconds": ([ev.succeeded(runtime=2)], {}),
    "a runtime of nothing": ([ev.succeeded("a", runtime=0), ev.succeeded("b", runtime=0.0), ev.succeeded("c")], {}),
    "a user-defined event of a known task": ([ev.sent(), ev.task("progress", percent=50)], {}),
    "a user-defined event of an unknown task": ([ev.task("progress", percent=float("nan"))], {}),
    "other groups": ([ev.event("custom-thing"), ev.event("worker-thing"), ev.event("thing")], {}),
    "no clock, pid or utcoffset": ([ev.without(ev.received(), "clock", "pid", "utcoffset")], {("prefetched", *ADD): 1}),
    "worker and task names with the same concatenation": (
        [ev.received("1", "ab", name="c"), ev.received("2", "a", name="bc")],
        {("prefetched", "ab", "c"): 1, ("prefetched", "a", "bc"): 1},
    ),
}


def gauges(samples):
    return {key: value for key, value in samples.short().items() if key[0] not in ("events", "runtimes")}


@pytest.mark.parametrize("events, expected", SEQUENCES.values(), ids=SEQUENCES)
def test_sequence_equals_flower(harness, events, expected):
    """Exactly these gauges exist, and every sample equals Flower's."""
    actual = harness.publish(*events)
    assert gauges(actual) == expected
    assert actual == Flower().feed(events).metrics()


def test_shadow_name_differs_from_flower_only_in_prefetched(harness):
    """The worker sends the `shadow` name, then the client's `task-sent` the real one.

    Only the set of prefetched tasks differs from Flower: an entry keeps its first name.
    """
    events = [ev.received(name="shadow"), ev.sent(name="real"), ev.started(at=1), ev.succeeded(at=3, runtime=2.0)]
    flower = Flower().feed(events).metrics().short()
    actual = harness.publish(*events).short()
    assert flower.pop(("prefetched", W, "real")) == -1 and flower.pop(("prefetched", W, "shadow")) == 1
    assert actual.pop(("prefetched", W, "shadow")) == 0
    assert actual.pop(("prefetched", W, "real"), 0) == 0
    assert actual == flower
    assert actual["prefetch time", W, "real"] == 0 and actual["runtimes", W, "real"] == 1
