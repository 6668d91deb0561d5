"""A sample Celery application. It contains nothing specific to the exporter.

    celery -A tasks worker --concurrency 2
"""

import os
import time

from celery import Celery

app = Celery("tasks", broker=os.environ.get("CELERY_BROKER_URL", "redis://127.0.0.1:6379/0"))
app.conf.task_ignore_result = True


@app.task
def add(x, y):
    return x + y


@app.task
def slow(seconds):
    time.sleep(seconds)


@app.task
def fail():
    raise ValueError("this task always fails")


@app.task(bind=True, autoretry_for=(ConnectionError,), max_retries=3, default_retry_delay=1)
def flaky(self):
    """Fails on the first attempt and succeeds on the second."""
    if self.request.retries == 0:
        raise ConnectionError("try again")
