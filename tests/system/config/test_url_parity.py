"""Broker URLs: what the installed kombu accepts and refuses, the exporter accepts and refuses, with the same effect."""

import json
import re
import socket
import subprocess
from types import SimpleNamespace
from urllib.parse import parse_qs, quote, unquote, urlsplit

import pytest

from support import events as ev
from support.certificates import Authority
from support.cli import Run
from support.processes import ROOT, TEST_ENV, free_port, wait_until

#: Both accept the URL, with the same effect; both refuse it; or a difference that docs/migration.md has a row for.
SAME, REFUSED = "same", "refused"


def differs(reason):
    return reason


IGNORED_HERE = differs("`connect_timeout` in a Redis URL")
VERIFIES = differs("`rediss://` without an `ssl_` parameter")
AMQP_HOSTNAME = differs("TLS to RabbitMQ")
NO_SCHEME = differs("a URL without a scheme")

#: Every reserved character.
RESERVED = ":/?#[]@!$&'()*+,;=% "
ENCODED = quote(RESERVED, safe="")

URLS = {
    # schemes
    "amqp://h": SAME,
    "pyamqp://h": SAME,
    "AMQP://h": SAME,
    "amqps://h": AMQP_HOSTNAME,
    "redis://h": SAME,
    "rediss://h": VERIFIES,
    "redis+socket:///run/r.sock": SAME,
    "sentinel://h": SAME,
    "unix:///run/r.sock": REFUSED,
    "localhost": NO_SCHEME,
    "localhost:6379": NO_SCHEME,
    # hosts and ports
    "amqp://": SAME,
    "redis://": SAME,
    "amqp://h:5673": SAME,
    "amqp://h:": SAME,
    "amqp://h:0": SAME,
    "amqp://h:99999": REFUSED,
    "redis://h:x": REFUSED,
    "redis://h:7000/0": SAME,
    "amqps://h:5672": AMQP_HOSTNAME,
    "amqp://[::1]:5673/": SAME,
    "redis://[::1]": SAME,
    "amqp://[fe80::1%25eth0]/": SAME,
    "amqp://::1/": REFUSED,
    "amqp://Broker.Example.ORG": SAME,
    "amqp://a b": differs("a host with a space or a comma"),
    "amqp://h1,h2": differs("a host with a space or a comma"),
    "amqp://h#fragment": differs("an unescaped `#`"),
    # credentials
    f"amqp://{ENCODED}:{ENCODED}@h": SAME,
    f"redis://{ENCODED}:{ENCODED}@h": SAME,
    f"redis+socket://{ENCODED}:{ENCODED}@/run/r.sock": SAME,
    "amqp://u@h": SAME,
    "amqp://:p@h": SAME,
    "amqp://u:p:q@h": SAME,
    "amqp://u:p@q@h": SAME,
    "amqp://u:p#q@h": REFUSED,
    "amqp://u:p/q@h": REFUSED,
    "redis://:p@h": SAME,
    "redis://u:p@h/1": SAME,
    "redis://u@h": SAME,
    # virtual hosts and databases
    "amqp://h/": SAME,
    "amqp://h//": SAME,
    "amqp://h/v": SAME,
    "amqp://h/v/w": SAME,
    "amqp://h/%2Fv": SAME,
    "amqp://h/v%20w": SAME,
    "redis://h/": SAME,
    "redis://h/3": SAME,
    "redis://h//3": SAME,
    "redis://h/x": REFUSED,
    "redis://h/3/4": REFUSED,
    "redis://h/-1": differs("a negative database"),
    "redis+socket:///run/r.sock?virtual_host=3": SAME,
    "redis+socket:///run/r.sock?virtual_host=/3": SAME,
    "redis+socket:///run/r.sock?virtual_host=x": REFUSED,
    "redis+socket:///a%20b": SAME,
    "redis+socket://h/run/r.sock": differs("a host in `redis+socket://`"),
    "redis+socket://": REFUSED,
    # several brokers
    "amqp://h1;amqp://h2:5673/v": SAME,
    "redis://h1/0;redis://h2/1": SAME,
    "redis://h1;amqp://h2": SAME,
    "amqp://h1;amqp://h2?heartbeat=3": SAME,
    "sentinel://h1;sentinel://h2:26380": SAME,
    "sentinel://u:p@h1/2;sentinel://h2": SAME,
    "amqp://h1;": differs("an empty item of a list"),
    "amqp://h1;h2": NO_SCHEME,
    # parameters of kombu
    "amqp://h?heartbeat=30": SAME,
    "amqp://h?heartbeat=2.5": differs("`heartbeat=0`"),
    "amqp://h?heartbeat=0": differs("`heartbeat=0`"),
    "amqp://h?heartbeat=": SAME,
    "amqp://h?heartbeat=x": REFUSED,
    "amqp://h?heartbeat=30&heartbeat=40": SAME,
    "redis://h?heartbeat=3": SAME,
    "redis://h?heartbeat=x": REFUSED,
    "amqp://h?connect_timeout=3": SAME,
    "amqp://h?connect_timeout=x": REFUSED,
    "redis://h?connect_timeout=3": IGNORED_HERE,
    "amqp://h?login_method=PLAIN": SAME,
    "amqp://h?login_method=AMQPLAIN": SAME,
    "amqp://h?login_method=EXTERNAL": SAME,
    "amqp://h?login_method=GSSAPI": REFUSED,
    "amqp://h?login_method=external": REFUSED,
    "redis://h?login_method=PLAIN": SAME,
    "amqp://h?ssl=true": AMQP_HOSTNAME,
    "amqp://h?ssl=1": AMQP_HOSTNAME,
    "amqp://h?ssl=false": AMQP_HOSTNAME,
    "amqp://h:5672?ssl=true": AMQP_HOSTNAME,
    "amqp://h?ssl=": SAME,
    "redis://h?ssl=true": REFUSED,
    "amqp://h?insist=true": SAME,
    "redis://h?insist=true": SAME,
    "amqp://h?credential_provider=a.b": SAME,
    "redis://h?credential_provider=redis.credentials.UsernamePasswordCredentialProvider": differs("`credential_provider`"),
    "redis+socket:///s?credential_provider=redis.credentials.UsernamePasswordCredentialProvider": differs(
        "`credential_provider`"
    ),
    "amqp://h/v?heartbeat=30&connect_timeout=4": SAME,
    "amqp://h?a": SAME,
    "amqp://h?unknown=": SAME,
    "amqp://h?unknown=1": REFUSED,
    "amqp://h?virtual_host=v": REFUSED,
    "amqp://h?userid=x": REFUSED,
    # parameters of py-amqp
    "amqp://h?read_timeout=3": REFUSED,
    "amqp://h?frame_max=8192": REFUSED,
    # parameters of redis-py
    "redis://h?db=3": REFUSED,
    "redis://h?virtual_host=3": REFUSED,
    "redis://h?socket_timeout=3": REFUSED,
    "redis://h?socket_connect_timeout=3": REFUSED,
    "redis://h?socket_keepalive=1": REFUSED,
    "redis://h?health_check_interval=10": REFUSED,
    "redis://h?retry_on_timeout=1": REFUSED,
    "redis://h?max_connections=3": REFUSED,
    "redis+socket:///s?socket_timeout=3": SAME,
    "redis+socket:///s?socket_keepalive=1": SAME,
    "redis+socket:///s?health_check_interval=3": SAME,
    "redis+socket:///s?client_name=x": SAME,
    "redis+socket:///s?db=3": SAME,
    "redis+socket:///s?foo=1": REFUSED,
    # TLS
    "rediss://h?ssl_cert_reqs=required": SAME,
    "rediss://h?ssl_cert_reqs=optional": differs("`ssl_cert_reqs=optional`"),
    "rediss://h?ssl_cert_reqs=none": SAME,
    "rediss://h?ssl_cert_reqs=CERT_REQUIRED": SAME,
    "rediss://h?ssl_cert_reqs=CERT_OPTIONAL": differs("`ssl_cert_reqs=optional`"),
    "rediss://h?ssl_cert_reqs=CERT_NONE": SAME,
    "rediss://h?ssl_cert_reqs=None": REFUSED,
    "rediss://h?ssl_cert_reqs=NONE": REFUSED,
    "rediss://h?ssl_cert_reqs=0": REFUSED,
    "rediss://h?ssl_cert_reqs=": VERIFIES,
    "redis://h?ssl_cert_reqs=none": SAME,
    "sentinel://h?ssl_cert_reqs=none": SAME,
    "rediss://h?ssl_check_hostname=false": SAME,
    "rediss://h?ssl_check_hostname=False": SAME,
    "rediss://h?ssl_check_hostname=true": SAME,
    "rediss://h?ssl_check_hostname=0": SAME,
    "rediss://h?ssl_ca_certs=CA": SAME,
    "rediss://h?ssl_ca_certs=/nonexistent": REFUSED,
    "rediss://h?ssl_ca_path=DIRECTORY": SAME,
    "rediss://h?ssl_ca_data=PEM": SAME,
    "rediss://h?ssl_ca_data=x": REFUSED,
    "rediss://h?ssl_certfile=CERT&ssl_keyfile=KEY": SAME,
    "rediss://h?ssl_password=x": differs("`ssl_password`"),
    "rediss://h?ssl_ciphers=ECDHE-RSA-AES128-GCM-SHA256": differs("`ssl_ciphers`"),
    "rediss://h?ssl_min_version=771": REFUSED,
    "rediss://h?ssl_validate_ocsp=true": differs("`ssl_validate_ocsp`"),
    "rediss://h?ssl_validate_ocsp_stapled=true": REFUSED,
    "rediss://h?ssl_foo=1": REFUSED,
    "amqp://h?ssl_ca_certs=CA": differs("`ssl_` parameters in an AMQP URL"),
    "amqps://h?ssl_cert_reqs=CERT_NONE": differs("`ssl_` parameters in an AMQP URL"),
}


@pytest.fixture(scope="module")
def files():
    """The files that the table names."""
    authority = Authority()
    client = authority.issue("client")
    directory = authority.dir / "directory"
    directory.mkdir()
    (directory / "ca.pem").write_bytes(authority.file.read_bytes())
    pem = quote(authority.file.read_text(), safe="")
    return {"CA": authority.file, "DIRECTORY": directory, "PEM": pem, "CERT": client.cert, "KEY": client.key}


@pytest.fixture(scope="module")
def kombu(files):
    """kombu's result for each URL of the table: a list of parameters, or an error."""
    urls = [fill(url, files) for url in URLS]
    program = [TEST_ENV / "celery-5.7.0/bin/python", "-P", ROOT / "tests/system/support/kombu_urls.py"]
    done = subprocess.run(program, input=json.dumps(urls), capture_output=True, text=True, timeout=60, check=True)
    return dict(zip(URLS, json.loads(done.stdout), strict=True))


def fill(url, files):
    return re.sub(r"=([A-Z]+)(?=&|$)", lambda match: f"={files.get(match[1], match[1])}", url)


def canonical(text):
    """The parameters of a URL as --check-config prints it, in the form of kombu_urls.py."""
    parts, query = urlsplit(text), {name: values[0] for name, values in parse_qs(urlsplit(text).query).items()}
    is_amqp, is_unix = parts.scheme.startswith("amqp"), parts.scheme == "redis+socket"
    secure = parts.scheme in ("amqps", "rediss") or any(name.startswith("ssl_") for name in query)
    verified = query.get("ssl_cert_reqs", "required")
    common = {
        "user": unquote(parts.username or "") or None,
        "tls": {"cert_reqs": verified, "check_hostname": query.get("ssl_check_hostname") != "false" and verified != "none"}
        if secure
        else None,
    }
    if is_unix:
        return {**common, "socket": unquote(parts.path), "path": query["virtual_host"]}
    address = {**common, "host": unquote(parts.hostname), "port": parts.port, "path": unquote(parts.path[1:])}
    if not is_amqp:
        return {**address, **({"connect_timeout": query["connect_timeout"]} if "connect_timeout" in query else {})}
    return {
        **address,
        "path": address["path"] or "/",
        "heartbeat": float(query.get("heartbeat", 0)),
        "connect_timeout": float(query.get("connect_timeout", 5)),
        "login_method": query.get("login_method", "PLAIN"),
    }


def read(url):
    """What the exporter makes of a URL: a list of parameters, or an error."""
    run = Run("-b", url, "--check-config", env={"FLOWER_EXPORTER_BROKER__REDIS__MASTER_NAME": "m"})
    if run.code:
        return run.error_line()
    [line] = re.findall(r'^url = (".*")  # command line --broker$', run.out, re.M)
    return [canonical(item) for item in json.loads(line).split(";")]


def comparable(found, own):
    """kombu's parameters in the exporter's terms. A password is masked, and those of Unix sockets have no host."""
    found = {name: value for name, value in found.items() if name != "password" and (name in own or value is not None)}
    if own.get("user") == "***":  # a user name without a password may be a password whose colon is missing
        found["user"] = "***"
    host = {"127.0.0.1": "localhost"}.get(found.get("host"), found.get("host"))
    if "socket" in own:
        return {name: value for name, value in found.items() if name not in ("host", "port")}
    return {**found, "host": host, **({"tls": own["tls"]} if found.get("tls") == {} else {})}


@pytest.mark.parametrize("url", URLS, ids=lambda url: url[:60])
def test_url_has_the_same_effect_as_in_kombu(kombu, files, url):
    theirs, own, relation = kombu[url], read(fill(url, files)), URLS[url]
    if relation == REFUSED:
        assert isinstance(theirs, str) and isinstance(own, str), (theirs, own)
    elif relation == SAME:
        assert isinstance(own, list), own
        if url.startswith("sentinel"):  # one set, with the parameters of the first
            theirs = [{**member, **{name: theirs[0][name] for name in ("path", "user", "tls")}} for member in theirs]
        assert [comparable(*pair) for pair in zip(theirs, own, strict=True)] == own
    else:
        assert theirs != own
        page = (ROOT / "docs/migration.md").read_text()
        assert re.search(rf"^\| {re.escape(relation)}", page, re.M), relation


def test_table_has_a_row_for_each_difference():
    """And docs/migration.md has no other ones."""
    page = (ROOT / "docs/migration.md").read_text()
    section = page.split("### Broker URLs")[1].split("\n#")[0]
    rows = {row for row in re.findall(r"^\| (.+?) \|", section, re.M)} - {"URL", "---"}
    assert rows == set(URLS.values()) - {SAME, REFUSED}
    assert len(URLS) >= 60


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("redis://h?credential_provider=a.B", "broker.url_file"),
        ("redis://h?socket_timeout=3", "broker.connect_timeout"),
        ("redis://h?virtual_host=3", "as the path of the URL"),
        ("rediss://h?ssl_password=x", "broker.tls.key_file"),
        ("amqp://h?hearbeat=3", "unknown parameter hearbeat: expected heartbeat, connect_timeout"),
        ("amqp://h?heartbeat=often", "parameter heartbeat: expected seconds"),
        ('"redis://h"', "in quotes"),
        ("CELERY_BROKER_URL=redis://h", "the name of a variable"),
        ("10.1.2.3:6379", "no scheme before 10.1.2.3:6379"),
    ],
)
def test_refused_url_names_what_to_write(url, words):
    line = Run("-b", url, "--check-config").error_line()
    assert line.startswith("flower-exporter: command line --broker = ***: ") and words in line, line


def test_password_with_reserved_characters_logs_in(services):
    """The exporter and kombu log in to Redis with the same URL."""
    redis = services.redis()
    redis.client().execute_command("ACL", "SETUSER", RESERVED.strip(), "on", f">{RESERVED.strip()}", "~*", "&*", "+@all")
    encoded = quote(RESERVED.strip(), safe="")
    url = f"redis://{encoded}:{encoded}@127.0.0.1:{redis.port}/0"
    exporter = services.exporter(None, {"broker": {"url": url}}).ready()
    services.publisher(SimpleNamespace(url=url, options={})).send(ev.received())
    exporter.wait_for(lambda metrics: metrics.events("received") == 1)


def test_parameter_without_effect_is_logged_at_debug(services, redis):
    settings = {"broker": {"url": f"{redis.url}?heartbeat=3&insist=1"}, "log": {"level": "debug"}}
    log = services.exporter(None, settings).ready().log()
    for parameter in ("heartbeat", "insist"):
        assert re.search(rf'DEBUG this parameter of the broker URL has no effect .*parameter="{parameter}"', log), log


def test_unknown_database_is_reported(services, redis):
    """The default of Redis is 16 databases. A user who may not select one gets no error."""
    exporter = services.exporter(None, {"broker": {"url": redis.url.replace("/0", "/99")}})
    wait_until(lambda: "the server has no database 99: use the number in Celery's broker URL" in exporter.log(), 5, exporter.log)
    redis.client().execute_command("ACL", "SETUSER", "few", "on", ">few", "&*", "+auth", "+ping", "+psubscribe", "+publish")
    url = f"redis://few:few@127.0.0.1:{redis.port}/99"
    services.exporter(None, {"broker": {"url": url}}).ready()


def test_timeout_of_the_url_takes_precedence(services):
    """A server that accepts and never answers."""
    with socket.create_server(("127.0.0.1", free_port())) as server:
        url = f"redis://127.0.0.1:{server.getsockname()[1]}/0?connect_timeout=1"
        exporter = services.exporter(None, {"broker": {"url": url, "connect_timeout": "60s"}})
        wait_until(lambda: "broker did not respond within 1 s" in exporter.log(), 5, exporter.log)
