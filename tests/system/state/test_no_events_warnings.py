"""Warnings when no events are received. They come after a minute, so this test takes as long."""

import time

import pytest

from support import events as ev
from support.processes import wait_until

pytestmark = pytest.mark.every_release

#: A hostname that would start a new line in the log.
FORGED = "w\n<0>kernel: forged"


def test_missing_events_are_explained(services, redis):
    """The warnings are in /healthz and the log a minute after connecting, and end when events arrive.

    One exporter receives nothing, another one heartbeats of workers that send no task events. A third has no warning.
    """
    heartbeats_only, healthy = services.harness(redis), services.harness(redis)
    no_events = services.exporter(redis, {"events": {"exchange": "unused"}})
    started = time.monotonic()

    def warnings(exporter):
        health = exporter.healthz()[1]
        return next(value for key, value in health.items() if "warning" in key)

    def both_warn():
        processed = int(time.monotonic() - started)
        for harness in (heartbeats_only, healthy):
            harness.publisher.send(ev.heartbeat(processed=processed))
        heartbeats_only.publisher.send(ev.heartbeat(FORGED, processed=processed))
        healthy.publisher.send(ev.succeeded(f"{processed}"))
        return warnings(no_events) and len(warnings(heartbeats_only.exporter)) == 2

    wait_until(both_warn, 60 + 30, "both exporters warn")
    assert time.monotonic() - started > 50, "not too early"
    assert ev.W in str(warnings(heartbeats_only.exporter)), "the warning contains the worker"
    assert not warnings(healthy.exporter)
    assert repr(FORGED)[1:-1] in str(warnings(heartbeats_only.exporter)).replace("\\\\", "\\")
    assert "\n<0>" not in heartbeats_only.exporter.log(), "a hostname cannot forge a log line"
    for exporter in (no_events, heartbeats_only.exporter):
        assert exporter.healthz()[0] == exporter.healthz(ready=True)[0] == 200
        assert "WARN" in exporter.log()
    assert "WARN" not in healthy.exporter.log()

    services.publisher(redis, "unused").send(ev.heartbeat())
    heartbeats_only.publish(ev.received("now"), ev.received("then", worker=FORGED))
    wait_until(lambda: not warnings(no_events) and not warnings(heartbeats_only.exporter), 10, "the warnings end")
