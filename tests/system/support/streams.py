"""Random streams of events of every shape on which Flower is right, so that all samples must be equal.

The cases that Flower gets wrong have separate tests. One of them is too common to leave out: after a retry, revoke,
reject or cancel Flower does not reset the prefetch time of the pair. Streams contain such ends, and a closing task for
each pair that is stuck at the end.
"""

import random
import uuid as uuids

from . import events as ev

WORKERS = ["celery@web-1", "celery@web-2", 'odd"name\\@h', "работник@хост", "ab", "a"]
NAMES = ["app.add", "app.mail", "c", "bc", 'räkna.算 "\\', "two\nlines", "💐", "app.add[1]{x}"]
CLIENTS = ["gen101@web-1", "gen102@web-2"]
CUSTOM = ["progress", "progress-half", "Done", "sent-again", "", "進捗"]
RUNTIMES = [0, 0.0, None, 1, 2, 10, 0.005, 0.1, 0.75, 7.5, 10.0, 10.000001, 5e-07, 86400.5, 1e300, 3.3e-12]
NASTY = ["()", "('\ud800',)", "nul \u0000 byte", '"\\' * 20, "x" * 3000, "{'k': '\udfff\ud800'}"]


class Stream:
    def __init__(self, seed, size=2000):
        self.random = random.Random(seed)
        self.size = size
        self.now = 0.0
        self.ids = 0
        self.processed = dict.fromkeys(WORKERS, 0)
        self.active = {}
        self.immediate = {}
        self.running = set()
        self.stuck = set()
        self.flat = []

    # -- pieces

    def tick(self):
        self.now += self.random.choice([0.001, 0.25, 1 / 3, self.random.random(), self.random.expovariate(2)]) + 1e-4
        return self.now

    def uuid(self):
        """Ids of every kind, and some that a parser might confuse."""
        self.ids += 1
        plain = uuids.UUID(int=self.random.getrandbits(128), version=4)
        return self.random.choice(
            [
                *[[str(plain)]] * 6,
                [str(plain).upper(), str(plain)],
                [plain.hex, str(plain), f"{{{plain}}}", plain.urn],
                [f"order-{self.ids}"],
                [f"заказ {self.ids}"],
                [f"{self.ids}"],
                [f"\ud800{self.ids}"],
            ]
        )

    def fields(self, kind):
        """Fields that no metric needs, with unusual values that Celery allows."""
        nasty = self.random.choice(NASTY)
        return {
            "sent": {"args": nasty, "kwargs": "{}", "queue": "q", "retries": 0},
            "received": {"args": nasty, "kwargs": nasty, "expires": None},
            "succeeded": {"result": nasty},
            "failed": {"exception": nasty, "traceback": nasty},
        }.get(kind, {"percent": self.random.choice([float("nan"), float("inf"), 1, None, {"deep": [[]]}])})

    def event(self, kind, uuid, worker, whole_seconds, **fields):
        at = self.tick()
        made = ev.task(kind, uuid, worker, at, {**self.fields(kind), **fields})
        if whole_seconds:
            made["timestamp"] = int(made["timestamp"])
        for key in ("pid", "clock", "utcoffset"):
            if self.random.random() < 0.1:
                del made[key]
        return made

    # -- what happens to one task: lists of (kind, fields); the worker's name and the id are filled in later

    def ending(self, kinds=("succeeded", "succeeded", "failed")):
        kind = self.random.choice(kinds)
        fields = {
            "succeeded": {"runtime": self.random.choice([*RUNTIMES, self.random.random() * 12])},
            "failed": self.random.choice([{}, {}, {"runtime": 0.5}]),
            "revoked": {
                "terminated": self.random.random() < 0.5,
                "expired": self.random.random() < 0.5,
                "signum": self.random.choice([None, 15, "SIGTERM"]),
            },
        }.get(kind, {})
        return kind, fields

    def script(self, name):
        """The events of a task that Flower processes correctly, and whether whole seconds are precise enough for it."""
        start, received = ("started", {}), ("received", {"name": name, "eta": self.random.choice([None, None, ""])})
        later = {"name": name, "eta": "2030-01-01T00:00:00+00:00"}
        sent = ("sent", {"name": name, "eta": None})
        untimely = ["retried", "revoked", "rejected", "cancelled"]
        kind = self.random.choices(
            ["usual", "unread", "retry", "cut", "later", "lost", "shadow"], [8, 2, 2, 2, 3, 2, 1]
        )[0]
        if kind == "usual":
            return self.spread([received, start, self.ending()], sent), True
        if kind == "unread":
            return self.spread([received, self.ending(("revoked", "rejected"))], sent), True
        if kind == "retry":
            runs = [received, start, ("retried", {})] * self.random.randint(1, 3)
            again = [received, start] if self.random.random() < 0.7 else [("received", later), start]
            return [*runs, *again, self.ending()], False
        if kind == "cut":
            return self.spread([received, start, self.ending(untimely[1:])], sent), True
        if kind == "later":
            script = [("received", later)] * self.random.randint(1, 2) + [start, self.ending(["succeeded", *untimely])]
            script.append(("sent", later))
            self.random.shuffle(script)
            return script, True
        if kind == "lost":
            script = [sent, start, start, self.ending(), self.ending(["failed", *untimely])]
            self.random.shuffle(script)
            return script[: self.random.randint(1, 5)], True
        shadow = [("sent", later), ("received", {**later, "name": f"{name} (shadow)"})]
        self.random.shuffle(shadow)
        return [*shadow, start, self.ending()], True

    def spread(self, script, sent):
        """task-sent comes over another connection, and user-defined events come at any time."""
        script = list(script)
        if self.random.random() < 0.7:
            script.insert(self.random.randint(0, len(script)), sent)
        for _ in range(self.random.choice([0, 0, 0, 1, 3])):
            script.insert(self.random.randint(0, len(script)), (self.random.choice(CUSTOM), {}))
        return script

    # -- the stream

    def note(self, event, pair):
        """Tracks the pairs whose prefetch time is stuck in Flower."""
        self.flat.append(event)
        kind, uuid = event["type"].removeprefix("task-"), event["uuid"]
        if kind == "started":
            self.running.add((event["hostname"], uuid))
        elif kind in ("succeeded", "failed", "retried", "revoked", "rejected", "cancelled"):
            self.running.discard((event["hostname"], uuid))
        if kind == "received" or (kind == "sent" and uuid in self.immediate):
            self.immediate[uuid] = not event["eta"]
        elif not self.immediate.get(uuid):
            pass
        elif kind in ("started", "succeeded", "failed"):
            self.stuck.discard(pair)
        elif kind in ("retried", "revoked", "rejected", "cancelled"):
            self.stuck.add(pair)

    def run(self, tasks, complete):
        """Interleaves the events of many tasks. Unless `complete`, some tasks never finish."""
        open_ = []
        while tasks or open_:
            if tasks and (len(open_) < 2 or (len(open_) < 40 and self.random.random() < 0.4)):
                tasks -= 1
                name, worker = self.random.choice(NAMES), self.random.choice(WORKERS)
                for uuid in self.uuid():
                    script, whole_seconds = self.script(name)
                    open_.append((uuid, worker, name, list(script), whole_seconds and self.random.random() < 0.2))
            picked = self.random.choice(open_)
            uuid, worker, name, script, whole_seconds = picked
            kind, fields = script.pop(0)
            if not script:
                open_.remove(picked)
            sender = self.random.choice(CLIENTS) if kind == "sent" else worker
            self.note(self.event(kind, uuid, sender, whole_seconds, **fields), (worker, name))
            if self.random.random() < 0.1:
                self.add_heartbeat(self.random.choice(WORKERS))
            if not complete and not tasks and self.random.random() < 0.02:
                return

    def add_heartbeat(self, worker):
        """Adds a heartbeat or an event that the exporter ignores."""
        self.processed[worker] += self.random.randint(0, 9)
        idle = [] if worker in {worker for worker, _ in self.running} else [0]
        fields = {"processed": self.processed[worker], "active": self.random.choice([*idle, 1, 2, 16, 3.0, None])}
        beat = ev.heartbeat(worker, self.now, **fields)
        for key in self.random.choice([(), (), ("timestamp",), ("active", "processed", "loadavg"), ("freq",)]):
            beat.pop(key, None)
        if beat.get("active") is not None:
            self.active[worker] = beat["active"]
        other = ev.event(
            self.random.choice(["custom-thing", "worker-thing", "thing"]),
            worker,
            self.now,
            value=self.random.choice([float("nan"), "\ud800", {"name": "x"}]),
        )
        self.flat.append(self.random.choice([beat, beat, other]))
        if self.flat[-1] is other and beat.get("active") is not None:
            self.active.pop(worker)

    def between(self):
        """Adds worker restarts at a time when no task is prefetched."""
        for worker in self.random.sample(WORKERS, self.random.randint(0, len(WORKERS))):
            if self.random.random() < 0.5:
                self.flat.append(ev.offline(worker, self.now, active=self.active.get(worker, 0)))
            self.processed[worker] = self.random.choice([0, self.processed[worker]])
            back = self.random.choice([ev.online, ev.heartbeat])
            active = self.random.choice([0, 4])
            self.flat.append(back(worker, self.now, processed=self.processed[worker], active=active))
            if back is ev.heartbeat:
                self.active[worker] = active

    def close(self):
        for number, (worker, name) in enumerate(sorted(self.stuck)):
            uuid, last = f"closing {number}", [] if number % 2 else [ev.succeeded]
            self.flat.append(ev.received(uuid, worker, self.tick(), name))
            self.flat.extend(make(uuid, worker, self.tick()) for make in [ev.started, *last])
        self.flat += [ev.offline(f"unknown{n}@h", self.now, active=5) for n in range(2)]

    def batches(self):
        """Groups task events into batches, as workers send them, or leaves them single."""
        items, batch = [], []
        limit = self.random.randint(1, 24)
        for event in self.flat:
            if batch and (len(batch) >= limit or not event["type"].startswith("task-")):
                items.append(batch if len(batch) > 1 or self.random.random() < 0.5 else batch[0])
                batch, limit = [], self.random.choice([1, 1, self.random.randint(2, 24)])
            if event["type"].startswith("task-"):
                batch.append(event)
            else:
                items.append(event)
        return [*items, *([batch] if batch else [])]


def stream(seed, size=2000):
    """A list of events and batches of them: about `size` events, in up to three epochs."""
    made = Stream(seed, size)
    epochs = made.random.randint(1, 3)
    for epoch in range(epochs):
        made.between()
        made.run(size // epochs // 4, complete=epoch + 1 < epochs)
    made.close()
    return made.batches()
