"""Sends more events than the exporter can read, and accounts for each of them."""

import contextlib
import json
import socket
import struct
import time
from concurrent.futures import ThreadPoolExecutor
from threading import Event

from . import events as ev
from .exposition import EVENTS
from .processes import wait_until
from .publish import envelope
from .resources import MIB, peak_memory

BUFFER_FULL, CONNECTION_LOST = "dropping messages: buffer full (events.buffer_max_bytes)", "lost connection to broker; reconnecting"


class RedisFlood:
    """Sends pre-encoded messages as fast as Redis reads them."""

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
    """Sends pre-encoded AMQP frames to RabbitMQ, on a channel that py-amqp has opened."""

    def __init__(self, broker, exchange):
        self.exchange = exchange
        self.connection = broker.connection()
        self.channel = self.connection.channel()
        self.socket = self.connection.transport.sock
        self.socket.settimeout(None)
        # py-amqp closes the connection if the broker does not read for a second, but the broker may block the sender.
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


def flood(harness):
    broker = harness.publisher.broker
    return {"redis": RedisFlood, "rabbitmq": RabbitMQFlood}[broker.name](broker, harness.exchange)


def task_events(tasks, **fields):
    """The events of tasks that are received, start and succeed."""
    for number in range(tasks):
        uuid, worker = f"{number:08x}-0000-4000-8000-000000000000", f"w{number % 4}@tests"
        yield ev.received(uuid, worker, number, **fields)
        yield ev.started(uuid, worker, number + 0.25, **fields)
        yield ev.succeeded(uuid, worker, number + 0.5, runtime=0.25, **fields)


@contextlib.contextmanager
def sample_buffer(exporter):
    """Samples the size of the exporter's buffer while the block runs: a list of bytes."""
    sizes, over = [0], Event()

    def watch():
        while not over.wait(0.02):
            sizes.append(exporter.metrics().one("flower_exporter_buffer_bytes"))

    with ThreadPoolExecutor(1) as pool:
        watching = pool.submit(watch)
        try:
            yield sizes
        finally:
            over.set()
        watching.result()


def send_for(stream, seconds, events, rate=None, **fields):
    """Sends batches of `events` events for some seconds, at `rate` events per second if given. Returns the number of events."""
    encoded = b"".join(map(stream.message, task_events(events // 3, **fields)))
    start, rounds = time.monotonic(), 0
    while time.monotonic() < start + seconds:
        stream.send(encoded)
        rounds += 1
        if rate:
            time.sleep(max(0, start + rounds * events / rate - time.monotonic()))
    stream.finish()
    return rounds * events


def wait_until_accounted(harness, sent, deadline):
    """The samples once every message is counted or dropped. Only a disconnect loses more, and it is counted, too."""

    def read():
        samples = harness.exporter.metrics()
        return samples if lost(samples) == 0 or samples.one("flower_exporter_broker_disconnects_total") else None

    def lost(samples):
        return sent - samples.total(EVENTS) - samples.one("flower_exporter_dropped_messages_total")

    samples = wait_until(read, deadline, lambda: (sent, harness.exporter.text()))
    if samples.one("flower_exporter_broker_disconnects_total"):
        # More may follow: the next subscription has the rest of the flood ahead of it. Dropped markers are few.
        harness.settle(deadline)
        samples = harness.exporter.metrics()
    dropped, disconnects, seconds = (
        samples.one(f"flower_exporter_{name}_total") for name in ("dropped_messages", "broker_disconnects", "broker_disconnected_seconds")
    )
    assert (lost(samples) > 0) == (disconnects > 0) == (seconds > 0)
    for number, text in ((dropped, BUFFER_FULL), (disconnects, CONNECTION_LOST)):
        wait_until(lambda: not number or harness.exporter.log_lines(text), 5, lambda: f"the log contains {text!r}")  # noqa: B023
    print(f"{sent} sent, {samples.total(EVENTS):.0f} counted, {dropped:.0f} dropped, {disconnects:.0f} disconnects")
    print(f"{seconds:.2f} s disconnected, {peak_memory(harness.exporter) / MIB:.0f} MiB at the peak")
    return samples
