"""Passwords and keys that are planted everywhere, and looked for in all that the program says.

Single mistakes in the settings are in test_settings.py, too.
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

#: In each of its parts, so that half of a password is found as well.
TRACE = "zXq7"
SECRET = f"{TRACE}p@ss{TRACE}:w/{TRACE}rd%21{TRACE}é;{TRACE}?#&{TRACE}"
ENCODED = quote(SECRET, safe="")
LOUD = {"log": {"level": "trace"}, "metrics": {"self_metrics": True}}


def lower(encoded):
    return re.sub("%[0-9A-F]{2}", lambda escape: escape[0].lower(), encoded)


FORMS = {
    SECRET, ENCODED, lower(ENCODED), quote(ENCODED, safe=""), SECRET.encode("unicode_escape").decode(), TRACE,
    *(base64.b64encode(b"\0" * pad + SECRET.encode()).decode()[4:-4] for pad in range(3)),
}  # fmt: skip


def clean(text):
    """Nothing of the secret is in it, in whatever form or case."""
    found = [form for form in FORMS if form.lower() in text.lower()]
    assert not found, [line for line in text.splitlines() if any(form.lower() in line.lower() for form in found)]
    return text


def told(exporter):
    """All that a running exporter says."""
    answers = [exporter.request(path) for path in ("/metrics", "/healthz", "/healthz?ready", f"/{ENCODED}")]
    return clean(exporter.log() + "".join(f"{headers}{body.decode()}" for _, headers, body in answers))


def clean_run(*args, code=2, env=None):
    """What the program says when it is run to its end."""
    run = Run(*args, env=env)
    assert run.code == code, (run.code, run.out, run.err)
    return clean(run.out + run.err)


@pytest.fixture
def home():
    return directory("secrets")


def user(vhost):
    """The URL of a user of RabbitMQ with this password."""
    vhost.server.ctl("add_user", vhost.vhost, SECRET)
    vhost.server.ctl("set_permissions", "-p", vhost.vhost, vhost.vhost, ".*", ".*", ".*")
    return f"amqp://{vhost.vhost}:{ENCODED}@127.0.0.1:{vhost.server.port}/{vhost.vhost}"


SOURCES = ["file", "url_file", "environment", "command line"]


@pytest.mark.parametrize("source, form", [*zip(SOURCES, ["text", "json", "json", "text"])], ids=SOURCES)
def test_while_it_runs(services, vhost, home, source, form):
    """Refused connections, refused passwords, failed TLS, a subscription at last, reloads, an outage, the end."""
    redis, other = services.redis(password=SECRET), services.redis(password="right")
    urls = [
        f"redis://:{lower(ENCODED)}@127.0.0.1:{free_port()}/0",
        f"amqp://tester:{ENCODED}@127.0.0.1:{vhost.server.port}/{vhost.vhost}",
        f"amqps://tester:{ENCODED}@127.0.0.1:{vhost.server.port}/{vhost.vhost}",
        f"redis://user:{ENCODED}@127.0.0.1:{other.port}/0",
        f"rediss://:{ENCODED}@127.0.0.1:{other.port}/0",
        redis.url,
        user(vhost),
    ]
    said = (
        "redis://:.*refused",
        "amqp:.*ACCESS.?REFUSED",
        "amqps:.*TLS",
        "user:.*WRONGPASS",
        "rediss:.*TLS",
        "listening",
    )
    url, url_file = ";".join(urls), home / "url"
    url_file.write_text(url)
    broker = {"file": {"url": url}, "url_file": {"url_file": str(url_file)}}.get(source, {})
    broker |= {"reconnect_max": "200ms"}
    settings = {**LOUD, "broker": broker, "log": {"level": "trace", "format": form}}
    exporter = services.exporter(
        None, settings, ready=False,
        env={"FLOWER_EXPORTER_BROKER__URL": url} if source == "environment" else None,
        args=["-b", url] if source == "command line" else [],
    ).ready()  # fmt: skip
    assert all(re.search(word, exporter.log(), re.I) for word in said), exporter.log()
    services.publisher(redis).send(ev.received())
    exporter.wait_for(lambda m: m.events("received") == 1)
    told(exporter)

    good = exporter.config.read_text()
    bad = (
        f'{good}[broker.redis]\nsentinel_password = "{TRACE}',
        f"{good}x = '{ENCODED}'",
        toml(nested("broker.url", ENCODED)),
    )
    for number, text in enumerate([*bad, good.replace(TRACE, TRACE + "new")], 1):
        exporter.write(text)
        exporter.send(signal.SIGHUP)
        wait_until(lambda: exporter.log().count("read again") == number, 10, exporter.log)
    exporter.write(good)
    url_file.write_text(f"{url};{TRACE}")
    redis.stop(signal.SIGKILL)
    wait_until(lambda: "is lost" in exporter.log(), 10, exporter.log)
    if source == "url_file":
        wait_until(lambda: "URL cannot be read" in exporter.log(), 10, exporter.log)
        url_file.write_text(url)
    wait_until(lambda: exporter.log().count("listening for events") == 2, 20, exporter.log)
    told(exporter)
    exporter.terminate()
    clean(exporter.log())


def test_a_server_that_repeats_what_it_refuses(services):
    """Redis quotes the arguments of a command that it does not know, and an administrator may have taken AUTH away."""
    redis = services.redis(args=["--rename-command", "AUTH", ""])
    for userinfo in (f":{ENCODED}", f"user:{ENCODED}"):
        settings = {**LOUD, "broker": {"url": f"redis://{userinfo}@127.0.0.1:{redis.port}/0", "reconnect_max": "100ms"}}
        exporter = services.exporter(None, settings)
        wait_until(lambda: exporter.log().count("unknown command") >= 2, 10, exporter.log)
        told(exporter)


SENTINELS = {
    "nobody there": ({}, None, "refused"),
    "wrong password": ({"password": "right"}, None, "WRONGPASS"),
    "AUTH taken away": ({"conf": ['rename-command AUTH ""']}, None, "unknown command"),
    "unknown master": ({"password": SECRET}, None, "knows no master"),
    "wrong password of the master": ({"password": SECRET}, "right", "WRONGPASS"),
    "all is well": ({"password": SECRET}, SECRET, "listening"),
}


@pytest.mark.parametrize("options, password, said", SENTINELS.values(), ids=SENTINELS)
def test_sentinels(services, options, password, said):
    """Theirs and the master's, whichever is refused."""
    port = free_port()
    if options:
        sentinel = Sentinel(services.redis(password=password), **options)
        services.callback(sentinel.stop)
        wait_until(lambda: sentinel.knows(0, 0), 10, "the Sentinel answers")
        port = sentinel.port
    name = "another" if "no master" in said else MASTER
    broker = {
        "url": f"sentinel://:{ENCODED}@127.0.0.1:{port}/0",
        "redis": {"master_name": name, "sentinel_password": SECRET},
        "reconnect_max": "100ms",
    }
    exporter = services.exporter(None, {**LOUD, "broker": broker})
    wait_until(lambda: said in exporter.log(), 10, exporter.log)
    told(exporter)
    shown = clean_run("-c", exporter.config, "--check-config", code=0)
    assert shown.count("***") == 2


# -- the key of a client certificate


def pieces(key_file):
    """Each line of the key, and its bytes as numbers."""
    lines = key_file.read_text().splitlines()[1:-1]
    raw = base64.b64decode("".join(lines))
    return [*lines, raw.hex(), ", ".join(map(str, raw[-32:]))]


def key_is_not_in(text, key_file):
    found = [piece for piece in pieces(key_file) if piece[:20] in text or piece[-20:] in text]
    assert not found, "the key shows"


@pytest.mark.parametrize("form", ["text", "json"])
def test_key_while_it_runs(services, pki, form):
    """Let in, and refused for another CA; at every level of talk."""
    secure = redis_over_tls(services, pki)
    for settings in (secure.settings(), secure.settings(ca_file=pki.other)):
        exporter = services.exporter(None, {**settings, "log": {"level": "trace", "format": form}})
        wait_until(lambda: re.search("listening|unknown issuer", exporter.log()), 10, exporter.log)
        key_is_not_in(exporter.log() + str(exporter.healthz()), pki.client.key)
        run = Run("-c", exporter.config, "--check-config")
        key_is_not_in(run.out + run.err, pki.client.key)


KEYS = {
    "damaged": lambda text: text.replace("\n", "\n*", 2),
    "cut short": lambda text: text[: len(text) // 2],
    "without its end": lambda text: text[: text.index("-----END")],
    "no PEM": lambda text: "".join(text.splitlines()[1:-1]),
    "another's": lambda text: text,
    "of another kind": lambda text: text.replace("PRIVATE KEY", "RSA PRIVATE KEY"),
}


@pytest.mark.parametrize("spoil", KEYS.values(), ids=KEYS)
def test_keys_that_cannot_be_used(home, spoil):
    files, other = (Authority().issue(name) for name in ("one", "other"))
    spoilt = home / "key.pem"
    spoilt.write_text(spoil(other.key.read_text()))
    url = f"rediss://127.0.0.1/0?ssl_certfile={files.cert}&ssl_keyfile={spoilt}"
    for run in (Run("-b", url), Run("-b", url, "--check-config")):
        assert run.code == 2 and len(run.err.splitlines()) == 1, run.err
        key_is_not_in(run.out + run.err, other.key)


@pytest.mark.parametrize("setting", ["key_file", "cert_file", "ca_file"])
@pytest.mark.parametrize("url", ["redis://127.0.0.1/0", "rediss://127.0.0.1/0"])
def test_a_key_where_its_path_belongs(home, url, setting):
    """As happens where secrets are handed over in the environment."""
    files = Authority().issue("one")
    tls = {"cert_file": str(files.cert), "key_file": str(files.key), setting: files.key.read_text()}
    (home / "settings.toml").write_text(toml({"broker": {"url": url, "tls": tls}}))
    for args in ([], ["--check-config"]):
        if args or url.startswith("rediss"):
            run = Run("-c", home / "settings.toml", *args)
            key_is_not_in(run.out + run.err, files.key)


# -- mistakes

#: In a user name or password, or around them.
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
    f"amqp://u:{ENCODED}@h:0/",
    f"amqp://u:{ENCODED}@h:5672/a#{TRACE}",
    f"amqps://u:{ENCODED}@h/?ssl_check_hostname={TRACE}",
    f"sentinel://u:{ENCODED}@h/0",
    f"redis+socket://u:{ENCODED}@h/0",
    f"amqp://u:{ENCODED}@h//;sqs://{ENCODED}:{ENCODED}@",
    f"redis://u:{ENCODED}@h/0 redis://u:{ENCODED}@i/0",
    f"KEY=redis://u:{ENCODED}@h/0",
]


@pytest.mark.parametrize("url", URLS, ids=range(len(URLS)))
def test_mistakes_in_urls(home, url):
    """From each source: one line that says what is wrong."""
    (home / "url").write_text(url)
    (home / "url_file.toml").write_text(toml(nested("broker.url_file", str(home / "url"))))
    (home / "url.toml").write_text(toml(nested("broker.url", url)))
    (home / "list.toml").write_text(toml(nested("broker.url", ["redis://h/0", url])))
    environment = {"FLOWER_EXPORTER_BROKER__URL": url}
    files = [["-c", home / name] for name in ("url_file.toml", "url.toml", "list.toml")]
    for args, env in [*((args, None) for args in files), (["-b", url], None), ([], environment)]:
        for check in ([], ["--check-config"]):
            assert len(clean_run(*args, *check, env=env).splitlines()) == 1


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
def test_mistakes_around_secrets(home, text):
    """One line that says where."""
    path = home / "settings.toml"
    path.write_text(text)
    for check in ([], ["--check-config"], ["--healthcheck"]):
        said = clean_run("-c", path, *check)
        assert len(said.splitlines()) == 1 and str(path) in said


@pytest.mark.parametrize(
    "name",
    ["broker.url_file", "broker.tls.ca_file", "broker.amqp.queue", "broker.redis.master_name", "events.exchange",
     "broker.redis.fanout_prefix", "broker.redis.sentinel_username", "broker.redis.global_keyprefix", "state.db"],
)  # fmt: skip
def test_a_url_where_none_belongs(home, name):
    """In another text setting, it is masked like anywhere."""
    (home / "settings.toml").write_text(toml(nested(name, f"redis://u:{ENCODED}@h/0")))
    run = Run("-c", home / "settings.toml", "--check-config")
    clean(run.out + run.err)


ARGUMENTS = {
    "a blank in the password": ["-b", "redis://u:p", f"{ENCODED}@h/0"],
    "an option misspelt": ["--brokr", f"redis://u:{ENCODED}@h/0"],
    "an option misspelt, with =": [f"--brokr=redis://u:{ENCODED}@h/0"],
    "two of them": ["-b", f"redis://u:{ENCODED}@h/0", "-b", f"redis://u:{ENCODED}@h/1"],
    "no option": [f"redis://u:{ENCODED}@h/0"],
    "another's place": ["--log-level", f"redis://u:{ENCODED}@h/0"],
    "the place of the file": ["-c", f"redis://u:{ENCODED}@h/0"],
    "the place of the address": ["-l", f"redis://u:{ENCODED}@h/0"],
}


@pytest.mark.parametrize("args", ARGUMENTS.values(), ids=ARGUMENTS)
def test_mistakes_on_the_command_line(args):
    clean_run(*args)
    clean_run(*args, "--check-config")


def test_environment(home):
    """A variable that does not exist, one in a wrong place, and one that is no text."""
    for name in ("BROKER__PASSWORD", "BROKER__REDIS__SENTINEL_PASSWORDS", "LOG__LEVEL", "STATE__MAX_TASKS"):
        clean_run(env={f"FLOWER_EXPORTER_{name}": f"redis://u:{ENCODED}@h/0"})
    clean_run(env={"FLOWER_EXPORTER_CONFIG": f"redis://u:{ENCODED}@h/0"})
    clean_run(env={"FLOWER_EXPORTER_BROKER__URL": f"redis://u:{TRACE}\udcff@h/0"})


def test_all_is_well(home):
    """The settings in force, from each source; and the question how a running exporter is."""
    url = f"redis://u:{ENCODED}@127.0.0.1:1/0;amqp://u:{lower(ENCODED)}@127.0.0.1:1//;rediss://{ENCODED}@127.0.0.1:1/2"
    path = home / "settings.toml"
    broker = {"url": url, "redis": {"sentinel_password": SECRET}}
    path.write_text(toml({"broker": broker, "http": {"listen": "127.0.0.1:1"}}))
    assert clean_run("-c", path, "--check-config", code=0).count("***") == 4
    assert clean_run("-b", url, "--check-config", code=0).count("***") == 3
    assert clean_run("--check-config", code=0, env={"FLOWER_EXPORTER_BROKER__URL": url}).count("***") == 3
    clean_run("-c", path, "--healthcheck", code=1)
