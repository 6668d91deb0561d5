"""More events than can be read: what is lost is a number, memory has a bound, and the log tells without being flooded.

`pytest -rP test_overload.py --sustained 60` shows the figures of this machine.
"""

import contextlib
import json
import os
import re
import signal
import socket
import struct
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Event

from support import events as ev
from support.exposition import EVENTS
from support.processes import wait_until
from support.publish import envelope

MIB = 1 << 20
SELF_METRICS = {"metrics": {"self_metrics": True}}
FULL, CUT = "max_backlog is reached", "the connection to the broker is lost"


class RedisFlood:
    """Sends messages that were encoded before, as fast as Redis reads them."""

    def __init__(self, broker, exchange):
        self.exchange = exchange
        self.socket = socket.create_connection(("127.0.0.1", broker.port))
        self.send(b"CLIENT REPLY OFF\r\n")

    def message(self, item):
        """PUBLISH, as kombu's client writes it."""
        payload = json.dumps(envelope(json.dumps(item), exchange=self.exchange)).encode()
        return self.publish(payload)

    def publish(self, payload):
        parts = b"PUBLISH", f"/0.{self.exchange}/task.x".encode(), payload
        return b"*3\r\n" + b"".join(b"$%d\r\n%s\r\n" % (len(part), part) for part in parts)

    def send(self, encoded):
        self.socket.sendall(encoded)

    def finish(self):
        """Waits until the broker has taken everything."""
        self.send(b"CLIENT REPLY ON\r\nPING\r\n")
        answer = b""
        while not answer.endswith(b"+PONG\r\n"):
            answer += self.socket.recv(100)


class RabbitMQFlood:
    """The same for RabbitMQ: AMQP frames, on a channel that py-amqp has opened."""

    def __init__(self, broker, exchange):
        self.exchange = exchange
        self.connection = broker.connection()
        self.channel = self.connection.channel()
        self.socket = self.connection.transport.sock
        self.socket.settimeout(None)
        # py-amqp gives up a broker that does not read for a second: but it is to make us wait.
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, 0)

    def message(self, item):
        return self.publish(json.dumps(item).encode())

    def publish(self, body):
        """Basic.Publish, its header with content type, encoding and delivery mode, and its body."""

        def short(text):
            return struct.pack("B", len(text)) + text.encode()

        def frame(kind, payload):
            return struct.pack(">BHI", kind, self.channel.channel_id, len(payload)) + payload + b"\xce"

        method = struct.pack(">HHH", 60, 40, 0) + short(self.exchange) + short("task.x") + b"\0"
        header = struct.pack(">HHQH", 60, 0, len(body), 0xD000) + short("application/json") + short("utf-8") + b"\1"
        pieces = [body[start : start + 100_000] for start in range(0, len(body), 100_000)]
        return frame(1, method) + frame(2, header) + b"".join(frame(3, piece) for piece in pieces)

    def send(self, encoded):
        self.socket.sendall(encoded)

    def finish(self):
        self.channel.basic_qos(0, 1, False)


def flood(rig):
    broker = rig.publisher.broker
    return {"redis": RedisFlood, "rabbitmq": RabbitMQFlood}[broker.name](broker, rig.exchange)


def lives(tasks, **fields):
    """The events of tasks that are received, started and succeed."""
    for number in range(tasks):
        uuid, worker = f"{number:08x}-0000-4000-8000-000000000000", f"w{number % 4}@tests"
        yield ev.received(uuid, worker, number, **fields)
        yield ev.started(uuid, worker, number + 0.25, **fields)
        yield ev.succeeded(uuid, worker, number + 0.5, runtime=0.25, **fields)


def peak_memory(exporter):
    """The most that was resident at a time, in bytes."""
    status = Path(f"/proc/{exporter.pid}/status").read_text()
    return int(re.search(r"VmHWM:\s+(\d+) kB", status)[1]) << 10


def cpu_seconds(exporter):
    fields = Path(f"/proc/{exporter.pid}/stat").read_text().rpartition(")")[2].split()
    return sum(map(int, fields[11:13])) / os.sysconf("SC_CLK_TCK")


def said(exporter, text):
    return [line for line in exporter.log().splitlines() if text in line]


@contextlib.contextmanager
def watched(exporter):
    """Reads the backlog again and again while the block runs: a list of its sizes in bytes."""
    sizes, over = [0], Event()

    def watch():
        while not over.wait(0.02):
            sizes.append(exporter.metrics().one("flower_exporter_backlog_bytes"))

    with ThreadPoolExecutor(1) as pool:
        watching = pool.submit(watch)
        try:
            yield sizes
        finally:
            over.set()
        watching.result()


def send_for(stream, seconds, events, rate=None, **fields):
    """Sends `events` events at a time for some seconds, at so many a second if there is a rate. How many were sent."""
    encoded = b"".join(map(stream.message, lives(events // 3, **fields)))
    start, rounds = time.monotonic(), 0
    while time.monotonic() < start + seconds:
        stream.send(encoded)
        rounds += 1
        if rate:
            time.sleep(max(0, start + rounds * events / rate - time.monotonic()))
    stream.finish()
    return rounds * events


def accounted(rig, sent, deadline):
    """The samples once every message is counted or dropped. Only a cut-off by the server costs more, and is counted."""

    def read():
        samples = rig.exporter.metrics()
        return samples if lost(samples) == 0 or samples.one("flower_exporter_cutoffs_total") else None

    def lost(samples):
        return sent - samples.total(EVENTS) - samples.one("flower_exporter_dropped_messages_total")

    samples = wait_until(read, deadline, lambda: (sent, rig.exporter.text()))
    if samples.one("flower_exporter_cutoffs_total"):
        # More may follow: the next subscription has the rest of the flood ahead of it. Dropped markers are few.
        rig.settle(deadline)
        samples = rig.exporter.metrics()
    dropped, cutoffs, blind = (
        samples.one(f"flower_exporter_{name}_total") for name in ("dropped_messages", "cutoffs", "blind_seconds")
    )
    assert (lost(samples) > 0) == (cutoffs > 0) == (blind > 0)
    for number, text in ((dropped, FULL), (cutoffs, CUT)):
        wait_until(lambda: not number or said(rig.exporter, text), 5, lambda: f"never silent: {text}")  # noqa: B023
    print(f"{sent} sent, {samples.total(EVENTS):.0f} counted, {dropped:.0f} dropped, {cutoffs:.0f} cut-offs")
    print(f"{blind:.2f} s blind, {peak_memory(rig.exporter) / MIB:.0f} MiB at the peak")
    return samples


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
