"""More events than can be read: what is lost is a number, memory has a bound, and the log tells without being flooded.

`tests/run.sh -rP broker/test_overload.py --sustained 60` shows the figures of this machine.
"""

import signal
import time

from support import events as ev
from support.exporter import SELF_METRICS
from support.exposition import EVENTS
from support.flood import BUFFER_FULL, CONNECTION_LOST, flood, sample_buffer, send_for, task_events, wait_until_accounted
from support.resources import MIB, cpu_seconds, peak_memory


def test_sustained(services, broker, request):
    """As fast as this machine can send for --sustained seconds, or at --sustained-rate, where all must count."""
    seconds, rate = (request.config.getoption(name) for name in ("--sustained", "--sustained-rate"))
    backlog = 16 * MIB
    harness = services.harness(broker, {"events": {"max_backlog": backlog}, **SELF_METRICS})
    memory, cpu, start = peak_memory(harness.exporter), cpu_seconds(harness.exporter), time.monotonic()
    with sample_buffer(harness.exporter) as sizes:
        sent = send_for(flood(harness), seconds, 3000, rate)
        took = time.monotonic() - start
        samples = wait_until_accounted(harness, sent, 60 + 2 * seconds)
    spent = (cpu_seconds(harness.exporter) - cpu) / samples.total(EVENTS)
    print(
        f"{sent / took:.0f} events a second, CPU {spent * 1e6:.1f} µs each, backlog at most {max(sizes) / MIB:.2f} MiB"
    )
    if broker.name == "rabbitmq" or rate:
        assert samples.total(EVENTS) == sent
    assert max(sizes) < backlog + 2000, "one message more at the most"
    assert peak_memory(harness.exporter) - memory < 2 * backlog + 16 * MIB
    for text in (BUFFER_FULL, CONNECTION_LOST):
        assert len(harness.exporter.log_lines(text)) <= 1 + took // 60, "once a minute"
    assert harness.publish(ev.heartbeat("after@tests")).one("flower_worker_online", worker="after@tests") == 1


def test_large_messages_in_a_full_queue(services, broker):
    """They exceed `max_backlog` by one message, not by one for each that is taken."""
    harness = services.harness(broker, {"events": {"max_backlog": MIB}, **SELF_METRICS})
    stream = flood(harness)
    # NaN makes them take longer to read than to send.
    messages = [stream.message(list(task_events(tasks, custom=float("nan")))) for tasks in range(20, 200, 7)]
    with sample_buffer(harness.exporter) as sizes:
        start = time.monotonic()
        while (took := time.monotonic() - start) < 3 or (max(sizes) <= MIB / 2 and took < 30):
            stream.send(b"".join(messages))
        stream.finish()
    assert MIB / 2 < max(sizes) < MIB + len(messages[-1])


def test_prefetch_bounds_what_lies_beneath_the_queue(services, vhost):
    """So many unacknowledged messages, however fast RabbitMQ is and however slow we are."""
    limits = {"events": {"max_backlog": MIB}, "broker": {"amqp": {"prefetch": 20}}}
    harness = services.harness(vhost, {**limits, **SELF_METRICS})
    memory, stream = peak_memory(harness.exporter), flood(harness)
    body = list(task_events(150, custom=float("nan")))
    encoded, count = stream.message(body), 1000
    stream.send(encoded * count)
    stream.finish()
    harness.exporter.wait_for(lambda m: m.total(EVENTS) == count * len(body), 60)
    assert peak_memory(harness.exporter) - memory < MIB + 20 * len(encoded) + 8 * MIB < count * len(encoded) / 2


def test_what_rabbitmq_drops_is_told(services, vhost):
    """A queue that has reached `queue_max_bytes` loses its oldest messages: nobody can count them, but it is said."""
    amqp = {"queue_max_bytes": "64KiB", "prefetch": 1}
    harness = services.harness(vhost, {"broker": {"amqp": amqp}, "events": {"enable_interval": "200ms"}})
    sent = send_for(flood(harness), 2, 3000)
    assert 0 < harness.publish().total(EVENTS) < sent
    assert len(harness.exporter.log_lines("queue_max_bytes")) == 1


def cut_off(harness, kill):
    """Has the server end the subscription, and waits for the next one."""
    before = harness.exporter.metrics().one("flower_exporter_reconnects_total")
    kill()
    harness.exporter.wait_for(lambda m: m.one("flower_exporter_reconnects_total") == before + 1, 20, "subscribed again")


def test_a_cut_off_is_counted(services, redis):
    """A subscriber that lags is disconnected; what that has cost is known in seconds."""
    redis.client().config_set("client-output-buffer-limit", "pubsub 1mb 0 0")
    harness = services.harness(redis, {"broker": {"reconnect_max": "1s"}, **SELF_METRICS})
    stream = flood(harness)
    encoded, rounds = b"".join(map(stream.message, task_events(100))), 0

    def lag():
        nonlocal rounds
        harness.exporter.send(signal.SIGSTOP)
        while redis.client().pubsub_numpat():
            stream.send(encoded)
            rounds += 1
        harness.exporter.send(signal.SIGCONT)

    cut_off(harness, lag)
    samples = harness.publish(ev.received("after", "after@tests"))
    assert samples.one("flower_exporter_cutoffs_total") == samples.one("flower_exporter_reconnects_total") == 1
    assert 0 < samples.one("flower_exporter_blind_seconds_total") < 5
    assert samples.one("flower_exporter_dropped_messages_total") == 0
    assert 0 < samples.total(EVENTS) - 1 < rounds * 300, "the rest is what the server threw away"
    assert len(harness.exporter.log_lines(CONNECTION_LOST)) == 1


def test_cut_offs_are_logged_once_a_minute(services, broker):
    """One after the other, with good times between: each is counted, the first is logged."""
    if broker.name == "redis":
        kill = lambda: broker.client().execute_command("CLIENT", "KILL", "TYPE", "pubsub")  # noqa: E731
    else:
        kill = lambda: broker.server.ctl("close_all_connections", "-p", broker.vhost, "test")  # noqa: E731
    harness = services.harness(broker, {"broker": {"reconnect_max": "500ms"}, **SELF_METRICS})
    for number in range(1, 4):
        cut_off(harness, kill)
        harness.publisher.connection.release()
        harness.publisher = services.publisher(broker, harness.exchange)
        harness.publish(ev.received(f"{number}"))
        assert harness.exporter.metrics().one("flower_exporter_cutoffs_total") == number
    assert len(harness.exporter.log_lines(CONNECTION_LOST)) == 1
