"""The first tasks of workers that run without -E: they read broadcasts only some moments after they have started."""

import re
import time

import pytest

from support import events as ev
from support.processes import wait_until
from support.worker import client

pytestmark = pytest.mark.every_release

WAITING, NAP = 50, 0.03




def run_short_lived_workers(services, broker, workers=3):
    """Each worker finds a backlog, works it off and ends."""
    for _ in range(workers):
        with client(broker) as app:
            for _ in range(WAITING):
                app.send_task("nap", (NAP,))
        worker = services.worker(broker, concurrency=1)
        wait_until(lambda: len(re.findall(r"Task nap\[.*\] succeeded", worker.log())) == WAITING, 60, worker.log)  # noqa: B023
        worker.stop(deadline=30)


@pytest.mark.short_form
def test_tasks_of_short_lived_workers_are_counted(services, broker):
    """At least 95 % of them, with the defaults."""
    exporter = services.exporter(broker)
    run_short_lived_workers(services, broker)
    time.sleep(1)
    counted = exporter.metrics().events("succeeded", task=None)
    print(f"counted {counted:.0f} of {3 * WAITING}")
    assert counted >= 0.95 * 3 * WAITING
