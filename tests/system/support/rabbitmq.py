"""A RabbitMQ node that runs without systemd and leaves nothing behind.

The node creates its user and virtual hosts from the definitions that it loads at boot, so that no test waits for
rabbitmqctl. The tests also start epmd, because the one that Erlang would start outlives the node.
"""

import itertools
import json
import os
import pwd
import shutil
import signal
import subprocess

import amqp

from . import releases
from .processes import Process, accepts, directory, free_port, wait_until

USER, PASSWORD = "tester", "p@ss/w:rd%"
#: Not the wrappers in /usr/sbin, which require a certain user.
PROGRAMS = "/usr/lib/rabbitmq/bin"

#: Every connection that holds a consumer.
CLOSE_CONSUMERS = """
[rabbit_networking:close_connection(Connection, "test") ||
    Connection <- rabbit_networking:connections(),
    {channels, Count} <- rabbit_networking:connection_info(Connection, [channels]), Count > 0,
    {client_properties, Properties} <- rabbit_networking:connection_info(Connection, [client_properties]),
    {<<"connection_name">>, longstr, <<"flower-exporter", _/binary>>} <- Properties].
"""


class RabbitMQ:
    def __init__(self, release=None, vhosts=1, start=True, conf=(), plugins=(), users=()):
        self.release = release or releases.own("rabbitmq")
        self.port, self.dist, self.epmd = free_port(), free_port(), free_port()
        account = pwd.getpwnam("rabbitmq") if os.getuid() == 0 else pwd.getpwuid(os.getuid())
        self.user, self.ids = account.pw_name, f"{account.pw_uid}:{account.pw_gid}"
        self.dir = directory("rabbitmq", self.user)
        self.vhosts = [f"v{n}" for n in range(vhosts)]
        self.unused = itertools.chain(self.vhosts)
        self.processes, self.plugins = [], plugins
        #: Users that log in without a password, by their certificate.
        self.passwordless = users
        self.configure(conf)
        if start:
            self.start()

    def configure(self, conf):
        rights = {"configure": ".*", "write": ".*", "read": ".*"}
        definitions = {
            "users": [
                {"name": USER, "password": PASSWORD, "tags": "administrator"},
                *({"name": user, "password_hash": "", "tags": ""} for user in self.passwordless),
            ],
            "vhosts": [self.definition(vhost) for vhost in self.vhosts],
            "permissions": [
                {"user": user, "vhost": vhost, **rights} for user in (USER, *self.passwordless) for vhost in self.vhosts
            ],
        }
        self.write("definitions.json", json.dumps(definitions))
        self.write("enabled_plugins", f"[{','.join(self.plugins)}].")
        self.write(
            "rabbitmq.conf",
            "\n".join(
                [
                    f"load_definitions = {self.dir}/definitions.json",
                    "disk_free_limit.absolute = 1MB",
                    "loopback_users = none",
                    "log.console = true",
                    "log.console.level = warning",
                    "log.file = false",
                    *conf,
                ]
            ),
        )

    def definition(self, vhost):
        return {"name": vhost, **({"metadata": {"default_queue_type": "quorum"}} if self.release.quorum else {})}

    def write(self, name, text):
        path = self.dir / name
        path.write_text(text)
        shutil.chown(path, self.user)

    def start(self):
        self.env = {
            "HOME": self.dir,
            "LC_ALL": "C.UTF-8",
            "ERL_EPMD_PORT": self.epmd,
            "ERL_EPMD_ADDRESS": "127.0.0.1",
            "RABBITMQ_NODENAME": f"test{self.port}@localhost",
            "RABBITMQ_NODE_IP_ADDRESS": "127.0.0.1",
            "RABBITMQ_NODE_PORT": self.port,
            "RABBITMQ_DIST_PORT": self.dist,
            "RABBITMQ_SERVER_ADDITIONAL_ERL_ARGS": "+S 2:2 +sbwt none +sbwtdcpu none +sbwtdio none",
            "RABBITMQ_CONFIG_FILE": self.dir / "rabbitmq.conf",
            "RABBITMQ_ADVANCED_CONFIG_FILE": self.dir / "none",
            "RABBITMQ_CONF_ENV_FILE": self.dir / "none.conf",
            "RABBITMQ_ENABLED_PLUGINS_FILE": self.dir / "enabled_plugins",
            "RABBITMQ_MNESIA_BASE": self.dir / "mnesia",
            "RABBITMQ_LOG_BASE": self.dir / "log",
            "RABBITMQ_FEATURE_FLAGS_FILE": self.dir / "feature_flags",
            "RABBITMQ_PID_FILE": self.dir / "pid",
            "RABBITMQ_GENERATED_CONFIG_DIR": self.dir / "config",
        }
        self.processes = [self.run("epmd", "/usr/bin/epmd", "-port", self.epmd)]
        wait_until(lambda: accepts(self.epmd), 10, "epmd answers")
        self.processes.append(self.run("rabbitmq", f"{PROGRAMS}/rabbitmq-server"))

    def run(self, name, program, *arguments):
        command = self.release.command(program, *arguments, user=self.ids)
        return Process(name, command, env=self.env, cwd=self.dir, user=self.switch)

    @property
    def switch(self):
        """The user that the program is started as. A program of an unpacked tree changes its user itself."""
        return self.user if os.getuid() == 0 and self.release.tree is None else None

    def wait(self):
        """Waits until it serves its last virtual host, and therefore all of them."""
        wait_until(self.answers, 120, lambda: f"RabbitMQ answers\n{self.processes[-1].log()}")
        return self

    def answers(self):
        try:
            with self.connection(self.vhosts[-1]):
                return True
        except (OSError, amqp.AMQPError):
            assert self.processes[-1].running, self.processes[-1].log()
            return False

    def connection(self, vhost):
        connection = amqp.Connection(f"127.0.0.1:{self.port}", USER, PASSWORD, virtual_host=vhost, connect_timeout=5)
        connection.connect()
        return connection

    def ctl(self, *command):
        """The output of rabbitmqctl, which takes some seconds."""
        return subprocess.run(
            self.release.command(f"{PROGRAMS}/rabbitmqctl", "--quiet", *command, user=self.ids),
            cwd=self.dir,
            user=self.switch,
            group=self.switch,
            extra_groups=[] if self.switch else None,
            env={**os.environ, **{key: str(value) for key, value in self.env.items()}},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=True,
            timeout=60,
        ).stdout

    def close_consumers(self):
        """Closes the connections of exporters that hold a consumer."""
        self.ctl("eval", CLOSE_CONSUMERS)

    def vhost(self):
        """An unused virtual host, which serves as a separate broker."""
        return VirtualHost(self, next(self.unused))

    def stop(self, number=signal.SIGKILL):
        for process in reversed(self.processes):
            if process.name == "rabbitmq":
                process.stop(number, deadline=30)
            else:
                process.kill()
        self.processes = []


class VirtualHost:
    name = "rabbitmq"
    options = {}

    def __init__(self, server, vhost):
        self.server, self.vhost = server, vhost

    @property
    def port(self):
        return self.server.port

    @property
    def url(self):
        return f"amqp://{USER}:p%40ss%2Fw%3Ard%25@127.0.0.1:{self.server.port}/{self.vhost}"

    def connection(self):
        return self.server.connection(self.vhost)

    def start(self):
        self.server.start()
        self.server.wait()

    def stop(self, number=signal.SIGKILL):
        self.server.stop(number)
