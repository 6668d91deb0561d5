"""Measures what an idle exporter costs: CPU time, wake-ups and memory, with default settings and no worker."""

import argparse
import sys
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parents[1] / "tests/system"), str(HERE)]

from subjects import Ours
from support.rabbitmq import RabbitMQ
from support.redis import Redis

#: The largest values that are accepted: milliseconds of CPU per second, wake-ups per second, MiB.
LIMITS = {"redis": (0.3, 6, 12), "rabbitmq": (0.5, None, 18)}


def measure(broker, settle, seconds):
    """Returns milliseconds of CPU per second, wake-ups per second, and MiB of resident memory."""
    subject = Ours(broker)
    subject.start()
    try:
        time.sleep(settle)
        began, cpu, woken = time.perf_counter(), subject.cpu(), subject.wake_ups()
        time.sleep(seconds)
        took = time.perf_counter() - began
        used, woken = subject.cpu() - cpu, subject.wake_ups() - woken
        return used / took * 1000, woken / took, subject.memory()[0]
    finally:
        subject.stop()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--settle", type=float, default=30, help="seconds from the start to the measurement")
    parser.add_argument("--seconds", type=float, default=60, help="duration of the measurement")
    options = parser.parse_args()
    failed = False
    print(f"{'broker':10} {'CPU, ms/s':>10} {'wake-ups/s':>11} {'memory, MiB':>12}   limits")
    for name, start in (("redis", Redis), ("rabbitmq", lambda: RabbitMQ().wait())):
        server = start()
        try:
            figures = measure(server if name == "redis" else server.vhost(), options.settle, options.seconds)
        finally:
            server.stop()
        over = [limit is not None and value > limit for value, limit in zip(figures, LIMITS[name])]
        failed |= any(over)
        cpu, woken, memory = figures
        print(f"{name:10} {cpu:10.2f} {woken:11.1f} {memory:12.1f}   {LIMITS[name]}{' exceeded' if any(over) else ''}", flush=True)
    sys.exit(failed)


if __name__ == "__main__":
    main()
