"""The Celery application of the test workers; it runs on every supported Celery and imports nothing from the tests."""

import json
import os
import time

from celery import Celery
from celery.exceptions import Ignore, Reject

app = Celery("tests", broker=os.environ["TEST_BROKER"])
app.conf.update(
    broker_transport_options=json.loads(os.environ.get("TEST_TRANSPORT_OPTIONS", "{}")),
    broker_connection_retry_on_startup=True,
    enable_utc=True,
    task_ignore_result=True,
    worker_prefetch_multiplier=8,
    worker_hijack_root_logger=False,
    **json.loads(os.environ.get("TEST_CONF", "{}")),
)


@app.task(name="add")
def add(x, y):
    return x + y


@app.task(name="nap")
def nap(seconds):
    time.sleep(seconds)


@app.task(name="compute")
def compute(seconds):
    """Keeps the CPU, and yields to nothing."""
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        pass


@app.task(name="fail")
def fail():
    raise ValueError("expected failure")


@app.task(name="retry", bind=True, max_retries=1)
def retry(self, countdown=0):
    if not self.request.retries:
        raise self.retry(countdown=countdown)


@app.task(name="reject", acks_late=True)
def reject():
    raise Reject("no thanks", requeue=False)


@app.task(name="ignore")
def ignore():
    raise Ignore()


@app.task(name="overlong", time_limit=1)
def overlong():
    time.sleep(60)


@app.task(name='räkna.算 "\\')
def unicode():
    return "ж"
