"""Measures how CPU, memory and scrapes grow with workers, label sets and tasks, as a table and a plot."""

import argparse
import signal
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parents[1] / "tests/system"), str(HERE)]

import plot
import report
from bench import FILLING, LONGEST, MANY, say
from stream import BATCH, Profile, Stream, heartbeats
from subjects import KINDS, Brokers, Ours, median

#: Limits that are not varied. Only the limit on tasks is reached.
BOUNDS = {"max_workers": 6_000, "max_tasks": 10_000}
PAIRS = 5_000
#: Events in one part of a longer stream.
EVENTS = 480_000
#: The headers of each kind of scrape.
PROTOBUF = "application/vnd.google.protobuf;proto=io.prometheus.client.MetricFamily;encoding=delimited"
SCRAPES = {"plain": {}, "gzip": {"Accept-Encoding": "gzip"}, "protobuf": {"Accept": PROTOBUF}}
#: Rounds for the CPU median.
ROUNDS = 9


def measure(broker, profile, tasks=None):
    """Fills one exporter to the given size, then measures its memory and CPU."""
    state = BOUNDS | ({"max_tasks": tasks} if tasks else {})
    subject = Ours(broker, {"state": state, "metrics": {"max_label_sets": 200_000}})
    protocol = KINDS["redis"][0]
    needed = max(profile.first_round, 4 * state["max_tasks"])
    try:
        subject.start()
        subject.sender.write(heartbeats(profile, protocol))
        # A task that repeats while it is held is not a new task, so a million tasks need several streams.
        for first in range(0, needed, EVENTS):
            stream = Stream(profile, protocol, min(EVENTS, needed - first) + 4 * BATCH, first // 4)
            subject.feed(stream, BATCH * stream.messages, FILLING)
        memory, last = subject.memory()[0], Stream(profile, protocol, ROUNDS * MANY, needed)
        cpu = [subject.feed(last, MANY, halted=True)[0] / MANY * 1e6 for _ in range(ROUNDS)]
        scrapes = {
            kind: list(zip(*(subject.scrape(headers) for _ in range(5))))
            for kind, headers in SCRAPES.items()
        }
        body = scrapes["plain"][4][-1]
        assert subject.counted(body) == subject.sent, f"{subject.sent - subject.counted(body)} events lost"
        found = {"cpu": median(cpu), "memory": memory, "series": sum(line[:1] != b"#" for line in body.splitlines())}
        for kind, (seconds, used, size, *_) in scrapes.items():
            found |= {f"{kind} ms": 1000 * median(seconds), f"{kind} CPU ms": 1000 * median(used)}
            found[f"{kind} KiB"] = size[-1] / 1024
        return found
    finally:
        subject.stop()


def main():
    parser = argparse.ArgumentParser(prog="benches/end_to_end/growth.sh", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="skip the largest values")
    parser.add_argument("--write", action="store_true", help="also write benches/RESULTS.md and growth.svg")
    options = parser.parse_args()
    signal.alarm(LONGEST)
    cases = {
        f"workers (with {PAIRS:,} label sets)": [(n, Profile(n, PAIRS // n), None) for n in (10, 100, 1_000, 5_000)],
        "label sets (of 100 workers)": [(n, Profile(100, n // 100), None) for n in (100, 1_000, 10_000, 100_000)],
        "tasks held (1,000 label sets)": [(n, Profile(20, 50), n) for n in (1_000, 10_000, 100_000, 1_000_000)],
    }
    head, found = report.head("Growth"), {}
    with Brokers("redis", 0) as brokers:
        for title, points in cases.items():
            found[title] = []
            for number, profile, tasks in points[: -1 if options.quick else None]:
                values = measure(brokers.new(), profile, tasks)
                say(f"{title} {number:,}: {values['cpu']:.2f} µs per event, {values['memory']:.1f} MiB")
                found[title].append((number, values))
    text = head + table(found)
    print(text)
    if options.write:
        (HERE.parent / "growth.svg").write_text(draw(found))
        report.save(text)


def table(found):
    keys = [f"{kind} {key}" for kind in SCRAPES for key in ("ms", "CPU ms", "KiB")]
    lines = []
    for title, points in found.items():
        lines += [report.row([title, "CPU per event, µs", "memory, MiB", "series", *(f"scrape {key}" for key in keys)])]
        lines += [report.row(["---:"] * (len(keys) + 4))]
        for number, values in points:
            cells = [f"{number:,}", f"{values['cpu']:.2f}", f"{values['memory']:.1f}", f"{values['series']:,}"]
            lines.append(report.row([*cells, *(f"{values[key]:,.1f}" for key in keys)]))
        lines.append("")
    return f"""CPU: full backlog on Redis. Unless tasks vary, {BOUNDS["max_tasks"]:,} tasks are held.

![growth](growth.svg)

""" + "\n".join(lines)


def draw(found):
    """One column per varied quantity, with CPU above memory, and one for scrapes by number of series."""
    panels = []
    for column, (title, points) in enumerate(found.items()):
        for line, key, unit in (0, "cpu", "CPU per event, µs"), (1, "memory", "memory, MiB"):
            panels.append((column, line, title, unit, {"": [(number, values[key]) for number, values in points]}))
    scraped = sorted((values["series"], values) for values in dict([*found.values()][1]).values())
    for line, key, unit in (0, "ms", "scrape, ms"), (1, "KiB", "scrape, KiB"):
        curves = {kind: [(series, values[f"{kind} {key}"]) for series, values in scraped] for kind in SCRAPES}
        panels.append((len(found), line, "series", unit, curves))
    return plot.svg(panels)


if __name__ == "__main__":
    main()
