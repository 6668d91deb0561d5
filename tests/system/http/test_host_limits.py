"""Limits of the exporter's own host: open files, and standard error that nothing reads."""

import contextlib
import fcntl
import os
import resource
import socket
import time

from support import events as ev
from support.events import W
from support.processes import directory, wait_until

PIPE_SIZE = 4096
#: More lines than the pipe and the exporter's buffer hold.
WORKERS = 3000


def test_scrape_is_answered_when_descriptors_run_out(services, shared_redis):
    """The connections that have waited longest are closed. There is one warning."""
    exporter = services.exporter(shared_redis, prefix=["prlimit", "--nofile=40:40"])
    assert "the limit of 40 open files is too low for http.max_connections = 64; raise it to 96" in exporter.log()
    with contextlib.ExitStack() as clients:
        idle = [clients.enter_context(socket.create_connection(("127.0.0.1", exporter.port))) for _ in range(60)]
        start = time.monotonic()
        for _ in range(3):
            assert exporter.request()[0] == 200
        assert time.monotonic() - start < 3
        assert len(exporter.log_lines("failed to accept connection")) == 1
        assert "Too many open files" in exporter.log()
        idle[0].settimeout(1)
        assert idle[0].recv(1) == b"", "the oldest connection was closed"


def test_soft_limit_of_open_files_is_raised(services, shared_redis):
    exporter = services.exporter(shared_redis, prefix=["prlimit", "--nofile=40:200"])
    assert resource.prlimit(exporter.pid, resource.RLIMIT_NOFILE) == (200, 200)
    assert "open files is too low" not in exporter.log()
    with contextlib.ExitStack() as clients:
        for _ in range(60):
            clients.enter_context(socket.create_connection(("127.0.0.1", exporter.port)))
        assert exporter.request()[0] == 200
    assert "failed to accept" not in exporter.log()


@contextlib.contextmanager
def unread_stderr():
    """The prefix of a command whose standard error is a small pipe, and a function that reads what is in it."""
    fifo = directory("stderr") / "fifo"
    os.mkfifo(fifo)
    reader = os.open(fifo, os.O_RDONLY | os.O_NONBLOCK)
    fcntl.fcntl(reader, fcntl.F_SETPIPE_SZ, PIPE_SIZE)

    def read():
        with contextlib.suppress(BlockingIOError):
            return os.read(reader, 1 << 16).decode()
        return ""

    try:
        yield ["bash", "-c", f'exec "$@" 2>{fifo}', "-"], read
    finally:
        os.close(reader)


def lost_lines(exporter):
    return exporter.metrics().one("flower_exporter_lost_log_lines_total")


def test_unread_log_stops_nothing(services, shared_redis):
    """Lines are lost and counted. Events, scrapes and SIGTERM are not affected."""
    settings = {"metrics": {"self_metrics": True}, "state": {"worker_timeout": "2s", "purge_offline_workers": "3s"}, "log": {"level": "debug"}}
    with unread_stderr() as (prefix, read):
        harness = services.harness(shared_redis, settings, prefix=prefix)
        exporter = harness.exporter
        harness.publisher.send([ev.without(ev.heartbeat(f"w{n}@tests"), "freq") for n in range(WORKERS)])
        wait_until(lambda: lost_lines(exporter), 20, "lines are lost")
        assert harness.publish(ev.received()).events("received", W) == 1
        assert any("log lines are lost" in warning for warning in exporter.healthz()[1]["warnings"])

        text = ""

        def reported():
            nonlocal text
            text += read()
            return "log lines were lost" in text

        wait_until(reported, 20, lambda: text[-1000:])
        wait_until(lambda: exporter.healthz()[1]["warnings"] == [], 10, "the warning ends")
        harness.publisher.send([ev.without(ev.heartbeat(f"v{n}@tests"), "freq") for n in range(WORKERS)])
        lost = lost_lines(exporter)
        wait_until(lambda: lost_lines(exporter) > lost, 20, "lines are lost again")
        exporter.terminate()


def test_closed_standard_error_stops_nothing(services, shared_redis):
    """Each line that cannot be written counts as lost."""
    settings = {"metrics": {"self_metrics": True}}
    with unread_stderr() as (prefix, _):
        harness = services.harness(shared_redis, settings, prefix=prefix)
    harness.exporter.send(1)
    wait_until(lambda: lost_lines(harness.exporter), 10, "lines are lost")
    assert harness.publish(ev.received()).events("received", W) == 1
