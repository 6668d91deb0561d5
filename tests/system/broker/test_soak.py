"""Random faults under load; afterwards everything is as it was: nothing stuck, nothing leaked."""

import contextlib
import os
import random
import re
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import amqp
import kombu.exceptions
import pytest
import redis

from support import events as ev
from support.events import W
from support.exposition import EVENTS, EXECUTING, ONLINE, PREFETCH_TIME, PREFETCHED
from support.processes import wait_until
from support.publish import Publisher
from support.resources import descriptors_and_threads

#: Each task of this fixed set comes again and again, so that the state is of one size.
TASKS, WORKERS, NAMES = 240, 4, 3
#: With so many faults RabbitMQ is restarted, too: that takes its time.
LONG = 50
#: An allocator that tells how many bytes are in use, each time that so many were allocated.
JEMALLOC = {
    "LD_PRELOAD": "libjemalloc.so.2",
    "MALLOC_CONF": f"tcache:false,narenas:1,stats_interval:{1 << 20},stats_interval_opts:Jgmdablxe",
}
#: Bytes by which that varies: scrapes under way, and what is kept of the last complaints.
NOISE = 32 << 10


class Soak:
    def __init__(self, services, broker, seed):
        self.services, self.broker, self.path, self.random = services, broker, services.proxy(broker), random.Random(seed)
        settings = {
            "broker": {"reconnect_max": "1s"},
            "state": {"max_tasks": 2 * TASKS, "worker_timeout": 0},
            "metrics": {"self_metrics": True},
        }
        self.harness = services.harness(broker, settings, path=self.path, env=JEMALLOC)
        self.exporter, self.steps = self.harness.exporter, 0

    # Load: each step one task is received, an earlier one started, a still earlier one ended.

    def event(self, make, step, after=0.0, **fields):
        return make(f"{step % TASKS:032x}", f"w{step % WORKERS}@tests", step + after, **fields)

    def received(self, step):
        return self.event(ev.received, step, name=f"app.t{step % NAMES}")

    def batch(self, steps=8):
        for step in range(self.steps, self.steps + steps):
            yield self.received(step)
            yield self.event(ev.started, step - 20, 0.1)
            yield self.event(ev.succeeded, step - 40, 0.2, runtime=0.1)
        self.steps += steps

    @contextlib.contextmanager
    def load(self):
        """Events come all the time, straight to the broker, which may be away."""
        over = threading.Event()

        def send():
            while not over.wait(0.1):
                with (
                    contextlib.suppress(OSError, amqp.AMQPError, redis.RedisError, kombu.exceptions.KombuError),
                    Publisher(self.broker, self.harness.exchange) as publisher,
                ):
                    while not over.wait(0.01):
                        publisher.send([*self.batch()])

        with ThreadPoolExecutor(1) as pool:
            sending = pool.submit(send)
            try:
                yield
            finally:
                over.set()
            sending.result()

    # Faults.

    def a_moment(self):
        time.sleep(self.random.random())

    def cut(self):
        self.path.cut()

    def reset(self):
        self.path.reset()

    def stall(self):
        self.path.stall(*self.random.choice([(True, True), (True, False), (False, True)]))
        self.a_moment()
        self.path.resume()

    def drop(self):
        self.path.drop()
        self.path.cut()
        self.a_moment()
        self.path.resume()

    def kill(self):
        """As an administrator does."""
        if self.broker.name == "redis":
            kind = self.random.choice(["pubsub", "normal"])
            self.broker.client().execute_command("CLIENT", "KILL", "TYPE", kind, "SKIPME", "yes")
        else:
            self.broker.server.close_consumers()

    def freeze(self):
        process = self.broker.process if self.broker.name == "redis" else self.broker.server.processes[-1]
        os.killpg(process.pid, signal.SIGSTOP)
        self.a_moment()
        os.killpg(process.pid, signal.SIGCONT)

    def restart(self):
        self.broker.stop(self.random.choice([signal.SIGTERM, signal.SIGKILL]))
        self.a_moment()
        self.broker.start()

    def strike(self, kind):
        """Whether the exporter is back before the next fault is left to chance."""
        getattr(self, kind)()
        self.a_moment()
        if self.random.random() < 0.5:
            self.exporter.ready()

    # Quiet.

    def settle(self):
        """Counts every task once through, and returns what the exporter holds: descriptors, threads, bytes.

        On a fresh connection: buffers grow with what they have read.
        """
        self.exporter.ready()
        self.harness.publisher = self.services.publisher(self.broker, self.harness.exchange)
        self.harness.settle()  # the last fault may not have been noticed yet
        first = self.steps
        self.steps += TASKS
        tasks = range(first, self.steps)
        before = self.harness.publish().total(EVENTS)  # with the last events of the load, which may still be on their way
        all_ = self.harness.publish([self.received(step) for step in tasks], ev.heartbeat(active=3))
        assert all_.total(PREFETCHED) == TASKS
        assert (all_.one(ONLINE, worker=W), all_.one(EXECUTING, worker=W)) == (1, 3)
        none = self.harness.publish(
            [self.event(ev.started, step, 0.1) for step in tasks],
            [self.event(ev.succeeded, step, 0.2, runtime=0.1) for step in tasks],
        )
        assert none.total(PREFETCHED) == none.total(PREFETCH_TIME) == 0
        assert none.total(EVENTS) == before + 3 * TASKS
        self.path.cut()
        return *self.settled_descriptors_and_threads(), self.allocated()

    def settled_descriptors_and_threads(self):
        """Once that has not changed for a second and a half: what broke must be seen first, and made anew."""
        seen = []
        wait_until(lambda: seen.append(descriptors_and_threads(self.exporter)) or seen[-75:] == seen[-1:] * 75, 20, lambda: seen)
        return seen[-1]

    def allocated(self, samples=10):
        """The least of so many figures: scrapes make the allocator speak."""

        def said():
            return [int(number) for number in re.findall(r'"allocated":(\d+)', self.exporter.err.read_text())]

        def speak():
            for _ in range(10):
                self.exporter.text()
            return len(said()) >= before + samples

        before = len(said())
        wait_until(speak, 30, "the allocator speaks")
        return min(said()[before:])


@pytest.fixture(params=["redis", "rabbitmq"])
def soaked(request, services):
    if request.param == "redis":
        return services.redis()
    if request.config.getoption("--faults") < LONG:
        return request.getfixturevalue("vhost")
    return services.rabbitmq().wait().vhost()


@pytest.mark.timeout(3600)
def test_soak(services, soaked, request):
    """At the end all is counted, no task is stuck; bytes, threads and descriptors are what they were after warm-up."""
    faults, seed = request.config.getoption("--faults"), request.config.getoption("--fault-seed")
    seed = random.SystemRandom().randrange(10**9) if seed is None else seed
    print(f"--faults {faults} --fault-seed {seed}")
    soak = Soak(services, soaked, seed)
    kinds = {"cut": 5, "reset": 5, "stall": 5, "drop": 3, "kill": 3, "freeze": 3, "restart": 3}
    if soaked.name == "rabbitmq":
        kinds |= {"kill": 1, "restart": 0.5 if faults >= LONG else 0}
    drawn = soak.random.choices([*kinds], kinds.values(), k=faults)

    with soak.load():
        for kind in kinds:
            if kinds[kind]:
                soak.strike(kind)
    first = soak.settle()
    started = time.monotonic()
    with soak.load():
        for kind in drawn:
            soak.strike(kind)
    took = time.monotonic() - started
    last = soak.settle()
    reconnects = re.search(r"flower_exporter_reconnects_total (\d+)", soak.exporter.text())[1]
    print(f"{soaked.name}: {faults} faults in {took:.0f} s, {reconnects} reconnects, {soak.steps} tasks")
    print(f"descriptors, threads, bytes: {first} after warm-up, {last} at the end")
    assert int(reconnects) > faults / 3
    assert last[2] <= first[2] + NOISE, (first, last)
    no_more = lambda: all(now <= then for now, then in zip(descriptors_and_threads(soak.exporter), first))  # noqa: E731
    wait_until(no_more, 15, lambda: (first, last))
