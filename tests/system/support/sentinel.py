"""A Redis master with a replica, and the Sentinels that watch them."""

import redis

from .processes import Process, directory, free_port, wait_until

MASTER = "the-master"


class Sentinel:
    def __init__(self, master, password=None, conf=()):
        self.port, self.password = free_port(), password
        home = directory("sentinel")
        lines = [
            "bind 127.0.0.1",
            f"port {self.port}",
            f"sentinel monitor {MASTER} 127.0.0.1 {master.port} 2",
            f"sentinel down-after-milliseconds {MASTER} 1000",
            f"sentinel failover-timeout {MASTER} 5000",
            *([f"sentinel auth-pass {MASTER} {master.password}"] if master.password else []),
            *([f"requirepass {password}", f"sentinel sentinel-pass {password}"] if password else []),
            *conf,
        ]
        (home / "sentinel.conf").write_text("\n".join(lines) + "\n")
        command = master.release.command(f"{master.release.product}-server", home / "sentinel.conf", "--sentinel")
        self.process = Process("sentinel", command, cwd=home)

    def client(self):
        return redis.Redis(port=self.port, password=self.password)

    def has_discovered(self, others, replicas):
        try:
            master = self.client().sentinel_master(MASTER)
        except redis.RedisError:
            assert self.process.running, self.process.log()
            return False
        return (master["num-other-sentinels"], master["num-slaves"]) == (others, replicas)

    def port_of_master(self):
        return int(self.client().sentinel_get_master_addr_by_name(MASTER)[1])

    def stop(self):
        self.process.kill()


class SentinelDeployment:
    """A master, a replica and Sentinels. Workers, publishers and the exporter use it like any other broker."""

    name = "redis"

    def __init__(self, services, sentinels=3, password=None, sentinel_password=None, db=0, options=None):
        self.db, self.password, self.sentinel_password = db, password, sentinel_password
        auth = ["--repl-diskless-sync-delay", "0", *(["--masterauth", password] if password else [])]
        master = services.redis(password=password, args=auth)
        replica = services.redis(password=password, args=["--replicaof", "127.0.0.1", str(master.port), *auth])
        self.servers = {server.port: server for server in (master, replica)}
        wait_until(lambda: replica.client().info("replication")["master_link_status"] == "up", 20, "the replica is synchronized")
        self.sentinels = []
        for _ in range(sentinels):
            self.sentinels.append(Sentinel(master, sentinel_password))
            services.callback(self.sentinels[-1].stop)
        wait_until(lambda: all(one.has_discovered(sentinels - 1, 1) for one in self.sentinels), 30, "the Sentinels have discovered each other")
        self.options = {"master_name": MASTER, **(options or {})}
        if sentinel_password:
            self.options["sentinel_kwargs"] = {"password": sentinel_password}

    @property
    def url(self):
        userinfo = f":{self.password}@" if self.password else ""
        return ";".join(f"sentinel://{userinfo}127.0.0.1:{one.port}/{self.db}" for one in self.sentinels)

    def settings(self, **redis):
        if self.sentinel_password:
            redis = {"sentinel_password": self.sentinel_password, **redis}
        return {"broker": {"redis": {"master_name": MASTER, **redis}, "reconnect_backoff_max": "1s"}}

    @property
    def master(self):
        return self.servers[self.sentinels[-1].port_of_master()]

    def client(self):
        return self.master.client()

    def failover(self):
        """Forces a failover at the Sentinel that the exporter queries last."""
        old = self.master
        self.sentinels[-1].client().sentinel_failover(MASTER)
        wait_until(lambda: self.master is not old, 60, "a new master")
        return old, self.master
