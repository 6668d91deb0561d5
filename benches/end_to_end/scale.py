"""Measures what 300 workers with 30 tasks each cost a real Prometheus after five deployments, as a table.

Each deployment stops the workers of the one before, and starts as many with new hostnames. Prometheus scrapes and evaluates
the shipped rules. Time runs faster than the rules have it, with as many samples in each range.
"""

import argparse
import re
import signal
import statistics
import sys
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parents[1] / "tests/system"), str(HERE)]

import report
from bench import LONGEST, say
from support import events as ev
from support import releases
from support.exporter import merge
from support.flood import RedisFlood
from support.incidents import INTERVAL, POD_SETTINGS, Pace, now
from support.prometheus import FILES, RULES, Prometheus
from support.services import Services

WORKERS, TASKS, DEPLOYMENTS = 300, 30, 5
#: The rules of today, and those that reconstruct the first events of a series.
RULE_FILES = [*(RULES / name for name in FILES), HERE / "first_events.rules.yml"]
#: {row: (settings, features of Prometheus)}
ROWS = {
    "default": ({}, []),
    '`purge_stopped_workers = "2m"`, as for pods': (POD_SETTINGS, []),
    'a worker group: `["web=celery@web-*"]`': ({"metrics": {"worker_groups": ["web=celery@web-*"]}}, []),
    "native histograms without the classic buckets": ({"metrics": {"native_histogram_bucket_factor": 1.1}}, ["native-histograms"]),
}


def workers(deployment):
    return [f"celery@web-{deployment}-{number}" for number in range(WORKERS)]


class Work:
    """What the workers send: in each round, every worker runs every task once."""

    def __init__(self, redis, exchange):
        self.stream, self.rounds = RedisFlood(redis, exchange), 0

    def round(self, deployment):
        self.rounds += 1
        for worker in workers(deployment):
            at, events = now(), [ev.heartbeat(worker, now())]
            for task in range(TASKS):
                uuid = f"{worker}-{task}-{self.rounds}"
                runtime = 0.01 * 10 ** (hash(uuid) % 1000 / 500)
                events += [
                    ev.received(uuid, worker, at, name=f"project.application.tasks.number_{task}"),
                    ev.started(uuid, worker, at),
                    ev.succeeded(uuid, worker, at, runtime=runtime),
                ]
            self.stream.send(self.stream.message(events))
        self.stream.finish()

    def stop(self, deployment):
        for worker in workers(deployment):
            self.stream.send(self.stream.message(ev.offline(worker, now())))
        self.stream.finish()


def measure(services, settings, features, pace):
    redis = services.redis()
    base = {"metrics": {"self_metrics": True}}
    exporter = services.exporter(redis, merge(base, pace.scaled(settings)))
    work = Work(redis, "celeryev")
    for deployment in range(DEPLOYMENTS):
        work.round(deployment)
        if deployment + 1 < DEPLOYMENTS:
            work.stop(deployment)
    # Until stopped workers are forgotten, and every value is shown.
    time.sleep(pace.seconds(150) + 3)
    release = releases.releases()["prometheus"][-1]
    interval = pace.text(INTERVAL)
    server = Prometheus([exporter.port], pace.rules(RULE_FILES), release=release, features=features, interval=interval)
    services.callback(server.kill)
    server.ready()
    end = time.monotonic() + pace.seconds(660)
    while time.monotonic() < end:
        began = time.monotonic()
        work.round(DEPLOYMENTS - 1)
        time.sleep(max(0, began + pace.seconds(INTERVAL) - time.monotonic()))
    return results(server, exporter, pace)


def results(server, exporter, pace):
    times = {"all rules": [], "flower": [], "first-events": []}
    for _ in range(5):
        found = server.api("rules")["groups"]
        failed = {rule["name"]: rule.get("lastError") for group in found for rule in group["rules"] if rule["health"] != "ok"}
        if failed:
            say(f"failed: {failed}")
        groups = {group["name"]: group["evaluationTime"] for group in found}
        groups["all rules"] = sum(groups.values()) - groups["first-events"]
        for name, values in times.items():
            values.append(groups[name])
        time.sleep(pace.seconds(INTERVAL))
    # As Prometheus counts them: native histograms are one series each.
    [(_, series)] = server.instant('scrape_samples_scraped{job="flower-exporter"}')
    [(_, seconds)] = server.instant('max_over_time(scrape_duration_seconds{job="flower-exporter"}[1m])')
    memory = int(re.search(r"VmRSS:\s+(\d+)", Path(f"/proc/{server.pid}/status").read_text())[1]) / 1024
    size = len(exporter.request()[2]) / 2**20
    return {"series": series, "size": size, "scrape": seconds, "memory": memory} | {
        name: statistics.median(values) for name, values in times.items()
    }


def table(found):
    titles = ["", "series", "text, MiB", "scrape, s", "Prometheus, MiB", "all rules, s", "recording rules, s", "before, s", "÷ before"]
    lines = [report.row(titles), report.row(["---", *["---:"] * (len(titles) - 1)])]
    for name, values in found.items():
        cells = [f"{values['series']:,.0f}", f"{values['size']:.1f}", f"{values['scrape']:.2f}", f"{values['memory']:,.0f}"]
        new, old = values["flower"], values["first-events"]
        cells += [f"{values['all rules']:.2f}", f"{new:.2f}", f"{old:.2f}", f"{new / old:.2f}"]
        lines.append(report.row([name, *cells]))
    return "\n".join(lines) + "\n"


def main():
    parser = argparse.ArgumentParser(prog="benches/end_to_end/scale.sh", description=__doc__)
    parser.add_argument("--speed", type=float, default=4, help="how much faster than the shipped rules (4)")
    parser.add_argument("--write", action="store_true", help="also write benches/RESULTS.md")
    options = parser.parse_args()
    signal.alarm(LONGEST)
    pace, found = Pace(options.speed), {}
    for name, (settings, features) in ROWS.items():
        say(f"{name}: {pace.seconds(900) / 60:.0f} minutes")
        with Services() as services:
            found[name] = measure(services, settings, features, pace)
        say(f"{found[name]}")
    text = report.head("Scale") + f"""{WORKERS} workers run {TASKS} tasks, after {DEPLOYMENTS} deployments. Scrapes and rules every {INTERVAL} s, in time that runs {options.speed:g} times
as fast. Rules: the time of one evaluation, a median. "Before": the recording rules in the form that counted first events without
zeros, on the same series in the same run.

""" + table(found)
    print(text)
    if options.write:
        report.save(text)


if __name__ == "__main__":
    main()
