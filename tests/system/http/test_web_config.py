"""`http.web_config_file`: TLS and passwords, as in every exporter that uses Prometheus' exporter-toolkit."""

import base64
import contextlib
import http.client
import json
import shutil
import ssl
import threading
import time

import bcrypt
import pytest

from support import events as ev
from support.certificates import Authority
from support.cli import SECRET, Run
from support.exporter import SELF_METRICS, merge
from support.exposition import EVENTS
from support.processes import accepts, directory, wait_until
from support.prometheus import Prometheus

PASSWORDS = {"alice": "wonderland", "bob": "pass:word é"}
HASHES = {name: bcrypt.hashpw(password.encode(), bcrypt.gensalt(8)).decode() for name, password in PASSWORDS.items()}


def basic(name, password):
    return {"Authorization": "Basic " + base64.b64encode(f"{name}:{password}".encode()).decode()}


ALICE = basic("alice", PASSWORDS["alice"])


@pytest.fixture(scope="module")
def authority():
    return Authority()


@pytest.fixture(scope="module")
def pairs(authority):
    """The certificates of the server and a client, and one of another CA."""
    return {"server": authority.issue("server"), "client": authority.issue("client"), "other": Authority("other").issue("other")}


class WebConfig:
    """A web configuration file in a directory of its own, with copies of the certificates that it names."""

    def __init__(self, authority, pairs):
        self.authority, self.pairs = authority, pairs
        self.dir = directory("web-config")
        self.path = self.dir / "web-config.yml"

    def write(self, users=None, certificate="server", client_certificates=False, **tls):
        """`certificate` None: plain HTTP."""
        content = {"basic_auth_users": users} if users else {}
        if certificate:
            pair = self.pairs[certificate]
            shutil.copy(pair.cert, self.dir / "server.pem")
            shutil.copy(pair.key, self.dir / "server.key")
            shutil.copy(self.authority.file, self.dir / "ca.pem")
            content["tls_server_config"] = {"cert_file": "server.pem", "key_file": "server.key", **tls}
            if client_certificates:
                content["tls_server_config"] |= {"client_auth_type": "RequireAndVerifyClientCert", "client_ca_file": "ca.pem"}
        self.path.write_text(json.dumps(content))
        return self.path

    def settings(self):
        return {"http": {"web_config_file": str(self.path)}}

    def context(self, certificate=None, verify=True):
        context = ssl.create_default_context(cafile=self.authority.file)
        if not verify:
            context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
        if certificate:
            context.load_cert_chain(self.pairs[certificate].cert, self.pairs[certificate].key)
        return context


@pytest.fixture
def web_config(authority, pairs):
    return WebConfig(authority, pairs)


def outcome(port, context=None, headers=None):
    """The status of /metrics, or "refused": no response."""
    try:
        if context:
            connection = http.client.HTTPSConnection("127.0.0.1", port, timeout=30, context=context)
        else:
            connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
        connection.request("GET", "/metrics", headers=headers or {})
        return connection.getresponse().status
    except (ssl.SSLError, http.client.HTTPException, ConnectionError):
        return "refused"


@pytest.mark.parametrize(
    "options",
    [
        {"users": HASHES, "certificate": None},
        {},
        {"users": HASHES},
        {"client_certificates": True},
        {"users": HASHES, "client_certificates": True},
        {"max_version": "TLS12"},
        {"min_version": "TLS13", "client_auth_type": "NoClientCert"},
    ],
    ids=lambda options: "-".join(options) or "tls",
)
def test_answers_equal_those_of_the_exporter_toolkit(services, shared_redis, web_config, options):
    """Prometheus itself reads the same file with the toolkit."""
    path = web_config.write(**options)
    exporter = services.exporter(None, {**web_config.settings(), "broker": {"url": shared_redis.url}})
    prometheus = Prometheus(rules=[], web_config=path)
    services.callback(prometheus.kill)
    wait_until(lambda: accepts(prometheus.port), 20, "Prometheus listens")
    contexts = {"plain": None} if options.get("certificate", "") is None else {
        "plain": None, "tls": web_config.context(), "client": web_config.context("client"), "other": web_config.context("other"),
    }
    if contexts["plain"] is None and "tls" in contexts:
        for version in (ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3):
            contexts[version] = web_config.context("client")
            contexts[version].minimum_version = contexts[version].maximum_version = version
    credentials = [{}, ALICE, basic("bob", PASSWORDS["bob"]), basic("alice", "x"), basic("x", "x"), basic("", ""),
                   {"Authorization": "Basic !"}, {"Authorization": "Bearer x"}]
    differences = {}
    for name, context in contexts.items():
        for headers in credentials:
            answers = outcome(exporter.port, context, headers), outcome(prometheus.port, context, headers)
            if answers[0] != answers[1]:
                differences[name, str(headers)] = answers
    assert differences == {}
    expected = {200} if "users" not in options else {200, 401}
    assert {outcome(exporter.port, contexts.get("client"), headers) for headers in credentials} == expected


def test_certificate_is_read_again(services, shared_redis, web_config, authority, pairs):
    """Without a restart. A broken file leaves the old one in force, and is reported."""
    web_config.write()
    settings = merge({**web_config.settings(), "broker": {"url": shared_redis.url}}, SELF_METRICS)
    exporter = services.exporter(None, settings, context=web_config.context(verify=False))

    def serial():
        with contextlib.closing(exporter.connect()) as connection:
            connection.connect()
            return ssl.DER_cert_to_PEM_cert(connection.sock.getpeercert(binary_form=True))

    def success():
        return exporter.metrics().total("flower_exporter_config_last_reload_successful")

    first = serial()
    assert first == pairs["server"].cert.read_text()
    assert success() == 1
    (web_config.dir / "server.key").write_text("no key")
    wait_until(lambda: success() == 0, 20, "the broken key is reported")
    assert serial() == first
    [warning] = exporter.healthz()[1]["warnings"]
    assert "tls_server_config.key_file" in warning and "no unencrypted PEM private key found" in warning
    assert len(exporter.log_lines("no unencrypted PEM private key")) == 1
    pairs["renewed"] = authority.issue("renewed")
    web_config.write(certificate="renewed")
    wait_until(lambda: serial() == pairs["renewed"].cert.read_text(), 20, "the new certificate is used")
    wait_until(lambda: success() == 1 and exporter.healthz()[1]["warnings"] == [], 20, "the warning is gone")


def test_users_are_read_again(services, shared_redis, web_config):
    web_config.write(users={"alice": HASHES["alice"]}, certificate=None)
    exporter = services.exporter(None, {**web_config.settings(), "broker": {"url": shared_redis.url}}, headers=ALICE)
    bob = basic("bob", PASSWORDS["bob"])
    assert (outcome(exporter.port, headers=ALICE), outcome(exporter.port, headers=bob)) == (200, 401)
    web_config.write(users={"bob": HASHES["bob"]}, certificate=None)
    wait_until(lambda: outcome(exporter.port, headers=bob) == 200, 20, "bob may read")
    assert outcome(exporter.port, headers=ALICE) == 401, "a password that was verified before"


@pytest.mark.every_release
def test_prometheus_scrapes_with_tls_and_password(services, shared_redis, web_config, prometheus_release, authority, pairs):
    """With a client certificate, too. An expired certificate fails until it is renewed."""
    pairs["expired"] = authority.issue("expired", expired=True)
    web_config.write(users=HASHES, certificate="expired", client_certificates=True)
    exporter = services.exporter(None, {**web_config.settings(), "broker": {"url": shared_redis.url}},
                                 context=web_config.context("client", verify=False), headers=ALICE)
    files = {"ca_file": str(authority.file), "cert_file": str(pairs["client"].cert), "key_file": str(pairs["client"].key)}
    login = {"username": "bob", "password": PASSWORDS["bob"]}
    jobs = {
        "complete": {"scheme": "https", "tls_config": files, "basic_auth": login},
        "password": {"scheme": "https", "tls_config": files},
        "certificate": {"scheme": "https", "tls_config": {"ca_file": str(authority.file)}, "basic_auth": login},
        "plain": {},
    }
    servers = {}
    for name, scrape in jobs.items():
        servers[name] = Prometheus([exporter.port], rules=[], release=prometheus_release, scrape=scrape)
        services.callback(servers[name].kill)
        servers[name].ready()

    def error(name):
        return "".join(target["lastError"] for target in servers[name].api("targets")["activeTargets"])

    wait_until(lambda: "expired" in error("complete"), 20, lambda: error("complete"))
    web_config.write(users=HASHES, client_certificates=True)
    wait_until(lambda: servers["complete"].instant("up == 1"), 30, lambda: error("complete"))
    wait_until(lambda: "401" in error("password"), 20, lambda: error("password"))
    wait_until(lambda: "certificate" in error("certificate"), 20, lambda: error("certificate"))
    wait_until(lambda: "400" in error("plain"), 20, lambda: error("plain"))


def test_plain_http_is_answered_with_the_reason(services, web_config):
    web_config.write()
    exporter = services.exporter(None, {**web_config.settings(), "broker": {"url": "redis://127.0.0.1:1"}}, context=web_config.context())
    exporter.context = None
    status, _, body = exporter.request()
    assert status == 400 and b"https://" in body


def test_healthz_without_password_has_only_the_status(services, shared_redis, web_config):
    web_config.write(users=HASHES, certificate=None)
    exporter = services.exporter(shared_redis, web_config.settings())
    for headers in ({}, basic("alice", "x")):
        status, _, body = exporter.request("/healthz?ready", headers=headers)
        assert (status, json.loads(body)) == (200, {"status": "ok"})
    assert "broker" in json.loads(exporter.request("/healthz", headers=ALICE)[2])


def test_wrong_passwords_delay_nothing(services, shared_redis, web_config):
    """A thousand of them: each is refused, all events are counted, and a verified password is always accepted."""
    web_config.write(users=HASHES, certificate=None)
    harness = services.harness(shared_redis, web_config.settings(), headers=ALICE)
    statuses, delays, done = [], [], threading.Event()

    def attack(part):
        with contextlib.closing(harness.exporter.connect()) as connection:
            for n in range(100):
                connection.request("GET", "/metrics", headers=basic("alice", f"{part}-{n}"))
                response = connection.getresponse()
                response.read()
                statuses.append(response.status)

    threads = [threading.Thread(target=attack, args=(part,)) for part in range(10)]
    for thread in threads:
        thread.start()
    scrapes = []

    def scrape():
        while not done.is_set():
            start = time.monotonic()
            scrapes.append(harness.exporter.request()[0])
            delays.append(time.monotonic() - start)

    scraper = threading.Thread(target=scrape)
    scraper.start()
    for n in range(20):
        harness.publish(*(ev.received(f"{n}-{m}") for m in range(50)))
    for thread in threads:
        thread.join()
    done.set()
    scraper.join()
    assert set(statuses) == {401, 429} and len(statuses) == 1000
    assert set(scrapes) == {200}
    assert harness.metrics().total(EVENTS) == 1000
    delays.sort()
    print(f"{len(scrapes)} scrapes: {1000 * delays[len(delays) // 2]:.1f} ms, at most {1000 * delays[-1]:.1f} ms")


@pytest.mark.parametrize("certificate, works", [("server", True), ("other", False)])
def test_healthcheck_uses_the_servers_certificate(services, shared_redis, web_config, certificate, works):
    """If clients need one. If the server does not accept it, the message says what to do."""
    web_config.write(users=HASHES, certificate=certificate, client_certificates=True)
    exporter = services.exporter(None, {**web_config.settings(), "broker": {"url": shared_redis.url}},
                                 context=web_config.context("client", verify=False), headers=ALICE)
    exporter.ready()
    run = Run("-c", exporter.config, "--healthcheck")
    if works:
        assert (run.code, json.loads(run.out)) == (0, {"status": "ok"})
    else:
        assert run.code == 1 and "tls_server_config.cert_file" in run.err and len(run.err.splitlines()) == 1


INVALID = {
    "not-yaml": ("tls_server_config: [", "line 1"),
    "list": ("[]", "expected"),
    "unknown-section": ("http_server_config: {http2: true}", "http_server_config"),
    "unknown-tls": ("tls_server_config: {cert_file: a, cipher_suites: []}", "cipher_suites"),
    "no-cert": ("tls_server_config: {key_file: server.key}", "tls_server_config.cert_file is not set"),
    "no-key": ("tls_server_config: {cert_file: server.pem}", "tls_server_config.key_file is not set"),
    "absent": ("tls_server_config: {cert_file: none.pem, key_file: server.key}", "none.pem"),
    "no-key-inside": ("tls_server_config: {cert_file: server.pem, key_file: server.pem}", "no unencrypted PEM private key found"),
    "wrong-key": ("tls_server_config: {cert_file: server.pem, key_file: other.key}", "does not match"),
    "auth-type": ("tls_server_config: {cert_file: server.pem, key_file: server.key, client_auth_type: RequestClientCert}", "client_auth_type"),
    "no-ca": ("tls_server_config: {cert_file: server.pem, key_file: server.key, client_auth_type: RequireAndVerifyClientCert}", "client_ca_file"),
    "version": ("tls_server_config: {cert_file: server.pem, key_file: server.key, min_version: TLS10}", "expected TLS12 or TLS13"),
    "versions": ("tls_server_config: {cert_file: server.pem, key_file: server.key, min_version: TLS13, max_version: TLS12}", "min_version"),
    "hash": (f"basic_auth_users: {{alice: '$2y$10${SECRET}'}}", "alice"),
    "users-as-text": (f"basic_auth_users: 'alice:$2y$10${SECRET}'", "expected"),
    "slow": ("basic_auth_users: {alice: $2y$17$mDwo.lAisC94iLAyP81MCesa29IzH37oigHC/42V2pdJlUprsJPze}", "cost"),
    "large": ("#" * (1 << 20) + "\n", "larger than 1 MiB"),
}


@pytest.mark.parametrize("name", INVALID)
@pytest.mark.parametrize("option", ["--check-config", "--log-level=info"])
def test_invalid_file_is_refused(web_config, pairs, name, option):
    """At the start with exit code 2 and one line that names the file and the key, without a hash."""
    content, expected = INVALID[name]
    web_config.write()
    shutil.copy(pairs["other"].key, web_config.dir / "other.key")
    web_config.path.write_text(content)
    line = Run("-b", "redis://127.0.0.1:1", "-l", "127.0.0.1:0", f"--web.config.file={web_config.path}", option).error_line()
    assert f'http.web_config_file = "{web_config.path}"' in line and expected in line


def test_missing_file_is_refused(web_config):
    line = Run("-b", "redis://127.0.0.1:1", f"--web.config.file={web_config.path}", "--check-config").error_line()
    assert f'"{web_config.path}": No such file' in line
