"""What the installed kombu makes of broker URLs: reads a JSON list of URLs, and writes a JSON list of results.

Runs with the Python of Celery's environment. It connects to nothing: it goes as far as the parameters of a connection
and the TLS context.
"""

import json
import logging
import socket
import sys
import warnings
from unittest import mock

import amqp
import redis
from kombu import Connection
from kombu.transport.redis import SentinelChannel
from redis.sentinel import SentinelManagedConnection


def tls(context):
    return {"cert_reqs": context.verify_mode.name.removeprefix("CERT_").lower(), "check_hostname": context.check_hostname}


def amqp_parameters(transport):
    made = []

    class Recorder(transport.Connection):
        def connect(self, callback=None):
            made.append((self, self.Transport(self.host, self.connect_timeout, self.ssl)))

    with mock.patch.object(transport, "Connection", Recorder):
        transport.establish_connection()
    [(connection, wire)] = made
    secure = isinstance(wire, amqp.transport.SSLTransport)
    return {
        "host": wire.host,
        "port": wire.port,
        "path": connection.virtual_host,
        "user": transport.client.userid,
        "password": transport.client.password,
        "heartbeat": connection.client_heartbeat,
        "connect_timeout": float(connection.connect_timeout),
        "login_method": connection.authentication[0].mechanism.decode(),
        "tls": tls(wire._wrap_socket(socket.socket(), **wire.sslopts).context) if secure else None,
    }


def redis_parameters(transport):
    with mock.patch("redis.Redis.ping"), mock.patch.object(SentinelChannel, "_get_pool"):
        parameters = transport.Channel(transport)._connparams()
    kind = parameters.pop("connection_class")
    parameters.pop("max_connections", None)
    secure = issubclass(kind, redis.SSLConnection)
    managed = issubclass(kind, SentinelManagedConnection)
    context = None if managed else secure_context(kind(**parameters))
    return {
        "host": parameters.get("host"),
        "port": parameters.get("port"),
        "socket": parameters.get("path"),
        "path": str(parameters["db"]),
        "user": parameters.get("username"),
        "password": parameters.get("password"),
        "tls": (tls(context) if context else {}) if secure else None,
    }


def secure_context(connection):
    if isinstance(connection, redis.SSLConnection):
        return connection._wrap_socket_with_ssl(socket.socket()).context


def parameters(url):
    try:
        connection, found = Connection(url), []
        for index in range(max(1, len(connection.alt))):
            transport = connection.transport
            read = amqp_parameters if transport.driver_type == "amqp" else redis_parameters
            found.append(read(transport))
            if index + 1 < len(connection.alt):
                connection.maybe_switch_next()
        return found
    except Exception as error:  # noqa: BLE001 - kombu raises any
        return f"{type(error).__name__}: {error}"


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    logging.disable(logging.CRITICAL)
    print(json.dumps([parameters(url) for url in json.load(sys.stdin)]))
