"""Random faults on the path of the events: no live worker is shown offline, and no dead one stays online."""

import contextlib
import os
import random
import signal
import threading
import time

import pytest

from support import events as ev
from support.exposition import ONLINE
from support.processes import STALLS, wait_until
from support.publish import Publisher

pytestmark = pytest.mark.every_release

LIVE, TIMEOUT = "live@tests", 4
#: Seconds from the end of a timeout until a scrape shows it: a witness, and its way through the exporter.
DELAY = 3


def beat(worker, at):
    """A heartbeat without its interval, which would extend the timeout."""
    return ev.without(ev.heartbeat(worker, at=at), "freq")


class Deployment:
    """A live worker, and workers that die one after another. They reach the broker directly, and the exporter by a path."""

    def __init__(self, services, broker, dice):
        self.broker, self.dice, self.path = broker, dice, services.proxy(broker)
        settings = {
            "state": {"worker_timeout": f"{TIMEOUT}s"},
            "broker": {"reconnect_backoff_max": "500ms", "connect_timeout": "1s", "amqp": {"heartbeat": "1s"}},
            "metrics": {"self_metrics": True},
            "events": {"enable_interval": "500ms"},
        }
        self.harness = services.harness(broker, settings, path=self.path)
        self.exporter, self.stopped, self.problems = self.harness.exporter, threading.Event(), []
        self.dead, self.faults = None, 0

    def run(self, faults):
        threads = [threading.Thread(target=self.guard, args=[target]) for target in (self.keep_alive, self.watch)]
        for thread in threads:
            thread.start()
        try:
            for _ in range(faults):
                if self.stopped.is_set():
                    break
                self.dice.choice([self.cut, self.reset, self.stall, self.refuse, self.stop_exporter, self.stop_broker])()
                self.faults += 1
                time.sleep(self.dice.random())
        finally:
            self.stopped.set()
            for thread in threads:
                thread.join()
        assert not self.problems, "\n".join([*self.problems, self.exporter.log()[-3000:]])

    def guard(self, target):
        try:
            target()
        except Exception as error:  # noqa: BLE001 - reported by the main thread
            self.problems.append(repr(error))
            self.stopped.set()

    def keep_alive(self):
        """Sends heartbeats of the live worker all the time, and one of another worker when the one before is offline."""
        number, at = 0, 0
        with Publisher(self.broker, self.harness.exchange) as publisher:
            while not self.stopped.wait(0.3):
                at += 1
                publisher.send([beat(LIVE, at), *(ev.sent(f"{at}-{n}") for n in range(20))])
                if self.dead is None:
                    number += 1
                    publisher.send(beat(f"dead{number}@tests", at))
                    self.dead = f"dead{number}@tests", None

    def watch(self):
        """Scrapes all the time. The dead worker's time on the clock is what has passed minus what was paused."""
        while not self.stopped.wait(0.1):
            samples = self.scrape()
            if samples is None:
                continue
            now, paused = time.monotonic(), samples.one("flower_exporter_worker_clock_paused_seconds_total") + STALLS.seconds
            if samples.one(ONLINE, worker=LIVE) == 0:
                self.problems.append(f"after {self.faults} faults: the live worker is shown offline")
                self.stopped.set()
            if self.dead is None:
                continue
            name, since = self.dead
            online = samples.one(ONLINE, worker=name)
            if since is None:
                # A fault may have swallowed its only heartbeat.
                self.dead = (name, (now, paused)) if online else (None if self.dice.random() < 0.02 else self.dead)
            elif not online:
                self.dead = None
            elif now - since[0] - (paused - since[1]) > TIMEOUT + DELAY + 8:
                self.problems.append(f"after {self.faults} faults: {name} is still online after {now - since[0]:.1f} s")
                self.stopped.set()

    def scrape(self):
        with contextlib.suppress(OSError):
            return self.exporter.metrics()

    # -- faults

    def cut(self):
        self.path.cut()

    def reset(self):
        self.path.reset()

    def stall(self):
        self.path.stall(inward=self.dice.random() < 0.7, outward=self.dice.random() < 0.5)
        time.sleep(self.dice.uniform(0, 6))
        self.path.resume()

    def refuse(self):
        self.path.refuse()
        self.path.cut()
        time.sleep(self.dice.uniform(0, 6))
        self.path.resume()

    def stop_exporter(self):
        self.exporter.send(signal.SIGSTOP)
        time.sleep(self.dice.uniform(0, 6))
        self.exporter.send(signal.SIGCONT)

    def stop_broker(self):
        """Not a node of RabbitMQ, which other tests use too."""
        if self.broker.name == "redis":
            os.killpg(self.broker.process.pid, signal.SIGSTOP)
            time.sleep(self.dice.uniform(0, 4))
            os.killpg(self.broker.process.pid, signal.SIGCONT)


@pytest.mark.timeout(3600)
def test_random_faults(services, broker, pytestconfig):
    seed = pytestconfig.getoption("--fault-seed") or random.SystemRandom().randrange(10**6)
    print(f"repeat with: tests/run.sh --fault-seed {seed} broker/test_worker_faults.py")
    deployment = Deployment(services, broker, random.Random(seed))
    deployment.harness.publish(beat(LIVE, 0))
    wait_until(lambda: deployment.exporter.metrics().one(ONLINE, worker=LIVE) == 1, 5, "the worker is online")
    deployment.run(pytestconfig.getoption("--faults"))
