"""Slow, silent and malformed HTTP clients: bounded in number, time and memory, and other clients are not affected."""

import contextlib
import http.client
import os
import re
import resource
import socket
import struct

import pytest

from support import events as ev
from support.processes import wait_until
from support.services import Harness

MAX_CONNECTIONS, REQUEST_TIMEOUT, TASKS = 8, 1, 1500
SCRAPE = b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n"
HEALTHZ = SCRAPE.replace(b"metrics", b"healthz")


@pytest.fixture(scope="module")
def large_harness(session_services, shared_redis):
    """An exporter with low limits and an exposition of more than 8 MB, which exceeds all socket buffers."""
    limits = {"max_connections": MAX_CONNECTIONS, "request_timeout": f"{REQUEST_TIMEOUT}s", "idle_timeout": "2s"}
    harness = Harness(session_services, shared_redis, {"http": limits, "state": {"worker_timeout": 0}})
    harness.publisher.send([ev.succeeded(f"{n}", name=f"{n:0250}", runtime=1.5) for n in range(TASKS)])
    harness.flow_events = 0
    assert_event_counted(harness)
    harness.full_text = without_flow(harness.exporter.text())
    assert harness.full_text.count("flower_task_runtime_seconds_count") == TASKS and len(harness.full_text) > 8_000_000
    return harness


def without_flow(text):
    return re.sub(r"(?m)^.*task-flow.*\n", "", text)


def descriptors(harness):
    return len(os.listdir(f"/proc/{harness.exporter.pid}/fd"))


def assert_event_counted(harness):
    """An event is counted and visible soon, regardless of other clients."""
    harness.flow_events += 1
    harness.publisher.send(ev.task("flow", "f", name=""))
    counted = f'type="task-flow",worker="{ev.W}"}} {harness.flow_events}\n'
    wait_until(lambda: counted in scrape_or_nothing(harness), 10, "the event is visible")


def scrape_or_nothing(harness):
    """The exposition, or an empty string if this scrape itself was too slow."""
    try:
        return harness.exporter.text()
    except http.client.IncompleteRead:
        return ""


@contextlib.contextmanager
def assert_unaffected(harness):
    """After the clients of the block, the number of descriptors is as before, and a scrape is complete and correct."""
    before = descriptors(harness)
    with contextlib.ExitStack() as clients:
        yield clients
        assert_event_counted(harness)
    wait_until(lambda: descriptors(harness) <= before, 5, "all connections are closed")
    assert without_flow(wait_until(lambda: scrape_or_nothing(harness), 10, "a scrape")) == harness.full_text
    assert_event_counted(harness)


def connect(harness, clients, sent=b"", small=True):
    """A client socket that has sent some data. Its receive buffer is small, so that the exporter has to wait for it."""
    client = clients.enter_context(socket.socket())
    if small:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    client.settimeout(20)
    client.connect(("127.0.0.1", harness.exporter.port))
    client.sendall(sent)
    return client


def read_to_end(client):
    """All data until the connection is closed in any way."""
    received = bytearray()
    with contextlib.suppress(ConnectionError):
        while piece := client.recv(1 << 16):
            received += piece
    return bytes(received)


def assert_closed_in_time(harness, before, action=lambda: None):
    """The exporter closes the connections after their timeout."""
    wait_until(lambda: action() or descriptors(harness) <= before, REQUEST_TIMEOUT + 2, "the connections are closed in time")


def test_slow_readers_do_not_delay_scrapes(large_harness):
    """All connections read one byte at a time. Another scrape waits for at most one of them."""
    before, memory = descriptors(large_harness), resident(large_harness)
    with assert_unaffected(large_harness) as clients:
        slow = [connect(large_harness, clients, SCRAPE) for _ in range(MAX_CONNECTIONS)]
        assert_event_counted(large_harness)
        assert_closed_in_time(large_harness, before, lambda: any(not client.recv(1) for client in slow))
        assert resident(large_harness) - memory < 16 << 20, "they share one snapshot"


def resident(harness):
    with open(f"/proc/{harness.exporter.pid}/statm") as statm:
        return int(statm.read().split()[1]) * resource.getpagesize()


@pytest.mark.parametrize("first", [b"", b"HEAD /metrics HTTP/1.1\r\nHost: x\r\n\r\n"], ids=["new", "kept alive"])
def test_slow_writers_time_out(large_harness, first):
    """A request head that arrives one byte at a time has the same timeout as one that does not arrive."""
    before = descriptors(large_harness)
    with assert_unaffected(large_harness) as clients:
        slow = [connect(large_harness, clients, first) for _ in range(MAX_CONNECTIONS // 2)]
        for client in slow:
            assert not first or b" 200 " in client.recv(4096)
        head = iter(SCRAPE[:-2] + b"X-Padding: " + b"x" * 10_000)

        def write():
            byte = bytes([next(head)])
            for client in slow:
                with contextlib.suppress(ConnectionError):
                    client.send(byte)

        assert_closed_in_time(large_harness, before, write)
        assert all(b" 200 " not in read_to_end(client) for client in slow)


HALF_OPEN = {
    "silent": (b"", False),
    "write side closed": (b"", True),
    "partial head": (SCRAPE[:-4], False),
    "partial head, write side closed": (SCRAPE[:-4], True),
    "request without reading": (SCRAPE, False),
    "request without reading, write side closed": (SCRAPE, True),
    "missing body": (b"GET /metrics HTTP/1.1\r\nHost: x\r\nContent-Length: 1000000\r\n\r\n", False),
    "body after 100-continue": (
        b"GET /metrics HTTP/1.1\r\nHost: x\r\nContent-Length: 9\r\nExpect: 100-continue\r\n\r\n", False),
}  # fmt: skip


@pytest.mark.parametrize("sent, closes", HALF_OPEN.values(), ids=HALF_OPEN)
def test_half_open_connections_time_out(large_harness, sent, closes):
    before = descriptors(large_harness)
    with assert_unaffected(large_harness) as clients:
        for _ in range(MAX_CONNECTIONS - 1):
            client = connect(large_harness, clients, sent)
            if closes:
                client.shutdown(socket.SHUT_WR)
        assert_event_counted(large_harness)
        assert_closed_in_time(large_harness, before)


def test_client_with_closed_write_side_gets_its_response(large_harness):
    with assert_unaffected(large_harness) as clients:
        client = connect(large_harness, clients, SCRAPE, small=False)
        client.shutdown(socket.SHUT_WR)
        answer = read_to_end(client)
    assert answer.startswith(b"HTTP/1.1 200 ") and answer.endswith(b"\r\n0\r\n\r\n")


@pytest.fixture
def many_files():
    """Raises the limit of open files for a thousand sockets."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, min(4096, hard)), hard))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@pytest.mark.parametrize("sent", [b"", SCRAPE[:-2], HEALTHZ], ids=["silent", "partial head", "requests"])
def test_1000_concurrent_connections(large_harness, many_files, sent):
    """At most `max_connections` are open. Each of the others gets a response or is closed without one."""
    before = descriptors(large_harness)
    with assert_unaffected(large_harness) as clients:
        connected = [connect(large_harness, clients, sent, small=False) for _ in range(1000)]
        assert descriptors(large_harness) <= before + MAX_CONNECTIONS + 1
        assert_event_counted(large_harness)
        answers = [read_to_end(client) for client in connected]
    full = [answer for answer in answers if answer.startswith(b"HTTP/1.1 200 ") and answer.endswith(b"}\n")]
    assert len(full) + answers.count(b"") == 1000
    assert bool(full) == (sent == HEALTHZ)


HEADS = {
    "no version": b"GET /metrics\r\n\r\n",
    "unknown version": b"GET /metrics HTTP/9.9\r\nHost: x\r\n\r\n",
    "HTTP/2": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    "TLS": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
    "no method": b" /metrics HTTP/1.1\r\n\r\n",
    "no path": b"GET HTTP/1.1\r\n\r\n",
    "blanks": b"GET  /metrics  HTTP/1.1\r\n\r\n",
    "header without colon": b"GET /metrics HTTP/1.1\r\nHost\r\n\r\n",
    "header without name": b"GET /metrics HTTP/1.1\r\n: x\r\n\r\n",
    "control characters": b"GET /metrics HTTP/1.1\r\nHost: \0\1\r\n\r\n",
    "control characters in the path": b"GET /met\0rics HTTP/1.1\r\nHost: x\r\n\r\n",
    "folded header": b"GET /metrics HTTP/1.1\r\nHost: x\r\n y\r\n\r\n",
    "two lengths": b"GET /metrics HTTP/1.1\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\nxx",
    "invalid length": b"GET /metrics HTTP/1.1\r\nContent-Length: -1\r\n\r\n",
    "large head": b"GET /metrics HTTP/1.1\r\nX: " + b"x" * 100_000 + b"\r\n\r\n",
    "long path": b"GET /" + b"x" * 100_000 + b" HTTP/1.1\r\n\r\n",
    "many headers": b"GET /metrics HTTP/1.1\r\n" + b"X: y\r\n" * 1000 + b"\r\n",
    "headers without end": b"GET /metrics HTTP/1.1\r\n" + b"X: y\r\n" * 100_000,
    "only line ends": b"\r\n" * 100_000,
}


@pytest.mark.parametrize("head", HEADS.values(), ids=HEADS)
def test_invalid_heads_are_refused(large_harness, head):
    """Refused immediately or closed in time, never answered with success."""
    with assert_unaffected(large_harness) as clients:
        client = connect(large_harness, clients, small=False)
        with contextlib.suppress(ConnectionError):
            client.sendall(head)
        answer = read_to_end(client)
    assert re.match(rb"HTTP/1\.[01] 4\d\d |$", answer), answer[:200]


def test_pipelined_requests_are_answered_in_order(large_harness):
    """Each request gets one complete response."""
    paths = ["/healthz", "/nothing", "/metrics"] * 5
    requests = "".join(f"GET {path} HTTP/1.1\r\nHost: x\r\n\r\n" for path in paths)
    with assert_unaffected(large_harness) as clients:
        client = connect(large_harness, clients, requests.encode() + b"GET /healthz HTTP/1.0\r\n\r\n", small=False)
        answers = re.split(rb"HTTP/1\.[01] ", read_to_end(client))[1:]
    assert [answer[:3] for answer in answers] == [b"200", b"404", b"200"] * 5 + [b"200"]
    assert all(len(answer) > len(large_harness.full_text) and answer.endswith(b"\r\n0\r\n\r\n") for answer in answers[2::3])
    assert all(answer.endswith(b"}\n") for answer in answers[0::3])


@pytest.mark.parametrize("path", [b"/healthz", b"/metrics"])
def test_pipelining_without_reading_is_closed(large_harness, path):
    """A client that sends requests and never reads is blocked, and then closed."""
    before, memory = descriptors(large_harness), resident(large_harness)
    with assert_unaffected(large_harness) as clients:
        client = connect(large_harness, clients)
        client.settimeout(REQUEST_TIMEOUT + 2)
        with pytest.raises(ConnectionError):
            while True:
                client.sendall(SCRAPE.replace(b"/metrics", path) * 100)
        assert_closed_in_time(large_harness, before)
        assert resident(large_harness) - memory < 16 << 20


@pytest.mark.parametrize("encoding", [b"", b"Accept-Encoding: gzip\r\n"], ids=["plain", "gzip"])
def test_reset_scrapes_leak_nothing(large_harness, encoding):
    """The client resets the connection during the response."""
    linger = struct.pack("ii", 1, 0)
    with assert_unaffected(large_harness) as clients:
        for number in range(100):
            client = connect(large_harness, clients, SCRAPE[:-2] + encoding + b"\r\n")
            assert client.recv(1 + 1000 * number)
            client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
            client.close()
