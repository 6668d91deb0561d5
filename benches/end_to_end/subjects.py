"""The subjects of the comparison: how to start each one, and how to measure it from outside."""

import contextlib
import glob
import http.client
import io
import re
import signal
import socket
import statistics
import time
from pathlib import Path

from support.exporter import CLEAN, Exporter
from support.processes import ROOT, TEST_ENV, Process, free_port, wait_until
from support.rabbitmq import RabbitMQ
from support.redis import Redis

from senders import KINDS

HERE = ROOT / "benches/end_to_end"
BARE = ROOT / "target/bench-bare/release/bare"
#: A subject has settled after a window of WINDOW seconds with less than QUIET seconds of CPU and waiting time.
WINDOW, QUIET = 0.1, 0.006


class Failed(Exception):
    """An exporter's failure, as shown in the results."""


class Subject:
    """One exporter with its own broker and sender."""

    name = title = counter = ""
    #: Whether it decodes more than a million events per minute.
    fast = False
    #: Maximum number of tasks that it holds by default.
    holds = 100_000

    def __init__(self, broker, settings=None):
        self.broker, self.settings, self.port = broker, settings or {}, free_port()
        protocol, sender = KINDS[broker.name]
        self.protocol, self.sender = protocol, sender(broker)
        self.sent, self.process = 0, None

    def start(self):
        """Returns the seconds from start to the first successful scrape, after waiting for the subscription."""
        began = time.perf_counter()
        self.process = self.launch()
        while True:
            self.alive()
            with contextlib.suppress(OSError):
                self.get("/metrics")
                break
            if time.perf_counter() - began > 30:
                raise Failed(f"no response within 30 s\n{self.log_tail()}")
            time.sleep(0.002)
        took = time.perf_counter() - began
        wait_until(self.has_subscriber, 30, lambda: f"{self.title} subscribes\n{self.process.log()}")
        self.settle(15)
        return took

    def stop(self):
        if self.process:
            self.process.kill()
        with contextlib.suppress(OSError):
            self.sender.close()

    def has_subscriber(self):
        self.alive()
        return self.sender.has_subscriber()

    def alive(self):
        if not self.process.running:
            raise Failed(f"exited with code {self.process.popen.returncode}: {self.log_tail()}")

    def log_tail(self):
        lines = self.process.log().strip().splitlines()
        return lines[-1].strip()[:300] if lines else "no output"

    # Resource usage

    def cpu(self):
        """User and system time of all threads in seconds, from the process's own CPU clock."""
        self.alive()
        try:
            return time.clock_gettime_ns(~self.process.pid << 3 | 2) / 1e9
        except OSError:
            self.process.wait(5)  # it has just exited
            self.alive()
            raise

    def busy(self):
        """CPU time plus the time that its threads waited for a CPU."""
        waited = 0
        for path in glob.glob(f"/proc/{self.process.pid}/task/*/schedstat"):
            with contextlib.suppress(OSError):
                waited += int(Path(path).read_text().split()[1])
        return self.cpu() + waited / 1e9

    def unsent(self):
        """Whether the broker's sockets still hold bytes. TCP waits at least 0.2 s before it sends a lost segment again."""
        for path in "/proc/net/tcp", "/proc/net/tcp6":
            for line in Path(path).read_text().splitlines()[1:]:
                _, local, _, _, queues, *_ = line.split()
                if int(local.rpartition(":")[2], 16) == self.broker.port and int(queues.split(":")[0], 16):
                    return True
        return False

    def settle(self, deadline):
        """Waits until it is idle. Returns when that started, or None if the deadline passed first."""
        end = time.perf_counter() + deadline
        while time.perf_counter() < end:
            began, before = time.perf_counter(), self.busy()
            time.sleep(WINDOW)
            if 0 <= self.busy() - before < QUIET and not self.unsent():
                return began
        return None

    def wake_ups(self):
        """How often a thread has started to run after it waited."""
        statuses = (Path(path).read_text() for path in glob.glob(f"/proc/{self.process.pid}/task/*/status"))
        return sum(int(re.search(r"^voluntary_ctxt_switches:\s+(\d+)", text, re.M)[1]) for text in statuses)

    def memory(self):
        """Returns (RSS, peak RSS) in MiB."""
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        return tuple(int(re.search(rf"{key}:\s+(\d+) kB", status)[1]) / 1024 for key in ("VmRSS", "VmHWM"))

    # Output

    def get(self, path, headers=None):
        with contextlib.closing(http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)) as connection:
            connection.request("GET", path, headers=headers or {})
            answer = connection.getresponse()
            return answer.read(), answer.headers

    def scrape(self, headers=None):
        """Returns (seconds, CPU seconds, bytes, whether compressed, body) of one scrape."""
        cpu, began = self.cpu(), time.perf_counter()
        try:
            length = exchange(self.port, "/metrics", headers or {})
            took, used = time.perf_counter() - began, self.cpu() - cpu
            answer = http.client.HTTPResponse(Received(length))
            answer.begin()
            body = answer.read()
        except (OSError, http.client.HTTPException) as error:
            self.alive()
            raise Failed(f"failed to scrape: {error!r}") from error
        return took, used, len(body), answer.headers.get("Content-Encoding") == "gzip", body

    def counted(self, body=None):
        """The number of task events it has counted, from this scrape body or from a new scrape."""
        lines = (body or self.scrape()[4]).decode().splitlines()
        return int(sum(float(line.rpartition(" ")[2]) for line in lines if line.startswith(self.counter)))

    # Load

    def feed(self, stream, events, rate=None, halted=False, timeout=60):
        """Sends events and waits until they are processed. Returns seconds: CPU, total, sending, and the rest.

        With `halted`, the process is stopped while they are sent, so that all are waiting when it continues.
        """
        if halted:
            self.process.send(signal.SIGSTOP)
        try:
            cpu, began = self.cpu(), time.perf_counter()
            sending = self.sender.send(stream, events, rate)
        finally:
            self.process.send(signal.SIGCONT)
        self.sent += events
        settled = self.settle(timeout)
        if settled is None:
            raise Failed(f"still busy {timeout} s after {events:,} events")
        return self.cpu() - cpu, time.perf_counter() - began, sending, settled - began - sending

    def all_counted(self, timeout=10):
        """The number of events counted, once it stops rising. Returns immediately if all events have been counted."""
        end, last = time.perf_counter() + timeout, -1
        while True:
            counted = self.counted()
            if counted == self.sent or counted == last or time.perf_counter() > end:
                return counted
            last = counted
            time.sleep(1)
            self.settle(timeout)


#: Buffer reused by all scrapes, so that the measured time does not include memory allocation in the client.
RECEIVED = bytearray(1 << 20)


def exchange(port, path, headers):
    """Sends a request and reads the whole response. Returns its length."""
    lines = [f"GET {path} HTTP/1.1", "Host: 127.0.0.1", "Connection: close", *map(": ".join, headers.items())]
    filled = 0
    with socket.create_connection(("127.0.0.1", port), timeout=60) as connection:
        connection.sendall("\r\n".join([*lines, "", ""]).encode())
        while True:
            if filled == len(RECEIVED):
                RECEIVED.extend(bytes(len(RECEIVED)))
            with memoryview(RECEIVED) as whole, whole[filled:] as room:
                count = connection.recv_into(room)
            if not count:
                return filled
            filled += count


class Received:
    """A received response, in the form of a socket."""

    def __init__(self, length):
        self.length = length

    def makefile(self, *_):
        return io.BytesIO(memoryview(RECEIVED)[: self.length])


class Ours(Subject):
    name, title, counter, fast = "ours", "flower-exporter", "flower_events_total{", True

    def launch(self):
        return Exporter(self.broker, {"http": {"listen": f"127.0.0.1:{self.port}"}, **self.settings})


class Flower(Subject):
    name, title, counter = "flower", "Flower 2.2.0", "flower_events_total{"

    def launch(self):
        celery = TEST_ENV / "flower/bin/celery"
        options = ["--address=127.0.0.1", f"--port={self.port}"]
        return Process("flower", [celery, "-b", self.broker.url, "flower", *options], env=CLEAN)


class CeleryExporter(Subject):
    name, title, holds = "celery-exporter", "celery-exporter 0.11.2", 10_000
    counter = tuple(f"celery_task_{kind}_total{{" for kind in ("sent", "received", "started", "succeeded"))

    def launch(self):
        python, script = ROOT / "target/bench-env/bin/python", HERE / "celery_exporter.py"
        options = ["--broker-url", self.broker.url, "--host", "127.0.0.1", "--port", self.port]
        return Process("celery-exporter", [python, "-B", script, *options])


class Bare(Subject):
    name, title, counter, fast, holds = "bare", "baseline consumer", "bare_events_total", True, 0
    options = []

    def launch(self):
        return Process("bare", [BARE, *self.options, self.broker.url, self.port], env={"RUST_BACKTRACE": None})


class Floor(Bare):
    """Does only what no exporter can avoid: receives, decodes base64, and looks up each task."""

    name, title = "floor", "floor"
    options = ["--floor"]


class Discard(Bare):
    """Discards everything unread, to measure how much the server can publish."""

    options = ["--discard"]


TITLES = {"redis": "Redis", "rabbitmq": "RabbitMQ"}
SUBJECTS = {kind.name: kind for kind in (Ours, Flower, CeleryExporter, Bare, Floor)}


class Brokers(contextlib.ExitStack):
    """A separate broker for each subject: a Redis server or a RabbitMQ virtual host."""

    def __init__(self, kind, count):
        super().__init__()
        self.kind, self.node = kind, None
        if kind == "rabbitmq":
            self.node = RabbitMQ(vhosts=count)
            self.callback(self.node.stop)
            self.node.wait()

    def new(self):
        if self.node:
            return self.node.vhost()
        server = Redis()
        self.callback(server.stop)
        return server


def median(values):
    values = [value for value in values if value is not None]
    return statistics.median(values) if values else None
