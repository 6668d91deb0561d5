"""TLS against real listeners: who is let in, and what is said of everyone else."""

import contextlib
import re
import socket
import ssl
import threading
from types import SimpleNamespace
from urllib.parse import urlencode

import pytest

from support import events as ev
from support.certificates import Authority, junk
from support.cli import Run
from support.exporter import merge, nested, toml
from support.processes import directory, free_port, wait_until
from support.rabbitmq import USER
from support.tls import FAST, Secure, rabbitmq_with_tls, redis_over_tls
from support.worker import client

pytestmark = pytest.mark.every_release

@pytest.fixture
def secure(services, shared, pki, broker_release):
    if broker_release.family == "redis":
        return redis_over_tls(services, pki)
    node, port = shared.get(broker_release, "TLS", lambda services: rabbitmq_with_tls(services, pki))
    vhost = node.vhost()
    return Secure(pki, vhost, "amqps", f"{USER}:p%40ss%2Fw%3Ard%25@", f"/{vhost.vhost}", port, node.port)


def counts(services, secure, settings):
    exporter = services.exporter(None, settings).ready()
    services.publisher(secure.broker).send(ev.received())
    exporter.wait_for(lambda m: m.events("received") == 1)
    return exporter


def refused(services, settings, *said):
    """One line of the log holds all that is said, in time, and the program goes on trying."""
    exporter = services.exporter(None, settings)

    def complaint():
        return [line for line in exporter.log().splitlines() if all(re.search(part, line) for part in said)]
    wait_until(complaint, 4, lambda: f"{said}\n{exporter.log()}")
    assert exporter.healthz(ready=True)[0] == 503 and exporter.healthz()[0] == 200
    return exporter


@pytest.mark.short_form
def test_settings_let_in(services, secure):
    """Own CA and client certificate. Nothing is warned of."""
    assert "WARN" not in counts(services, secure, secure.settings()).log()


def test_parameters_let_in(services, secure, pki):
    """As Celery users write them; they win over the settings."""
    url = secure.url(cert_reqs="required", ca_certs=pki.ca, certfile=pki.client.cert, keyfile=pki.client.key)
    counts(services, secure, merge({"broker": {"url": url, "tls": {"ca_file": str(pki.other), "cert_file": str(pki.server.cert)}}}, FAST))


def test_certificate_and_key_in_one_file(services, secure, pki):
    counts(services, secure, secure.settings(cert_file=pki.client.both, key_file=None))


def test_plain_scheme_with_parameters(services, secure, pki):
    """An ssl_ parameter turns TLS on, as in kombu; so does the setting."""
    url = secure.url().replace("rediss:", "redis:").replace("amqps:", "amqp:")
    counts(services, secure, secure.settings(f"{url}?ssl_cert_reqs=required"))
    counts(services, secure, secure.settings(url, enabled=True))


@pytest.mark.parametrize("where", ["setting", "parameter"])
def test_any_host_name(services, secure, where):
    """The name is not looked at; the chain still is."""
    if where == "setting":
        def settings(**tls):
            return secure.settings(secure.url("localhost"), check_hostname=False, **tls)
    else:
        def settings(**tls):
            return secure.settings(secure.url("localhost", check_hostname="false"), **tls)
    counts(services, secure, settings())
    refused(services, settings(ca_file=secure.pki.other), "unknown issuer", "broker.tls.ca_file")


@pytest.mark.parametrize("where", ["setting", "parameter"])
def test_verify_nothing(services, secure, where):
    """It is warned of, once."""
    if where == "setting":
        settings = secure.settings(secure.url("localhost"), ca_file=secure.pki.other, insecure_skip_verify=True)
    else:
        settings = secure.settings(secure.url("localhost", cert_reqs="none"), ca_file=secure.pki.other)
    assert counts(services, secure, settings).log().count("is not verified") == 1


def test_optional_is_required(services, secure):
    refused(services, secure.settings(secure.url(cert_reqs="optional"), ca_file=secure.pki.other, insecure_skip_verify=True),
            "unknown issuer")


@pytest.mark.short_form
def test_wrong_ca(services, secure):
    refused(services, secure.settings(ca_file=secure.pki.other), "unknown issuer", "broker.tls.ca_file")


def test_bare_url_verifies(services, secure):
    """Against the system's roots. The line names what turns it off."""
    refused(services, secure.settings(ca_file=None), "unknown issuer", "insecure_skip_verify", "ssl_cert_reqs=none")


def test_wrong_host_name(services, secure):
    refused(services, secure.settings(secure.url("localhost")), "another host name", "localhost", "broker.tls.check_hostname")


def test_plaintext_port(services, secure):
    refused(services, secure.settings(secure.url(port=secure.plain_port)), "speak TLS on this port")


@pytest.mark.short_form
def test_no_client_certificate(services, secure):
    refused(services, secure.settings(cert_file=None, key_file=None), "client certificate", "broker.tls.cert_file")


def test_client_certificate_of_another(services, secure):
    stranger = Authority("stranger").issue("client")
    refused(services, secure.settings(cert_file=stranger.cert, key_file=stranger.key), "client certificate", "may not accept",
            "broker.tls.cert_file")


@pytest.mark.usefixtures("redis_release")
def test_no_client_certificate_in_tls_1_2(services, pki):
    secure = redis_over_tls(services, pki, "--tls-protocols", "TLSv1.2")
    counts(services, secure, secure.settings())
    refused(services, secure.settings(cert_file=None, key_file=None), "client certificate", "broker.tls.cert_file")


@contextlib.contextmanager
def listener(files):
    """A port where somebody shakes hands with this certificate."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(files.cert, files.key)
    with socket.create_server(("127.0.0.1", free_port())) as server:
        def serve():
            with contextlib.suppress(OSError):
                while True:
                    connection, _ = server.accept()
                    with contextlib.suppress(OSError), context.wrap_socket(connection, server_side=True):
                        pass
        threading.Thread(target=serve, daemon=True).start()
        yield server.getsockname()[1]
        server.shutdown(socket.SHUT_RDWR)


@pytest.mark.parametrize("url", ["rediss://127.0.0.1:{}/0", "amqps://127.0.0.1:{}//"])
def test_expired(services, pki, url):
    with listener(pki.expired) as port:
        refused(services, merge({"broker": {"url": url.format(port), "tls": {"ca_file": str(pki.ca)}}}, FAST), "has expired", "renewed")


@pytest.mark.short_form
def test_real_worker(services, secure, pki):
    """Over TLS itself, and told by us to send events."""
    if secure.name == "redis":
        url = secure.url(cert_reqs="required", ca_certs=pki.ca, certfile=pki.client.cert, keyfile=pki.client.key)
        conf = {}
    else:
        url = secure.url()
        conf = {"broker_use_ssl": {"cert_reqs": ssl.CERT_REQUIRED, "ca_certs": str(pki.ca), "certfile": str(pki.client.cert),
                                   "keyfile": str(pki.client.key)}}
    services.worker(SimpleNamespace(url=url, options={}), conf=conf).ready()
    exporter = services.exporter(None, merge(secure.settings(), {"events": {"enable_interval": "500ms"}})).ready()
    with client(secure.broker) as app:
        def counted():
            app.send_task("add", (1, 2))
            return exporter.metrics().events("succeeded", task="add") > 0
        wait_until(counted, 30, exporter.log)


MISTAKES = {
    "ca_file": {"ca_file": "{missing}"}, "cert_file": {"cert_file": "{missing}", "key_file": "{key}"},
    "key_file": {"cert_file": "{cert}", "key_file": "{missing}"},
    "ca_file without PEM": {"ca_file": "{junk}"}, "cert_file without PEM": {"cert_file": "{junk}", "key_file": "{key}"},
    "key_file without PEM": {"cert_file": "{cert}", "key_file": "{junk}"},
    "ca_file is a directory": {"ca_file": "{directory}"},
    "key_file is another's": {"cert_file": "{cert}", "key_file": "{other}"},
    "key_file without its certificate": {"key_file": "{key}"},
}


@pytest.mark.parametrize("what", MISTAKES)
def test_files_that_cannot_be_used(pki, what):
    """At the start: code 2 and one line with key and file; --check-config says the same."""
    names = {"missing": "/nowhere/file.pem", "junk": junk(), "directory": directory("tls"), "cert": pki.client.cert,
             "key": pki.client.key, "other": pki.server.key}
    tls = {name: value.format(**names) for name, value in MISTAKES[what].items()}
    parameters = {"ca_file": "ssl_ca_certs", "cert_file": "ssl_certfile", "key_file": "ssl_keyfile"}
    wrong = what.split()[0]
    environment = {f"FLOWER_EXPORTER_BROKER__TLS__{name.upper()}": value for name, value in tls.items()}
    listen = "-l", f"127.0.0.1:{free_port()}"
    for args in ([], ["--check-config"]):
        line = Run("-b", "rediss://127.0.0.1/0", *listen, *args, env=environment).error_line()
        assert f"broker.tls.{wrong}" in line and tls[wrong] in line
    url = "amqps://h//?" + urlencode({parameters[name]: value for name, value in tls.items()})
    line = Run("-b", url, *listen).error_line()
    assert parameters[wrong] in line and tls[wrong] in line


@pytest.mark.usefixtures("redis_release")
def test_file_that_goes_later(services, pki):
    """An attempt that fails, like any other; and read again on the next one."""
    file = directory("tls") / "ca.pem"
    file.write_bytes(pki.ca.read_bytes())
    secure = redis_over_tls(services, pki)
    exporter = counts(services, secure, secure.settings(ca_file=file))
    file.unlink()
    secure.broker.client().execute_command("CLIENT", "KILL", "TYPE", "pubsub")
    wait_until(lambda: "broker.tls.ca_file" in exporter.log() and str(file) in exporter.log(), 10, exporter.log)
    file.write_bytes(pki.ca.read_bytes())
    exporter.ready(5)


@pytest.mark.parametrize("settings, said", [
    ({"broker": {"url": "rediss://h/0", "tls": {"enabled": False}}}, "broker.url"),
    ({"broker": {"url": "amqps://h//", "tls": {"enabled": False}}}, "broker.url"),
    ({"broker": {"url": "redis://h/0?ssl_cert_reqs=none", "tls": {"enabled": False}}}, "broker.url"),
    ({"broker": {"url": "redis+socket:///run/redis.sock", "tls": {"enabled": True}}}, "redis\\+socket"),
], ids=str)
def test_contradictions(settings, said):
    line = Run("-c", junk(toml(settings))).error_line()
    assert "broker.tls.enabled" in line and re.search(said, line)


def test_tls_may_be_off(services, shared_redis):
    services.exporter(shared_redis, nested("broker.tls.enabled", False))
