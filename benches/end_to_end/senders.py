"""Writes a stream to a broker at a given rate, or as fast as the broker accepts it.

The cost of sending is far below the measured costs.
"""

import socket
import time

import amqp

from stream import BATCH, AmqpProtocol, RedisProtocol, heartbeat, worker

#: Socket timeout in seconds.
DEADLINE = 60
#: Maximum bytes per write.
SLICE = 1 << 20


class Sender:
    """Sends a stream in a loop, and a new stream from its start. `position` is the next message."""

    def __init__(self):
        self.stream, self.position = None, 0

    def send(self, stream, events, rate=None):
        """Sends this many events and waits until the broker has processed them. Returns the elapsed seconds."""
        if stream is not self.stream:
            self.stream, self.position = stream, 0
        view, ends, messages = memoryview(stream.data), stream.ends, events // BATCH
        began, sent = time.perf_counter(), 0
        while sent < messages:
            if rate is None:
                due = messages
            else:
                due = min(messages, 1 + int((time.perf_counter() - began) * rate / BATCH))
            if due == sent:
                time.sleep(min(0.001, BATCH / rate))
                continue
            first = self.position % stream.messages
            last = min(first + due - sent, stream.messages)
            start, end = ends[first - 1] if first else 0, ends[last - 1]
            for at in range(start, end, SLICE):
                self.socket.sendall(view[at : min(end, at + SLICE)])
            self.position += last - first
            sent += last - first
        self.wait()
        return time.perf_counter() - began

    def write(self, data):
        self.socket.sendall(data)
        self.wait()


class RedisSender(Sender):
    def __init__(self, broker):
        super().__init__()
        self.socket = socket.create_connection(("127.0.0.1", broker.port), timeout=DEADLINE)
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.socket.sendall(b"CLIENT REPLY OFF\r\n")
        self.client = broker.client()

    def has_subscriber(self):
        """Whether there is a subscriber."""
        return self.client.pubsub_numpat()

    def wait(self):
        """Waits for a reply: Redis processes commands in order."""
        self.socket.sendall(b"CLIENT REPLY ON\r\n")
        answer = b""
        while not answer.endswith(b"\r\n"):
            more = self.socket.recv(4096)
            assert more, "Redis has closed the connection"
            answer += more
        assert answer == b"+OK\r\n", answer
        self.socket.sendall(b"CLIENT REPLY OFF\r\n")

    def close(self):
        self.socket.close()


class AmqpSender(Sender):
    def __init__(self, broker):
        super().__init__()
        self.connection = broker.connection()
        self.channel = self.connection.channel()
        assert self.channel.channel_id == 1
        self.channel.exchange_declare("celeryev", "topic", durable=True, auto_delete=False)
        self.socket = self.connection.transport.sock
        self.socket.settimeout(DEADLINE)

    def has_subscriber(self):
        returned = []
        self.channel.events["basic_return"].add(lambda *answer: returned.append(answer))
        event = amqp.Message(heartbeat(worker(0)), content_type="application/json", content_encoding="utf-8")
        self.channel.basic_publish(event, "celeryev", "worker.probe", mandatory=True)
        self.wait()
        return not returned

    def wait(self):
        """Waits for a reply: RabbitMQ processes a channel in order, so by then all messages are in the queues."""
        self.channel.exchange_declare("celeryev", "topic", passive=True)

    def close(self):
        self.connection.close()


KINDS = {"redis": (RedisProtocol(0), RedisSender), "rabbitmq": (AmqpProtocol(), AmqpSender)}
