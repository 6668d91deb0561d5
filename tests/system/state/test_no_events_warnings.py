"""What the exporter tells its user when it hears nothing. These take a minute: the promise is one of a minute."""

import time

import pytest

from support import events as ev
from support.processes import wait_until

pytestmark = pytest.mark.every_release

#: A hostname that would begin a line of its own in the log.
FORGED = "w\n<0>kernel: forged"


def test_silence_is_explained(services, redis):
    """In /healthz and the log, a minute after connecting, and withdrawn when all is well.

    One exporter hears nothing at all, another that tasks are processed but no task event; a third has no complaint.
    """
    idle, well = services.harness(redis), services.harness(redis)
    silent = services.exporter(redis, {"events": {"exchange": "silence"}})
    begun = time.monotonic()

    def warnings(exporter):
        said = exporter.healthz()[1]
        return next(value for key, value in said.items() if "warning" in key)

    def pulse():
        processed = int(time.monotonic() - begun)
        for harness in (idle, well):
            harness.publisher.send(ev.heartbeat(processed=processed))
        idle.publisher.send(ev.heartbeat(FORGED, processed=processed))
        well.publisher.send(ev.succeeded(f"{processed}"))
        return warnings(silent) and len(warnings(idle.exporter)) == 2

    wait_until(pulse, 60 + 30, "both exporters warn")
    assert time.monotonic() - begun > 50, "not before its time"
    assert ev.W in str(warnings(idle.exporter)), "the worker is named"
    assert not warnings(well.exporter)
    assert repr(FORGED)[1:-1] in str(warnings(idle.exporter)).replace("\\\\", "\\")
    assert "\n<0>" not in idle.exporter.log(), "a name forges no line"
    for exporter in (silent, idle.exporter):
        assert exporter.healthz()[0] == exporter.healthz(ready=True)[0] == 200
        assert "WARN" in exporter.log()
    assert "WARN" not in well.exporter.log()

    services.publisher(redis, "silence").send(ev.heartbeat())
    idle.publish(ev.received("now"), ev.received("then", worker=FORGED))
    wait_until(lambda: not warnings(silent) and not warnings(idle.exporter), 10, "the warnings are withdrawn")
