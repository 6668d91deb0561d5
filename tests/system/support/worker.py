"""Real Celery workers, of any version that setup.sh has installed, and a client that sends them tasks."""

import contextlib
import itertools
import json
from pathlib import Path

from celery import Celery

from .processes import TEST_ENV, Process, wait_until

OLDEST, MIDDLE, NEWEST = VERSIONS = "4.4.7", "5.2.7", "5.7.0"
UNICODE = 'räkna.算 "\\'

_numbers = itertools.count(1)


class Worker(Process):
    """`celery worker` without -E, so that it sends events only on request; it sends a heartbeat every second."""

    def __init__(self, broker, version=NEWEST, pool="prefork", concurrency=2, args=(), conf=None, hostname=None):
        self.hostname = hostname or f"w{next(_numbers)}@tests"
        self.version = version
        super().__init__(
            f"celery-{version}",
            [
                TEST_ENV / f"celery-{version}/bin/celery",
                "-A",
                "worker_app",
                "worker",
                "-n",
                self.hostname,
                "-P",
                pool,
                "-c",
                concurrency,
                "--heartbeat-interval",
                "1",
                "--without-mingle",
                "-l",
                "INFO",
                *args,
            ],
            env={
                "TEST_BROKER": broker.url,
                "TEST_TRANSPORT_OPTIONS": json.dumps(broker.options),
                "TEST_CONF": json.dumps(conf or {}),
                "C_FORCE_ROOT": "1",
                "PYTHONPATH": Path(__file__).with_name("app"),
                "PYTHONDONTWRITEBYTECODE": "1",
            },
        )

    def ready(self):
        """Waits until the worker is ready for tasks."""

        def is_ready():
            assert self.running, self.log()
            return " ready." in self.log()

        wait_until(is_ready, 60, lambda: f"the worker is ready\n{self.log()}")
        return self


@contextlib.contextmanager
def client(broker, **conf):
    """A Celery 5.7 client, like a web application."""
    app = Celery("client", broker=broker.url, set_as_current=False)
    app.conf.update(broker_transport_options=broker.options, task_ignore_result=True, **conf)
    try:
        yield app
    finally:
        app.close()
