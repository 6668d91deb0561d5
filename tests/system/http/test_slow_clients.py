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
def large(session_services, shared_redis):
    """An exporter with tight limits and an exposition of more than 10 MB, which fits no socket's buffers."""
    limits = {"max_connections": MAX_CONNECTIONS, "request_timeout": f"{REQUEST_TIMEOUT}s", "idle_timeout": "2s"}
    harness = Harness(session_services, shared_redis, {"http": limits, "state": {"worker_timeout": 0}})
    harness.publisher.send([ev.succeeded(f"{n}", name=f"{n:0250}", runtime=1.5) for n in range(TASKS)])
    harness.flowed = 0
    flow(harness)
    harness.whole = without_flow(harness.exporter.text())
    assert harness.whole.count("flower_task_runtime_seconds_count") == TASKS and len(harness.whole) > 8_000_000
    return harness


def without_flow(text):
    return re.sub(r"(?m)^.*task-flow.*\n", "", text)


def descriptors(harness):
    return len(os.listdir(f"/proc/{harness.exporter.pid}/fd"))


def flow(harness):
    """An event is counted and seen soon, whoever else is connected."""
    harness.flowed += 1
    harness.publisher.send(ev.task("flow", "f", name=""))
    counted = f'type="task-flow",worker="{ev.W}"}} {harness.flowed}\n'
    wait_until(lambda: counted in scraped(harness), 10, "the event is seen")


def scraped(harness):
    """What a scrape has got; nothing if it was too slow itself."""
    try:
        return harness.exporter.text()
    except http.client.IncompleteRead:
        return ""


@contextlib.contextmanager
def unmoved(harness):
    """Clients come and go: afterwards descriptors are what they were, and a scrape is complete and correct."""
    before = descriptors(harness)
    with contextlib.ExitStack() as clients:
        yield clients
        flow(harness)
    wait_until(lambda: descriptors(harness) <= before, 5, "all connections are closed")
    assert without_flow(wait_until(lambda: scraped(harness), 10, "a scrape")) == harness.whole
    flow(harness)


def connect(harness, clients, sent=b"", small=True):
    """A client's socket that has sent something; its own buffer is small, so that the exporter has to wait for it."""
    client = clients.enter_context(socket.socket())
    if small:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    client.settimeout(20)
    client.connect(("127.0.0.1", harness.exporter.port))
    client.sendall(sent)
    return client


def rest(client):
    """What still comes until the connection is closed, in whatever way."""
    received = bytearray()
    with contextlib.suppress(ConnectionError):
        while piece := client.recv(1 << 16):
            received += piece
    return bytes(received)


def gone(harness, before, meanwhile=lambda: None):
    """Connections are closed when their time is over, not when the client pleases."""
    wait_until(lambda: meanwhile() or descriptors(harness) <= before, REQUEST_TIMEOUT + 2, "they are closed in time")


def test_slow_readers(large):
    """A byte at a time, on every connection there may be: one more scrape waits no longer than for one of them."""
    before, memory = descriptors(large), resident(large)
    with unmoved(large) as clients:
        slow = [connect(large, clients, SCRAPE) for _ in range(MAX_CONNECTIONS)]
        flow(large)
        gone(large, before, lambda: any(not client.recv(1) for client in slow))
        assert resident(large) - memory < 16 << 20, "they have shared one copy of the numbers"


def resident(harness):
    with open(f"/proc/{harness.exporter.pid}/statm") as statm:
        return int(statm.read().split()[1]) * resource.getpagesize()


@pytest.mark.parametrize("first", [b"", b"HEAD /metrics HTTP/1.1\r\nHost: x\r\n\r\n"], ids=["new", "kept alive"])
def test_slow_writers(large, first):
    """A head that comes a byte at a time gets no more time than one that does not come."""
    before = descriptors(large)
    with unmoved(large) as clients:
        slow = [connect(large, clients, first) for _ in range(MAX_CONNECTIONS // 2)]
        for client in slow:
            assert not first or b" 200 " in client.recv(4096)
        head = iter(SCRAPE[:-2] + b"X-Padding: " + b"x" * 10_000)

        def write():
            byte = bytes([next(head)])
            for client in slow:
                with contextlib.suppress(ConnectionError):
                    client.send(byte)

        gone(large, before, write)
        assert all(b" 200 " not in rest(client) for client in slow)


HALF_OPEN = {
    "silent": (b"", False),
    "closed its side": (b"", True),
    "half a head": (SCRAPE[:-4], False),
    "half a head, closed its side": (SCRAPE[:-4], True),
    "asks and does not read": (SCRAPE, False),
    "asks, closed its side, does not read": (SCRAPE, True),
    "a body that never comes": (b"GET /metrics HTTP/1.1\r\nHost: x\r\nContent-Length: 1000000\r\n\r\n", False),
    "waits to be asked for its body": (
        b"GET /metrics HTTP/1.1\r\nHost: x\r\nContent-Length: 9\r\nExpect: 100-continue\r\n\r\n", False),
}  # fmt: skip


@pytest.mark.parametrize("sent, closes", HALF_OPEN.values(), ids=HALF_OPEN)
def test_half_open(large, sent, closes):
    before = descriptors(large)
    with unmoved(large) as clients:
        for _ in range(MAX_CONNECTIONS - 1):
            client = connect(large, clients, sent)
            if closes:
                client.shutdown(socket.SHUT_WR)
        flow(large)
        gone(large, before)


def test_a_client_that_closes_its_side_is_answered(large):
    with unmoved(large) as clients:
        client = connect(large, clients, SCRAPE, small=False)
        client.shutdown(socket.SHUT_WR)
        answer = rest(client)
    assert answer.startswith(b"HTTP/1.1 200 ") and answer.endswith(b"\r\n0\r\n\r\n")


@pytest.fixture
def many_files():
    """A thousand sockets are more than a process may have open by default."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, min(4096, hard)), hard))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@pytest.mark.parametrize("sent", [b"", SCRAPE[:-2], HEALTHZ], ids=["silent", "half a head", "requests"])
def test_1000_connections_at_once(large, many_files, sent):
    """No more than `max_connections` are open; each of the others is answered, or closed without a word."""
    before = descriptors(large)
    with unmoved(large) as clients:
        crowd = [connect(large, clients, sent, small=False) for _ in range(1000)]
        assert descriptors(large) <= before + MAX_CONNECTIONS + 1
        flow(large)
        answers = [rest(client) for client in crowd]
    whole = [answer for answer in answers if answer.startswith(b"HTTP/1.1 200 ") and answer.endswith(b"}\n")]
    assert len(whole) + answers.count(b"") == 1000
    assert bool(whole) == (sent == HEALTHZ)


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
    "length that is none": b"GET /metrics HTTP/1.1\r\nContent-Length: -1\r\n\r\n",
    "large head": b"GET /metrics HTTP/1.1\r\nX: " + b"x" * 100_000 + b"\r\n\r\n",
    "long path": b"GET /" + b"x" * 100_000 + b" HTTP/1.1\r\n\r\n",
    "many headers": b"GET /metrics HTTP/1.1\r\n" + b"X: y\r\n" * 1000 + b"\r\n",
    "headers without end": b"GET /metrics HTTP/1.1\r\n" + b"X: y\r\n" * 100_000,
    "only line ends": b"\r\n" * 100_000,
}


@pytest.mark.parametrize("head", HEADS.values(), ids=HEADS)
def test_heads_that_are_none(large, head):
    """Refused at once, or given up in time; never answered as if they had been good."""
    with unmoved(large) as clients:
        client = connect(large, clients, small=False)
        with contextlib.suppress(ConnectionError):
            client.sendall(head)
        answer = rest(client)
    assert re.match(rb"HTTP/1\.[01] 4\d\d |$", answer), answer[:200]


def test_pipelining(large):
    """Many requests at once: as many answers, in order and whole."""
    paths = ["/healthz", "/nothing", "/metrics"] * 5
    requests = "".join(f"GET {path} HTTP/1.1\r\nHost: x\r\n\r\n" for path in paths)
    with unmoved(large) as clients:
        client = connect(large, clients, requests.encode() + b"GET /healthz HTTP/1.0\r\n\r\n", small=False)
        answers = re.split(rb"HTTP/1\.[01] ", rest(client))[1:]
    assert [answer[:3] for answer in answers] == [b"200", b"404", b"200"] * 5 + [b"200"]
    assert all(len(answer) > len(large.whole) and answer.endswith(b"\r\n0\r\n\r\n") for answer in answers[2::3])
    assert all(answer.endswith(b"}\n") for answer in answers[0::3])


@pytest.mark.parametrize("path", [b"/healthz", b"/metrics"])
def test_pipelining_without_end(large, path):
    """Who asks and asks and never reads is made to wait, and then closed."""
    before, memory = descriptors(large), resident(large)
    with unmoved(large) as clients:
        client = connect(large, clients)
        client.settimeout(REQUEST_TIMEOUT + 2)
        with pytest.raises(ConnectionError):
            while True:
                client.sendall(SCRAPE.replace(b"/metrics", path) * 100)
        gone(large, before)
        assert resident(large) - memory < 16 << 20


@pytest.mark.parametrize("encoding", [b"", b"Accept-Encoding: gzip\r\n"], ids=["plain", "gzip"])
def test_scrapes_cancelled_halfway(large, encoding):
    """By a reset, with the answer on its way."""
    linger = struct.pack("ii", 1, 0)
    with unmoved(large) as clients:
        for number in range(100):
            client = connect(large, clients, SCRAPE[:-2] + encoding + b"\r\n")
            assert client.recv(1 + 1000 * number)
            client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
            client.close()
