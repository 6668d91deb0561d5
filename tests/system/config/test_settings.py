"""Settings end to end: an invalid one is one line and exit code 2. --check-config prints them without secrets."""

import json
import re

import pytest

from support import events as ev
from support.cli import SECRET, Run
from support.exporter import nested, toml
from support.processes import ROOT, directory, free_port, wait_until


@pytest.fixture
def file():
    home = directory("settings")

    def write(settings, name="settings.toml"):
        path = home / name
        path.write_text(toml(settings) if isinstance(settings, dict) else settings)
        return path

    return write


INVALID = [
    # unknown
    ("broker.uri", "redis://127.0.0.1/0"),
    ("brokers", {"url": "redis://127.0.0.1/0"}),
    ("broker.redis.prefix", "x"),
    ("state.max_worker", 5),
    ("surprise", 1),
    ("broker.tls.verify", True),
    # of a wrong type
    ("http.listen", 9555),
    ("http.listen", ["127.0.0.1:9555"]),
    ("state.max_workers", "many"),
    ("state.max_workers", 1.5),
    ("events.enable_events", "yes please"),
    ("events.enable_events", 1),
    ("events.hostnames", 5),
    ("events.exchange", 7),
    ("metrics.task_runtime_metric_buckets", "1,2"),
    ("metrics.task_runtime_metric_buckets", ["a"]),
    ("broker.connect_timeout", True),
    ("broker.connect_timeout", []),
    ("log.level", 3),
    ("broker.url", 5),
    ("broker", "x"),
    ("broker.redis.fanout_prefix", 5),
    ("broker.redis.fanout_patterns", "maybe"),
    # impossible
    ("http.listen", "nowhere"),
    ("http.listen", "127.0.0.1:99999"),
    ("http.listen", "127.0.0.1"),
    ("log.level", "loud"),
    ("log.format", "xml"),
    ("state.max_workers", -1),
    ("state.max_tasks", -5),
    ("events.enable_interval", "5 parsecs"),
    ("events.enable_interval", -1),
    ("events.message_max_bytes", "16 MiBs"),
    ("events.buffer_max_bytes", -1),
    ("broker.reconnect_backoff_max", "soon"),
    ("metrics.task_runtime_metric_buckets", [1.0, 0.5]),
    ("metrics.task_runtime_metric_buckets", [1.0, 1.0]),
    ("events.hostnames", ["[a"]),
    ("metrics.worker_groups", []),
    ("metrics.worker_groups", ["celery@*"]),
    ("metrics.worker_groups", ["=*"]),
    ("metrics.worker_groups", ["(other)=*"]),
    ("metrics.worker_groups", ["x" * 257 + "=*"]),
    ("metrics.worker_groups", ["web=["]),
    ("metrics.worker_groups", ["web=a*||b*"]),
    ("metrics.native_histogram_bucket_factor", 1),
    ("metrics.native_histogram_bucket_factor", 0.5),
    ("metrics.native_histogram_bucket_factor", "x"),
    ("metrics.exemplars", 1),
    ("broker.amqp.prefetch_count", 70_000),
    ("broker.amqp.prefetch_count", -1),
    ("broker.amqp.prefetch_count", 1),
    ("events.enable_interval", 0),
    # URLs
    ("broker.url", "nonsense"),
    ("broker.url", ""),
    ("broker.url", []),
    ("broker.url", "http://127.0.0.1/"),
    ("broker.url", "redis://127.0.0.1:notaport/0"),
    ("broker.url", "redis://127.0.0.1:99999/0"),
    ("broker.url", "redis://127.0.0.1/database"),
    ("broker.url", "amqp://127.0.0.1:x//"),
    ("broker.url", "redis+socket://"),
    ("broker.url", "redis://127.0.0.1/0;nonsense"),
    ("broker.url", ["redis://127.0.0.1/0", "nonsense"]),
    ("broker.url", "redis://127.0.0.1/0;amqp://127.0.0.1//;http://x/"),
]


@pytest.mark.parametrize("path, value", INVALID, ids=[f"{path}={value!r}" for path, value in INVALID])
def test_invalid_setting_in_a_file(file, path, value):
    """One line with the file and the key."""
    source = file(nested(path, value))
    line = Run("-c", source).error_line()
    assert str(source) in line
    assert path in line or path.split(".")[-1] in line


@pytest.mark.parametrize(
    "name, value",
    [
        ("BROKER__URI", "redis://127.0.0.1/0"),
        ("BROKERS__URL", "x"),
        ("BROKER__REDIS__PREFIX", "x"),
        ("STATE__MAX_WORKERS", "many"),
        ("STATE__MAX_WORKERS", "-1"),
        ("STATE__MAX_WORKERS", ""),
        ("HTTP__LISTEN", "nowhere"),
        ("EVENTS__ENABLE_EVENTS", "perhaps"),
        ("LOG__LEVEL", "loud"),
        ("BROKER__URL", "nonsense"),
        ("BROKER__CONNECT_TIMEOUT", "soon"),
        ("EVENTS__MESSAGE_MAX_BYTES", "large"),
    ],
)
def test_invalid_setting_in_the_environment(name, value):
    assert f"FLOWER_EXPORTER_{name}" in Run(env={f"FLOWER_EXPORTER_{name}": value}).error_line()


@pytest.mark.parametrize(
    "args",
    [
        ["-b", "nonsense"],
        ["-l", "nowhere"],
        ["--log-level", "loud"],
        ["--log-format", "xml"],
        ["--broker"],
        ["--no-such-option"],
        ["stray"],
        ["-c"],
        ["-b", "redis://127.0.0.1:port/0"],
    ],
)
def test_invalid_command_line(args):
    """Exit code 2, and the output contains the option."""
    run = Run(*args)
    assert run.code == 2
    assert args[0] in run.err or {"-b": "--broker", "-l": "--listen"}.get(args[0], args[0]) in run.err


def test_invalid_value_on_the_command_line_is_one_line():
    for args in (["-b", "nonsense"], ["-l", "nowhere"], ["--log-level", "loud"]):
        Run(*args).error_line()


UNKNOWN_TRANSPORTS = [
    "sqs://key:{}@",
    "rediscluster://:{}@127.0.0.1:7000",
    "kafka://u:{}@h",
    "filesystem://{}",
    "memory://{}",
    "mongodb://u:{}@h/db",
    "gcpubsub://projects/{}",
    "redis://127.0.0.1/0;sqs://key:{}@",
]


@pytest.mark.parametrize("url", UNKNOWN_TRANSPORTS)
def test_unsupported_transport_is_refused(url):
    """The line contains its name and the supported transports."""
    line = Run("-b", url.format(SECRET)).error_line()
    assert url.split(";")[-1].split(":")[0] in line
    assert all(name in line for name in ("redis", "redis+socket", "amqp", "pyamqp"))


SECRETS = [
    nested("broker.url", f"redis://user:{SECRET}@127.0.0.1:notaport/0"),
    nested("broker.url", f"redis://:{SECRET}@127.0.0.1/database"),
    nested("broker.url", f"amqp://u:{SECRET}@h:99999//"),
    nested("broker.url", f"amqp://u:{SECRET}@[::1//"),
    nested("broker.url", f"htp://u:{SECRET}@127.0.0.1/"),
    nested("broker.url", f"u:{SECRET}@127.0.0.1"),
    nested("broker.url", [f"redis://:{SECRET}@127.0.0.1/0", "nonsense"]),
    nested("broker.url", f"redis://127.0.0.1/0;amqp://u:{SECRET}"),
    nested("broker.redis.sentinel_password", [SECRET]),
    {
        "broker": {"url": f"redis://u:{SECRET}@h/0", "redis": {"sentinel_password": SECRET}},
        "state": {"max_workers": "x"},
    },
    nested("broker.redis.sentinel_passwort", SECRET),
    f'[broker]\nurl = "redis://u:{SECRET}@h/0\n',
    f"[broker]\nurl = redis://u:{SECRET}@h/0\n",
    f'[broker]\nurls = "redis://u:{SECRET}@h/0"\n',
]


@pytest.mark.parametrize("settings", SECRETS, ids=lambda settings: str(settings).replace(SECRET, "SECRET"))
def test_errors_contain_no_secrets(file, settings):
    """`error_line` checks the output."""
    Run("-c", file(settings)).error_line()


def test_errors_of_environment_variables_contain_no_secrets():
    for value in (f"redis://u:{SECRET}@h:port/0", f"redis://u:{SECRET}@h/x", f"u:{SECRET}@h"):
        Run(env={"FLOWER_EXPORTER_BROKER__URL": value}).error_line()
    Run(env={"FLOWER_EXPORTER_BROKER__PASSWORD": SECRET}).error_line()


@pytest.mark.parametrize("url", ["redis://user:{}@127.0.0.1:{}/0", "amqp://user:{}@127.0.0.1:{}//"])
def test_running_exporter_prints_no_secrets(services, url):
    """Neither in the trace log of failing attempts nor in /healthz."""
    exporter = services.exporter(
        None,
        {"broker": {"url": url.format(SECRET, free_port()), "reconnect_backoff_max": "100ms"}},
        args=["--log-level", "trace"],
    )
    attempts = exporter.log().count("127.0.0.1:")
    exporter.healthz()
    wait_until(lambda: exporter.log().count("127.0.0.1:") > attempts + 3, 20, "some attempts")
    assert SECRET not in exporter.log()
    assert SECRET not in str(exporter.healthz()) + str(exporter.healthz(ready=True)) + exporter.text()


@pytest.mark.parametrize(
    "url, pattern",
    [
        ("redis://:{secret}@127.0.0.1:{redis}/0", "WRONGPASS|invalid|auth"),
        ("amqp://tester:{secret}@127.0.0.1:{rabbitmq}/v0", "ACCESS.?REFUSED|403"),
        ("amqp://tester:p%40ss%2Fw%3Ard%25@127.0.0.1:{rabbitmq}/nowhere", "NOT.?ALLOWED|530|vhost"),
    ],
)
def test_wrong_credentials_are_logged(services, rabbitmq_node, url, pattern):
    """The exporter keeps retrying, and the log contains the reason."""
    url = url.format(secret=SECRET, redis=services.redis(password="right").port, rabbitmq=rabbitmq_node.port)
    exporter = services.exporter(None, {"broker": {"url": url, "reconnect_backoff_max": "200ms"}})
    wait_until(lambda: re.search(pattern, exporter.log(), re.I), 15, exporter.log)
    assert exporter.healthz(ready=True)[0] == 503 and SECRET not in exporter.log()


@pytest.mark.parametrize("what", ["missing", "a directory", "not TOML", "not UTF-8", "missing, by environment"])
def test_unreadable_file_is_an_error(file, what):
    path = file("[broker")
    if what.startswith("missing"):
        path = path.with_name("missing.toml")
    elif what == "a directory":
        path = path.parent
    elif what == "not UTF-8":
        path.write_bytes(b'[log]\nlevel = "\xff"\n')
    by_environment = what.endswith("environment")
    run = Run(env={"FLOWER_EXPORTER_CONFIG": str(path)}) if by_environment else Run("-c", path)
    assert str(path) in run.error_line()


def shown(run, name):
    """The line of --check-config with this key."""
    assert run.code == 0, run.err
    [line] = [line for line in run.out.splitlines() if re.search(rf"(^|[\s.\[]){re.escape(name)}\b", line)]
    return line


def test_later_sources_override_earlier_ones(file):
    """Default, file, environment, command line. --check-config prints the source of each value."""
    source = file(
        {
            "log": {"level": "warn"},
            "broker": {"url": "redis://127.0.0.1/1"},
            "http": {"listen": "127.0.0.1:1111"},
            "state": {"max_workers": 17},
        }
    )
    env = {"FLOWER_EXPORTER_BROKER__URL": "redis://127.0.0.1/2", "FLOWER_EXPORTER_HTTP__LISTEN": "127.0.0.1:2222"}
    run = Run("-c", source, "--check-config", "-l", "127.0.0.1:3333", env=env)
    for name, value, origin in [
        ("max_tasks", "100000", "default"),
        ("max_workers", "17", str(source)),
        ("level", "warn", str(source)),
        ("url", "redis://127.0.0.1", "FLOWER_EXPORTER_BROKER__URL"),
        ("listen", "127.0.0.1:3333", "--listen"),
    ]:
        line = shown(run, name)
        assert value in line and origin in line, line
    assert "/2" in shown(run, "url")


def test_check_config_masks_secrets(file):
    source = file(
        {
            "broker": {
                "url": f"redis://user:{SECRET}@127.0.0.1/0;amqp://u:{SECRET}@h//",
                "redis": {"sentinel_password": SECRET},
            }
        }
    )
    run = Run("-c", source, "--check-config")
    assert run.code == 0 and SECRET not in run.out + run.err
    assert run.out.count("***") >= 3
    assert "***" in shown(run, "url") and "user" in shown(run, "url") and "***" in shown(run, "sentinel_password")


def test_check_config_fails_like_a_start(file):
    Run("-c", file(nested("state.max_workers", "x")), "--check-config").error_line()


@pytest.mark.parametrize("path", sorted((ROOT / "config").glob("*.toml")), ids=lambda path: path.stem)
def test_shipped_config_files_are_valid(path):
    """Each file of config/ is accepted, and sets at least one value."""
    run = Run("-c", path, "--check-config")
    assert run.code == 0, run.err
    assert f"# {path}" in run.out


def test_example_file_contains_the_defaults():
    """It has every key with its default, so it changes nothing."""

    def values(run):
        return {
            line.split("=")[0].strip(): line.split("=")[1].split("#")[0].strip()
            for line in run.out.splitlines()
            if "=" in line
        }

    example, default = Run("-c", ROOT / "flower-exporter.toml.example", "--check-config"), Run("--check-config")
    assert example.code == default.code == 0
    assert len(default.out.splitlines()) > 30
    assert values(example) == values(default)


@pytest.mark.parametrize(
    "spelling",
    [
        {"broker": {"connect_timeout": 5, "reconnect_backoff_max": 0.5}, "events": {"message_max_bytes": 1048576}},
        {"broker": {"connect_timeout": "5s", "reconnect_backoff_max": "500ms"}, "events": {"message_max_bytes": "1MiB"}},
        {"state": {"worker_timeout": "10m", "purge_offline_workers": 0}, "events": {"hostnames": ["*"]}},
        {"broker": {"url": ["redis://127.0.0.1/0", "amqp://127.0.0.1//"]}},
        {"broker": {"redis": {"fanout_prefix": False}}},
        {"broker": {"redis": {"fanout_prefix": "x{db}"}}},
        {"broker": {"url": "pyamqp://u:p@h/%2F"}},
        {"broker": {"url": "redis+socket:///run/redis.sock?virtual_host=3"}},
        {"broker": {"url": "amqp://"}},
        {"broker": {"url": "redis://"}},
    ],
)
def test_valid_spellings(file, spelling):
    assert Run("-c", file(spelling), "--check-config").code == 0


def test_kubernetes_service_variables_are_ignored(file):
    """Kubernetes injects variables without a double underscore for a Service of this name."""
    env = {
        "FLOWER_EXPORTER_PORT": "tcp://10.0.0.1:9555",
        "FLOWER_EXPORTER_SERVICE_HOST": "10.0.0.1",
        "FLOWER_EXPORTER_PORT_9555_TCP": "tcp://10.0.0.1:9555",
        "FLOWER_EXPORTER_SERVICE_PORT": "9555",
    }
    run = Run("--check-config", env=env)
    assert run.code == 0 and "10.0.0.1" not in run.out + run.err


def test_environment_sets_nested_keys():
    run = Run(
        "--check-config",
        env={
            "FLOWER_EXPORTER_BROKER__REDIS__GLOBAL_KEYPREFIX": "app:",
            "FLOWER_EXPORTER_STATE__MAX_TASKS": "7",
            "FLOWER_EXPORTER_EVENTS__ENABLE_EVENTS": "false",
        },
    )
    assert (
        "app:" in shown(run, "global_keyprefix")
        and "7" in shown(run, "max_tasks")
        and "false" in shown(run, "enable_events")
    )


@pytest.mark.parametrize(
    "option, expected",
    [
        ("-V", "flower-exporter "),
        ("--version", "flower-exporter "),
        ("-h", "--check-config"),
        ("--help", "--healthcheck"),
    ],
)
def test_version_and_help(option, expected):
    run = Run(option)
    assert run.code == 0 and expected in run.out and not run.err


def test_healthcheck_exit_code(services, shared_redis):
    """0 if an exporter is running, otherwise 1."""
    exporter = services.exporter(shared_redis)
    assert Run("-c", exporter.config, "--healthcheck").code == 0
    assert Run("-l", f"127.0.0.1:{exporter.port}", "--healthcheck").code == 0
    exporter.terminate()
    assert Run("-c", exporter.config, "--healthcheck").code == 1


def test_healthcheck_needs_only_the_address(services, shared_redis):
    """A mistake in the file, which the running exporter has read before, does not make it unhealthy."""
    exporter = services.exporter(shared_redis)
    address = f"127.0.0.1:{exporter.port}"
    exporter.write(f'[http]\nlisten = "{address}"\nmax_connections = "many"\n[broker]\nurl_file = "/nonexistent"\n[nonsense]\n')
    assert Run("-c", exporter.config, "--healthcheck").code == 0
    for text in ("[http", f'[http]\nlisten = {address}'):
        exporter.write(text)
        assert Run("-c", exporter.config, "--healthcheck", env={"FLOWER_EXPORTER_HTTP__LISTEN": address}).code == 0
        assert Run("-c", exporter.config, "--healthcheck", "-l", address).code == 0
    env = {"FLOWER_EXPORTER_HTTP__LISTEN": address, "FLOWER_EXPORTER_STATE__MAX_TASKS": "many", "FLOWER_EXPORTER_NO_SUCH__KEY": "1"}
    assert Run("--healthcheck", env=env).code == 0
    assert Run("--healthcheck", env={"FLOWER_EXPORTER_HTTP__LISTEN": "nonsense"}).code == 1


def test_healthcheck_of_a_wildcard_address(services, shared_redis):
    port = free_port()
    exporter = services.exporter(shared_redis, {"http": {"listen": f"0.0.0.0:{port}"}}, ready=False)
    exporter.port = port
    exporter.ready()
    assert Run("-c", exporter.config, "--healthcheck").code == 0


@pytest.mark.parametrize("as_list", [False, True], ids=["semicolons", "list"])
def test_brokers_are_tried_in_turn(services, broker, as_list):
    """The exporter uses the first one that responds."""
    urls = [f"redis://127.0.0.1:{free_port()}/0", f"amqp://guest:guest@127.0.0.1:{free_port()}//", broker.url]
    settings = {"broker": {"url": urls if as_list else ";".join(urls), "reconnect_backoff_max": "500ms"}}
    exporter = services.exporter(None, settings).ready(30)
    services.publisher(broker).send(ev.received())
    exporter.wait_for(lambda m: m.events("received") == 1)


def test_url_file_is_read_on_every_attempt_to_connect(services, redis, file):
    """The exporter detects that a mounted secret has changed."""
    source = file(f"redis://127.0.0.1:{free_port()}/0\n", "url")
    exporter = services.exporter(None, {"broker": {"url_file": str(source), "reconnect_backoff_max": "300ms"}})
    assert exporter.healthz(ready=True)[0] == 503
    file(redis.url + "\n", "url")
    exporter.ready()


def test_command_line_without_file(services, redis):
    """No configuration file is needed."""
    port = free_port()
    exporter = services.exporter(None, config=False, ready=False, args=["-b", redis.url, "-l", f"127.0.0.1:{port}"])
    exporter.port = port
    exporter.ready()


def test_environment_without_file(services, redis):
    port = free_port()
    exporter = services.exporter(
        None,
        config=False,
        ready=False,
        env={"FLOWER_EXPORTER_BROKER__URL": redis.url, "FLOWER_EXPORTER_HTTP__LISTEN": f"127.0.0.1:{port}"},
    )
    exporter.port = port
    exporter.ready()


def test_celery_broker_url_is_used_without_a_setting(services, redis):
    """The variable of Flower's image and of many applications."""
    exporter = services.exporter(None, env={"CELERY_BROKER_URL": redis.url}).ready()
    services.publisher(redis).send(ev.received())
    exporter.wait_for(lambda metrics: metrics.events("received") == 1)
    assert "WARN" not in exporter.log()


def test_celery_broker_url_comes_after_every_setting(file):
    """--check-config shows the source. A copied example file sets no URL."""
    env = {"CELERY_BROKER_URL": "redis://celery:6379/0"}
    example = ROOT / "flower-exporter.toml.example"
    for args in ([], ["-c", example]):
        line = 'url = "redis://celery:6379/0"  # environment CELERY_BROKER_URL\n'
        assert line in Run("--check-config", *args, env=env).out
    in_file = file({"broker": {"url": "redis://file:6379/0"}})
    url_file = file("redis://url-file:6379/0", "url")
    for args, more in [
        (["-b", "redis://option:6379/0"], {}),
        (["-c", in_file], {}),
        ([], {"FLOWER_EXPORTER_BROKER__URL": "redis://variable:6379/0"}),
        ([], {"FLOWER_EXPORTER_BROKER__URL_FILE": str(url_file)}),
    ]:
        out = Run("--check-config", *args, env={**env, **more}).out
        assert "celery:6379" not in out and "# environment CELERY" not in out and "is ignored" not in out, out
    line = Run(env={"CELERY_BROKER_URL": "sqs://"}).error_line()
    assert line.startswith("flower-exporter: environment CELERY_BROKER_URL = ***: sqs:// is not supported"), line


@pytest.mark.parametrize("name", ["BROKER_URL", "FLOWER_BROKER"])
def test_other_broker_variables_cause_a_hint(name):
    env = {name: "redis://:hunter2@h"}
    out = Run("--check-config", env=env).out
    assert f"# environment variable {name} is ignored; did you mean FLOWER_EXPORTER_BROKER__URL?\n" in out
    assert "is ignored" not in Run("-b", "redis://h", "--check-config", env=env).out


@pytest.mark.parametrize("value", ["redis://h", '"redis://:hunter2-planted@h"', "FLOWER_EXPORTER_BROKER__URL=redis://:hunter2-planted@h"])
def test_quotes_and_names_around_a_value_are_reported(file, value):
    """The value is masked, so the message says it."""
    url_file = file(value, "url")
    for env in ({"FLOWER_EXPORTER_BROKER__URL": value}, {"FLOWER_EXPORTER_BROKER__URL_FILE": str(url_file)}):
        if value == "redis://h":
            assert Run("--check-config", env=env).code == 0
        else:
            line = Run("--check-config", env=env).error_line()
            assert line.endswith("in quotes: remove them" if value[0] == '"' else "a variable and `=`: remove them"), line


@pytest.mark.parametrize(("text", "value"), [(text, True) for text in ("true", "True", "1", "yes", "ON")] + [
    (text, False) for text in ("false", "FALSE", "0", "no", "Off")])
def test_booleans_in_the_environment(text, value):
    """As Python and shell users write them."""
    names = ["METRICS__SELF_METRICS", "BROKER__TLS__ENABLED", "BROKER__REDIS__FANOUT_PATTERNS"]
    out = Run("--check-config", "-b", "amqp://h:5672", env={f"FLOWER_EXPORTER_{name}": text for name in names}).out
    assert out.count(f" = {str(value).lower()}  # environment") == 3, out


def test_purge_before_the_timeout_is_reported(services, redis):
    """At the start, and by --check-config."""
    state = {"worker_timeout": "60s", "purge_offline_workers": "30s"}
    exporter = services.exporter(redis, {"state": state})
    assert "state.purge_offline_workers (30s) is shorter than state.worker_timeout (1m)" in exporter.log()


def test_purge_before_a_scrape_sees_the_last_events_is_reported(file):
    def warnings(**state):
        return Run("--check-config", "-c", file({"metrics": {"zero_first": "30s"}, "state": state})).out

    message = "state.purge_stopped_workers ({}) is shorter than twice metrics.zero_first (30s)"
    assert message.format("59s") in warnings(purge_stopped_workers="59s")
    assert message.format("50s") in warnings(purge_offline_workers="50s", worker_timeout="10s")
    assert "twice metrics.zero_first" not in warnings(purge_stopped_workers="1m") + warnings(purge_offline_workers=0)


def test_json_log_lines_are_objects(services, redis):
    """Every line on stderr is a JSON object, and stdout is empty."""
    exporter = services.exporter(redis, args=["--log-format", "json"])
    exporter.terminate()
    lines = exporter.err.read_text().splitlines()
    assert lines and all(isinstance(json.loads(line), dict) for line in lines)
    assert exporter.out.read_text() == ""


def test_log_contains_the_subscription(services, broker):
    """The exact exchange or channel."""
    exporter = services.exporter(broker, {"events": {"exchange": "my.events"}})
    assert ("/0.my.events/*" if broker.name == "redis" else "my.events") in exporter.log()


def test_sentinel_requires_a_master_name():
    assert "broker.redis.master_name" in Run("-b", "sentinel://127.0.0.1:26379/0").error_line()
