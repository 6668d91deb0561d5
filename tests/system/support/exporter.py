"""The program under test."""

import contextlib
import http.client
import json
import os
import re
import signal
from pathlib import Path

from .exposition import parse_text
from .processes import ROOT, Process, accepts, directory, free_port, wait_until

BINARY = Path(os.environ.get("FLOWER_EXPORTER_BIN") or ROOT / "target/debug/flower-exporter")

#: Settings of an exporter that serves its own metrics.
SELF_METRICS = {"metrics": {"self_metrics": True}}

#: The environment of the tests must not configure the exporter.
BROKER_VARIABLES = ("CELERY_BROKER_URL", "BROKER_URL", "FLOWER_BROKER")
CLEAN = {key: None for key in os.environ if key.startswith("FLOWER_EXPORTER_") or key in BROKER_VARIABLES}


def toml(settings):
    """Nested dicts as TOML: scalars and lists of a table come before the tables in it."""

    def lines(table, path):
        if path:
            yield f"[{'.'.join(path)}]"
        yield from (f"{key} = {json.dumps(value)}" for key, value in table.items() if not isinstance(value, dict))
        for key, value in table.items():
            if isinstance(value, dict):
                yield from lines(value, [*path, key])

    return "\n".join(lines(settings, [])) + "\n"


def merge(base, over):
    for key, value in over.items():
        if isinstance(value, dict) and isinstance(base.get(key), dict):
            merge(base[key], value)
        else:
            base[key] = value
    return base


def nested(path, value):
    """{"a": {"b": value}} for "a.b"."""
    for part in reversed(path.split(".")):
        value = {part: value}
    return value


class Exporter(Process):
    """A running exporter. Settings are nested dicts as in the TOML file; a test sets only what it needs."""

    #: The TLS context and the headers of the tests' own requests, for an exporter with a web configuration file.
    context = None
    headers = {}

    def __init__(self, broker=None, settings=None, *, env=None, args=(), config=True, prefix=(), port=None, context=None, headers=None):
        self.context, self.headers = context, headers or {}
        self.port = port or free_port()
        self.settings = {"http": {"listen": f"127.0.0.1:{self.port}"}}
        if broker:
            self.settings["broker"] = {"url": broker.url}
        merge(self.settings, settings or {})
        home = directory("exporter")
        self.config = home / "settings.toml"
        self.write(self.settings)
        options = ["-c", self.config] if config else []
        super().__init__("exporter", [*prefix, BINARY, *options, *args], env={**CLEAN, **(env or {})}, cwd=home)

    def write(self, settings):
        self.config.write_text(settings if isinstance(settings, str) else toml(settings))

    def listening(self, deadline=10):
        def check():
            assert self.running, f"the exporter exited with {self.popen.returncode}\n{self.log()}"
            return accepts(self.port)

        wait_until(check, deadline, lambda: f"the exporter listens\n{self.log()}")
        return self

    def ready(self, deadline=20):
        """Waits until the broker has confirmed the subscription."""
        self.listening()
        wait_until(lambda: self.healthz(ready=True)[0] == 200, deadline, lambda: f"ready\n{self.log()}")
        return self

    def connect(self):
        if self.context:
            return http.client.HTTPSConnection("127.0.0.1", self.port, timeout=30, context=self.context)
        return http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)

    def request(self, path="/metrics", method="GET", headers=None):
        """(status, headers, body) of one request on a new connection."""
        with contextlib.closing(self.connect()) as connection:
            connection.request(method, path, headers=self.headers if headers is None else headers)
            response = connection.getresponse()
            return response.status, response.headers, response.read()

    def text(self):
        status, _, body = self.request()
        assert status == 200
        return body.decode()

    def metrics(self):
        return parse_text(self.text())

    def healthz(self, ready=False):
        """(status, JSON) of /healthz; (None, None) if there is no response."""
        try:
            status, _, body = self.request("/healthz?ready" if ready else "/healthz")
        except OSError:
            return None, None
        return status, json.loads(body)

    def log(self):
        """All lines that it has logged until now. A thread writes them, and sleeps when it has written all of them."""
        wait_until(lambda: not self.is_writing_log(), 10, "the log is written")
        return super().log()

    def is_writing_log(self):
        with contextlib.suppress(OSError):
            for thread in Path(f"/proc/{self.pid}/task").iterdir():
                name, state = re.search(r"\((.*)\) (.)", (thread / "stat").read_text()).groups()
                if name == "flower-log":
                    return state in "RD"
        return False

    def log_lines(self, text):
        """The lines of the log that contain this text."""
        return [line for line in self.log().splitlines() if text in line]

    def wait_for(self, condition, deadline=20, what="the series are as expected"):
        """The first samples for which `condition(samples)` is true."""
        last = None

        def check():
            nonlocal last
            assert self.running, f"the exporter exited with {self.popen.returncode}\n{self.log()}"
            last = self.metrics()
            return condition(last)

        def described():
            return f"{what}\n" + "\n".join(f"{key}: {value}" for key, value in last.short().items())

        wait_until(check, deadline, described)
        return last

    def terminate(self, number=signal.SIGTERM):
        """Stops it: exit code 0 within 5 s, and no panic."""
        if self.running:
            self.send(number)
            assert self.wait(5) == 0, self.log()
        assert "panicked" not in self.log(), self.log()
        self.kill()
