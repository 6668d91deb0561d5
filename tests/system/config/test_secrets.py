"""Passwords and keys in all places, which must not occur in any output of the program.
\ntest_settings.py contains simpler cases.
"""

import base64
import re
import signal
from urllib.parse import quote

import pytest

from support import events as ev
from support.certificates import Authority
from support.cli import Run
from support.exporter import nested, toml
from support.processes import directory, free_port, wait_until
from support.sentinel import MASTER, Sentinel
from support.tls import redis_over_tls

#: Occurs in each part of the secret, so that a part of a password is also found.
TRACE = "zXq7"
SECRET = f"{TRACE}p@ss{TRACE}:w/{TRACE}rd%21{TRACE}é;{TRACE}?#&{TRACE}"
ENCODED = quote(SECRET, safe="")
TRACE_SETTINGS = {"log": {"level": "trace"}, "metrics": {"self_metrics": True}}


def lower(encoded):
    return re.sub("%[0-9A-F]{2}", lambda escape: escape[0].lower(), encoded)


FORMS = {
    SECRET, ENCODED, lower(ENCODED), quote(ENCODED, safe=""), SECRET.encode("unicode_escape").decode(), TRACE,
    *(base64.b64encode(b"\0" * pad + SECRET.encode()).decode()[4:-4] for pad in range(3)),
}  # fmt: skip


def assert_clean(text):
    """The text does not contain any part of the secret in any form or case."""
    found = [form for form in FORMS if form.lower() in text.lower()]
    assert not found, [line for line in text.splitlines() if any(form.lower() in line.lower() for form in found)]
    return text


def assert_running_exporter_clean(exporter):
    """Checks the log and all responses of a running exporter."""
    answers = [exporter.request(path) for path in ("/metrics", "/healthz", "/healthz?ready", f"/{ENCODED}")]
    return assert_clean(exporter.log() + "".join(f"{headers}{body.decode()}" for _, headers, body in answers))


def run_clean(*args, code=2, env=None):
    """The checked output of a run of the program."""
    run = Run(*args, env=env)
    assert run.code == code, (run.code, run.out, run.err)
    return assert_clean(run.out + run.err)


@pytest.fixture
def home():
    return directory("secrets")


def add_user(vhost):
    """The URL of a new RabbitMQ user with the secret as its password."""
    vhost.server.ctl("add_user", vhost.vhost, SECRET)
    vhost.server.ctl("set_permissions", "-p", vhost.vhost, vhost.vhost, ".*", ".*", ".*")
    return f"amqp://{vhost.vhost}:{ENCODED}@127.0.0.1:{vhost.server.port}/{vhost.vhost}"


SOURCES = ["file", "url_file", "environment", "command line"]


@pytest.mark.parametrize("source, form", [*zip(SOURCES, ["text", "json", "json", "text"])], ids=SOURCES)
def test_running_exporter_keeps_the_secret(services, vhost, home, source, form):
    """Refused connections and passwords, failed TLS, a subscription, reloads, an outage, and the end."""
    redis, other = services.redis(password=SECRET), services.redis(password="right")
    urls = [
        f"redis://:{lower(ENCODED)}@127.0.0.1:{free_port()}/0",
        f"amqp://tester:{ENCODED}@127.0.0.1:{vhost.server.port}/{vhost.vhost}",
        f"amqps://tester:{ENCODED}@127.0.0.1:{vhost.server.port}/{vhost.vhost}",
        f"redis://user:{ENCODED}@127.0.0.1:{other.port}/0",
        f"rediss://:{ENCODED}@127.0.0.1:{other.port}/0",
        redis.url,
        add_user(vhost),
    ]
    patterns = (
        "redis://:.*refused",
        "amqp:.*ACCESS.?REFUSED",
        "amqps:.*TLS",
        "user:.*WRONGPASS",
        "rediss:.*TLS",
        "subscribed to",
    )
    url, url_file = ";".join(urls), home / "url"
    url_file.write_text(url)
    broker = {"file": {"url": url}, "url_file": {"url_file": str(url_file)}}.get(source, {})
    broker |= {"reconnect_backoff_max": "200ms"}
    settings = {**TRACE_SETTINGS, "broker": broker, "log": {"level": "trace", "format": form}}
    exporter = services.exporter(
        None, settings, ready=False,
        env={"FLOWER_EXPORTER_BROKER__URL": url} if source == "environment" else None,
        args=["-b", url] if source == "command line" else [],
    ).ready()  # fmt: skip
    assert all(re.search(pattern, exporter.log(), re.I) for pattern in patterns), exporter.log()
    services.publisher(redis).send(ev.received())
    exporter.wait_for(lambda m: m.events("received") == 1)
    assert_running_exporter_clean(exporter)

    good = exporter.config.read_text()
    bad = (
        f'{good}[broker.redis]\nsentinel_password = "{TRACE}',
        f"{good}x = '{ENCODED}'",
        toml(nested("broker.url", ENCODED)),
    )
    for number, text in enumerate([*bad, good.replace(TRACE, TRACE + "new")], 1):
        exporter.write(text)
        exporter.send(signal.SIGHUP)
        wait_until(lambda: len(re.findall("configuration reloaded|failed to reload configuration", exporter.log())) == number, 10, exporter.log)
    exporter.write(good)
    url_file.write_text(f"{url};{TRACE}")
    redis.stop(signal.SIGKILL)
    wait_until(lambda: "lost connection to broker" in exporter.log(), 10, exporter.log)
    if source == "url_file":
        wait_until(lambda: "failed to read broker URL" in exporter.log(), 10, exporter.log)
        url_file.write_text(url)
    wait_until(lambda: exporter.log().count("subscribed to") == 2, 20, exporter.log)
    assert_running_exporter_clean(exporter)
    exporter.terminate()
    assert_clean(exporter.log())


def test_quoted_arguments_of_the_server_are_masked(services):
    """Redis quotes the arguments of an unknown command, and an administrator may have removed AUTH."""
    redis = services.redis(args=["--rename-command", "AUTH", ""])
    for userinfo in (f":{ENCODED}", f"user:{ENCODED}"):
        settings = {**TRACE_SETTINGS, "broker": {"url": f"redis://{userinfo}@127.0.0.1:{redis.port}/0", "reconnect_backoff_max": "100ms"}}
        exporter = services.exporter(None, settings)
        wait_until(lambda: exporter.log().count("unknown command") >= 2, 10, exporter.log)
        assert_running_exporter_clean(exporter)


SENTINELS = {
    "not running": ({}, None, "refused"),
    "wrong password": ({"password": "right"}, None, "WRONGPASS"),
    "AUTH removed": ({"conf": ['rename-command AUTH ""']}, None, "unknown command"),
    "unknown master": ({"password": SECRET}, None, "no master named"),
    "wrong password of the master": ({"password": SECRET}, "right", "WRONGPASS"),
    "connected": ({"password": SECRET}, SECRET, "subscribed to"),
}


@pytest.mark.parametrize("options, password, pattern", SENTINELS.values(), ids=SENTINELS)
def test_passwords_of_sentinels_and_master_stay_secret(services, options, password, pattern):
    """Neither one is printed, whichever is refused."""
    port = free_port()
    if options:
        sentinel = Sentinel(services.redis(password=password), **options)
        services.callback(sentinel.stop)
        wait_until(lambda: sentinel.has_discovered(0, 0), 10, "the Sentinel responds")
        port = sentinel.port
    name = "another" if "no master" in pattern else MASTER
    broker = {
        "url": f"sentinel://:{ENCODED}@127.0.0.1:{port}/0",
        "redis": {"master_name": name, "sentinel_password": SECRET},
        "reconnect_backoff_max": "100ms",
    }
    exporter = services.exporter(None, {**TRACE_SETTINGS, "broker": broker})
    wait_until(lambda: pattern in exporter.log(), 10, exporter.log)
    assert_running_exporter_clean(exporter)
    shown = run_clean("-c", exporter.config, "--check-config", code=0)
    assert shown.count("***") == 2


# -- the key of a client certificate


def pieces(key_file):
    """The lines of the key, and its bytes in hexadecimal and decimal."""
    lines = key_file.read_text().splitlines()[1:-1]
    raw = base64.b64decode("".join(lines))
    return [*lines, raw.hex(), ", ".join(map(str, raw[-32:]))]


def assert_key_not_in(text, key_file):
    found = [piece for piece in pieces(key_file) if piece[:20] in text or piece[-20:] in text]
    assert not found, "the output contains the key"


@pytest.mark.parametrize("form", ["text", "json"])
def test_running_exporter_keeps_the_key(services, pki, form):
    """The connection succeeds, or fails because of the CA. The log level is trace."""
    secure = redis_over_tls(services, pki)
    for settings in (secure.settings(), secure.settings(ca_file=pki.other)):
        exporter = services.exporter(None, {**settings, "log": {"level": "trace", "format": form}})
        wait_until(lambda: re.search("subscribed to|unknown issuer", exporter.log()), 10, exporter.log)
        assert_key_not_in(exporter.log() + str(exporter.healthz()), pki.client.key)
        run = Run("-c", exporter.config, "--check-config")
        assert_key_not_in(run.out + run.err, pki.client.key)


KEYS = {
    "damaged": lambda text: text.replace("\n", "\n*", 2),
    "truncated": lambda text: text[: len(text) // 2],
    "without its end": lambda text: text[: text.index("-----END")],
    "not PEM": lambda text: "".join(text.splitlines()[1:-1]),
    "of another certificate": lambda text: text,
    "of another kind": lambda text: text.replace("PRIVATE KEY", "RSA PRIVATE KEY"),
}


@pytest.mark.parametrize("spoil", KEYS.values(), ids=KEYS)
def test_errors_of_invalid_keys_do_not_print_them(home, spoil):
    files, other = (Authority().issue(name) for name in ("one", "other"))
    spoilt = home / "key.pem"
    spoilt.write_text(spoil(other.key.read_text()))
    url = f"rediss://127.0.0.1/0?ssl_certfile={files.cert}&ssl_keyfile={spoilt}"
    for run in (Run("-b", url), Run("-b", url, "--check-config")):
        assert run.code == 2 and len(run.err.splitlines()) == 1, run.err
        assert_key_not_in(run.out + run.err, other.key)


@pytest.mark.parametrize("setting", ["key_file", "cert_file", "ca_file"])
@pytest.mark.parametrize("url", ["redis://127.0.0.1/0", "rediss://127.0.0.1/0"])
def test_key_in_place_of_its_path_is_not_printed(home, url, setting):
    """This happens when secrets are in environment variables."""
    files = Authority().issue("one")
    tls = {"cert_file": str(files.cert), "key_file": str(files.key), setting: files.key.read_text()}
    (home / "settings.toml").write_text(toml({"broker": {"url": url, "tls": tls}}))
    for args in ([], ["--check-config"]):
        if args or url.startswith("rediss"):
            run = Run("-c", home / "settings.toml", *args)
            assert_key_not_in(run.out + run.err, files.key)


# -- invalid settings

#: Errors in a user name or password, or next to them.
URLS = [
    f"redis://u:{ENCODED}@127.0.0.1:port/0",
    f"redis://u:{ENCODED}@127.0.0.1:/0/1",
    f"redis://u:{ENCODED}%ff@127.0.0.1/0",
    f"redis://u:{SECRET}@127.0.0.1/0",
    f"redis://u:{ENCODED}@127.0.0.1 /0",
    f"redis://{ENCODED}",
    f"redis:/u:{ENCODED}@h/0",
    f"redis//u:{ENCODED}@h/0",
    f"redis:u:{ENCODED}@h/0",
    f"{ENCODED}@h/0",
    f"reddis://u:{ENCODED}@h/0",
    f"redis://u:{ENCODED}@[h/0",
    f"redis://u:{ENCODED}@h/0?password={ENCODED}",
    f"redis://u:{ENCODED}@h/0?ssl_cert_reqs={ENCODED}",
    f"redis://u:{ENCODED}@h/0?ssl_keyfile_password={TRACE}",
    f"amqp://u:{ENCODED}@h:65536/",
    f"amqp://u:{ENCODED}@h:5672/a#{TRACE}",
    f"amqps://u:{ENCODED}@h/?heartbeat={TRACE}",
    f"sentinel://u:{ENCODED}@h/0",
    f"redis+socket://u:{ENCODED}@h/0",
    f"amqp://u:{ENCODED}@h//;sqs://{ENCODED}:{ENCODED}@",
    f"redis://u:{ENCODED}@h/0 redis://u:{ENCODED}@i/0",
    f"KEY=redis://u:{ENCODED}@h/0",
]


@pytest.mark.parametrize("url", URLS, ids=range(len(URLS)))
def test_errors_of_invalid_urls_contain_no_secret(home, url):
    """One line on stderr for each source of the URL."""
    (home / "url").write_text(url)
    (home / "url_file.toml").write_text(toml(nested("broker.url_file", str(home / "url"))))
    (home / "url.toml").write_text(toml(nested("broker.url", url)))
    (home / "list.toml").write_text(toml(nested("broker.url", ["redis://h/0", url])))
    environment = {"FLOWER_EXPORTER_BROKER__URL": url}
    files = [["-c", home / name] for name in ("url_file.toml", "url.toml", "list.toml")]
    for args, env in [*((args, None) for args in files), (["-b", url], None), ([], environment)]:
        for check in ([], ["--check-config"]):
            assert len(run_clean(*args, *check, env=env).splitlines()) == 1


TOMLS = [
    f'[broker]\nurl = "redis://u:{ENCODED}@h/0',
    f"[broker]\nurl = redis://u:{ENCODED}@h/0",
    f"[broker]\nurl = 'redis://u:{ENCODED}'{TRACE}@h/0'",
    f'[broker]\nurl = "redis://u:\\{ENCODED}@h/0"',
    f"[broker]\nurl: redis://u:{ENCODED}@h/0",
    f"[broker]\nurl redis://u:{ENCODED}@h/0",
    f'[broker]\nurl = "redis://u:{ENCODED}@h/0"\nurl = "redis://u:{ENCODED}@i/0"',
    f'[broker]\nurl = ["redis://u:{ENCODED}@h/0", 5]',
    f'[broker]\nurl = ["redis://u:{ENCODED}@h/0", ["redis://u:{ENCODED}@h/0"]]',
    f'[broker]\nurl = {{host = "h", password = "{ENCODED}"}}',
    f'[broker]\nurl = "redis://u:{ENCODED}@h/0" "redis://u:{ENCODED}@h/0"',
    f'[broker]\nurl = """\nredis://u:{ENCODED}@h/0',
    f'broker = "redis://u:{ENCODED}@h/0"',
    f'url = "redis://u:{ENCODED}@h/0"',
    f'[broker]\npassword = "{ENCODED}"',
    f'[broker.url]\npassword = "{ENCODED}"',
    f'[broker.redis]\nsentinel_password = {{password = "{ENCODED}"}}',
    f'[broker.redis]\nsentinel_password = ["{ENCODED}"]',
    f"[broker.redis]\nsentinel_password = {ENCODED}",
    f"[broker.redis]\nsentinel_password =\n{ENCODED}",
    f"[broker.redis]\nsentinel_password = '{ENCODED}",
    f"[broker.redis]\nsentinel_password : {ENCODED}",
    f'[broker.redis]\nsentinel_password = "\\u{ENCODED}"',
    f'[http]\nlisten = "redis://u:{ENCODED}@h/0"',
    f'[state]\nmax_tasks = "redis://u:{ENCODED}@h/0"',
    f'[events]\nhostnames = ["redis://u:{ENCODED}@[/0"]',
    f"redis://u:{ENCODED}@h/0",
    f"# {ENCODED}\n{SECRET}",
]


@pytest.mark.parametrize("text", TOMLS, ids=range(len(TOMLS)))
def test_errors_of_invalid_toml_contain_no_secret(home, text):
    """One line with the file."""
    path = home / "settings.toml"
    path.write_text(text)
    for check in ([], ["--check-config"]):
        output = run_clean("-c", path, *check)
        assert len(output.splitlines()) == 1 and str(path) in output
    run_clean("-c", path, "--healthcheck", code=1)


@pytest.mark.parametrize(
    "name",
    ["broker.url_file", "broker.tls.ca_file", "broker.amqp.queue", "broker.redis.master_name", "events.exchange",
     "broker.redis.fanout_prefix", "broker.redis.sentinel_username", "broker.redis.global_keyprefix", "state.db"],
)  # fmt: skip
def test_url_in_another_setting_is_masked(home, name):
    """The password is masked in every text setting."""
    (home / "settings.toml").write_text(toml(nested(name, f"redis://u:{ENCODED}@h/0")))
    run = Run("-c", home / "settings.toml", "--check-config")
    assert_clean(run.out + run.err)


ARGUMENTS = {
    "whitespace in the password": ["-b", "redis://u:p", f"{ENCODED}@h/0"],
    "misspelled option": ["--brokr", f"redis://u:{ENCODED}@h/0"],
    "misspelled option with =": [f"--brokr=redis://u:{ENCODED}@h/0"],
    "repeated option": ["-b", f"redis://u:{ENCODED}@h/0", "-b", f"redis://u:{ENCODED}@h/1"],
    "missing option": [f"redis://u:{ENCODED}@h/0"],
    "value of another option": ["--log-level", f"redis://u:{ENCODED}@h/0"],
    "value of --config": ["-c", f"redis://u:{ENCODED}@h/0"],
    "value of --listen": ["-l", f"redis://u:{ENCODED}@h/0"],
}


@pytest.mark.parametrize("args", ARGUMENTS.values(), ids=ARGUMENTS)
def test_errors_of_command_lines_contain_no_secret(args):
    run_clean(*args)
    run_clean(*args, "--check-config")


def test_errors_of_environment_variables_contain_no_secret(home):
    """An unknown variable, a URL in a wrong one, and invalid text."""
    for name in ("BROKER__PASSWORD", "BROKER__REDIS__SENTINEL_PASSWORDS", "LOG__LEVEL", "STATE__MAX_TASKS"):
        run_clean(env={f"FLOWER_EXPORTER_{name}": f"redis://u:{ENCODED}@h/0"})
    run_clean(env={"FLOWER_EXPORTER_CONFIG": f"redis://u:{ENCODED}@h/0"})
    run_clean(env={"FLOWER_EXPORTER_BROKER__URL": f"redis://u:{TRACE}\udcff@h/0"})


def test_check_config_and_healthcheck_mask_passwords(home):
    """--check-config with each source, and --healthcheck."""
    url = f"redis://u:{ENCODED}@127.0.0.1:1/0;amqp://u:{lower(ENCODED)}@127.0.0.1:1//;rediss://{ENCODED}@127.0.0.1:1/2"
    path = home / "settings.toml"
    broker = {"url": url, "redis": {"sentinel_password": SECRET}}
    path.write_text(toml({"broker": broker, "http": {"listen": "127.0.0.1:1"}}))
    assert run_clean("-c", path, "--check-config", code=0).count("***") == 4
    assert run_clean("-b", url, "--check-config", code=0).count("***") == 3
    assert run_clean("--check-config", code=0, env={"FLOWER_EXPORTER_BROKER__URL": url}).count("***") == 3
    run_clean("-c", path, "--healthcheck", code=1)
