"""Sends a varied stream of tasks until it is stopped."""

import itertools
import time

from celery import group
from tasks import add, fail, flaky, slow

SENDERS = [
    lambda: add.delay(2, 3),
    lambda: slow.delay(1.5),
    lambda: flaky.delay(),
    lambda: fail.delay(),
    lambda: add.apply_async((4, 5), countdown=5),  # has an eta
    lambda: group(slow.s(1.0) for _ in range(4)).delay(),  # more tasks than two processes can start at once
    lambda: add.delay(6, 7),
    lambda: slow.delay(0.2),
]

for send in itertools.cycle(SENDERS):
    send()
    time.sleep(0.5)
