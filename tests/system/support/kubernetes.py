"""Manifests as kubectl and Helm build them, the API's schemas, and the environment that the kubelet derives from manifests."""

import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import kubernetes_validate
import yaml

from .cli import Run
from .processes import ROOT, directory

MANIFESTS = ROOT / "deploy/kubernetes"
#: Installed from PyPI, so that the version is the same on every machine.
KUBECTL = Path(sys.executable).with_name("kubectl")
NAME = "flower-exporter"
DEFAULT_FILE = "/etc/flower-exporter/flower-exporter.toml"
OPERATOR = "monitoring.coreos.com/v1"
#: The supported versions of Kubernetes.
OLDEST, NEWEST = "1.25", "1.37"


def kubectl(*arguments):
    return subprocess.run([KUBECTL, *map(str, arguments)], cwd=ROOT, text=True, capture_output=True, timeout=60)


def build(path):
    """The manifests that `kubectl apply -k` would send."""
    done = kubectl("kustomize", path)
    assert done.returncode == 0, done.stderr
    return list(yaml.safe_load_all(done.stdout))


def overlay(resources=("base",), components=(), **fields):
    """A new kustomization with these directories of deploy/kubernetes (or others, by absolute path)."""
    home = directory("kustomization").resolve()

    def relative(paths):
        return [os.path.relpath(MANIFESTS / path, home) for path in paths]

    fields |= {"resources": relative(resources), "components": relative(f"components/{name}" for name in components)}
    (home / "kustomization.yaml").write_text(yaml.safe_dump(fields))
    return home


def only(documents, kind):
    """The one manifest of this kind."""
    (found,) = [document for document in documents if document["kind"] == kind]
    return found


def workload(documents):
    """The one Deployment or StatefulSet."""
    (found,) = [document for document in documents if document["kind"] in ("Deployment", "StatefulSet")]
    return found


def containers(workload):
    """[(pod's spec, container)] for each exporter container of a Deployment or StatefulSet."""
    pod = workload["spec"]["template"]["spec"]
    both = [*pod.get("initContainers", []), *pod["containers"]]
    return [(pod, container) for container in both if container["name"] == NAME]


def validate(documents, version):
    """Validates all objects of Kubernetes itself against a version's schemas, which refuse unknown fields."""
    for document in documents:
        if document["apiVersion"] != OPERATOR:
            assert kubernetes_validate.validate(document, version, strict=True) == version


def covers(selector, labels):
    assert set(selector) == {"matchLabels"} and selector["matchLabels"]
    return selector["matchLabels"].items() <= labels.items()


def assert_consistent(documents):
    """Everything selects the same pods and the same port, and names objects that exist. Returns the exporter container."""
    exporter, service = workload(documents), only(documents, "Service")
    labels = exporter["spec"]["template"]["metadata"]["labels"]
    ((pod, container),) = containers(exporter)
    (port,), (service_port,) = container["ports"], service["spec"]["ports"]
    assert covers(exporter["spec"]["selector"], labels)
    assert exporter["spec"]["serviceName"] == service["metadata"]["name"]
    for constraint in pod["topologySpreadConstraints"]:
        assert covers(constraint["labelSelector"], labels)
    assert covers({"matchLabels": service["spec"]["selector"]}, labels)
    assert service_port["targetPort"] == port["name"] and service_port["port"] == port["containerPort"]
    volumes = {volume["name"] for volume in [*pod["volumes"], *claims(exporter)]}
    assert {mount["name"] for mount in container["volumeMounts"]} == volumes
    for document in documents:
        if document["kind"] == "NetworkPolicy":
            assert covers(document["spec"]["podSelector"], labels)
            assert document["spec"]["ingress"][0]["ports"] == [{"port": port["containerPort"], "protocol": "TCP"}]
        elif document["kind"] == "ServiceMonitor":
            assert_scrapes(document, service["metadata"]["labels"], service_port["name"])
        elif document["kind"] == "PodMonitor":
            assert_scrapes(document, labels, port["name"])
    return container


def assert_scrapes(monitor, labels, port):
    """The monitor selects these labels and this port. It sets the job name of the alerts, and the pod's name as `instance`."""
    spec = monitor["spec"]
    (endpoint,) = spec["endpoints" if monitor["kind"] == "ServiceMonitor" else "podMetricsEndpoints"]
    assert covers(spec["selector"], labels) and endpoint["port"] == port
    assert labels[spec["jobLabel"]] == NAME
    assert endpoint["interval"] == "15s"
    assert endpoint["relabelings"][0] == {"sourceLabels": ["__meta_kubernetes_pod_name"], "targetLabel": "instance"}


def claims(workload):
    """The templates of a StatefulSet's volume claims, each with its name."""
    return [{"name": claim["metadata"]["name"], **claim} for claim in workload["spec"].get("volumeClaimTemplates", [])]


def environment(container, pod_name, mounts):
    """A container's variables. Paths below its mounts are replaced: {path in the pod: local directory}."""
    fields, env = {"metadata.name": pod_name}, {}
    for variable in container.get("env", []):
        value = variable.get("value") or fields[variable["valueFrom"]["fieldRef"]["fieldPath"]]
        # The kubelet expands only variables that come earlier in the list.
        value = re.sub(r"\$\((\w+)\)", lambda match: env.get(match[1], match[0]), value)
        for path, here in mounts.items():
            value = re.sub(rf"^{re.escape(path)}(?=/|$)", str(here), value)
        env[variable["name"]] = value
    return env


def mib(quantity):
    """The number of a quantity such as 32Mi."""
    return int(re.fullmatch(r"(\d+)Mi", quantity)[1])


class Pod:
    """The files and variables of the exporter container, as the kubelet provides them for a pod with this name."""

    def __init__(self, documents, url, name="worker-6f7c-x2x"):
        ((pod, container),) = containers(workload(documents))
        volumes = {volume["name"]: volume for volume in pod["volumes"]}
        mounts = {mount["mountPath"]: directory("mount") for mount in container["volumeMounts"]}
        self.config = self.broker_url = None
        for mount in container["volumeMounts"]:
            volume, here = volumes.get(mount["name"], {}), mounts[mount["mountPath"]]
            if "configMap" in volume:
                settings = only(documents, "ConfigMap")
                assert volume["configMap"]["name"] == settings["metadata"]["name"]
                (key,) = settings["data"]
                assert f"{mount['mountPath']}/{key}" == DEFAULT_FILE
                self.config = here / key
                self.config.write_text(settings["data"][key])
            elif "items" in volume.get("secret", {}):
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
