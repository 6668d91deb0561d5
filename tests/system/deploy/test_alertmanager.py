"""deploy/prometheus/alertmanager.yml, checked by amtool and loaded by a real Alertmanager."""

import json
import re
import subprocess
import urllib.request

import pytest
import yaml

from support.processes import Process, directory, free_port, wait_until
from support.prometheus import FILES, RULES

CONFIG = RULES / "alertmanager.yml"


def alert(name, **labels):
    severity = "critical" if name in CRITICAL else "warning"
    return {"alertname": name, "broker": "a", "severity": severity, **labels}


SHIPPED = [rule for name in FILES for group in yaml.safe_load((RULES / name).read_text())["groups"] for rule in group["rules"]]
CRITICAL = {rule["alert"] for rule in SHIPPED if rule.get("labels", {}).get("severity") == "critical"}
NAMES = {rule["alert"] for rule in SHIPPED if "alert" in rule}

#: What fires, and what of it is inhibited.
INCIDENTS = {
    "all workers are gone": (
        [alert("CeleryNoWorkers")],
        [alert("CeleryWorkersDown"), alert("CeleryTooFewWorkers"), alert("CeleryWorkerDown", worker="w"),
         alert("CeleryPrefetchBacklog", worker="w")],
    ),
    "one worker hangs and is lost, another one only hangs": (
        [alert("CeleryWorkerDown", worker="w"), alert("CeleryPrefetchBacklog", worker="v")],
        [alert("CeleryPrefetchBacklog", worker="w")],
    ),
    "one task fails, and another one in part": (
        [alert("CeleryTaskAlwaysFails", task="t"), alert("CeleryTaskFailures", task="u")],
        [alert("CeleryTaskFailures", task="t")],
    ),
    "one exporter has no connection": (
        [alert("FlowerExporterNotConnected", instance="1"), alert("FlowerExporterMissedEvents", instance="2", cause="disconnected"),
         alert("CeleryWorkerDown", worker="w")],
        [alert("FlowerExporterMissedEvents", instance="1", cause="disconnected"), alert("FlowerExporterSeesNoWorkers"),
         alert("CeleryPrefetchBacklog", worker="w"),
         alert("FlowerExporterConnectionFlapping", instance="1")],
    ),
    "a connection flaps, and the queue loses messages": (
        [alert("FlowerExporterConnectionFlapping", instance="1"),
         alert("FlowerExporterMissedEvents", instance="1", cause="buffer_full")],
        [alert("FlowerExporterMissedEvents", instance="1", cause="disconnected"),
         alert("FlowerExporterMissedEvents", instance="1", cause="redis_output_limit")],
    ),
}


def amtool(*arguments):
    return subprocess.run(["amtool", *arguments], text=True, capture_output=True, timeout=30)


@pytest.fixture
def alertmanager():
    """Sends alerts, or returns all of them."""
    port, home = free_port(), directory("alertmanager")
    server = Process(
        "alertmanager",
        ["prometheus-alertmanager", f"--config.file={CONFIG}", f"--storage.path={home}",
         f"--web.listen-address=127.0.0.1:{port}", "--cluster.listen-address="],
        cwd=home,
    )

    def api(body=None):
        request = urllib.request.Request(f"http://127.0.0.1:{port}/api/v2/alerts", body and json.dumps(body).encode(),
                                         {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=10) as response:
            return response.read()

    def ready():
        assert server.running, server.log()
        try:
            return api()
        except OSError:
            return False

    wait_until(ready, 20, server.log)
    yield api
    server.kill()


def test_file_is_valid_and_names_existing_alerts():
    done = amtool("check-config", str(CONFIG))
    assert done.returncode == 0, done.stdout + done.stderr
    named = set(re.findall(r"(?:Celery|FlowerExporter)\w+", CONFIG.read_text()))
    assert named <= NAMES and len(named) > 8


def test_critical_alerts_reach_the_pager():
    for severity, receiver in (("critical", "pager"), ("warning", "chat")):
        done = amtool("config", "routes", "test", f"--config.file={CONFIG}", "alertname=any", f"severity={severity}")
        assert (done.returncode, done.stdout.strip()) == (0, receiver), done.stderr


@pytest.mark.parametrize("incident", INCIDENTS)
@pytest.mark.parametrize("broker", ["a", None])
def test_alert_that_explains_others_inhibits_them(alertmanager, incident, broker):
    """Only those of the same broker, and also without the label `broker`."""

    def labels(alerts, broker):
        return [{key: value for key, value in {**one, "broker": broker}.items() if value is not None} for one in alerts]

    shown, inhibited = (labels(part, broker) for part in INCIDENTS[incident])
    shown += labels(inhibited[:1], "another")
    alertmanager([{"labels": one} for one in shown + inhibited])

    def found():
        """[(labels, whether the alert is inhibited)]"""
        return [(one["labels"], bool(one["status"]["inhibitedBy"])) for one in json.loads(alertmanager())]

    expected = [(one, False) for one in shown] + [(one, True) for one in inhibited]
    wait_until(lambda: len(found()) == len(expected), 10, found)
    assert sorted(map(by_label, found())) == sorted(map(by_label, expected))


def by_label(alert):
    labels, is_inhibited = alert
    return sorted(labels.items()), is_inhibited
