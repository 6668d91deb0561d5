"""TLS against real servers: which settings connect, and what the log contains for the others."""

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
from support.tls import FAST, TlsBroker, rabbitmq_with_tls, redis_over_tls
from support.worker import client

pytestmark = pytest.mark.every_release

@pytest.fixture
def secure(services, shared, pki, broker_release):
    if broker_release.family == "redis":
        return redis_over_tls(services, pki)
    node, port = shared.get(broker_release, "TLS", lambda services: rabbitmq_with_tls(services, pki))
    vhost = node.vhost()
    return TlsBroker(pki, vhost, "amqps", f"{USER}:p%40ss%2Fw%3Ard%25@", f"/{vhost.vhost}", port, node.port)


def assert_counts(services, secure, settings):
    exporter = services.exporter(None, settings).ready()
    services.publisher(secure.broker).send(ev.received())
    exporter.wait_for(lambda m: m.events("received") == 1)
    return exporter


def assert_refused(services, settings, *patterns):
    """One line of the log matches all patterns, in time, and the exporter continues to retry."""
    exporter = services.exporter(None, settings)

    def matching_lines():
        return [line for line in exporter.log().splitlines() if all(re.search(pattern, line) for pattern in patterns)]
    wait_until(matching_lines, 4, lambda: f"{patterns}\n{exporter.log()}")
    assert exporter.healthz(ready=True)[0] == 503 and exporter.healthz()[0] == 200
    return exporter


@pytest.mark.short_form
def test_ca_and_client_certificate_from_settings(services, secure):
    """The connection succeeds without a warning."""
    assert "WARN" not in assert_counts(services, secure, secure.settings()).log()


def test_ca_and_client_certificate_from_url_parameters(services, secure, pki):
    """Celery's own parameters override the settings."""
    url = secure.url(cert_reqs="required", ca_certs=pki.ca, certfile=pki.client.cert, keyfile=pki.client.key)
    assert_counts(services, secure, merge({"broker": {"url": url, "tls": {"ca_file": str(pki.other), "cert_file": str(pki.server.cert)}}}, FAST))


def test_certificate_and_key_in_one_file(services, secure, pki):
    assert_counts(services, secure, secure.settings(cert_file=pki.client.both, key_file=None))


def test_plain_scheme_with_tls_enabled(services, secure, pki):
    """An ssl_ parameter enables TLS, as in kombu, and so does the setting."""
    url = secure.url().replace("rediss:", "redis:").replace("amqps:", "amqp:")
    assert_counts(services, secure, secure.settings(f"{url}?ssl_cert_reqs=required"))
    assert_counts(services, secure, secure.settings(url, enabled=True))


@pytest.mark.parametrize("where", ["setting", "parameter"])
def test_check_hostname_false_still_verifies_the_chain(services, secure, where):
    """The host name is not verified, but the certificate chain is."""
    if where == "setting":
        def settings(**tls):
            return secure.settings(secure.url("localhost"), check_hostname=False, **tls)
    else:
        def settings(**tls):
            return secure.settings(secure.url("localhost", check_hostname="false"), **tls)
    assert_counts(services, secure, settings())
    assert_refused(services, settings(ca_file=secure.pki.other), "unknown issuer", "broker.tls.ca_file")


@pytest.mark.parametrize("where", ["setting", "parameter"])
def test_skipped_verification_is_logged_once(services, secure, where):
    """There is one warning."""
    if where == "setting":
        settings = secure.settings(secure.url("localhost"), ca_file=secure.pki.other, insecure_skip_verify=True)
    else:
        settings = secure.settings(secure.url("localhost", cert_reqs="none"), ca_file=secure.pki.other)
    assert assert_counts(services, secure, settings).log().count("is not verified") == 1


def test_optional_verification_is_required(services, secure):
    assert_refused(services, secure.settings(secure.url(cert_reqs="optional"), ca_file=secure.pki.other, insecure_skip_verify=True),
            "unknown issuer")


@pytest.mark.short_form
def test_wrong_ca_is_refused(services, secure):
    assert_refused(services, secure.settings(ca_file=secure.pki.other), "unknown issuer", "broker.tls.ca_file")


def test_system_roots_are_the_default(services, secure):
    """The log line contains what to set instead, and not how to disable verification."""
    assert_refused(services, secure.settings(ca_file=None), "unknown issuer", "broker.tls.ca_file", "ssl_ca_certs")


def test_wrong_host_name_is_refused(services, secure):
    assert_refused(services, secure.settings(secure.url("localhost")), "another host name", "localhost", "broker.tls.check_hostname")


def test_plaintext_port_is_explained(services, secure):
    assert_refused(services, secure.settings(secure.url(port=secure.plain_port)), "use TLS on this port")


@pytest.mark.short_form
def test_missing_client_certificate_is_explained(services, secure):
    assert_refused(services, secure.settings(cert_file=None, key_file=None), "client certificate", "broker.tls.cert_file")


def test_client_certificate_of_another_ca_is_explained(services, secure):
    other = Authority("unknown").issue("client")
    assert_refused(services, secure.settings(cert_file=other.cert, key_file=other.key), "client certificate", "does not accept",
            "broker.tls.cert_file")


@pytest.mark.usefixtures("redis_release")
def test_missing_client_certificate_in_tls_1_2_is_explained(services, pki):
    secure = redis_over_tls(services, pki, "--tls-protocols", "TLSv1.2")
    assert_counts(services, secure, secure.settings())
    assert_refused(services, secure.settings(cert_file=None, key_file=None), "client certificate", "broker.tls.cert_file")


@contextlib.contextmanager
def listener(files):
    """A TLS server with this certificate that closes every connection after the handshake."""
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
def test_expired_certificate_is_explained(services, pki, url):
    with listener(pki.expired) as port:
        assert_refused(services, merge({"broker": {"url": url.format(port), "tls": {"ca_file": str(pki.ca)}}}, FAST), "has expired", "renew it at the broker")


@pytest.mark.short_form
def test_real_worker_over_tls(services, secure, pki):
    """The worker itself connects over TLS, and sends events because of broadcasts."""
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


INVALID_FILES = {
    "ca_file": {"ca_file": "{missing}"}, "cert_file": {"cert_file": "{missing}", "key_file": "{key}"},
    "key_file": {"cert_file": "{cert}", "key_file": "{missing}"},
    "ca_file without PEM": {"ca_file": "{junk}"}, "cert_file without PEM": {"cert_file": "{junk}", "key_file": "{key}"},
    "key_file without PEM": {"cert_file": "{cert}", "key_file": "{junk}"},
    "ca_file is a directory": {"ca_file": "{directory}"},
    "key_file is another's": {"cert_file": "{cert}", "key_file": "{other}"},
    "key_file without its certificate": {"key_file": "{key}"},
}


@pytest.mark.parametrize("what", INVALID_FILES)
def test_invalid_files_are_refused_at_start(pki, what):
    """Exit code 2 and one line with key and file, also with --check-config."""
    names = {"missing": "/nowhere/file.pem", "junk": junk(), "directory": directory("tls"), "cert": pki.client.cert,
             "key": pki.client.key, "other": pki.server.key}
    tls = {name: value.format(**names) for name, value in INVALID_FILES[what].items()}
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
def test_missing_file_is_read_again_on_every_attempt(services, pki):
    """The CA file is removed while the exporter runs. Attempts fail until it is back."""
    file = directory("tls") / "ca.pem"
    file.write_bytes(pki.ca.read_bytes())
    secure = redis_over_tls(services, pki)
    exporter = assert_counts(services, secure, secure.settings(ca_file=file))
    file.unlink()
    secure.broker.client().execute_command("CLIENT", "KILL", "TYPE", "pubsub")
    wait_until(lambda: "broker.tls.ca_file" in exporter.log() and str(file) in exporter.log(), 10, exporter.log)
    file.write_bytes(pki.ca.read_bytes())
    exporter.ready(5)


@pytest.mark.parametrize("settings, pattern", [
    ({"broker": {"url": "rediss://h/0", "tls": {"enabled": False}}}, "broker.url"),
    ({"broker": {"url": "amqps://h//", "tls": {"enabled": False}}}, "broker.url"),
    ({"broker": {"url": "redis://h/0?ssl_cert_reqs=none", "tls": {"enabled": False}}}, "broker.url"),
    ({"broker": {"url": "redis+socket:///run/redis.sock", "tls": {"enabled": True}}}, "redis\\+socket"),
], ids=str)
def test_contradictory_settings_are_refused(settings, pattern):
    line = Run("-c", junk(toml(settings))).error_line()
    assert "broker.tls.enabled" in line and re.search(pattern, line)


def test_enabled_false_is_accepted(services, shared_redis):
    services.exporter(shared_redis, nested("broker.tls.enabled", False))
