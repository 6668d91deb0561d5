"""A Redis server with its default limits."""

import signal
from urllib.parse import quote

import redis

from . import releases
from .processes import Process, directory, free_port, wait_until


class Redis:
    name = "redis"

    def __init__(self, *, release=None, password=None, db=0, start=True, options=None, args=()):
        self.release = release or releases.own("redis")
        self.port, self.password, self.db, self.args = free_port(), password, db, args
        self.dir = directory("redis")
        self.socket = self.dir / "redis.sock"
        self.options = dict(options or {})  # kombu's transport options
        self.process = None
        if start:
            self.start()

    @property
    def url(self):
        credentials = f":{quote(self.password, safe='')}@" if self.password else ""
        return f"redis://{credentials}127.0.0.1:{self.port}/{self.db}"

    def client(self):
        return redis.Redis(port=self.port, password=self.password)

    def start(self):
        password = ["--requirepass", self.password] if self.password else []
        self.process = Process(
            "redis",
            self.release.command(
                f"{self.release.product}-server",
                *("--bind", "127.0.0.1"),
                *("--port", self.port),
                *("--unixsocket", self.socket),
                *("--save", ""),
                *("--daemonize", "no"),
                *password,
                *self.args,
            ),
            cwd=self.dir,
        )
        wait_until(self.answers, 10, lambda: f"redis answers\n{self.process.log()}")

    def answers(self):
        try:
            return self.client().ping()
        except redis.RedisError:
            assert self.process.running, self.process.log()
            return False

    def stop(self, number=signal.SIGTERM):
        if self.process:
            self.process.stop(number)
