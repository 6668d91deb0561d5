"""Incidents on a real Prometheus with the shipped rules: which alerts fire, when, and what the counters say about the truth.

Each incident is a broker of the same Prometheus, and all of them run at once. Normally, time runs ten times as fast as the
shipped rules have it. `tests/run.sh -rP deploy/test_incidents.py --incident-speed 1 --timeout 3000` runs them as shipped, in
20 minutes. -rP prints the truth beside what was shown.
"""

import itertools
import math
import signal
import time
import traceback
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

from support.exporter import merge
from support.flood import RedisFlood, task_events
from support.grafana import Viewer
from support.incidents import INTERVAL, Deployment, Monitoring, Pace
from support.processes import directory, wait_until
from support.worker import Worker

INCIDENTS = {}


def incident(also=(), **expected):
    """The alerts that fire, with the seconds after the trouble, and those that may fire because they are true, too."""

    def register(function):
        INCIDENTS[function.__name__.replace("_", "-")] = function, expected, set(also)
        return function

    return register


class Incident:
    """One broker, its exporters and workers, and when the trouble began."""

    def __init__(self, name, services, monitoring, pace, redis):
        self.name, self.services, self.monitoring, self.pace, self.redis = name, services, monitoring, pace, redis
        self.exchange, self.start, self.began = f"celeryev-{name}", time.time(), None
        self.deployment, self.lost, self.notes = None, False, ""
        #: Whether the exporter receives what the workers send.
        self.is_blind = False

    def exporter(self, broker=None, settings=None, instance="exporter-0", port=None):
        options = merge(self.pace.settings(), {"events": {"exchange": self.exchange}})
        merge(options, settings or {})
        exporter = self.services.exporter(broker or self.redis, options, port=port)
        self.monitoring.scrape(self.name, instance, exporter)
        return exporter

    def deploy(self, *workers, broker=None, rates=None):
        """Starts workers that run tasks, and waits until Prometheus knows them."""
        self.deployment = Deployment(self.services.publisher(broker or self.redis, self.exchange), *workers)
        self.deployment.rates.update(rates or {})
        self.services.callback(self.deployment.stop)
        query = f'count(flower_worker_online{{broker="{self.name}"}} == 1) >= {len(workers)}'
        wait_until(lambda: self.monitoring.server.instant(query), 60, query)
        self.wait(60)
        return self.deployment

    def begin(self):
        self.began = time.time()

    def wait(self, seconds):
        time.sleep(self.pace.seconds(seconds))

    def settle(self):
        """Until Prometheus has scraped everything that has been sent, and what it shows is not held back at 0."""
        self.wait(30 + 2 * INTERVAL)
        time.sleep(1)


@incident()
def healthy(run):
    run.exporter()
    run.deploy("a", "b").rates["pay", "succeeded", 0.1] = 2
    run.wait(720)


@incident(CeleryWorkerDown=240)
def worker_killed(run):
    run.exporter()
    run.deploy("a", "b", "c")
    run.begin()
    run.deployment.kill("c")
    run.wait(260)


@incident(CeleryNoWorkers=280, also={"CeleryWorkersDown"})
def all_workers_gone(run):
    run.exporter()
    run.deploy("a", "b", "c")
    run.begin()
    run.deployment.kill("a", "b", "c")
    run.wait(320)


@incident(CeleryTaskFailures=500)
def failures_rise(run):
    run.exporter()
    rates = run.deploy("a", "b").rates
    rates["pay", "succeeded", 0.1] = 4 / run.pace.speed + 1
    run.wait(60)
    run.begin()
    rates["pay", "failed", None] = 2 / run.pace.speed + 0.5
    run.wait(520)


def every_run_becomes(run, outcome, runtime):
    """All runs succeed quickly, and then none does."""
    run.exporter()
    rates = run.deploy("a").rates
    rates["pay", "succeeded", 0.1] = 2
    run.wait(60)
    run.begin()
    del rates["pay", "succeeded", 0.1]
    rates["pay", outcome, runtime] = 2


@incident(CeleryTaskAlwaysFails=180, also={"CeleryTaskFailures"})
def every_run_fails(run):
    every_run_becomes(run, "failed", None)
    run.wait(240)


@incident(CeleryTaskSlow=780)
def tasks_are_slow(run):
    every_run_becomes(run, "succeeded", 8.0)
    run.wait(800)


@incident(CeleryPrefetchBacklog=680)
def backlog(run):
    run.exporter()
    deployment = run.deploy("a", "b")
    deployment.rates["pay", "succeeded", 0.1] = 2
    run.wait(60)
    run.begin()
    deployment.receive("b", "pay", 8)
    run.wait(700)


def outage(run, seconds):
    """Of the exporter's path to the broker. The workers work on, and their events are lost."""
    path = run.services.proxy(run.redis)
    exporter = run.exporter(path)
    run.deploy("a", "b", rates={("pay", "succeeded", 0.1): 10})
    run.wait(240)
    run.lost = True
    run.begin()
    path.refuse()
    path.cut()
    run.wait(seconds)
    path.resume()
    exporter.ready(60)
    estimate = f'instance:flower_exporter_missed_events:estimate10m{{broker="{run.name}"}} > 0'
    [(_, estimated)] = wait_until(lambda: run.monitoring.server.instant(estimate), 60, estimate)
    run.deployment.rates.clear()
    run.settle()
    lost = sum(run.deployment.sent.values()) - exporter.metrics().total("flower_events_total")
    run.notes = f"{lost:.0f} events lost, {estimated:.0f} estimated"
    assert abs(estimated - lost) < 10 + 0.2 * lost, run.notes


@incident(FlowerExporterMissedEvents=90)
def broker_away_30_s(run):
    outage(run, 30)


@incident(FlowerExporterNotConnected=165, FlowerExporterMissedEvents=240)
def broker_away_180_s(run):
    outage(run, 180)


def restart(run, settings=None, same_port=True):
    """Five failures before a restart, two after it: seven in the window of the alert."""
    exporter = run.exporter(settings=settings)
    deployment = run.deploy("a", "b")
    deployment.run("pay", count=30)
    run.begin()
    deployment.run("pay", "failed", count=5)
    run.settle()
    exporter.terminate()
    run.wait(INTERVAL)
    run.exporter(settings=settings, port=exporter.port if same_port else None)
    run.settle()
    deployment.run("pay", "failed", count=2)
    run.settle()
    [(_, shown)] = run.monitoring.server.instant(
        f'broker_task_type:flower_events:increase10m{{broker="{run.name}",type="task-failed"}}'
    )
    run.notes = f"increase10m shows {shown:.2f} failures of 7"
    assert 7 <= shown < 8.5, run.notes
    run.wait(330)


@incident(CeleryTaskFailures=450)
def restart_without_saved_state(run):
    restart(run)


@incident(CeleryTaskFailures=450)
def restart_with_saved_state(run):
    restart(run, {"state": {"persistent": True, "db": str(directory("state") / "db")}})


@incident(CeleryTaskFailures=450)
def restart_under_a_new_address(run):
    restart(run, same_port=False)


def rolling_restart(run, number):
    """Of real workers, whose hostnames are new at each start."""
    broker = run.services.redis()
    run.exporter(broker, {"events": {"exchange": "celeryev"}})
    names = (f"{run.name}-{number}@tests" for number in itertools.count())

    def start():
        worker = Worker(broker, hostname=next(names), concurrency=1)
        run.services.callback(worker.kill)
        return worker.ready()

    old = [start() for _ in range(3)]
    online = f'broker:flower_worker_online:sum{{broker="{run.name}"}} == 3'
    wait_until(lambda: run.monitoring.server.instant(online), 60, online)
    run.begin()
    for worker in old:
        start()
        worker.stop(number)
    run.wait(300)


@incident()
def rolling_restart_of_workers(run):
    rolling_restart(run, signal.SIGTERM)


@incident(CeleryWorkersDown=330, also={"CeleryWorkerDown"})
def rolling_restart_that_kills_workers(run):
    rolling_restart(run, signal.SIGKILL)


@incident(FlowerExporterReplicaDown=345)
def one_of_two_replicas_dies(run):
    dying = run.exporter(instance="exporter-1")
    run.exporter(instance="exporter-0")
    run.deploy("a", "b").rates["pay", "succeeded", 0.1] = 4
    run.wait(60)
    run.begin()
    dying.kill()
    run.wait(360)


@incident(FlowerExporterMissedEvents=60)
def burst_beyond_the_buffer(run):
    redis = run.services.redis()
    exporter = run.exporter(redis, {"events": {"buffer_max_bytes": "64KiB"}})
    run.deploy("a", broker=redis)
    run.lost = True
    run.begin()
    stream = RedisFlood(redis, run.exchange)
    # NaN makes them slower to parse than to send.
    stream.send(stream.message(list(task_events(150, custom=float("nan")))) * 200)
    stream.finish()
    exporter.wait_for(lambda m: m.total("flower_exporter_dropped_messages_total"), 30)
    run.wait(90)


@incident(FlowerExporterMissedEvents=60)
def burst_beyond_the_limit_of_redis(run):
    redis = run.services.redis()
    redis.client().config_set("client-output-buffer-limit", "pubsub 1mb 0 0")
    exporter = run.exporter(redis)
    run.deploy("a", broker=redis)
    run.lost = True
    stream = RedisFlood(redis, run.exchange)
    encoded = b"".join(map(stream.message, task_events(100)))
    exporter.send(signal.SIGSTOP)
    while redis.client().pubsub_numpat():
        stream.send(encoded)
    run.begin()
    exporter.send(signal.SIGCONT)
    run.wait(90)


@incident(FlowerExporterSeesNoWorkers=165)
def wrong_database(run):
    redis = run.services.redis()
    exporter = run.exporter(redis)
    run.deploy("a", "b", broker=redis)
    exporter.terminate()
    run.is_blind = True
    run.begin()
    run.exporter(redis, {"broker": {"url": f"redis://127.0.0.1:{redis.port}/1"}}, port=exporter.port)
    run.wait(300)


def problems(run, expected, also):
    """What fired too late, never, or without a reason, and counts that differ from the truth."""
    end = time.time()
    fired = run.monitoring.fired(run.name, run.start, end)
    delays = {name: round((at - (run.began or at)) * run.pace.speed) for name, at in fired.items()}
    # The exporter's clock does not run faster.
    slack = 40 if run.pace.speed > 1 else 0
    found = [f"{name} fired" for name in fired if name not in {*expected, *also}]
    for name, limit in expected.items():
        if name not in fired:
            found.append(f"{name} did not fire")
        elif not 0 <= delays[name] <= limit + slack:
            found.append(f"{name} fired after {delays[name]} s instead of {limit} s")
    truth, counted = Counter(), Counter()
    if run.deployment and not run.lost:
        truth, counted = run.deployment.sent, run.monitoring.counted(run.name, run.start, end)
        found += [f"{key}: {counted[key]:.0f} instead of {truth[key]}" for key in truth if counted[key] != truth[key]]
        found += on_the_dashboard(run, counted, end)
    sums = f"{sum(truth.values())} sent, {sum(counted.values()):.0f} counted; " if truth else ""
    return found, f"{run.name}: {sums}{run.notes or '-'}; alerts after {delays}"


def on_the_dashboard(run, counted, end):
    """Where the dashboard's table differs from the samples by more than the edges that increase() estimates."""
    # The youngest series has been scraped for at least a minute.
    most = 1 + 2.2 * INTERVAL / 60
    viewer = Viewer(run.monitoring.server, int(run.start), math.ceil(end), broker=[run.name])
    rows = {row["Task"]: row for row in viewer.table("Tasks")}
    for task in {task for task, _ in counted}:
        for outcome in ("Succeeded", "Failed"):
            exact, shown = counted[task, f"task-{outcome.lower()}"], rows.get(task, {}).get(outcome)
            if shown is None or not exact - 0.01 <= shown <= exact * most + 0.01:
                yield f"{task}: the dashboard shows {shown} {outcome} instead of {exact:.0f}"
    online, workers = viewer.number("Workers online"), None if run.is_blind else len(run.deployment.workers)
    if online != workers:
        yield f"the dashboard shows {online} workers online instead of {workers}"


def test_incidents(services, redis, prometheus_release, request):
    """The right alert fires in time, no wrong one does, and the counts are the truth."""
    pace = Pace(request.config.getoption("--incident-speed"))
    monitoring = Monitoring(pace, prometheus_release)
    services.callback(monitoring.server.kill)

    def play(name):
        function, expected, also = INCIDENTS[name]
        run = Incident(name, services, monitoring, pace, redis)
        try:
            function(run)
            if run.deployment:
                run.deployment.rates.clear()
            run.settle()
            return problems(run, expected, also)
        except Exception:
            return [traceback.format_exc()], name

    with ThreadPoolExecutor(len(INCIDENTS)) as pool:
        results = dict(zip(INCIDENTS, pool.map(play, INCIDENTS)))
    for _, summary in results.values():
        print(summary)
    wrong = {name: found for name, (found, _) in results.items() if found}
    assert not wrong, "\n".join(f"{name}: {problem}" for name, found in wrong.items() for problem in found)
    assert not [rule for rule in monitoring.server.rules() if rule["health"] != "ok"]
