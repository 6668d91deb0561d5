"""More events than can be read: what is lost is a number, memory has a bound, and the log tells without being flooded.

`tests/run.sh -rP broker/test_overload.py --sustained 60` shows the figures of this machine.
"""

import signal
import time

from support import events as ev
from support.exporter import SELF_METRICS
from support.exposition import EVENTS
from support.flood import CUT, FULL, accounted, flood, lives, said, send_for, watched
from support.resources import MIB, cpu_seconds, peak_memory


def test_sustained(lab, broker, request):
    """As fast as this machine can send for --sustained seconds, or at --sustained-rate, where all must count."""
    seconds, rate = (request.config.getoption(name) for name in ("--sustained", "--sustained-rate"))
    backlog = 16 * MIB
    rig = lab.rig(broker, {"events": {"max_backlog": backlog}, **SELF_METRICS})
    memory, cpu, start = peak_memory(rig.exporter), cpu_seconds(rig.exporter), time.monotonic()
    with watched(rig.exporter) as sizes:
        sent = send_for(flood(rig), seconds, 3000, rate)
        took = time.monotonic() - start
        samples = accounted(rig, sent, 60 + 2 * seconds)
    spent = (cpu_seconds(rig.exporter) - cpu) / samples.total(EVENTS)
    print(
        f"{sent / took:.0f} events a second, CPU {spent * 1e6:.1f} µs each, backlog at most {max(sizes) / MIB:.2f} MiB"
    )
    if broker.name == "rabbitmq" or rate:
        assert samples.total(EVENTS) == sent
    assert max(sizes) < backlog + 2000, "one message more at the most"
    assert peak_memory(rig.exporter) - memory < 2 * backlog + 16 * MIB
    for text in (FULL, CUT):
        assert len(said(rig.exporter, text)) <= 1 + took // 60, "once a minute"
    assert rig.play(ev.heartbeat("after@tests")).one("flower_worker_online", worker="after@tests") == 1


def test_large_messages_in_a_full_queue(lab, broker):
    """They exceed `max_backlog` by one message, not by one for each that is taken."""
    rig = lab.rig(broker, {"events": {"max_backlog": MIB}, **SELF_METRICS})
    stream = flood(rig)
    # NaN makes them take longer to read than to send.
    messages = [stream.message(list(lives(tasks, custom=float("nan")))) for tasks in range(20, 200, 7)]
    with watched(rig.exporter) as sizes:
        start = time.monotonic()
        while (took := time.monotonic() - start) < 3 or (max(sizes) <= MIB / 2 and took < 30):
            stream.send(b"".join(messages))
        stream.finish()
    assert MIB / 2 < max(sizes) < MIB + len(messages[-1])


def test_prefetch_bounds_what_lies_beneath_the_queue(lab, vhost):
    """So many unacknowledged messages, however fast RabbitMQ is and however slow we are."""
    limits = {"events": {"max_backlog": MIB}, "broker": {"amqp": {"prefetch": 20}}}
    rig = lab.rig(vhost, {**limits, **SELF_METRICS})
    memory, stream = peak_memory(rig.exporter), flood(rig)
    body = list(lives(150, custom=float("nan")))
    encoded, count = stream.message(body), 1000
    stream.send(encoded * count)
    stream.finish()
    rig.exporter.wait_for(lambda m: m.total(EVENTS) == count * len(body), 60)
    assert peak_memory(rig.exporter) - memory < MIB + 20 * len(encoded) + 8 * MIB < count * len(encoded) / 2


def test_what_rabbitmq_drops_is_told(lab, vhost):
    """A queue that has reached `queue_max_bytes` loses its oldest messages: nobody can count them, but it is said."""
    amqp = {"queue_max_bytes": "64KiB", "prefetch": 1}
    rig = lab.rig(vhost, {"broker": {"amqp": amqp}, "events": {"enable_interval": "200ms"}})
    sent = send_for(flood(rig), 2, 3000)
    assert 0 < rig.play().total(EVENTS) < sent
    assert len(said(rig.exporter, "queue_max_bytes")) == 1


def cut_off(rig, kill):
    """Has the server end the subscription, and waits for the next one."""
    before = rig.exporter.metrics().one("flower_exporter_reconnects_total")
    kill()
    rig.exporter.wait_for(lambda m: m.one("flower_exporter_reconnects_total") == before + 1, 20, "subscribed again")


def test_a_cut_off_is_counted(lab, redis):
    """A subscriber that lags is disconnected; what that has cost is known in seconds."""
    redis.client().config_set("client-output-buffer-limit", "pubsub 1mb 0 0")
    rig = lab.rig(redis, {"broker": {"reconnect_max": "1s"}, **SELF_METRICS})
    stream = flood(rig)
    encoded, rounds = b"".join(map(stream.message, lives(100))), 0

    def lag():
        nonlocal rounds
        rig.exporter.send(signal.SIGSTOP)
        while redis.client().pubsub_numpat():
            stream.send(encoded)
            rounds += 1
        rig.exporter.send(signal.SIGCONT)

    cut_off(rig, lag)
    samples = rig.play(ev.received("after", "after@tests"))
    assert samples.one("flower_exporter_cutoffs_total") == samples.one("flower_exporter_reconnects_total") == 1
    assert 0 < samples.one("flower_exporter_blind_seconds_total") < 5
    assert samples.one("flower_exporter_dropped_messages_total") == 0
    assert 0 < samples.total(EVENTS) - 1 < rounds * 300, "the rest is what the server threw away"
    assert len(said(rig.exporter, CUT)) == 1


def test_cut_offs_are_logged_once_a_minute(lab, broker):
    """One after the other, with good times between: each is counted, the first is logged."""
    if broker.name == "redis":
        kill = lambda: broker.client().execute_command("CLIENT", "KILL", "TYPE", "pubsub")  # noqa: E731
    else:
        kill = lambda: broker.server.ctl("close_all_connections", "-p", broker.vhost, "test")  # noqa: E731
    rig = lab.rig(broker, {"broker": {"reconnect_max": "500ms"}, **SELF_METRICS})
    for number in range(1, 4):
        cut_off(rig, kill)
        rig.publisher.connection.release()
        rig.publisher = lab.publisher(broker, rig.exchange)
        rig.play(ev.received(f"{number}"))
        assert rig.exporter.metrics().one("flower_exporter_cutoffs_total") == number
    assert len(said(rig.exporter, CUT)) == 1
