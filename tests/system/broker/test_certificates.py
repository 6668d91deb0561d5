"""Server certificates that OpenSSL accepts and webpki does not, and the login by client certificate."""

import re

import pytest

from support import events as ev
from support.certificates import Authority
from support.exporter import merge
from support.processes import accepts, free_port, wait_until
from support.tls import FAST, skip_without_tls

pytestmark = pytest.mark.every_release


@pytest.fixture(scope="module")
def authority():
    return Authority()


@pytest.fixture
def redis_with(services, redis_release):
    """A Redis server with this certificate, which asks for no client certificate."""

    def start(files, protocols="TLSv1.2 TLSv1.3"):
        skip_without_tls(services)
        port = free_port()
        options = {"port": port, "cert-file": files.cert, "key-file": files.key, "auth-clients": "no", "protocols": protocols}
        redis = services.redis(args=[part for name, value in options.items() for part in (f"--tls-{name}", value)])
        return redis, port

    return start


def settings(port, ca_file, host="127.0.0.1", **tls):
    return merge({"broker": {"url": f"rediss://{host}:{port}/0", "tls": {"ca_file": str(ca_file), **tls}}}, FAST)


def assert_counts(services, redis, given):
    exporter = services.exporter(None, given).ready()
    services.publisher(redis).send(ev.received())
    exporter.wait_for(lambda metrics: metrics.events("received") == 1)
    assert "WARN" not in exporter.log()


def assert_refused(services, given, *words):
    """One line has a sentence and a solution, and no text of Rust's debug format."""
    exporter = services.exporter(None, given)
    wait_until(lambda: "failed to connect to broker" in exporter.log(), 5, exporter.log)
    [line] = [line for line in exporter.log().splitlines() if "failed to connect" in line][:1]
    error = re.search(r"error=(.*) suppressed=", line)[1]
    assert all(word in error for word in words), error
    assert not re.search(r"[a-z][A-Z][a-z]+\(|[({]\w+: |\bOther\b|insecure_skip_verify", error), error


@pytest.mark.parametrize("protocol", ["TLSv1.2", "TLSv1.3"])
@pytest.mark.parametrize("version", [1, 3])
def test_self_signed_certificate_is_its_own_ca(services, authority, redis_with, version, protocol):
    """Most self-made certificates are CA certificates that a server presents, and old ones have X.509 version 1."""
    files = authority.self_signed("broker", version=version)
    redis, port = redis_with(files, protocol)
    assert_counts(services, redis, settings(port, files.cert))


def test_trusted_certificate_must_be_for_the_host(services, authority, redis_with):
    """Its names are those of the extension, and without one the common name."""
    files = authority.self_signed("broker")
    redis, port = redis_with(files)
    assert_refused(services, settings(port, files.cert, "localhost"), "another host name: for 127.0.0.1, not for localhost;", "broker.tls.check_hostname")
    assert_counts(services, redis, settings(port, files.cert, "localhost", check_hostname=False))
    files = authority.self_signed("localhost", alternative=None)
    redis, port = redis_with(files)
    assert_counts(services, redis, settings(port, files.cert, "localhost"))
    assert_refused(services, settings(port, files.cert), "another host name")


def test_trusted_certificate_must_be_valid(services, authority, redis_with):
    files = authority.self_signed("broker", expired=True)
    _, port = redis_with(files)
    assert_refused(services, settings(port, files.cert), "has expired: renew it at the broker")


def test_certificate_of_a_server_may_be_trusted_instead_of_its_ca(services, authority, redis_with):
    files = authority.issue("server")
    redis, port = redis_with(files)
    assert_counts(services, redis, settings(port, files.cert))


@pytest.mark.short_form
@pytest.mark.parametrize(
    ("version", "is_ca", "words"),
    [
        (3, True, ["is the certificate of a CA", "broker.tls.ca_file"]),
        (3, False, ["has an unknown issuer", "broker.tls.ca_file"]),
        (1, True, ["X.509 version 1", "broker.tls.ca_file", "subjectAltName"]),
    ],
)
def test_other_certificates_are_refused_with_a_solution(services, authority, redis_with, version, is_ca, words):
    _, port = redis_with(authority.self_signed("broker", version=version, is_ca=is_ca))
    assert_refused(services, settings(port, authority.file), *words)


def test_certificate_of_a_ca_as_server_certificate_is_explained(services, authority, redis_with):
    """Trusted is the CA that signed it, and not the certificate itself."""
    files = authority.issue("intermediate", is_ca=True)
    _, port = redis_with(files)
    assert_refused(services, settings(port, authority.file), "is the certificate of a CA", "broker.tls.ca_file")


LOGIN = ["auth_mechanisms.1 = PLAIN", "auth_mechanisms.2 = EXTERNAL", "ssl_cert_login_from = common_name"]


@pytest.fixture
def external(services, shared, rabbitmq_release, authority):
    """A node on which the user `client` logs in with a client certificate, which is not required."""

    def start(services):
        port, server = free_port(), authority.self_signed(rabbitmq_release.id)
        files = {"cacertfile": authority.file, "certfile": server.cert, "keyfile": server.key, "verify": "verify_peer",
                 "fail_if_no_peer_cert": "false"}
        conf = [f"listeners.ssl.default = 127.0.0.1:{port}", *(f"ssl_options.{name} = {value}" for name, value in files.items())]
        node = services.rabbitmq(vhosts=10, conf=[*conf, *LOGIN], plugins=["rabbitmq_auth_mechanism_ssl"], users=["client"])
        node.wait()
        wait_until(lambda: accepts(port), 10, "RabbitMQ's port for TLS")
        node.tls_port, node.certificate = port, server.cert
        return node

    return shared.get(rabbitmq_release, "EXTERNAL", start)


@pytest.mark.short_form
@pytest.mark.parametrize("where", ["setting", "parameter"])
def test_login_by_client_certificate(services, authority, external, where):
    """No user name and no password. The server's certificate is its own CA."""
    vhost, client = external.vhost(), authority.issue("client")
    query = "?login_method=EXTERNAL" if where == "parameter" else ""
    url = f"amqps://127.0.0.1:{external.tls_port}/{vhost.vhost}{query}"
    tls = {"ca_file": str(external.certificate), "cert_file": str(client.cert), "key_file": str(client.key)}
    amqp = {"login_method": "EXTERNAL"} if where == "setting" else {}
    exporter = services.exporter(None, merge({"broker": {"url": url, "tls": tls, "amqp": amqp}}, FAST)).ready()
    services.publisher(vhost).send(ev.received())
    exporter.wait_for(lambda metrics: metrics.events("received") == 1)
    assert "WARN" not in exporter.log()


@pytest.mark.parametrize("scheme", ["amqp", "amqps"])
def test_login_method_that_is_not_offered_is_explained(services, authority, external, scheme):
    """The error lists what the server offers. A plain connection has no certificate, so EXTERNAL is not offered."""
    vhost = external.vhost()
    port, method = (external.tls_port, "AMQPLAIN") if scheme == "amqps" else (external.port, "EXTERNAL")
    url = f"{scheme}://127.0.0.1:{port}/{vhost.vhost}?login_method={method}"
    given = merge({"broker": {"url": url, "tls": {"ca_file": str(external.certificate)}}}, FAST)
    offered = "EXTERNAL PLAIN" if scheme == "amqps" else "PLAIN"
    exporter = services.exporter(None, given)
    line = rf'error="the server does not offer login method {method} \(broker.amqp.login_method.*\); it offers {offered}" '
    wait_until(lambda: re.search(line, exporter.log()), 10, exporter.log)
    assert "client certificate" not in exporter.log(), "the server accepts clients without one"


def test_wrong_password_is_not_explained_by_a_certificate(services, external):
    vhost = external.vhost()
    url = f"amqps://client:wrong@127.0.0.1:{external.tls_port}/{vhost.vhost}"
    exporter = services.exporter(None, merge({"broker": {"url": url, "tls": {"ca_file": str(external.certificate)}}}, FAST))
    wait_until(lambda: "ACCESS_REFUSED" in exporter.log(), 10, exporter.log)
    assert "client certificate" not in exporter.log()
