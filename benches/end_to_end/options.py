"""Measures how much memory a label set takes in a running exporter, with the options that are off by default, as a table."""

import re
import sys
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parents[1] / "tests/system"), str(HERE)]

from support import events as ev
from support.flood import RedisFlood
from support.services import Services

#: The memory of one label set is the difference between exporters with so many of them, divided by their number.
FEW, MANY, NAMES = 2_000, 8_000, 50
OPTIONS = {"metrics": {"native_histogram_bucket_factor": 1.1, "exemplars": True, "zero_first": "1s"}}
TYPICAL = [0.01 * 100 ** (n * 0.618034 % 1) for n in range(80)]
#: One in each of 160 buckets, and in each classic one.
MOST = [2 ** ((n - 80) / 8 + 0.01) for n in range(160)]
ROWS = {
    "default; 80 tasks, 10 ms to 1 s": ({}, TYPICAL),
    "all options; 80 tasks, 10 ms to 1 s": (OPTIONS, TYPICAL),
    "all options; 160 native buckets, and every exemplar": (OPTIONS, MOST),
}


def memory(settings, runtimes, label_sets):
    """The bytes of anonymous memory before the first scrape, which copies the values."""
    with Services() as services:
        redis = services.redis()
        exporter = services.exporter(redis, {**settings, "state": {"max_tasks": 1}})
        stream = RedisFlood(redis, "celeryev")
        for number in range(label_sets):
            worker, uuid = f"celery@worker-{number // NAMES:04}.example.com", f"{number:08x}-0000-4000-8000-000000000000"
            name = f"project.application.tasks.number_{number % NAMES}"
            runs = [ev.succeeded(uuid, worker, runtime=runtime) for runtime in runtimes]
            stream.send(stream.message([ev.received(uuid, worker, name=name), ev.started(uuid, worker), *runs, ev.failed(uuid, worker)]))
            if number % 200 == 0:
                stream.finish()
                time.sleep(0.1)
        stream.finish()
        time.sleep(3)
        status = Path(f"/proc/{exporter.pid}/status").read_text()
        assert exporter.metrics().total("flower_events_total") == label_sets * (len(runtimes) + 3)
        return int(re.search(r"RssAnon:\s+(\d+)", status)[1]) * 1024


def main():
    print("| memory of a label set | bytes |\n| --- | ---: |")
    for name, row in ROWS.items():
        print(f"| {name} | {(memory(*row, MANY) - memory(*row, FEW)) // (MANY - FEW):,} |", flush=True)


if __name__ == "__main__":
    main()
