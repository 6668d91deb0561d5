"""The Helm chart, rendered by Helm's own library: against the API's schemas, the kustomize base and the exporter."""

import copy
import json
import re
import shutil
import subprocess
import sys
import tomllib

import pytest
import yaml

from support.helm import CHART, DIRECTORY, RELEASE, chart, helm, refusal, render, texts
from support.kubernetes import (
    NAME,
    NEWEST,
    OLDEST,
    OPERATOR,
    Pod,
    assert_consistent,
    build,
    claims,
    containers,
    only,
    overlay,
    validate,
    workload,
)
from support.processes import ROOT, directory
from support.prometheus import FILES, RULES

URL = "redis://redis.example/0"
README = (CHART / "README.md").read_text()

#: Values that each turn on another part of the chart.
VALUES = {
    "defaults": {},
    "url": {"broker": {"url": "amqp://celery:p@ss@rabbitmq/%2f"}},
    "secret": {"broker": {"existingSecret": "orders", "secretKey": "broker-url"}, "brokerLabel": "orders"},
    "file": {
        "broker": {"urlFile": "/vault/url", "namedQueue": False},
        "extraVolumes": [{"name": "vault", "emptyDir": {}}],
        "extraVolumeMounts": [{"name": "vault", "mountPath": "/vault", "readOnly": True}],
    },
    "replicas": {
        "replicas": 2,
        "persistence": {"enabled": True, "size": "5Gi", "storageClass": "fast", "annotations": {"a": "b"}},
    },
    "service monitor": {
        "serviceMonitor": {
            "enabled": True,
            "labels": {"release": "kps"},
            "scrapeTimeout": "10s",
            "relabelings": [{"targetLabel": "cluster", "replacement": "eu"}],
            "metricRelabelings": [{"action": "labeldrop", "regex": "pod"}],
        },
        "prometheusRule": {"enabled": True},
    },
    "pod monitor": {
        "podMonitor": {"enabled": True},
        "config": {"metrics": {"native_histogram_bucket_factor": 1.1}},
    },
    "open network": {"networkPolicy": {"enabled": False}},
    "closed network": {
        "networkPolicy": {
            "from": [{"namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": "monitoring"}}}],
            "to": [{"podSelector": {"matchLabels": {"app.kubernetes.io/name": "redis"}}}],
            "brokerPorts": [6379],
        }
    },
    "TLS": {"webConfig": {"existingSecret": "web", "tls": True}, "podMonitor": {"enabled": True}},
    "client certificates": {"webConfig": {"existingSecret": "web", "tls": True, "clientCertificates": True}},
    "settings": {
        "config": {
            "broker": {"amqp": {"queue": "orders", "prefetch_count": 500}, "redis": {"fanout_prefix": "/x."}},
            "state": {"max_tasks": 2000000, "purge_stopped_workers": None},
            "metrics": {"task_runtime_metric_buckets": [0.5, 60], "worker_groups": ["web=celery@web-*|\"a\"&<é>"]},
            "http": {"listen": "[::]:9000"},
        }
    },
    "nothing": {
        "config": {"state": None, "metrics": None},
        **dict.fromkeys(["startupProbe", "livenessProbe", "readinessProbe", "resources", "securityContext"]),
    },
    "pod": {
        "image": {"repository": "registry.example.com/exporter", "tag": "1", "pullPolicy": "Always"},
        "imagePullSecrets": [{"name": "registry"}],
        "fullnameOverride": "celery-metrics",
        "serviceAccountName": "exporter",
        "commonLabels": {"team": "a"},
        "commonAnnotations": {"owner": "a"},
        "podLabels": {"tier": "b"},
        "podAnnotations": {"owner": "b"},
        "extraEnv": [{"name": "FLOWER_EXPORTER_LOG__FORMAT", "value": "json"}],
        "nodeSelector": {"disk": "ssd"},
        "tolerations": [{"key": "dedicated", "operator": "Exists"}],
        "affinity": {"nodeAffinity": {}},
        "priorityClassName": "low",
        "livenessProbe": {"tcpSocket": {"port": "flower-metrics"}},
    },
    "dependency": {"global": {"imageRegistry": "registry.example.com"}},
    **{f"README {n}": yaml.safe_load(text) for n, text in enumerate(re.findall(r"^```yaml\n(.*?)^```", README, re.M | re.S))},
    "Datadog": yaml.safe_load((CHART / "examples/datadog.yaml").read_text()),
}
every_value_set = pytest.mark.parametrize("name", VALUES)


@pytest.fixture
def documents(name):
    return render(VALUES[name])


def container_of(documents):
    ((_, container),) = containers(workload(documents))
    return container


def leaves(table, prefix=""):
    """(dotted key, value) of each setting."""
    for key, value in table.items():
        if isinstance(value, dict):
            yield from leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def mounted_secret(documents):
    """The name and the items of the only Secret among the pod's volumes."""
    ((pod, _),) = containers(workload(documents))
    (secret,) = [volume["secret"] for volume in pod["volumes"] if "secret" in volume]
    return secret["secretName"], secret["items"]


# -- the manifests


@every_value_set
def test_strict_lint(name):
    report = helm.lint(CHART, VALUES[name], strict=True, namespace="celery")
    assert report["errors"] == []
    assert {one["error"] for one in report["messages"]} == {"icon is recommended"}


@every_value_set
def test_manifests_match_the_schemas(documents):
    """Valid in the oldest and the newest version, without unknown fields; selectors, ports and names fit together."""
    for version in (OLDEST, NEWEST):
        validate(documents, version)
    assert_consistent(documents)
    assert {document["metadata"]["namespace"] for document in documents} == {"celery"}


def comparable(documents):
    """{kind: manifest} without names, namespaces, labels and the image's tag. Settings are parsed; lists have one order."""
    found = {}
    for document in copy.deepcopy(documents):
        kind, spec = document["kind"], document.get("spec", {})
        del document["metadata"]
        if kind == "ConfigMap":
            (text,) = document["data"].values()
            document["data"] = dict(leaves(tomllib.loads(text)))
        elif kind == "Service":
            del spec["selector"]
        elif kind == "StatefulSet":
            ((pod, container),) = containers(document)
            del spec["template"]["metadata"], spec["serviceName"]
            del spec["selector"], pod["topologySpreadConstraints"][0]["labelSelector"]
            container["image"] = container["image"].partition(":")[0]
            for key in ("env", "volumeMounts"):
                container[key].sort(key=lambda one: one["name"])
            for volume in pod["volumes"]:
                volume.get("configMap", {}).pop("name", None)
        else:
            del spec["podSelector" if kind == "NetworkPolicy" else "selector"]
        found[kind] = document
    return found


@pytest.mark.parametrize(
    ("parts", "components"),
    [((), ()), (("persistence", "serviceMonitor"), ("persistent-state", "service-monitor"))],
    ids=["defaults", "with state"],
)
def test_render_equals_the_kustomize_base(parts, components):
    """Except for names and labels."""
    rendered = render({part: {"enabled": True} for part in parts})
    assert comparable(rendered) == comparable(build(overlay(["base"], components)))


@pytest.mark.parametrize("release", ["flower-exporter", "orders", "a" * 53])
def test_name_of_the_release(release):
    """All objects have its name, and the job of the alerts does not depend on it."""
    documents = render({"serviceMonitor": {"enabled": True}}, name=release)
    assert_consistent(documents)
    name = release if release == NAME else f"{release}-{NAME}"[:52]
    assert {document["metadata"]["name"] for document in documents} == {name}


def test_a_changed_setting_restarts_the_pods():
    """A changed URL does not."""

    def template(values):
        return workload(render(values))["spec"]["template"]

    urls = [template({"broker": {"url": f"redis://{host}/0"}}) for host in "ab"]
    assert urls[0] == urls[1] == template({})
    assert template({"config": {"log": {"format": "json"}}}) != template({})


def test_broker_url_in_a_secret():
    """The pods mount the Secret that the chart creates, or the given one."""
    documents = render(VALUES["url"])
    secret = only(documents, "Secret")
    assert secret["stringData"] == {"url": VALUES["url"]["broker"]["url"]}
    assert mounted_secret(documents) == (secret["metadata"]["name"], [{"key": "url", "path": "url"}])
    documents = render(VALUES["secret"])
    assert mounted_secret(documents) == ("orders", [{"key": "broker-url", "path": "url"}])
    assert [one for one in documents if one["kind"] == "Secret"] == []


def test_broker_label_is_on_what_monitors_read():
    """The Service and the pods, for `targetLabels` and `podTargetLabels`."""
    for kind in ("serviceMonitor", "podMonitor"):
        documents = render({"brokerLabel": "orders", kind: {"enabled": True}})
        (spec,) = [one["spec"] for one in documents if one["kind"].endswith("Monitor")]
        assert (spec.get("targetLabels") or spec.get("podTargetLabels")) == ["broker"]
        for one in (only(documents, "Service"), workload(documents)["spec"]["template"]):
            assert one["metadata"]["labels"]["broker"] == "orders"


def test_probes_and_monitors_of_a_web_configuration():
    """With TLS they use HTTPS. With client certificates, probes only test the TCP port. A probe with a handler stays."""

    def probes(values):
        return {key: probe for key, probe in container_of(render(values)).items() if key.endswith("Probe")}

    assert {probe["httpGet"].get("scheme") for probe in probes({}).values()} == {None}
    assert {probe["httpGet"].get("scheme") for probe in probes(VALUES["TLS"]).values()} == {"HTTPS"}
    (endpoint,) = only(render(VALUES["TLS"]), "PodMonitor")["spec"]["podMetricsEndpoints"]
    assert endpoint["scheme"] == "https"
    tcp = probes(VALUES["client certificates"])
    assert {key: sorted(probe) for key, probe in tcp.items()} == {
        "startupProbe": ["failureThreshold", "periodSeconds", "tcpSocket"],
        "livenessProbe": ["tcpSocket", "timeoutSeconds"],
        "readinessProbe": ["periodSeconds", "tcpSocket", "timeoutSeconds"],
    }
    own = probes(VALUES["client certificates"] | {"livenessProbe": {"exec": {"command": ["x"]}}})["livenessProbe"]
    assert own == {"exec": {"command": ["x"]}, "timeoutSeconds": 5}


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"broker": {"url": URL, "existingSecret": "x"}}, "the broker URL has several sources"),
        ({"broker": {"urlFile": "/x"}, "config": {"broker": {"url": [URL]}}}, "the broker URL has several sources"),
        ({"serviceMonitor": {"enabled": True}, "podMonitor": {"enabled": True}}, "would scrape each replica twice"),
    ],
)
def test_contradictions_are_refused(values, words):
    assert words in refusal(values)


@pytest.mark.parametrize(
    ("values", "where"),
    [
        ({"replica": 2}, "replica"),
        ({"replicas": 3}, "/replicas"),
        ({"replicas": "2"}, "/replicas"),
        ({"nameOverride": "x"}, "nameOverride"),
        ({"image": {"repo": "x"}}, "repo"),
        ({"image": {"tag": 1.5}}, "/image/tag"),
        ({"image": {"pullPolicy": "always"}}, "/image/pullPolicy"),
        ({"broker": {"existingsecret": "x"}}, "existingsecret"),
        ({"broker": {"url_file": "/x"}}, "url_file"),
        ({"config": {"metric": {}}}, "metric"),
        ({"config": {"state": {"worker_timout": "1m"}}}, "worker_timout"),
        ({"config": {"state": {"worker_timeout": True}}}, "/config/state/worker_timeout"),
        ({"config": {"state": {"persistent": "yes"}}}, "/config/state/persistent"),
        ({"config": {"broker": {"redis": {"master": "x"}}}}, "master"),
        ({"config": {"http": {"listen": "9555"}}}, "/config/http/listen"),
        ({"persistence": {"size": "1 GiB"}}, "/persistence/size"),
        ({"persistence": {"accessModes": ["ReadWriteMany"]}}, "/persistence/accessModes"),
        ({"livenessProbe": {"periodSecond": 1}}, "periodSecond"),
        ({"readinessProbe": {"periodSeconds": "5s"}}, "/readinessProbe/periodSeconds"),
        ({"webConfig": {"tls": "true"}}, "/webConfig/tls"),
        ({"serviceMonitor": {"interval": "15"}}, "/serviceMonitor/interval"),
        ({"serviceMonitor": {"basicAuth": {"username": "x"}}}, "/serviceMonitor/basicAuth/username"),
        ({"podMonitor": {"label": {}}}, "label"),
        ({"prometheusRule": {"disabled": "CeleryNoWorkers"}}, "/prometheusRule/disabled"),
        ({"networkPolicy": {"brokerPorts": ["6379"]}}, "/networkPolicy/brokerPorts"),
        ({"podAnnotations": {"prometheus.io/scrape": True}}, "/podAnnotations"),
        ({"resources": {"request": {}}}, "request"),
        ({"extraEnv": [{"name": "A", "valuefrom": {}}]}, "valuefrom"),
        ({"extraEnv": {"A": "b"}}, "/extraEnv"),
        ({"affinity": {"podAntiaffinity": {}}}, "podAntiaffinity"),
        ({"tolerations": {"key": "x"}}, "/tolerations"),
    ],
    ids=str,
)
def test_schema_refuses_a_mistake(values, where):
    """The error names the place."""
    error = refusal(values)
    assert "specifications of the schema" in error and where in error


def test_schema_has_every_value():
    """And no other, except for the one that Helm sets for a dependency."""
    assert set(chart().schema["properties"]) == {*chart().values, "global"}


# -- the settings


def check(documents):
    """The pod of a release, whose settings the exporter has accepted."""
    pod = Pod(documents, URL)
    if web_config := pod.env.get("FLOWER_EXPORTER_HTTP__WEB_CONFIG_FILE"):
        open(web_config, "w").close()
    if url_file := pod.env.get("FLOWER_EXPORTER_BROKER__URL_FILE"):
        with open(url_file, "w") as file:
            file.write(URL)
    return pod


@every_value_set
def test_exporter_accepts_the_settings(name, documents):
    """The rendered file has what `config` has, and the exporter listens on the container's port."""
    pod = check(documents)
    settings = pod.settings()
    assert settings["http"]["listen"].endswith(f":{container_of(documents)['ports'][0]['containerPort']}")
    for section, keys in (chart().merge_values(VALUES[name])["config"] or {}).items():
        rendered = tomllib.loads(pod.config.read_text()).get(section, {})
        assert rendered == {key: value for key, value in (keys or {}).items() if value is not None}


def test_rendered_mistake_is_detected():
    """The test above can fail: an invalid value that the schema cannot know."""
    assert check(render({"config": {"state": {"worker_timeout": "1 parsec"}}})).check().code == 2


def every_setting():
    """flower-exporter.toml.example with its commented examples."""
    text = (ROOT / "flower-exporter.toml.example").read_text()
    return tomllib.loads(re.sub(r"^# (\w+ = .*)$", r"\1", text, flags=re.M))


def test_every_setting_can_be_given():
    """All at once, with the values of the example. The rendered file contains them all, and no other setting exists."""
    settings = every_setting()
    del settings["broker"]["url"]  # the other source of the URL
    assert len(list(leaves(settings))) > 50
    assert tomllib.loads(Pod(render({"config": settings}), URL).config.read_text()) == settings

    def keys(schema, prefix=""):
        for key, one in schema["properties"].items():
            yield from keys(one, f"{prefix}{key}.") if "properties" in one else [f"{prefix}{key}"]

    assert set(keys(chart().schema["properties"]["config"])) == {key for key, _ in leaves(every_setting())}


@pytest.mark.parametrize("key", [key for key, _ in leaves(every_setting())])
def test_each_setting_wins_over_the_chart(key):
    """The exporter uses the value of `config`, even of a setting that the chart makes by a variable."""
    value = dict(leaves(every_setting()))[key]
    config = value
    for part in reversed(key.split(".")):
        config = {part: config}
    on = {"persistence": {"enabled": True}, "webConfig": {"existingSecret": "web"}}
    documents = render({"config": config, **on})
    variable = f"FLOWER_EXPORTER_{key.upper().replace('.', '__')}"
    assert variable not in [one["name"] for one in container_of(documents)["env"]]
    assert dict(leaves(tomllib.loads(only(documents, "ConfigMap")["data"]["flower-exporter.toml"])))[key] == value
    # With another source of the URL, no Secret is required.
    mounts = {one["name"] for one in container_of(documents)["volumeMounts"]}
    assert ("broker" in mounts) == (key not in ("broker.url", "broker.url_file"))


def test_state_is_on_the_volume():
    documents = render({"replicas": 2, "persistence": {"enabled": True}})
    (claim,) = claims(workload(documents))
    (mount,) = [one for one in container_of(documents)["volumeMounts"] if one["name"] == claim["name"]]
    variables = {one["name"]: one.get("value") for one in container_of(documents)["env"]}
    assert variables["FLOWER_EXPORTER_STATE__DB"].startswith(mount["mountPath"] + "/")
    assert check(documents).settings()["state"]["persistent"] is True


def test_named_queue_is_optional():
    """With it, the queue has the name of the pod."""
    queues = [check(render({"broker": {"namedQueue": on}})).settings()["broker"]["amqp"].get("queue") for on in (True, False)]
    assert queues == ["worker-6f7c-x2x", None]


# -- Prometheus


def rules(values):
    documents = [one for one in render({"prometheusRule": {"enabled": True, **values}}) if one["kind"] == "PrometheusRule"]
    assert {one["apiVersion"] for one in documents} == {OPERATOR}
    return {one["metadata"]["name"].removeprefix(f"{RELEASE}-"): one["spec"] for one in documents}


def test_prometheus_rules_equal_the_files():
    """Each file becomes one object, with the placeholders of Prometheus intact and with the given addresses."""
    addresses = {"runbookUrl": "https://wiki.example.org/x", "dashboardUrl": "https://grafana.example.org/y"}
    found = rules(addresses)
    for name in FILES:
        text = (RULES / name).read_text().replace("https://runbooks.example.com/flower-exporter", addresses["runbookUrl"])
        text = text.replace("https://grafana.example.com/d/flower-exporter", addresses["dashboardUrl"])
        assert found.pop(name.removesuffix(".yml").replace(".", "-")) == yaml.safe_load(text)
    assert found == {}


def test_prometheus_rules_without_a_disabled_alert():
    """Only that alert is missing."""

    def alerts(values):
        groups = [group for spec in rules(values).values() for group in spec["groups"]]
        return [rule["alert"] for group in groups for rule in group["rules"] if "alert" in rule]

    assert "CeleryTaskSlow" in alerts({})
    assert alerts({"disabled": ["CeleryTaskSlow"]}) == [name for name in alerts({}) if name != "CeleryTaskSlow"]


# -- the documents


def generate(home, *arguments):
    command = [sys.executable, home / "deploy/helm/generate.py", *arguments]
    return subprocess.run(command, text=True, capture_output=True, timeout=30)


def test_generated_parts_are_up_to_date():
    """The README's table, the schema of the settings, and the copies of the rules and the sidecar."""
    done = generate(ROOT)
    assert done.returncode == 0, done.stderr


def test_generator_finds_and_updates_what_is_out_of_date():
    """In a copy: a changed source makes the check fail, and --write makes it pass."""
    home = directory("chart")
    for path in ("deploy/helm", "deploy/prometheus", "deploy/kubernetes", "docs"):
        shutil.copytree(ROOT / path, home / path)
    assert generate(home, "--write").returncode == 0 == generate(home).returncode
    changes = {
        "deploy/helm/flower-exporter/values.yaml": ("replicas: 1", "replicas: 2", "README.md"),
        "docs/configuration.md": ("The file of the saved state.", "A file.", "values.schema.json"),
        "deploy/prometheus/flower.rules.yml": ("groups:", "# changed\ngroups:", "rules/flower.rules.yml"),
        "deploy/kubernetes/sidecar/sidecar.yaml": ("32Mi", "33Mi", "examples/sidecar.yaml"),
    }
    for name, (old, new, target) in changes.items():
        text = (home / name).read_text()
        assert old in text
        (home / name).write_text(text.replace(old, new, 1))
        done = generate(home)
        assert done.returncode == 1
        assert done.stderr == f"deploy/helm/flower-exporter/{target} is out of date: run deploy/helm/generate.py --write\n"
        assert generate(home, "--write").returncode == 0 == generate(home).returncode


def test_every_value_is_described():
    """Each value has a row, or is a part of one."""
    described = set(re.findall(r"^\| `([\w.]+)` \|", README, re.M))

    def missing(values, prefix=""):
        for key, value in values.items():
            name = f"{prefix}{key}"
            if isinstance(value, dict) and any(other.startswith(f"{name}.") for other in described):
                yield from missing(value, f"{name}.")
            elif name not in described:
                yield name

    assert list(missing(yaml.safe_load((CHART / "values.yaml").read_text()))) == []


def test_notes_show_the_next_command():
    """The Secret if it is missing, then the rollout, then the metrics."""
    secret = "kubectl create secret generic -n celery orders-flower-exporter-broker --from-file=url=broker-url"
    rollout = "kubectl rollout status -n celery statefulset/orders-flower-exporter"
    notes = texts(name="orders")["NOTES.txt"]
    assert 0 < notes.index(secret) < notes.index(rollout) < notes.index("curl http://127.0.0.1:9555/metrics")
    documents = render(name="orders")
    assert rollout.endswith(f"/{workload(documents)['metadata']['name']}")
    assert f" {mounted_secret(documents)[0]} " in secret
    for name in ("url", "secret", "file"):
        assert "create secret" not in texts(VALUES[name])["NOTES.txt"]


def test_versions_are_those_of_the_crate():
    version = tomllib.loads((ROOT / "Cargo.toml").read_text())["package"]["version"]
    assert (chart().metadata["version"], chart().metadata["appVersion"]) == (version, version)


def test_sidecar_example_equals_the_patch():
    """A worker's pod with these values has what the kustomize build has."""
    values = yaml.safe_load((CHART / "examples/sidecar.yaml").read_text())
    template = workload(build(overlay(["sidecar"])))["spec"]["template"]
    assert values["podLabels"].items() <= template["metadata"]["labels"].items()
    assert (values["initContainers"], values["extraVolumes"]) == (template["spec"]["initContainers"], template["spec"]["volumes"])


def test_datadog_example_equals_the_component():
    documents = build(overlay(["base"], ["datadog"]))
    annotations = workload(documents)["spec"]["template"]["metadata"]["annotations"]
    assert {key: json.loads(text) for key, text in VALUES["Datadog"]["podAnnotations"].items()} == {
        key: json.loads(text) for key, text in annotations.items()
    }
    assert list(annotations) == [f"ad.datadoghq.com/{container_of(render(VALUES['Datadog']))['name']}.checks"]


def test_examples_are_listed():
    assert {path.name for path in (CHART / "examples").iterdir()} == set(re.findall(r"\]\(examples/([\w.-]+)\)", README))
    assert {path.name for path in DIRECTORY.iterdir()} - {"__pycache__"} == {"flower-exporter", "generate.py"}
