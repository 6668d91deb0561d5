"""Brokers with TLS, and the certificates of the brokers and their clients."""

from types import SimpleNamespace
from urllib.parse import urlencode

import pytest

from .certificates import Authority
from .exporter import merge
from .processes import accepts, free_port, wait_until

FAST = {"broker": {"connect_timeout": "2s", "reconnect_backoff_max": "500ms"}}


def certificates():
    """The brokers' certificate names only 127.0.0.1, so that localhost is a wrong name."""
    authority = Authority()
    return SimpleNamespace(
        ca=authority.file, other=Authority("other").file, server=authority.issue("server", "IP:127.0.0.1"),
        client=authority.issue("client"), expired=authority.issue("expired", expired=True),
    )


class TlsBroker:
    """A broker with a TLS port that requires a client certificate, and a plaintext port for the tests themselves."""

    def __init__(self, pki, broker, scheme, userinfo, path, port, plain_port):
        self.pki, self.broker, self.scheme, self.userinfo, self.path = pki, broker, scheme, userinfo, path
        self.port, self.plain_port, self.name = port, plain_port, broker.name

    def url(self, host="127.0.0.1", port=None, **parameters):
        query = "?" + urlencode({f"ssl_{name}": value for name, value in parameters.items()}) if parameters else ""
        return f"{self.scheme}://{self.userinfo}{host}:{port or self.port}{self.path}{query}"

    def settings(self, url=None, **tls):
        """Settings that connect, unless the test overrides them; None removes one."""
        given = {"ca_file": self.pki.ca, "cert_file": self.pki.client.cert, "key_file": self.pki.client.key, **tls}
        shown = {name: value if isinstance(value, bool) else str(value) for name, value in given.items() if value is not None}
        return merge({"broker": {"url": url or self.url(), "tls": shown}}, FAST)


def skip_without_tls(services):
    if "redis" in services.tested and not services.tested["redis"].has_tls:
        pytest.skip("this server is built without TLS")


def redis_over_tls(services, pki, *args):
    skip_without_tls(services)
    port = free_port()
    redis = services.redis(args=["--tls-port", port, "--tls-cert-file", pki.server.cert, "--tls-key-file", pki.server.key,
                            "--tls-ca-cert-file", pki.ca, *args])
    return TlsBroker(pki, redis, "rediss", "", "/0", port, redis.port)


def rabbitmq_with_tls(services, pki):
    """(node, port for TLS)"""
    port = free_port()
    files = {"cacertfile": pki.ca, "certfile": pki.server.cert, "keyfile": pki.server.key, "verify": "verify_peer",
             "fail_if_no_peer_cert": "true"}
    node = services.rabbitmq(vhosts=40, conf=[
        f"listeners.ssl.default = 127.0.0.1:{port}", *(f"ssl_options.{name} = {value}" for name, value in files.items())])
    node.wait()
    # Its listeners start one after another.
    wait_until(lambda: accepts(port), 10, "RabbitMQ's port for TLS")
    return node, port
