"""The Compose file, tested without its images, which cannot be pulled here."""

import ipaddress
import json
import re
import subprocess
from pathlib import Path
from urllib.parse import urlsplit

import pytest
import yaml

from support.cli import Run
from support.container import CONTAINERFILE
from support.exposition import FAMILIES
from support.processes import ROOT, TEST_ENV, Process, directory
from support.prometheus import FILES
from support.worker import NEWEST

pytestmark = pytest.mark.packaging

HERE = CONTAINERFILE.parent
WORKER = HERE / "worker.Containerfile"
CHECK = ["/usr/bin/flower-exporter", "--healthcheck"]
STATE = "/var/lib/flower-exporter"


@pytest.fixture(scope="module")
def compose():
    """The services as docker-compose reads them. This release does not support `name` yet."""
    file = directory("compose") / "compose.yml"
    lines = (HERE / "compose.yml").read_text().splitlines(keepends=True)
    assert "name: flower-exporter\n" in lines
    file.write_text("".join(line for line in lines if not line.startswith("name:")))
    argv = ["docker-compose", "-f", file, "--project-directory", HERE, "config"]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and not done.stderr, done.stderr
    services = yaml.safe_load(done.stdout)["services"]
    for service in services.values():
        service["ports"] = [port if isinstance(port, str) else PORT.format(**port) for port in service.get("ports", [])]
        service["volumes"] = [
            volume if isinstance(volume, str) else f"{volume['source']}:{volume['target']}:{mode(volume)}"
            for volume in service.get("volumes", [])
        ]
    return services


#: The form of docker-compose version 1 for the fields of version 2.
PORT = "{host_ip}:{published}:{target}/{protocol}"


def mode(volume):
    return "ro" if volume.get("read_only") else "rw"


def mounts(service):
    """The mounted paths of the repository: {path in the container: path in the repository}."""
    volumes = [volume.split(":") for volume in service["volumes"]]
    assert all(options == "ro" for source, _, options in volumes if source.startswith("/"))
    return {target: source for source, target, _ in volumes if source.startswith("/")}


def mounted_file(service, path):
    """The file of the repository that the service has at `path`."""
    [found] = [source + path[len(target) :] for target, source in mounts(service).items() if path.startswith(target)]
    return ROOT / found


def test_compose_is_local_pinned_and_restricted(compose):
    """All ports are on loopback, every image tag contains a release, and the exporter has no privileges."""
    ports = [port for service in compose.values() for port in service["ports"]]
    assert {port.split(":", 1)[1] for port in ports} == {"9555:9555/tcp", "9090:9090/tcp", "3000:3000/tcp"}
    assert all(ipaddress.ip_address(port.split(":")[0]).is_loopback for port in ports)
    images = [service["image"] for service in compose.values() if "build" not in service]
    images += re.findall(r"^ARG \w+_IMAGE=(.+)", CONTAINERFILE.read_text() + WORKER.read_text(), re.M)
    assert len(images) == 6
    assert all(re.search(r":v?\d+\.\d+|distroless/cc-debian\d+:nonroot$", name) for name in images)
    exporter = compose["exporter"]
    assert exporter["read_only"] and exporter["cap_drop"] == ["ALL"] and exporter["mem_limit"]
    assert exporter["security_opt"] == ["no-new-privileges:true"] and exporter["healthcheck"]["test"][1:] == CHECK


def test_compose_exporter_environment_is_valid(compose):
    """The URL contains the name of the broker's service, and the state is in a volume."""
    service = compose["exporter"]
    environment = service["environment"]
    done = Run("--check-config", env=environment)
    assert done.code == 0, done.err
    assert urlsplit(environment["FLOWER_EXPORTER_BROKER__URL"]).hostname in service["depends_on"]
    assert f"state:{STATE}:rw" in service["volumes"]
    assert '"0.0.0.0:9555"' in done.out and f'"{STATE}/' in done.out


def test_compose_prometheus_config_is_valid(compose):
    """Prometheus loads its configuration and the shipped rules from their mounts, and scrapes the exporter."""
    service, inside = compose["prometheus"], directory("compose-prometheus")
    for target, source in mounts(service).items():
        path = inside / target[1:]
        path.parent.mkdir(parents=True, exist_ok=True)
        path.symlink_to(source)
    done = subprocess.run(
        ["promtool", "check", "config", "etc/prometheus/prometheus.yml"], cwd=inside, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("rules found") == len(FILES)
    config = yaml.safe_load((HERE / "prometheus.yml").read_text())
    shipped = yaml.safe_load((ROOT / "deploy/prometheus/prometheus.yml").read_text())
    assert config["scrape_configs"][0].pop("static_configs") == [{"targets": ["exporter:9555"]}]
    assert shipped["scrape_configs"][0].pop("static_configs")
    assert config.pop("rule_files") == [f"rules/{name}" for name in shipped.pop("rule_files")]
    assert config == shipped


def test_compose_grafana_provisioning(compose):
    """The data source is Prometheus, and the provider and the home page use the path of the mounted dashboard."""
    service = compose["grafana"]
    assert all((ROOT / source).exists() for source in mounts(service).values())
    path = "datasources/prometheus.yml"
    config = yaml.safe_load(mounted_file(service, f"/etc/grafana/provisioning/{path}").read_text())
    shipped = yaml.safe_load((ROOT / "deploy/grafana/provisioning" / path).read_text())
    assert config["datasources"][0].pop("url") == "http://prometheus:9090" and shipped["datasources"][0].pop("url")
    assert config == shipped
    provider = yaml.safe_load(mounted_file(service, "/etc/grafana/provisioning/dashboards/flower-exporter.yml").read_text())
    dashboard = f"{provider['providers'][0]['options']['path']}/flower-exporter.json"
    assert mounted_file(service, dashboard) == ROOT / "deploy/grafana/flower-exporter.json"
    assert service["environment"]["GF_DASHBOARDS_DEFAULT_HOME_DASHBOARD_PATH"] == dashboard


def test_compose_worker_and_tasks_produce_all_metrics(compose, services, redis):
    """Their commands, run outside of containers, produce all six metrics."""
    exporter, worker = services.exporter(redis), compose["worker"]
    assert Path(worker["build"]["context"], worker["build"]["dockerfile"]).resolve() == WORKER
    assert compose["tasks"]["build"] == worker["build"]
    copied = [name for line in re.findall(r"^COPY (.+) /app/$", WORKER.read_text(), re.M) for name in line.split()]
    assert copied and all(Path(worker["build"]["context"], name).is_file() for name in copied)
    [argv] = re.findall(r"^CMD (.+)$", WORKER.read_text(), re.M)
    for name, command in {"worker": json.loads(argv), "tasks": compose["tasks"]["command"]}.items():
        [variable] = compose[name]["environment"]
        environment = {variable: redis.url, "C_FORCE_ROOT": "1", "PYTHONDONTWRITEBYTECODE": "1"}
        program = [TEST_ENV / f"celery-{NEWEST}/bin" / command[0], *command[1:]]
        process = Process(name, program, env=environment, cwd=worker["build"]["context"])
        services.callback(process.kill)
    exporter.wait_for(lambda metrics: {key[0].removesuffix("_count") for key in metrics} >= {*FAMILIES}, 30)
