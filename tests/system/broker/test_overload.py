"""More events than the exporter can read: losses are counted, memory is bounded, and log lines are throttled.

`tests/run.sh -rP broker/test_overload.py --sustained 60` prints the throughput of this machine.
"""

import signal
import time

from support import events as ev
from support.exporter import SELF_METRICS
from support.exposition import EVENTS
from support.flood import BUFFER_FULL, CONNECTION_LOST, flood, sample_buffer, send_for, task_events, wait_until_accounted
from support.resources import MIB, cpu_seconds, peak_memory


def test_sustained_load_is_accounted(services, broker, request):
    """Events at full speed for --sustained seconds, or at --sustained-rate, where all must be counted."""
    seconds, rate = (request.config.getoption(name) for name in ("--sustained", "--sustained-rate"))
    backlog = 16 * MIB
    harness = services.harness(broker, {"events": {"buffer_max_bytes": backlog}, **SELF_METRICS})
    memory, cpu, start = peak_memory(harness.exporter), cpu_seconds(harness.exporter), time.monotonic()
    with sample_buffer(harness.exporter) as sizes:
        sent = send_for(flood(harness), seconds, 3000, rate)
        elapsed = time.monotonic() - start
        samples = wait_until_accounted(harness, sent, 60 + 2 * seconds)
    spent = (cpu_seconds(harness.exporter) - cpu) / samples.total(EVENTS)
    print(
        f"{sent / elapsed:.0f} events per second, CPU {spent * 1e6:.1f} µs per event, buffer at most {max(sizes) / MIB:.2f} MiB"
    )
    if broker.name == "rabbitmq" or rate:
        assert samples.total(EVENTS) == sent
    assert max(sizes) < backlog + 2000, "at most one message more"
    assert peak_memory(harness.exporter) - memory < 2 * backlog + 16 * MIB
    for text in (BUFFER_FULL, CONNECTION_LOST):
        assert len(harness.exporter.log_lines(text)) <= 1 + elapsed // 60, "once a minute"
    assert harness.publish(ev.heartbeat("after@tests")).one("flower_worker_online", worker="after@tests") == 1


def test_large_messages_exceed_the_buffer_by_one(services, broker):
    """They exceed `buffer_max_bytes` by one message, not by one for each message that is read."""
    harness = services.harness(broker, {"events": {"buffer_max_bytes": MIB}, **SELF_METRICS})
    stream = flood(harness)
    # NaN makes them slower to parse than to send.
    messages = [stream.message(list(task_events(tasks, custom=float("nan")))) for tasks in range(20, 200, 7)]
    with sample_buffer(harness.exporter) as sizes:
        start = time.monotonic()
        while (elapsed := time.monotonic() - start) < 3 or (max(sizes) <= MIB / 2 and elapsed < 30):
            stream.send(b"".join(messages))
        stream.finish()
    assert MIB / 2 < max(sizes) < MIB + len(messages[-1])


def test_prefetch_count_bounds_unacknowledged_messages(services, vhost):
    """The bound holds when RabbitMQ is much faster than the exporter."""
    limits = {"events": {"buffer_max_bytes": MIB}, "broker": {"amqp": {"prefetch_count": 20}}}
    harness = services.harness(vhost, {**limits, **SELF_METRICS})
    memory, stream = peak_memory(harness.exporter), flood(harness)
    body = list(task_events(150, custom=float("nan")))
    encoded, count = stream.message(body), 1000
    stream.send(encoded * count)
    stream.finish()
    harness.exporter.wait_for(lambda m: m.total(EVENTS) == count * len(body), 60)
    assert peak_memory(harness.exporter) - memory < MIB + 20 * len(encoded) + 8 * MIB < count * len(encoded) / 2


def test_queue_overflow_at_rabbitmq_is_logged(services, vhost):
    """A queue that reaches `queue_max_bytes` loses its oldest messages. They cannot be counted, but the log has one line."""
    amqp = {"queue_max_bytes": "64KiB", "prefetch_count": 2}
    harness = services.harness(vhost, {"broker": {"amqp": amqp}, "events": {"enable_interval": "200ms"}})
    sent = send_for(flood(harness), 2, 3000)
    assert 0 < harness.publish().total(EVENTS) < sent
    assert len(harness.exporter.log_lines("queue_max_bytes")) == 1


def disconnect(harness, kill):
    """Lets the server close the subscription, and waits for the next one."""
    before = harness.exporter.metrics().one("flower_exporter_broker_reconnects_total")
    kill()
    harness.exporter.wait_for(lambda m: m.one("flower_exporter_broker_reconnects_total") == before + 1, 20, "subscribed again")


def test_disconnect_of_a_slow_subscriber_is_counted(services, redis):
    """Redis disconnects a slow subscriber. The exporter counts the seconds until it is connected again."""
    redis.client().config_set("client-output-buffer-limit", "pubsub 1mb 0 0")
    harness = services.harness(redis, {"broker": {"reconnect_backoff_max": "1s"}, **SELF_METRICS})
    stream = flood(harness)
    encoded, rounds = b"".join(map(stream.message, task_events(100))), 0

    def lag():
        nonlocal rounds
        harness.exporter.send(signal.SIGSTOP)
        while redis.client().pubsub_numpat():
            stream.send(encoded)
            rounds += 1
        harness.exporter.send(signal.SIGCONT)

    disconnect(harness, lag)
    samples = harness.publish(ev.received("after", "after@tests"))
    assert samples.one("flower_exporter_broker_disconnects_total") == samples.one("flower_exporter_broker_reconnects_total") == 1
    assert 0 < samples.one("flower_exporter_broker_disconnected_seconds_total") < 5
    assert samples.one("flower_exporter_dropped_messages_total") == 0
    assert 0 < samples.total(EVENTS) - 1 < rounds * 300, "the server discarded the rest"
    assert len(harness.exporter.log_lines(CONNECTION_LOST)) == 1


def test_disconnects_are_logged_once_a_minute(services, broker):
    """Each of several disconnects is counted, but only the first one is logged."""
    if broker.name == "redis":
        kill = lambda: broker.client().execute_command("CLIENT", "KILL", "TYPE", "pubsub")  # noqa: E731
    else:
        kill = lambda: broker.server.ctl("close_all_connections", "-p", broker.vhost, "test")  # noqa: E731
    harness = services.harness(broker, {"broker": {"reconnect_backoff_max": "500ms"}, **SELF_METRICS})
    for number in range(1, 4):
        disconnect(harness, kill)
        harness.publisher.connection.release()
        harness.publisher = services.publisher(broker, harness.exchange)
        harness.publish(ev.received(f"{number}"))
        assert harness.exporter.metrics().one("flower_exporter_broker_disconnects_total") == number
    assert len(harness.exporter.log_lines(CONNECTION_LOST)) == 1
