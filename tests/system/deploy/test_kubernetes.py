"""The manifests of deploy/kubernetes: built by kubectl, validated against the API's schemas, and used by the exporter."""

import base64
import copy
import json
import re
import shlex
import subprocess
import tomllib

import kubernetes_validate
import pytest
import yaml

from support import events as ev
from support.cli import Run
from support.exposition import EVENTS, ONLINE
from support.kubernetes import MANIFESTS, NAME, build, containers, environment, kubectl, mib, only, overlay
from support.processes import ROOT, directory, wait_until
from support.prometheus import FILES, RULES

#: Every documented build, and its oldest and newest supported Kubernetes.
BUILDS = {
    "base": ("base", (), "1.25"),
    "overlay": ("overlay", (), "1.25"),
    "base with state": ("base", ("persistent-state", "service-monitor"), "1.25"),
    "sidecar": ("sidecar", ("pod-monitor",), "1.29"),
}
NEWEST = "1.37"
OPERATOR = "monitoring.coreos.com/v1"
DEFAULT_FILE = "/etc/flower-exporter/flower-exporter.toml"


@pytest.fixture(scope="module")
def built():
    return {name: build(overlay([path], components)) for name, (path, components, _) in BUILDS.items()}


@pytest.fixture(params=BUILDS)
def documents(request, built):
    return copy.deepcopy(built[request.param])


@pytest.fixture
def exporter_container(documents):
    """(pod's spec, exporter container) of a build."""
    ((pod, container),) = containers(only(documents, "Deployment"))
    return pod, container


class Pod:
    """The files and variables of the exporter container, as the kubelet provides them for a pod with this name."""

    def __init__(self, documents, url, name="worker-6f7c-x2x"):
        ((pod, container),) = containers(only(documents, "Deployment"))
        volumes = {volume["name"]: volume for volume in pod["volumes"]}
        mounts = {mount["mountPath"]: directory("mount") for mount in container["volumeMounts"]}
        self.config = self.broker_url = None
        for mount in container["volumeMounts"]:
            volume, here = volumes[mount["name"]], mounts[mount["mountPath"]]
            if "configMap" in volume:
                settings = only(documents, "ConfigMap")
                assert volume["configMap"]["name"] == settings["metadata"]["name"]
                (key,) = settings["data"]
                assert f"{mount['mountPath']}/{key}" == DEFAULT_FILE
                self.config = here / key
                self.config.write_text(settings["data"][key])
            elif "secret" in volume:
                (item,) = volume["secret"]["items"]
                self.broker_url = here / item["path"]
                self.broker_url.write_text(url)
        self.env = environment(container, name, mounts)

    def check(self):
        return Run(*(["-c", self.config] if self.config else []), "--check-config", env=self.env)

    def settings(self):
        done = self.check()
        assert done.code == 0, done.err
        return tomllib.loads(done.out)

    def start(self, services):
        settings = tomllib.loads(self.config.read_text()) if self.config else {}
        return services.exporter(None, settings, env=self.env).ready()


def seconds(text):
    """The seconds of a duration such as 1m 30s."""
    return sum(int(number) * {"s": 1, "m": 60, "h": 3600}[unit] for number, unit in re.findall(r"(\d+)([smh])", text))


def covers(selector, labels):
    assert set(selector) == {"matchLabels"} and selector["matchLabels"]
    return selector["matchLabels"].items() <= labels.items()


# -- the files


def test_every_file_is_part_of_a_build():
    """Each manifest is in the kustomization of its directory, and each component in a build of these tests."""
    for path in MANIFESTS.rglob("kustomization.yaml"):
        text = path.read_text()
        for other in path.parent.iterdir():
            assert other == path or re.search(rf"^ .*\b{re.escape(other.name)}\b", text, re.M), f"{other} is unused"
    components = {path.name for path in (MANIFESTS / "components").iterdir()}
    assert components == {name for _, names, _ in BUILDS.values() for name in names}


@pytest.mark.parametrize("name", BUILDS)
def test_manifests_match_the_schemas(built, name):
    """Every manifest is valid in the oldest and the newest version, without unknown fields."""
    for version in (BUILDS[name][2], NEWEST):
        for document in built[name]:
            if document["apiVersion"] != OPERATOR:
                assert kubernetes_validate.validate(document, version, strict=True) == version


def test_schemas_reject_a_misspelled_field(built):
    """In each manifest, at several levels."""
    for document in (one for name in BUILDS for one in built[name] if one["apiVersion"] != OPERATOR):
        spots = [document, document["metadata"]]
        if document["kind"] == "Deployment":
            ((pod, container),) = containers(document)
            spots += [document["spec"], pod, container, container["livenessProbe"], container["securityContext"]]
        for spot in spots:
            spot["misspelled"] = "x"
            with pytest.raises(kubernetes_validate.ValidationError, match="misspelled"):
                kubernetes_validate.validate(document, NEWEST, strict=True)
            del spot["misspelled"]


def test_native_sidecar_requires_its_version(built):
    """The base's oldest version rejects the field that the sidecar's oldest version introduced."""
    with pytest.raises(kubernetes_validate.ValidationError, match="restartPolicy"):
        kubernetes_validate.validate(only(built["sidecar"], "Deployment"), BUILDS["base"][2], strict=True)


def test_selectors_and_ports_match(built):
    """Deployment, Service, NetworkPolicy and ServiceMonitor select the same pods and the same port."""
    documents = built["base with state"]
    deployment, service = only(documents, "Deployment"), only(documents, "Service")
    policy, monitor = only(documents, "NetworkPolicy")["spec"], only(documents, "ServiceMonitor")["spec"]
    labels = deployment["spec"]["template"]["metadata"]["labels"]
    ((_, container),) = containers(deployment)
    (port,), (service_port,), (endpoint,) = container["ports"], service["spec"]["ports"], monitor["endpoints"]
    assert covers(deployment["spec"]["selector"], labels) and covers(policy["podSelector"], labels)
    assert covers({"matchLabels": service["spec"]["selector"]}, labels)
    assert service_port["targetPort"] == port["name"] and service_port["port"] == port["containerPort"]
    assert policy["ingress"][0]["ports"] == [{"port": port["containerPort"], "protocol": "TCP"}]
    assert covers(monitor["selector"], service["metadata"]["labels"]) and endpoint == {"port": service_port["name"]}
    # The alerts use this job name: from the monitor's label, and from the operator's default, the Service's name.
    assert service["metadata"]["labels"][monitor["jobLabel"]] == service["metadata"]["name"] == NAME


def test_pod_monitor_selects_the_sidecar(built):
    """It selects the pods that the patch labels and only the exporter's port, and sets the job name of the alerts."""
    labels = only(built["sidecar"], "Deployment")["spec"]["template"]["metadata"]["labels"]
    monitor = only(built["sidecar"], "PodMonitor")["spec"]
    ((_, container),) = containers(only(built["sidecar"], "Deployment"))
    assert covers(monitor["selector"], labels) and labels[monitor["jobLabel"]] == NAME
    assert monitor["podMetricsEndpoints"] == [{"port": container["ports"][0]["name"]}]


def test_network_policy_allows_brokers_and_dns(built):
    """Egress is allowed to the default port of every broker, and to DNS."""
    policy = only(built["base"], "NetworkPolicy")["spec"]
    ports = {(port["protocol"], port["port"]) for rule in policy["egress"] for port in rule["ports"]}
    assert policy["policyTypes"] == ["Ingress", "Egress"]
    assert ports == {("UDP", 53), *(("TCP", number) for number in (53, 5672, 5671, 6379, 6380, 26379))}


def test_pod_security_standard_restricted(exporter_container):
    """Pod Security Standard "restricted", for the container or its pod, with a read-only root filesystem."""
    pod, container = exporter_container
    context = pod.get("securityContext", {}) | container["securityContext"]
    assert context["runAsNonRoot"] is True and context["runAsUser"] == context["runAsGroup"] == 65532
    assert context["seccompProfile"] == {"type": "RuntimeDefault"}
    assert context["allowPrivilegeEscalation"] is False and context["capabilities"] == {"drop": ["ALL"]}
    assert context["readOnlyRootFilesystem"] is True and "privileged" not in context
    assert not {"hostNetwork", "hostPID", "hostIPC"} & set(pod)
    kinds = {key for volume in pod["volumes"] for key in volume} - {"name"}
    assert kinds <= {"configMap", "secret", "persistentVolumeClaim"}


@pytest.mark.parametrize("name", ["base", "overlay", "base with state"])
def test_pod_options_and_strategy(built, name):
    """One pod at a time, no service variables, no token, and a grace period of more than the 5 s that a stop takes."""
    spec = only(built[name], "Deployment")["spec"]
    pod = spec["template"]["spec"]
    assert (spec["replicas"], spec["strategy"]) == (1, {"type": "Recreate"})
    assert (pod["enableServiceLinks"], pod["automountServiceAccountToken"]) == (False, False)
    assert pod["terminationGracePeriodSeconds"] > 5


def test_sidecar_does_not_delay_its_worker(built):
    """A native sidecar stops after the worker. None of its probes delays the worker or makes the pod unready."""
    ((pod, container),) = containers(only(built["sidecar"], "Deployment"))
    assert container in pod["initContainers"] and container["restartPolicy"] == "Always"
    assert not {"startupProbe", "readinessProbe"} & set(container)
    assert [other["name"] for other in pod["containers"]] == ["worker"]


def test_sidecars_do_not_enable_events(built):
    """Each broadcast would reach all workers, so the example's workers send events without a request."""
    assert Pod(built["sidecar"], "redis://redis.example/0").settings()["events"]["enable_events"] is False
    (worker,) = only(built["sidecar"], "Deployment")["spec"]["template"]["spec"]["containers"]
    assert "-E" in worker["command"]


def test_overlay_sets_image_namespace_and_secret(built):
    """The Secret has a fixed name, which a new URL does not change."""
    documents = built["overlay"]
    ((pod, container),) = containers(only(documents, "Deployment"))
    assert container["image"] == "registry.example.com/flower-exporter:0.1.0"
    assert {document["metadata"]["namespace"] for document in documents} == {"celery"}
    (secret,) = [volume["secret"] for volume in pod["volumes"] if "secret" in volume]
    assert only(documents, "Secret")["metadata"]["name"] == secret["secretName"] == "flower-exporter-broker"


# -- the settings


def test_config_map_and_variables_are_valid(documents):
    """The exporter accepts the ConfigMap and the container's variables, with the container's port and URL file."""
    ((_, container),) = containers(only(documents, "Deployment"))
    pod = Pod(documents, "redis://redis.example/0\n")
    settings = pod.settings()
    assert settings["broker"]["url_file"] == str(pod.broker_url)
    assert settings["http"]["listen"] == f"0.0.0.0:{container['ports'][0]['containerPort']}"
    assert settings["metrics"]["self_metrics"] is True


def test_invalid_settings_are_detected(built):
    """The test above can fail: with a wrong key in the ConfigMap, and with a wrong variable name."""
    documents = copy.deepcopy(built["base"])
    settings = only(documents, "ConfigMap")["data"]
    settings["flower-exporter.toml"] += "self_metric = true\n"
    assert Pod(documents, "redis://redis.example/0").check().code == 2
    documents = copy.deepcopy(built["sidecar"])
    ((_, container),) = containers(only(documents, "Deployment"))
    container["env"][0]["name"] += "S"
    assert Pod(documents, "redis://redis.example/0").check().code == 2


def test_placeholder_url_is_refused(built):
    """The overlay as shipped does not start. The error contains the file name but not its content."""
    url = base64.b64decode(only(built["overlay"], "Secret")["data"]["url"]).decode()
    pod = Pod(built["overlay"], url)
    line = pod.check().error_line()
    assert str(pod.broker_url) in line and url.strip() not in line


def test_workers_are_purged_before_their_alert_fires(built):
    """Pods have new names after each rollout, so the old series must be purged before CeleryWorkerDown fires."""
    state = Pod(built["base"], "redis://redis.example/0").settings()["state"]
    rules = yaml.safe_load((RULES / "flower.alerts.yml").read_text())["groups"][0]["rules"]
    (alert,) = [rule for rule in rules if rule.get("alert") == "CeleryWorkerDown"]
    assert seconds(state["worker_timeout"]) < seconds(state["purge_offline_workers"]) < seconds(alert["for"])


def test_memory_limit_covers_an_overload(documents, exporter_container):
    """The limit is at least 2.5 times the buffer plus 24 MiB for 100,000 tasks. CPU has no limit."""
    resources = exporter_container[1]["resources"]
    buffer = Pod(documents, "redis://redis.example/0").settings()["events"]["buffer_max_bytes"]
    assert mib(resources["limits"]["memory"]) >= 2.5 * mib(buffer.removesuffix("B")) + 24
    assert mib(resources["requests"]["memory"]) >= 24 and set(resources["limits"]) == {"memory"}


def test_persistent_state_is_on_the_volume(built):
    """The component's volume contains state.db, and the exporter's group can write to it."""
    documents = built["base with state"]
    ((pod, container),) = containers(only(documents, "Deployment"))
    (volume,) = [one for one in pod["volumes"] if "persistentVolumeClaim" in one]
    (mount,) = [one for one in container["volumeMounts"] if one["name"] == volume["name"]]
    assert volume["persistentVolumeClaim"]["claimName"] == only(documents, "PersistentVolumeClaim")["metadata"]["name"]
    variables = {one["name"]: one["value"] for one in container["env"]}
    assert variables["FLOWER_EXPORTER_STATE__DB"].startswith(mount["mountPath"] + "/") and "readOnly" not in mount
    assert pod["securityContext"]["fsGroup"] == pod["securityContext"]["runAsGroup"]
    state = Pod(documents, "redis://redis.example/0").settings()["state"]
    assert state["persistent"] is True and state["db"].endswith("/state")


# -- a running exporter


def test_probes_succeed_on_a_connected_exporter(services, shared_redis, documents, exporter_container):
    """Every probe's path returns 200, and its port is that of the exporter."""
    container = exporter_container[1]
    exporter = Pod(documents, shared_redis.url).start(services)
    probes = {key: probe for key, probe in container.items() if key.endswith("Probe")}
    for probe in probes.values():
        assert probe["httpGet"]["port"] == container["ports"][0]["name"]
        assert exporter.request(probe["httpGet"]["path"])[0] == 200
    paths = {key: probe["httpGet"]["path"] for key, probe in probes.items()}
    sidecar = {"livenessProbe": "/healthz"}
    assert paths in (sidecar, sidecar | {"startupProbe": "/healthz", "readinessProbe": "/healthz?ready"})


def test_liveness_probe_tolerates_an_outage(services, redis, built):
    """During a broker outage the pod is not ready, but it is not restarted."""
    ((_, container),) = containers(only(built["base"], "Deployment"))
    exporter = Pod(built["base"], redis.url).start(services)
    redis.stop()
    path = {key: container[key]["httpGet"]["path"] for key in ("livenessProbe", "readinessProbe")}
    wait_until(lambda: exporter.request(path["readinessProbe"])[0] == 503, 10, "not ready")
    assert exporter.request(path["livenessProbe"])[0] == 200


def test_sidecar_counts_only_its_worker(services, redis, built):
    """Only events of the pod's worker are counted, even if the name of another pod has the same prefix."""
    publisher = services.publisher(redis)
    exporter = Pod(built["sidecar"], redis.url, name="worker-1").start(services)
    for worker in ("celery@worker-12", "celery@worker-2", "celery@worker-1"):
        publisher.send([ev.received(worker=worker), ev.heartbeat(worker)])
    samples = exporter.wait_for(lambda m: m.one(ONLINE, worker="celery@worker-1"))
    assert samples.labels("worker") == {"celery@worker-1"} and samples.total(EVENTS) == 1


# -- Prometheus


@pytest.mark.parametrize("name", ["base", "sidecar"])
def test_scrape_job_finds_the_exporter(built, name):
    """The job without the operator finds only the exporter container, and labels pods and brokers."""
    deployment = only(built[name], "Deployment")
    pod = deployment["spec"]["template"]["spec"]
    (job,) = yaml.safe_load((MANIFESTS / "prometheus.yml").read_text())["scrape_configs"]
    # Debian's Prometheus has no Kubernetes service discovery, so the targets are static.
    assert job.pop("kubernetes_sd_configs") == [{"role": "pod"}]
    about = {"namespace": "celery", "pod_name": "pod-1", "pod_label_broker": "orders"}
    targets = []
    other = {"name": "other", "ports": [{"name": "metrics"}]}
    for container in [*pod.get("initContainers", []), *pod["containers"], other]:
        for port in container.get("ports", [{"name": ""}]):
            for phase in ("Running", "Succeeded"):
                found = about | {"pod_container_name": container["name"], "pod_container_port_name": port["name"]}
                labels = {f"__meta_kubernetes_{key}": text for key, text in (found | {"pod_phase": phase}).items()}
                targets.append({"targets": [f"10.0.0.1:{port.get('containerPort', 80)}"], "labels": labels})
    config = directory("prometheus") / "prometheus.yml"
    config.write_text(json.dumps({"scrape_configs": [{**job, "static_configs": targets}]}))
    command = ["promtool", "check", "service-discovery", "--timeout=500ms", config, NAME]
    done = subprocess.run(command, text=True, capture_output=True, timeout=30)
    assert done.returncode == 0, done.stdout + done.stderr
    (kept,) = [target["labels"] for target in json.loads(done.stdout) if target["labels"]]
    visible = {key: value for key, value in kept.items() if not key.startswith("__")}
    wanted = {"job": NAME, "instance": "10.0.0.1:9555", "namespace": "celery", "pod": "pod-1", "broker": "orders"}
    assert visible == wanted and kept["__metrics_path__"] == "/metrics"


@pytest.mark.parametrize("label", [{}, {"release": "kube-prometheus-stack"}])
def test_prometheus_rules_script(label):
    """The script converts each file to a PrometheusRule with the same rules and the requested label."""
    arguments = [f"{key}={value}" for key, value in label.items()]
    done = subprocess.run([MANIFESTS / "prometheus-rules.sh", *arguments], text=True, capture_output=True, timeout=10)
    assert done.returncode == 0, done.stderr
    documents = list(yaml.safe_load_all(done.stdout))
    for document, name in zip(documents, FILES, strict=True):
        assert (document["apiVersion"], document["kind"]) == (OPERATOR, "PrometheusRule")
        assert document["spec"] == yaml.safe_load((RULES / name).read_text())
        labels = label or {"app.kubernetes.io/name": NAME}
        assert document["metadata"] == {"name": name.removesuffix(".yml"), "labels": labels}


def test_prometheus_rules_script_rejects_an_invalid_label():
    done = subprocess.run([MANIFESTS / "prometheus-rules.sh", "release"], text=True, capture_output=True, timeout=10)
    assert (done.returncode, done.stdout) == (2, "") and "expected a label as in release=" in done.stderr


# -- the README


def blocks(language):
    return re.findall(rf"^```{language}\n(.*?)^```", (MANIFESTS / "README.md").read_text(), re.M | re.S)


def test_readme_commands_create_the_secret(built):
    """The Secret has the name and key that the pods mount, and every named file exists."""
    (commands,) = blocks("sh")
    (create,) = [line for line in commands.splitlines() if line.startswith("kubectl create secret")]
    arguments = shlex.split(create)[1:]
    assert [argument for argument in arguments if "url" in argument] == ["--from-file=url=broker-url"]
    file = directory("secret") / "broker-url"
    file.write_text("redis://:password@redis:6379/0\n")
    arguments[arguments.index("--from-file=url=broker-url")] = f"--from-file=url={file}"
    done = kubectl(*arguments, "--dry-run=client", "-o", "yaml")
    assert done.returncode == 0, done.stderr
    secret = yaml.safe_load(done.stdout)
    for name in BUILDS:
        ((pod, _),) = containers(only(built[name], "Deployment"))
        (volume,) = [one["secret"] for one in pod["volumes"] if "secret" in one]
        assert secret["metadata"]["name"] == volume["secretName"]
        assert [item["key"] for item in volume["items"]] == list(secret["data"])
    url = base64.b64decode(secret["data"]["url"]).decode()
    assert Pod(built["base"], url).check().code == 0
    for path in re.findall(r"deploy/[\w./-]+", (MANIFESTS / "README.md").read_text()):
        assert (ROOT / path).exists(), path


def test_readme_several_brokers():
    """In the described overlays no Service selects another's pods, and one ServiceMonitor selects all Services."""
    (block,) = blocks("yaml")
    brokers = {}
    for broker in ("orders", "mail"):
        labels = yaml.safe_load(block.replace("orders", broker))
        secret = [{"name": "flower-exporter-broker", "literals": [f"url=redis://{broker}/0"]}]
        brokers[broker] = overlay(nameSuffix=f"-{broker}", secretGenerator=secret, **labels)
    documents = build(overlay(brokers.values(), ["service-monitor"]))
    monitor = only(documents, "ServiceMonitor")["spec"]
    for broker, home in brokers.items():
        deployment, service = (only(build(home), kind) for kind in ("Deployment", "Service"))
        assert deployment in documents and service in documents
        assert service["spec"]["selector"]["broker"] == broker
        assert service["metadata"]["labels"][monitor["targetLabels"][0]] == broker
        assert deployment["spec"]["template"]["metadata"]["labels"]["broker"] == broker
        assert covers(monitor["selector"], service["metadata"]["labels"])
        assert service["metadata"]["labels"][monitor["jobLabel"]] == NAME
        (secret,) = [v["secret"] for v in deployment["spec"]["template"]["spec"]["volumes"] if "secret" in v]
        assert secret["secretName"].startswith(f"flower-exporter-broker-{broker}-")
