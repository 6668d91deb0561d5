"""Servers that misbehave below the protocol: silent, frozen or flapping ones, and servers of another protocol."""

import contextlib
import signal
import socket
import threading
import time

import pytest

from support import events as ev
from support.events import W
from support.exposition import ONLINE
from support.processes import wait_until
from support.resources import descriptors_and_threads


@contextlib.contextmanager
def listener(handler):
    """A server that accepts connections and calls `handler` with each of them on a separate thread."""
    with socket.create_server(("127.0.0.1", 0), backlog=64) as server:

        def accept():
            with contextlib.suppress(OSError):
                while True:
                    threading.Thread(target=handler, args=[server.accept()[0]], daemon=True).start()

        threading.Thread(target=accept, daemon=True).start()
        yield server.getsockname()[1]


def assert_nothing_leaked(exporter, before):
    wait_until(
        lambda: all(now <= then + 3 for now, then in zip(descriptors_and_threads(exporter), before)), 5, lambda: (descriptors_and_threads(exporter), before)
    )


@pytest.mark.parametrize("scheme", ["redis", "amqp"])
def test_silent_server_leaks_nothing(services, scheme):
    """Attempts that time out leak no descriptors or threads."""
    connections = []
    with listener(lambda connection: connections.append(connection)) as port:
        settings = {"broker": {"url": f"{scheme}://127.0.0.1:{port}/", "connect_timeout": "100ms", "reconnect_backoff_max": "100ms"}}
        exporter = services.exporter(None, settings)
        wait_until(lambda: len(connections) >= 5, 10, "some attempts")
        before = descriptors_and_threads(exporter)
        wait_until(lambda: len(connections) >= 40, 30, "many attempts")
        assert_nothing_leaked(exporter, before)
        assert exporter.healthz()[0] == 200 and exporter.healthz(ready=True)[0] == 503


@pytest.mark.parametrize(
    "answer",
    [b"*1\r\n" * 1_000_000, b"*1000000000\r\n", b"$10000000000\r\n" + b"x" * 1_000_000, b"+" * 1_000_000, b"HTTP/1.1 400\r\n\r\n"],
    ids=["nested", "wide", "long", "endless", "http"],
)
def test_server_without_redis_protocol_is_refused(services, answer):
    """The log contains a hint, and the exporter continues."""

    def handler(connection):
        with contextlib.suppress(OSError):
            connection.recv(100)
            connection.sendall(answer)
            time.sleep(5)

    with listener(handler) as port:
        settings = {"broker": {"url": f"redis://127.0.0.1:{port}/", "connect_timeout": "1s", "reconnect_backoff_max": "100ms"}}
        exporter = services.exporter(None, settings)
        wait_until(lambda: "is this Redis?" in exporter.log(), 10, exporter.log)
        assert exporter.healthz()[0] == 200


def test_wrong_subscription_reply_is_refused(services):
    """Only the expected reply confirms the subscription."""

    def handler(connection):
        with contextlib.suppress(OSError):
            while connection.recv(100):
                connection.sendall(b"+OK\r\n")

    with listener(handler) as port:
        exporter = services.exporter(None, {"broker": {"url": f"redis://127.0.0.1:{port}/", "reconnect_backoff_max": "100ms"}})
        wait_until(lambda: "PSUBSCRIBE: unexpected reply" in exporter.log(), 10, exporter.log)
        assert exporter.healthz(ready=True)[0] == 503


def test_frozen_broker_pauses_worker_timeouts(services, redis):
    """No worker times out while the broker does not respond."""
    settings = {"state": {"worker_timeout": "4s"}, "broker": {"reconnect_backoff_max": "1s", "connect_timeout": "1s"}}
    harness = services.harness(redis, settings)
    assert harness.publish(ev.heartbeat()).one(ONLINE, worker=W) == 1
    redis.process.send(signal.SIGSTOP)
    end = time.monotonic() + 10
    while time.monotonic() < end:
        assert harness.metrics().one(ONLINE, worker=W) == 1
        time.sleep(0.2)
    redis.process.send(signal.SIGCONT)
    harness.exporter.wait_for(lambda m: m.one(ONLINE, worker=W) == 0, 15, "the worker times out")


def test_repeated_disconnects_leak_no_client(services, redis):
    """Even when a broadcast was in progress."""
    settings = {"broker": {"reconnect_backoff_max": "100ms"}, "events": {"enable_interval": "100ms"}}
    harness = services.harness(redis, settings)
    client = redis.client()
    wait_until(lambda: client.pubsub_numpat() == 1, 10, "subscribed")
    before = {other["id"] for other in client.client_list()}
    for _ in range(40):
        wait_until(lambda: client.pubsub_numpat() == 1, 10, "subscribed")
        client.execute_command("CLIENT", "KILL", "TYPE", "pubsub")
    harness.exporter.ready(10)
    # Each of them had two connections.
    wait_until(lambda: sum(other["id"] not in before for other in client.client_list()) <= 2, 10, client.client_list)


CONFIRMED = {"redis": b"psubscribe", "rabbitmq": b"\x00\x3c\x00\x15"}  # basic.consume-ok


def test_disconnect_after_subscribing_leaks_nothing(services, broker):
    """On Redis the connection for broadcasts is only just starting then."""
    path = services.proxy(broker)
    exporter = services.exporter(path, {"broker": {"reconnect_backoff_max": "100ms"}})
    before = descriptors_and_threads(exporter)
    path.close_after(CONFIRMED[broker.name])
    path.cut()
    wait_until(lambda: exporter.log().count("subscribed to") >= 60, 90, exporter.log)
    path.close_after(None)
    exporter.ready(10)
    assert_nothing_leaked(exporter, before)


def test_errors_of_each_broker_are_logged(services, redis):
    """The log contains each broker of a list with its error, and a new error of the same broker."""
    redis.client().config_set("requirepass", "secret")
    urls = f"redis://127.0.0.1:1/;redis://127.0.0.1:{redis.port}/"
    exporter = services.exporter(None, {"broker": {"url": urls, "reconnect_backoff_max": "100ms"}})
    wait_until(lambda: "127.0.0.1:1/" in exporter.log() and "NOAUTH" in exporter.log(), 10, exporter.log)
    redis.stop(signal.SIGKILL)
    wait_until(lambda: exporter.log().count("refused") >= 2, 10, exporter.log)
    assert exporter.log().count("NOAUTH") == 1
