"""The HTTP server: paths, methods, health, connections, and a port that is in use."""

import http.client
import socket
import time

import pytest

from support import events as ev
from support.exposition import EVENTS
from support.processes import free_port, wait_until


@pytest.fixture
def exporter(harness):
    return harness.exporter


@pytest.mark.parametrize("path", ["/metrics", "/healthz", "/healthz?ready", "/metrics?name=x"])
def test_head_equals_get_without_body(exporter, path):
    """Status and content type are equal."""
    status, headers, body = exporter.request(path, "HEAD")
    get, same, content = exporter.request(path)
    assert (status, body) == (get, b"") == (200, b"")
    assert content
    assert headers["Content-Type"] == same["Content-Type"]


@pytest.mark.parametrize("path", ["/", "/metric", "/metrics/", "/healthz/x", "/favicon.ico", "//metrics"])
def test_not_found(exporter, path):
    assert exporter.request(path)[0] == 404


@pytest.mark.parametrize("path", ["/metrics", "/healthz", "/healthz?ready"])
@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "OPTIONS", "PATCH"])
def test_method_not_allowed(exporter, method, path):
    status, headers, _ = exporter.request(path, method)
    assert status == 405
    assert sorted(method.strip() for method in headers["Allow"].split(",")) == ["GET", "HEAD"]


def test_healthz_is_json(harness):
    """Its contents are tested in test_healthz.py."""
    assert content_type(harness.exporter).startswith("application/json")


def content_type(exporter):
    return exporter.request("/healthz")[1]["Content-Type"]


@pytest.mark.parametrize("scheme", ["redis://127.0.0.1:{}/0", "amqp://guest:guest@127.0.0.1:{}//"])
def test_serves_metrics_without_a_broker(services, scheme):
    """Alive and serving metrics, but not ready."""
    exporter = services.exporter(None, {"broker": {"url": scheme.format(free_port())}}, ready=False).listening()
    assert exporter.healthz()[0] == 200
    assert exporter.healthz(ready=True)[0] == 503
    assert "# TYPE flower_events_total counter" in exporter.text()
    assert exporter.healthz(ready=True)[1].keys() == exporter.healthz()[1].keys()


def test_port_in_use_is_an_error(services, shared_redis):
    """Exit code 2 and one line with the address."""
    first = services.exporter(shared_redis)
    second = services.exporter(shared_redis, {"http": {"listen": f"127.0.0.1:{first.port}"}}, ready=False, terminate=False)
    assert second.wait(5) == 2
    lines = [line for line in second.err.read_text().splitlines() if line.strip()]
    assert len([line for line in lines if f"127.0.0.1:{first.port}" in line]) == 1
    assert len(lines) == 1, lines


def test_keep_alive_serves_many_requests(exporter):
    """All requests use the same connection."""
    connection = http.client.HTTPConnection("127.0.0.1", exporter.port, timeout=10)
    connection.connect()
    local = connection.sock.getsockname()
    for path in ("/metrics", "/nothing", "/healthz", "/metrics"):
        connection.request("GET", path)
        connection.getresponse().read()
        assert connection.sock and connection.sock.getsockname() == local
    connection.close()


def test_max_connections_closes_the_oldest_idle_connection(services, shared_redis):
    """Scrapes never wait for idle connections. The one that is longest without a complete request is closed."""
    exporter = services.exporter(shared_redis, {"http": {"max_connections": 4}})
    idle = []
    for _ in range(20):
        idle.append(socket.create_connection(("127.0.0.1", exporter.port)))
        idle[-1].sendall(b"GET /metrics HTTP/1.1\r\n")
        assert exporter.request()[0] == 200
    closed = []
    for connection in idle:
        connection.settimeout(0.2)
        try:
            closed.append(not connection.recv(1))
        except ConnectionError:
            closed.append(True)
        except TimeoutError:
            closed.append(False)
        connection.close()
    assert closed[:16] == [True] * 16 and not closed[-1], closed


def test_request_timeout_closes_incomplete_requests(services, shared_redis):
    """Other requests are served at the same time."""
    exporter = services.exporter(shared_redis, {"http": {"request_timeout": "1s"}})
    slow = socket.create_connection(("127.0.0.1", exporter.port))
    slow.sendall(b"GET /metrics HTTP/1.1\r\nHost: x\r\n")
    assert exporter.request()[0] == 200
    slow.settimeout(10)
    answer = b"".join(iter(lambda: slow.recv(4096), b""))
    assert b" 200 " not in answer
    slow.close()


def test_idle_timeout_is_separate_from_request_timeout(services, shared_redis):
    """A kept-alive connection may be idle for longer than `request_timeout`, until `idle_timeout`."""
    exporter = services.exporter(shared_redis, {"http": {"request_timeout": "500ms", "idle_timeout": "3s"}})
    idle = socket.create_connection(("127.0.0.1", exporter.port))
    idle.settimeout(20)

    def scrape():
        idle.sendall(b"HEAD /metrics HTTP/1.1\r\nHost: x\r\n\r\n")
        return idle.recv(4096)

    assert b" 200 " in scrape()
    # Another connection starts now and is closed after request_timeout: the first one is idle for at least as long.
    late = socket.create_connection(("127.0.0.1", exporter.port))
    late.settimeout(20)
    late.sendall(b"GET /met")
    while late.recv(4096):
        pass
    late.close()
    assert b" 200 " in scrape(), "idle for longer than request_timeout"
    started = time.monotonic()
    assert idle.recv(4096) == b"", "closed after idle_timeout"
    assert time.monotonic() - started < 10
    idle.close()


@pytest.mark.parametrize(
    "garbage", [b"\x16\x03\x01\x02\x00\x01\x00", b"GET\r\n\r\n", b"\0" * 70000, b"GET /" + b"x" * 200000]
)
def test_garbage_does_not_affect_other_clients(exporter, garbage):
    with socket.create_connection(("127.0.0.1", exporter.port), timeout=15) as connection:
        try:
            connection.sendall(garbage)
            connection.shutdown(socket.SHUT_WR)
            while connection.recv(4096):
                pass
        except OSError:  # the server may close the connection
            pass
    assert exporter.request()[0] == 200


def test_counters_never_decrease_during_a_stream(harness):
    """Every scrape is complete."""
    seen = [0]
    harness.publisher.send([ev.succeeded(f"{n}", runtime=0.1) for n in range(20)])
    for batch in range(50):
        harness.publisher.send([ev.succeeded(f"{batch}-{n}", runtime=0.1) for n in range(20)])
        seen.append(harness.metrics().total(EVENTS, worker=ev.W))
    wait_until(lambda: harness.metrics().total(EVENTS, worker=ev.W) == 51 * 20, 20, "all are counted")
    assert seen == sorted(seen)
