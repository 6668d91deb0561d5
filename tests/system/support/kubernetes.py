"""The manifests of deploy/kubernetes as kubectl builds them, and the environment that the kubelet derives from them."""

import os
import re
import subprocess
import sys
from pathlib import Path

import yaml

from .processes import ROOT, directory

MANIFESTS = ROOT / "deploy/kubernetes"
#: Installed from PyPI, so that the version is the same on every machine.
KUBECTL = Path(sys.executable).with_name("kubectl")
NAME = "flower-exporter"


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


def containers(workload):
    """[(pod's spec, container)] for each exporter container of a Deployment."""
    pod = workload["spec"]["template"]["spec"]
    both = [*pod.get("initContainers", []), *pod["containers"]]
    return [(pod, container) for container in both if container["name"] == NAME]


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
