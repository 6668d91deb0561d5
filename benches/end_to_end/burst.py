"""Compares the memory of the exporter a minute after a burst with that of the same state without the burst."""

import argparse
import sys
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parents[1] / "tests/system"), str(HERE)]

import report
from stream import BATCH, Profile, Stream, heartbeats
from subjects import KINDS, TITLES, Brokers, Ours

EVENTS = 800_000 // BATCH * BATCH
#: Events per second without a burst.
STEADY = 40_000
#: The largest ratio that is accepted.
LIMIT = 1.3


def measure(subject, stream, rate, wait):
    """MiB of resident memory: at most, and some time after the events."""
    subject.start()
    try:
        if subject.broker.name == "redis":
            # Otherwise the server closes the connection, because it publishes faster than the exporter reads.
            subject.broker.client().config_set("client-output-buffer-limit", "pubsub 0 0 0")
        subject.sender.write(heartbeats(stream.profile, subject.protocol))
        subject.feed(stream, EVENTS, rate, timeout=120)
        time.sleep(wait)
        now, peak = subject.memory()
        return peak, now, subject.counted()
    finally:
        subject.stop()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--wait", type=float, default=60, help="seconds from the last event to the measurement")
    parser.add_argument("--write", action="store_true", help="also write benches/RESULTS.md")
    options = parser.parse_args()
    lines, failed = [], False
    for kind in KINDS:
        brokers, stream = Brokers(kind, 2), Stream(Profile(20, 50), KINDS[kind][0])
        try:
            _, steady, counted = measure(Ours(brokers.new()), stream, STEADY, options.wait)
            assert counted == EVENTS, counted
            peak, burst, counted = measure(Ours(brokers.new()), stream, None, options.wait)
        finally:
            brokers.close()
        failed |= burst > LIMIT * steady
        lines.append(f"| {TITLES[kind]} | {steady:.1f} | {burst:.1f} | {burst / steady:.2f} | {peak:.1f} | {counted / EVENTS:.0%} |")
    text = report.head("Memory after a burst") + "\n".join([
        f"{EVENTS:,} events, as fast as the broker accepts them, with 1,000 label sets and 100,000 tasks. Resident memory in MiB,"
        f" {options.wait:.0f} s after the last event.",
        f"At most {LIMIT} times as much is accepted. On Redis, what does not fit into `events.buffer_max_bytes` is dropped.\n",
        "| | without a burst | after a burst | ratio | peak | counted |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
        *lines,
        "",
    ])
    print(text)
    if options.write:
        report.save(text)
    sys.exit(failed)


if __name__ == "__main__":
    main()
