"""A burst into a Redis with its default limits, which disconnects a subscriber that lags 32 MB behind."""

import json
import re
import subprocess

import pytest

from support import events as ev
from support.exposition import PREFETCHED
from support.flood import BUFFER_FULL, wait_until_accounted
from support.publish import envelope
from support.resources import MIB, peak_memory

EVENTS_SENT = 80_000


@pytest.mark.parametrize("times", [1, 10])
def test_burst_is_counted_or_reported(services, redis, times):
    """80,000 events in 46 MB through `redis-cli --pipe` are all counted. Of ten times as many, the rest is reported."""
    harness = services.harness(redis, {"metrics": {"self_metrics": True}})
    kinds, memory = [ev.sent, ev.received, ev.started, ev.succeeded], peak_memory(harness.exporter)

    def command(number):
        uuid, kind = f"{number // len(kinds):032x}", kinds[number % len(kinds)]
        event = kind(uuid, at=number / 1000)
        # About as large as the events of a real Celery deployment in `redis-cli monitor`.
        event["root_id"] = "x" * max(0, 190 - len(json.dumps(event)))
        payload = json.dumps(envelope(json.dumps(event), exchange=harness.exchange)).encode()
        parts = [b"PUBLISH", f"/0.{harness.exchange}/task.x".encode(), payload]
        return b"*3\r\n" + b"".join(b"$%d\r\n%s\r\n" % (len(part), part) for part in parts)

    burst = b"".join(map(command, range(EVENTS_SENT)))
    assert 500 < len(burst) / EVENTS_SENT < 800
    redis_cli = ["redis-cli", "-p", str(redis.port), "--pipe"]
    piped = subprocess.run(redis_cli, input=burst * times, capture_output=True, timeout=60)
    assert b"errors: 0" in piped.stdout, piped

    wait_until_accounted(harness, times * EVENTS_SENT, 60)
    samples = harness.publish()
    if times == 1:
        assert [samples.events(kind.__name__, task="add") for kind in kinds] == [EVENTS_SENT // len(kinds)] * len(kinds)
        assert samples.total(PREFETCHED) == 0
    assert harness.exporter.healthz(ready=True)[0] == 200
    assert peak_memory(harness.exporter) - memory < (2 * 64 + 16) * MIB, "at most twice buffer_max_bytes, and the tasks"


def test_small_buffer_loses_nothing_on_rabbitmq(services, vhost):
    """The exporter blocks RabbitMQ, so a small buffer loses no event."""
    harness = services.harness(vhost, {"events": {"buffer_max_bytes": "64KiB"}})
    samples = harness.publish(*[[ev.received(f"{batch}-{n}") for n in range(24)] for batch in range(1500)], deadline=60)
    assert samples.events("received") == samples.total(PREFETCHED) == 1500 * 24


def test_small_buffer_drops_and_counts_on_redis(services, redis):
    """Messages that do not fit are dropped, counted and logged."""
    harness = services.harness(redis, {"events": {"buffer_max_bytes": "64KiB"}, "metrics": {"self_metrics": True}})
    topic, sent = f"/0.{harness.exchange}/task.received", 20_000
    pipe = redis.client().pipeline(transaction=False)
    for number in range(sent):
        pipe.publish(topic, json.dumps(envelope(json.dumps(ev.received(f"{number}")), exchange=harness.exchange)))
    pipe.execute()
    dropped = wait_until_accounted(harness, sent, 20).one("flower_exporter_dropped_messages_total")
    harness.exporter.terminate()
    logged = re.findall(r" dropped=(\d+) ", "\n".join(harness.exporter.log_lines(BUFFER_FULL)))
    assert dropped > 0 and sum(map(int, logged)) == dropped, "the remaining drops are logged at the end"
