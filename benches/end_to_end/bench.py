"""Compares the exporter with Flower, celery-exporter and a baseline consumer: one run sends the same stream to each."""

import argparse
import signal
import sys
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parents[1] / "tests/system"), str(HERE)]

import report
from stream import BATCH, Profile, Stream, heartbeats
from subjects import KINDS, SUBJECTS, TITLES, Bare, Brokers, Discard, Failed, median

PROFILES = {"small": Profile(20, 50), "large": Profile(1000, 20)}
TRICKLE = 5_000  # events per second
#: A backlog within every server's default limits: 8 MB on Redis, three seconds of Flower's work on RabbitMQ.
SOME = 16_800
#: A backlog for fast subjects: 17 MB.
MANY = 34_800
#: A rate, in events per second, that builds up no backlog.
FILLING = 80_000
#: Seconds after which this process ends, with everything it started, if something hangs.
LONGEST = 3_000
BURST = 80_000 // BATCH * BATCH


class Effort:
    """How long and how often each measurement runs."""

    def __init__(self, quick, rounds):
        self.rounds = rounds or (1 if quick else 5)
        self.trickle = 6_000 if quick else 9_000
        self.repeats = 2 if quick else 5  # of MANY, in one round
        self.settling, self.idle = (1.5, 1.5) if quick else (30, 60)  # seconds
        self.scrapes = 1 if quick else 9
        self.scraping = 1 if quick else 5  # seconds, after which no further scrape starts
        self.step = 1.5 if quick else 4  # seconds at one rate
        self.searching = 6 if quick else 20  # seconds
        self.crowd = not quick


def say(text):
    print(f"[{time.perf_counter() - STARTED:4.0f} s] {text}", file=sys.stderr, flush=True)


STARTED = time.perf_counter()


class Bench:
    def __init__(self, kind, effort):
        self.kind, self.effort = kind, effort
        self.brokers, self.notes, self.capped = Brokers(kind, 16), [], set()

    def fail(self, name, what, error):
        note = f"{SUBJECTS[name].title}, {what}: {'; '.join((str(error) or repr(error)).splitlines())[:300]}"
        say(f"FAILED: {note}")
        self.notes.append(note)

    def steady(self, profile, names):
        """Measures CPU, memory and scrapes of all exporters, which run side by side and receive events in turn.

        Returns {name: {measure: values}}.
        """
        stream = Stream(profile, KINDS[self.kind][0])
        results = {name: {} for name in names}
        subjects = {name: SUBJECTS[name](self.brokers.new()) for name in names}
        try:
            self.each(subjects, results, "start", self.begin)
            self.measure_idle(subjects, results)
            self.each(subjects, results, "label sets", lambda subject, result: self.fill(subject, stream))
            for _ in range(self.effort.rounds):
                self.each(subjects, results, "round", lambda subject, result: self.round(subject, result, stream))
            self.each(subjects, results, "scrapes", lambda subject, result: self.finish(subject, result, stream))
        finally:
            for subject in subjects.values():
                subject.stop()
        return results

    def each(self, subjects, results, what, action):
        """Runs an action on every subject, and drops the subjects that fail."""
        for name, subject in [*subjects.items()]:
            began = time.perf_counter()
            try:
                action(subject, results[name])
                say(f"{self.kind}, {name}: {what} ({time.perf_counter() - began:.1f} s)")
            except (Failed, AssertionError, OSError) as error:
                self.fail(name, f"{what} on {self.kind}", error)
                subjects.pop(name).stop()

    def begin(self, subject, result):
        result["start"] = [subject.start()]
        result["memory idle"] = [subject.memory()[0]]

    def measure_idle(self, subjects, results):
        """CPU time and wake-ups while nothing happens, of all subjects at the same time."""
        time.sleep(self.effort.settling)
        before = {name: (subject.cpu(), subject.wake_ups(), time.perf_counter()) for name, subject in subjects.items()}
        time.sleep(self.effort.idle)
        for name, (cpu, woken, began) in before.items():
            took = time.perf_counter() - began
            results[name]["idle cpu"] = [(subjects[name].cpu() - cpu) / took]
            results[name]["idle wake-ups"] = [(subjects[name].wake_ups() - woken) / took]

    def fill(self, subject, stream):
        """Creates all label sets, so that their cost is not measured."""
        subject.sender.write(heartbeats(stream.profile, subject.protocol))
        while subject.sent < stream.profile.first_round:
            subject.feed(stream, SOME)

    def round(self, subject, result, stream):
        subject.sender.write(heartbeats(stream.profile, subject.protocol))
        subject.settle(10)
        cpu, took, *_ = subject.feed(stream, self.effort.trickle, TRICKLE)
        used = (cpu - result["idle cpu"][0] * took) / self.effort.trickle * 1e6
        result.setdefault("trickle", []).append(used)
        result.setdefault("backlog", []).append(self.backlog(subject, result, stream))

    def backlog(self, subject, result, stream):
        """Microseconds of CPU per event when all events are already waiting."""
        events, repeats = (MANY, self.effort.repeats) if subject.fast else (SOME, 1)
        fed = [subject.feed(stream, events, halted=True) for _ in range(repeats)]
        cpu, took = (sum(times[part] for times in fed) for part in (0, 1))
        return (cpu - result["idle cpu"][0] * took) / (repeats * events) * 1e6

    def finish(self, subject, result, stream):
        result["memory after"], result["memory peak"] = ([value] for value in subject.memory())
        for kind, headers in ("plain", {}), ("gzip", {"Accept-Encoding": "gzip"}):
            subject.settle(5)
            began, scrapes = time.perf_counter(), []
            while len(scrapes) < self.effort.scrapes and time.perf_counter() - began < self.effort.scraping:
                scrapes.append(subject.scrape(headers))
            if kind == "plain":
                self.count(subject, result, scrapes[-1][4])
            if isinstance(subject, Bare) or kind == "gzip" and not scrapes[0][3]:
                continue  # it has no metrics, or does not compress
            for key, values in zip(("time", "cpu", "size"), zip(*scrapes)):
                result[f"{kind} {key}"] = values
        result["memory scraped"] = [subject.memory()[1]]

    def count(self, subject, result, body):
        counted = subject.counted(body)
        if counted != subject.sent:
            counted = subject.all_counted()
            self.notes.append(
                f"{subject.title} on {self.kind} lost {subject.sent - counted:,} of {subject.sent:,} events;"
                f" its log: {subject.log_tail()}"
            )
        result["counted"], result["sent"] = [counted], [subject.sent]

    def crowded(self, profile, names, results):
        """Memory and CPU of each subject, run alone, once it holds its default maximum number of tasks."""
        stream = Stream(profile, KINDS[self.kind][0])
        for name in names:
            subject, result = SUBJECTS[name](self.brokers.new()), results[name]
            try:
                subject.start()
                subject.sender.write(heartbeats(profile, subject.protocol))
                while subject.sent < max(4 * subject.holds, profile.first_round) + SOME:
                    subject.feed(stream, SOME, FILLING if subject.fast else None)
                result["crowd"], result["crowded memory"] = [subject.holds], [subject.memory()[0]]
                result["crowded"] = [self.backlog(subject, result, stream) for _ in range(2)]
                say(f"{self.kind}, {name}: {subject.holds:,} tasks held")
            except (Failed, AssertionError, OSError) as error:
                self.fail(name, f"{subject.holds:,} tasks on {self.kind}", error)
            finally:
                subject.stop()

    def fastest(self, profile, names, results):
        """The highest sustained rate without loss, and a burst. Each subject runs alone; a failed one is restarted."""
        stream = Stream(profile, KINDS[self.kind][0])
        for name in names:
            broker, result = self.brokers.new(), results[name]
            try:
                result["rate"] = [self.search(name, broker, stream, 5e5 / median(result["backlog"]))]
                result["rate capped"] = name in self.capped
                if self.effort.crowd or self.kind == "redis":
                    self.burst(name, broker, stream, result)
            except (Failed, AssertionError, OSError) as error:
                self.fail(name, f"highest rate on {self.kind}", error)
        if self.kind == "redis":
            self.server_alone(self.brokers.new(), stream)

    def server_alone(self, broker, stream):
        subject = Discard(broker)
        try:
            subject.start()
            rates = []
            for _ in range(3):
                rates.append(240_000 / subject.feed(stream, 240_000)[2])
            text = f"{sorted(rates)[1]:,.0f} events per second to a subscriber that discards them unread"
            say(f"Redis publishes {text}")
            self.notes.append(f"Redis itself, at maximum sending rate, publishes {text}.")
        finally:
            subject.stop()

    def search(self, name, broker, stream, rate):
        """Raises the rate until it fails, then searches between the last success and the failure."""
        kind, good, bad, subject = SUBJECTS[name], 0, None, None
        end = time.perf_counter() + self.effort.searching
        try:
            while time.perf_counter() < end and (not bad or bad > 1.08 * good):
                if subject is None:
                    subject = kind(broker)
                    subject.start()
                    subject.sender.write(heartbeats(stream.profile, subject.protocol))
                    subject.feed(stream, stream.profile.first_round)
                reached, problem = self.probe(subject, stream, rate)
                say(f"{self.kind}, {name}: {rate:,.0f} events/s: {problem or f'{reached:,.0f}, all counted'}")
                if problem:
                    bad = rate
                    subject.stop()
                    subject = None
                else:
                    good = max(good, reached)
                    if reached < 0.9 * rate:
                        self.capped.add(name)
                        self.notes.append(
                            f"{kind.title} on {self.kind}: {reached:,.0f} events per second was the most that"
                            f" the broker and the sender could deliver when {rate:,.0f} were requested."
                        )
                        break
                rate = rate * 1.4 if bad is None else (good * bad) ** 0.5 if good else bad / 2
        finally:
            if subject:
                subject.stop()
        return good or None

    def probe(self, subject, stream, rate):
        """Returns (events sent per second, problem). A subject keeps up if it finishes soon after the last event."""
        events = int(rate * self.effort.step) // BATCH * BATCH
        grace = 0.3 + 0.1 * self.effort.step
        try:
            *_, sending, lag = subject.feed(stream, events, rate, timeout=grace + 3)
            if lag > grace:
                return 0, f"finished only {lag:.1f} s after the last event"
            counted = subject.all_counted(5)
            if counted != subject.sent:
                return 0, f"{subject.sent - counted:,} of {events:,} events lost; its log: {subject.log_tail()}"
            return events / sending, None
        except (Failed, AssertionError, OSError) as error:
            return 0, (str(error) or repr(error)).splitlines()[0]

    def burst(self, name, broker, stream, result):
        subject = SUBJECTS[name](broker)
        try:
            subject.start()
            subject.feed(stream, stream.profile.first_round)
            before = subject.all_counted()
            result["burst"] = "fails"
            sending = subject.feed(stream, BURST, timeout=40)[2]
            result["burst"] = [(subject.all_counted(3) - before) / BURST]
            say(f"{self.kind}, {name}: of a burst in {sending:.2f} s, {result['burst'][0]:.1%} counted")
        except (Failed, AssertionError, OSError) as error:
            self.fail(name, f"burst of {BURST:,} events on {self.kind}", error)
        finally:
            subject.stop()


def main():
    parser = argparse.ArgumentParser(prog="benches/end_to_end/run.sh", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="one round of everything: 3 minutes instead of 15")
    parser.add_argument("--broker", choices=KINDS, help="run only this broker")
    parser.add_argument("--only", default=",".join(SUBJECTS), help=f"a subset of {','.join(SUBJECTS)}")
    parser.add_argument("--profile", choices=PROFILES, help="run only this stream: 20 workers, or 1,000")
    parser.add_argument("--rounds", type=int, help="rounds for the CPU medians")
    parser.add_argument("--no-rates", action="store_true", help="skip the highest rates and the bursts")
    parser.add_argument("--write", action="store_true", help="also write benches/RESULTS.md")
    options = parser.parse_args()
    signal.alarm(LONGEST)
    names, effort = options.only.split(","), Effort(options.quick, options.rounds)
    if unknown := set(names) - set(SUBJECTS):
        parser.error(f"--only: unknown: {', '.join(unknown)}")
    tables, notes = [], []
    head = report.head("End to end") + report.method(effort.rounds)
    for kind in [options.broker] if options.broker else KINDS:
        bench = Bench(kind, effort)
        for key in [options.profile] if options.profile else PROFILES:
            if options.quick and key == "large" and kind == "rabbitmq" and not options.profile:
                continue  # similar to Redis
            profile = PROFILES[key]
            say(f"{kind}: {profile.title}")
            # celery-exporter would take another minute, with figures like Flower's.
            few = options.quick and key == "large"
            results = bench.steady(profile, [name for name in names if not few or name != "celery-exporter"])
            well = [name for name in names if "counted" in results.get(name, {})]
            if key == "small" and kind == "redis" and effort.crowd:
                bench.crowded(profile, well, results)
            if key == "small" and not options.no_rates:
                bench.fastest(profile, [name for name in well if name != "floor"], results)
            tables.append(report.table(f"{TITLES[kind]}, {profile.title}", results))
        bench.brokers.close()
        notes += bench.notes
    text = "\n".join([head, *tables, report.tail(notes)])
    print(text)
    if options.write:
        report.save(text)
    say("done")


if __name__ == "__main__":
    main()
