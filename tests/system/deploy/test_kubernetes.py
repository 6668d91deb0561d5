"""The manifests of deploy/kubernetes: built by kubectl, validated against the API's schemas, and used by the exporter."""

import base64
import copy
import json
import re
import shlex
import subprocess

import kubernetes_validate
import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families

from support import events as ev
from support.exposition import ONLINE, PREFETCHED
from support.kubernetes import (
    MANIFESTS,
    NAME,
    NEWEST,
    OLDEST,
    OPERATOR,
    Pod,
    assert_consistent,
    assert_scrapes,
    build,
    claims,
    containers,
    covers,
    kubectl,
    mib,
    only,
    overlay,
    validate,
    workload,
)
from support.processes import ROOT, directory, wait_until
from support.prometheus import FILES, RULES, seconds

#: Every documented build, and its oldest and newest supported Kubernetes.
BUILDS = {
    "base": ("base", (), OLDEST),
    "overlay": ("overlay", (), OLDEST),
    "base with state": ("base", ("persistent-state", "service-monitor"), OLDEST),
    "base for Datadog": ("base", ("datadog",), OLDEST),
    "sidecar": ("sidecar", ("pod-monitor",), "1.29"),
}


@pytest.fixture(scope="module")
def built():
    return {name: build(overlay([path], components)) for name, (path, components, _) in BUILDS.items()}


@pytest.fixture(params=BUILDS)
def documents(request, built):
    return copy.deepcopy(built[request.param])


@pytest.fixture
def exporter_container(documents):
    """(pod's spec, exporter container) of a build."""
    ((pod, container),) = containers(workload(documents))
    return pod, container


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
        validate(built[name], version)


def test_schemas_reject_a_misspelled_field(built):
    """In each manifest, at several levels."""
    for document in (one for name in BUILDS for one in built[name] if one["apiVersion"] != OPERATOR):
        spots = [document, document["metadata"]]
        if document["kind"] in ("Deployment", "StatefulSet"):
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
    """StatefulSet, Service, NetworkPolicy and ServiceMonitor select the same pods and the same port."""
    assert_consistent(built["base with state"])
    # The job without a monitor's `jobLabel` is the Service's name.
    assert only(built["base with state"], "Service")["metadata"]["name"] == NAME


def test_pod_monitor_selects_the_sidecar(built):
    """It selects the pods that the patch labels and only the exporter's port, and sets the job name of the alerts."""
    sidecar = workload(built["sidecar"])
    ((_, container),) = containers(sidecar)
    labels = sidecar["spec"]["template"]["metadata"]["labels"]
    assert_scrapes(only(built["sidecar"], "PodMonitor"), labels, container["ports"][0]["name"])


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
    assert kinds <= {"configMap", "secret"}


@pytest.mark.parametrize("name", ["base", "overlay", "base with state"])
def test_pod_options_and_strategy(built, name):
    """No replica waits for another, no service variables, no token, and more grace than the 5 s that a stop takes."""
    spec = only(built[name], "StatefulSet")["spec"]
    pod = spec["template"]["spec"]
    assert (spec["replicas"], spec["podManagementPolicy"]) == (1, "Parallel")
    assert (pod["enableServiceLinks"], pod["automountServiceAccountToken"]) == (False, False)
    assert pod["terminationGracePeriodSeconds"] > 5


def test_overlay_can_set_two_replicas():
    """As the overlay's comment shows."""
    (block,) = re.findall(r"^# replicas:\n(?:#   .*\n)+", (MANIFESTS / "overlay/kustomization.yaml").read_text(), re.M)
    documents = build(overlay(["overlay"], **yaml.safe_load(block.replace("# ", "", 1).replace("\n# ", "\n"))))
    assert only(documents, "StatefulSet")["spec"]["replicas"] == 2


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
    ((pod, container),) = containers(workload(documents))
    assert container["image"] == "registry.example.com/flower-exporter:0.1.0"
    assert {document["metadata"]["namespace"] for document in documents} == {"celery"}
    (secret,) = [volume["secret"] for volume in pod["volumes"] if "secret" in volume]
    assert only(documents, "Secret")["metadata"]["name"] == secret["secretName"] == "flower-exporter-broker"


# -- the settings


def test_config_map_and_variables_are_valid(documents):
    """The exporter accepts the ConfigMap and the container's variables, with the container's port and URL file."""
    ((_, container),) = containers(workload(documents))
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
    ((_, container),) = containers(workload(documents))
    container["env"][0]["name"] += "S"
    assert Pod(documents, "redis://redis.example/0").check().code == 2


def test_placeholder_url_is_refused(built):
    """The overlay as shipped does not start. The error contains the file name but not its content."""
    url = base64.b64decode(only(built["overlay"], "Secret")["data"]["url"]).decode()
    pod = Pod(built["overlay"], url)
    line = pod.check().error_line()
    assert str(pod.broker_url) in line and url.strip() not in line


def test_stopped_workers_are_forgotten_after_two_scrapes(built):
    """Later than that, so that the last events of a worker are scraped, and before the alert about a lost worker fires."""
    settings = Pod(built["base"], "redis://redis.example/0").settings()
    state = {key: seconds(settings["state"][key]) for key in ("purge_stopped_workers", "purge_offline_workers")}
    rules = yaml.safe_load((RULES / "flower.alerts.yml").read_text())["groups"][0]["rules"]
    (offline,) = [rule["expr"] for rule in rules if rule.get("record") == "broker_worker:flower_worker_offline:2m"]
    minutes, more = map(int, re.search(r"offset (\d+)m(\d+)s", offline).groups())
    assert 2 * 15 < state["purge_stopped_workers"] <= 60 * minutes + more - 15
    assert 60 * minutes + more < state["purge_offline_workers"]


def test_counters_start_at_zero_for_two_scrapes(documents):
    """`metrics.zero_first` is twice the interval of everything that scrapes on Kubernetes."""
    (job,) = yaml.safe_load((MANIFESTS / "prometheus.yml").read_text())["scrape_configs"]
    zero_first = Pod(documents, "redis://redis.example/0").settings()["metrics"]["zero_first"]
    assert seconds(zero_first) == 2 * seconds(job["scrape_interval"]) == 2 * 15  # assert_scrapes() checks the monitors


def test_memory_limit_covers_an_overload(documents, exporter_container):
    """The limit is at least 2.5 times the buffer plus 24 MiB for 100,000 tasks. CPU has no limit."""
    resources = exporter_container[1]["resources"]
    buffer = Pod(documents, "redis://redis.example/0").settings()["events"]["buffer_max_bytes"]
    assert mib(resources["limits"]["memory"]) >= 2.5 * mib(buffer.removesuffix("B")) + 24
    assert mib(resources["requests"]["memory"]) >= 24 and set(resources["limits"]) == {"memory"}


def test_persistent_state_is_on_the_volume(built):
    """The component's volume contains state.db, and the exporter's group can write to it."""
    documents = built["base with state"]
    ((pod, container),) = containers(workload(documents))
    (claim,) = claims(workload(documents))
    (mount,) = [one for one in container["volumeMounts"] if one["name"] == claim["name"]]
    variables = {one["name"]: one.get("value") for one in container["env"]}
    assert variables["FLOWER_EXPORTER_STATE__DB"].startswith(mount["mountPath"] + "/") and "readOnly" not in mount
    assert pod["securityContext"]["fsGroup"] == pod["securityContext"]["runAsGroup"]
    settings = Pod(documents, "redis://redis.example/0", name="flower-exporter-1").settings()
    assert settings["state"]["persistent"] is True and settings["state"]["db"].endswith("/state")
    # The component's variables do not come between the queue and the pod's name.
    assert settings["broker"]["amqp"]["queue"] == "flower-exporter-1"


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
    ((_, container),) = containers(workload(built["base"]))
    exporter = Pod(built["base"], redis.url).start(services)
    redis.stop()
    path = {key: container[key]["httpGet"]["path"] for key in ("livenessProbe", "readinessProbe")}
    wait_until(lambda: exporter.request(path["readinessProbe"])[0] == 503, 10, "not ready")
    assert exporter.request(path["livenessProbe"])[0] == 200


def test_each_replica_has_its_own_queue(services, vhost, built):
    """Two replicas receive all events, and the queue of each has the pod's name. Counters show 0 at first (zero_first)."""
    replicas = [Pod(built["base"], vhost.url, name=f"flower-exporter-{number}").start(services) for number in (0, 1)]
    services.publisher(vhost).send([ev.received("one"), ev.received("two")])
    for number, exporter in enumerate(replicas):
        exporter.wait_for(lambda m: m.total(PREFETCHED) == 2)
        assert f"flower-exporter-{number}" in exporter.healthz()[1]["subscription"]


def test_queue_name_has_no_effect_on_redis(services, redis, built):
    """The exporter counts the events."""
    exporter = Pod(built["base"], redis.url, name="flower-exporter-0").start(services)
    services.publisher(redis).send([ev.received("one"), ev.received("two")])
    exporter.wait_for(lambda m: m.total(PREFETCHED) == 2)


def test_sidecar_counts_only_its_worker(services, redis, built):
    """Only events of the pod's worker are counted, even if the name of another pod has the same prefix."""
    publisher = services.publisher(redis)
    exporter = Pod(built["sidecar"], redis.url, name="worker-1").start(services)
    for worker in ("celery@worker-12", "celery@worker-2", "celery@worker-1"):
        publisher.send([ev.received(worker=worker), ev.heartbeat(worker)])
    samples = exporter.wait_for(lambda m: m.one(ONLINE, worker="celery@worker-1"))
    assert samples.labels("worker") == {"celery@worker-1"} and samples.total(PREFETCHED) == 1


# -- Prometheus


@pytest.mark.parametrize("name", ["base", "sidecar"])
def test_scrape_job_finds_the_exporter(built, name):
    """The job without the operator finds only the exporter container, and labels pods and brokers."""
    pod = workload(built[name])["spec"]["template"]["spec"]
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
    wanted = {"job": NAME, "instance": "pod-1", "namespace": "celery", "pod": "pod-1", "broker": "orders"}
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


# -- Datadog

#: The mapping of Datadog's check `celery`, without the prefix `celery.flower.`. The source is in components/datadog.
DATADOG = {
    "flower_events": "events",
    "flower_task_runtime_seconds": "task.runtime.seconds",
    "flower_task_prefetch_time_seconds": "task.prefetch_time.seconds",
    "flower_worker_prefetched_tasks": "worker.prefetched_tasks",
    "flower_worker_online": "worker.online",
    "flower_worker_number_of_currently_executing_tasks": "worker.executing_tasks",
}


def test_datadog_annotations_name_what_is_served(services, redis, built):
    """The annotation has the container's name, valid checks, the exporter's port, and metrics of a real exposition."""
    documents = built["base for Datadog"]
    template = workload(documents)["spec"]["template"]
    ((_, container),) = containers(workload(documents))
    checks = json.loads(template["metadata"]["annotations"][f"ad.datadoghq.com/{container['name']}.checks"])
    assert set(checks) == {"celery", "openmetrics"}
    exporter = Pod(documents, redis.url).start(services)
    done = [event("one") for event in (ev.received, ev.started, ev.succeeded)]
    services.publisher(redis).send([*done, ev.received("two"), ev.heartbeat()])
    exporter.wait_for(lambda m: m.total(PREFETCHED) == 1)
    # A family's name has no suffix _total, as in Datadog's parser.
    families = {family.name for family in text_string_to_metric_families(exporter.text())}
    for check in checks.values():
        (instance,) = check["instances"]
        assert instance["openmetrics_endpoint"] == f"http://%%host%%:{container['ports'][0]['containerPort']}/metrics"
        assert {name for metric in instance.get("metrics", ()) for name in metric} <= families
    assert set(DATADOG) <= families


def test_readme_lists_datadogs_names():
    """All six metrics, with the names of Datadog's mapping."""
    row = r"^\| `(flower_\w+)` \| `celery\.flower\.([\w.]+?)(?:\.(?:count|bucket))?`"
    rows = re.findall(row, (MANIFESTS / "README.md").read_text(), re.M)
    assert {name.removesuffix("_total"): mapped for name, mapped in rows} == DATADOG


# -- the README


def blocks(language):
    return re.findall(rf"^```{language}\n(.*?)^```", (MANIFESTS / "README.md").read_text(), re.M | re.S)


def commands():
    return "".join(blocks("sh")).splitlines()


def test_commands_wait_for_what_the_overlay_creates(built):
    """Every `kubectl rollout status` in the documents names the overlay's workload and namespace."""
    exporter = only(built["overlay"], "StatefulSet")["metadata"]
    installation = (ROOT / "docs/installation.md").read_text().splitlines()
    waits = [line for line in [*commands(), *installation] if line.startswith("kubectl rollout status")]
    assert len(waits) == 4
    assert set(waits) == {f"kubectl rollout status -n {exporter['namespace']} statefulset/{exporter['name']}"}


def test_readme_moves_from_the_deployment(built):
    """It deletes what the overlay replaces, and nothing that the overlay creates afterwards."""
    lines = [line for line in commands() if line.startswith(("kubectl delete", "kubectl apply"))]
    lines = lines[lines.index("kubectl delete -n celery service/flower-exporter") :]
    assert lines == [
        "kubectl delete -n celery service/flower-exporter",
        "kubectl apply -k deploy/kubernetes/overlay",
        "kubectl delete -n celery deployment/flower-exporter",
        "kubectl delete -n celery pvc/flower-exporter-state",
    ]
    assert only(built["overlay"], "Service")["spec"]["clusterIP"] == "None"
    assert not [one for one in built["overlay"] if one["kind"] in ("Deployment", "PersistentVolumeClaim")]


def test_readme_commands_create_the_secret(built):
    """The Secret has the name and key that the pods mount, and every named file exists."""
    (create,) = [line for line in commands() if line.startswith("kubectl create secret")]
    arguments = shlex.split(create)[1:]
    assert [argument for argument in arguments if "url" in argument] == ["--from-file=url=broker-url"]
    file = directory("secret") / "broker-url"
    file.write_text("redis://:password@redis:6379/0\n")
    arguments[arguments.index("--from-file=url=broker-url")] = f"--from-file=url={file}"
    done = kubectl(*arguments, "--dry-run=client", "-o", "yaml")
    assert done.returncode == 0, done.stderr
    secret = yaml.safe_load(done.stdout)
    for name in BUILDS:
        ((pod, _),) = containers(workload(built[name]))
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
        exporter, service = (only(build(home), kind) for kind in ("StatefulSet", "Service"))
        assert exporter in documents and service in documents
        assert exporter["spec"]["serviceName"] == service["metadata"]["name"]
        assert service["spec"]["selector"]["broker"] == broker
        assert service["metadata"]["labels"][monitor["targetLabels"][0]] == broker
        assert exporter["spec"]["template"]["metadata"]["labels"]["broker"] == broker
        assert covers(monitor["selector"], service["metadata"]["labels"])
        assert service["metadata"]["labels"][monitor["jobLabel"]] == NAME
        (secret,) = [v["secret"] for v in exporter["spec"]["template"]["spec"]["volumes"] if "secret" in v]
        assert secret["secretName"].startswith(f"flower-exporter-broker-{broker}-")
