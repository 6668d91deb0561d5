use std::ffi::OsString;
use std::fs;
use std::os::unix::ffi::OsStringExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use super::cli::Cli;
use super::load::load_from;
use super::schema::{self, KEYS, Kind};
use super::url::{Address, BrokerUrl, BrokerUrls, CertReqs, Transport};
use super::{FanoutPrefix, Level, Loaded, Secret, Settings, reload};

const EXAMPLE: &str = include_str!(concat!(env!("CARGO_MANIFEST_DIR"), "/flower-exporter.toml.example"));
const NOWHERE: &str = "/nonexistent/flower-exporter.toml";

fn cli(args: &[&str]) -> Cli {
    let args = ["flower-exporter"].iter().chain(args).map(OsString::from);
    Cli::read(args).unwrap()
}

/// Loads a file's text, `NAME=value` variables without their prefix, and arguments.
fn load(file: &str, variables: &[&str], args: &[&str]) -> Result<Loaded, String> {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("x.toml");
    fs::write(&path, file).unwrap();
    load_at(&path, variables, args).map_err(|error| {
        let error = error.replace(path.to_str().unwrap(), "x.toml");
        assert!(!error.contains('\n'), "more than a line: {error}");
        error
    })
}

fn load_at(path: &Path, variables: &[&str], args: &[&str]) -> Result<Loaded, String> {
    let variables = variables.iter().map(|variable| {
        let (name, value) = variable.split_once('=').unwrap();
        (format!("FLOWER_EXPORTER_{name}").into(), value.into())
    });
    load_from(&cli(args), variables, path).map_err(|error| error.to_string())
}

#[track_caller]
fn settings(file: &str, variables: &[&str], args: &[&str]) -> Settings {
    load(file, variables, args).unwrap().settings
}

#[track_caller]
fn assert_refused(file: &str, variables: &[&str], expected: &str) {
    assert_eq!(load(file, variables, &[]).unwrap_err(), expected);
}

#[test]
fn the_example_is_the_defaults_and_names_every_key() {
    assert_eq!(settings(EXAMPLE, &[], &[]), Settings::default());
    for key in KEYS {
        let section = format!("\n[{}]\n", key.section());
        let body = EXAMPLE.split_once(&section).unwrap().1.split("\n[").next().unwrap();
        let name = &key.name[key.section().len() + 1..];
        let comment = if key.optional { "# " } else { "" };
        let line = format!("{comment}{name} = ");
        assert!(body.lines().any(|text| text.starts_with(&line)), "{} is not listed", key.name);
    }
    let uncommented = EXAMPLE.replace("# queue_", "queue_").replace("# prefetch", "prefetch");
    let amqp = settings(&uncommented, &[], &[]).broker.amqp;
    let defaults = Settings::default().broker.amqp;
    assert_eq!(amqp.queue_expires, Some(defaults.effective_expires()));
    assert_eq!(amqp.prefetch, Some(defaults.effective_prefetch()));
}

#[test]
fn a_key_is_optional_exactly_when_its_default_is_unset() {
    let defaults = Settings::default();
    let effective = ["broker.amqp.queue_expires", "broker.amqp.prefetch"];
    for key in KEYS {
        let unset = (key.shown)(&defaults).is_none() || effective.contains(&key.name);
        assert_eq!(key.optional, unset, "{}", key.name);
    }
}

#[test]
fn later_layers_win() {
    let file = "[log]\nlevel = 'warn'";
    let environment = "LOG__LEVEL=error";
    let option = ["--log-level", "debug"];
    let level = |file, variables: &[&str], args: &[&str]| {
        let loaded = load(file, variables, args).unwrap();
        let report = loaded.report();
        let line = report.lines().find(|line| line.starts_with("level = ")).unwrap().to_owned();
        (loaded.settings.log.level, line)
    };
    assert_eq!(level("", &[], &[]), (Level::Info, r#"level = "info"  # default"#.into()));
    let (value, line) = level(file, &[], &[]);
    assert_eq!(value, Level::Warn);
    assert!(line.starts_with(r#"level = "warn"  # /"#) && line.ends_with("/x.toml"), "{line}");
    assert_eq!(
        level(file, &[environment], &[]),
        (Level::Error, r#"level = "error"  # environment FLOWER_EXPORTER_LOG__LEVEL"#.into())
    );
    assert_eq!(
        level(file, &[environment], &option),
        (Level::Debug, r#"level = "debug"  # command line --log-level"#.into())
    );
}

#[test]
fn the_file_is_named_by_option_then_environment_then_habit() {
    let dir = tempfile::tempdir().unwrap();
    let file = |name: &str, workers: u32| {
        let path = dir.path().join(name);
        fs::write(&path, format!("[state]\nmax_workers = {workers}")).unwrap();
        path.to_str().unwrap().to_owned()
    };
    let (habit, environment, option) = (file("a", 1), file("b", 2), file("c", 3));
    let variable = format!("CONFIG={environment}");
    let workers = |variables: &[&str], args: &[&str]| {
        load_at(Path::new(&habit), variables, args).unwrap().settings.state.max_workers
    };
    assert_eq!(workers(&[], &[]), 1);
    assert_eq!(workers(&["CONFIG="], &[]), 1);
    assert_eq!(workers(&[&variable], &[]), 2);
    assert_eq!(workers(&[&variable], &["-c", &option]), 3);

    assert!(load_at(Path::new(NOWHERE), &[], &[]).is_ok());
    let missing = load_at(Path::new(&habit), &[], &["-c", NOWHERE]).unwrap_err();
    assert_eq!(missing, format!("{NOWHERE}: No such file or directory (os error 2)"));
}

#[test]
fn environment_values_take_the_type_of_their_key() {
    let loaded = settings(
        "[broker.redis]\nmaster_name = 'm'",
        &[
            "BROKER__REDIS__SENTINEL_PASSWORD=0123",
            "BROKER__REDIS__GLOBAL_KEYPREFIX=[\"a\"]",
            "BROKER__REDIS__MASTER_NAME=",
            "BROKER__REDIS__FANOUT_PREFIX=false",
            "BROKER__REDIS__FANOUT_PATTERNS=false",
            "BROKER__AMQP__PREFETCH=20",
            "EVENTS__ENABLE_INTERVAL=2.5",
            "EVENTS__MAX_BACKLOG=1MiB",
            "EVENTS__HOSTNAMES=[ab]@x, *@y,12",
            "METRICS__TASK_RUNTIME_METRIC_BUCKETS=[1, 2.5, inf]",
            "STATE__WORKER_TIMEOUT=0",
            "HTTP__LISTEN=:80",
        ],
        &[],
    );
    let redis = &loaded.broker.redis;
    assert_eq!(redis.sentinel_password.as_ref().map(Secret::expose), Some("0123"));
    assert_eq!(redis.global_keyprefix, "[\"a\"]");
    assert_eq!(redis.master_name, None);
    assert_eq!(redis.fanout_prefix, FanoutPrefix::Off);
    assert!(!redis.fanout_patterns);
    assert_eq!(loaded.broker.amqp.prefetch, Some(20));
    assert_eq!(loaded.events.enable_interval, Duration::from_millis(2500));
    assert_eq!(loaded.events.max_backlog, 1 << 20);
    let hostnames = loaded.events.hostnames.unwrap();
    assert_eq!(hostnames.patterns(), ["[ab]@x", "*@y", "12"]);
    assert!(hostnames.matches("b@x") && hostnames.matches("celery@y"));
    assert!(!hostnames.matches("c@x") && !hostnames.matches("celery@y.z"));
    assert_eq!(loaded.metrics.task_runtime_metric_buckets, [1.0, 2.5]);
    assert_eq!(loaded.state.worker_timeout, None);
    assert_eq!(loaded.http.listen.to_string(), "0.0.0.0:80");
}

#[test]
fn foreign_variables_are_left_alone_and_unknown_ones_are_not() {
    let kubernetes = ["PORT=tcp://10.0.0.1:9555", "SERVICE_HOST=10.0.0.1", "PORT_9555_TCP_ADDR=x"];
    assert_eq!(settings("", &kubernetes, &[]), Settings::default());
    assert_refused(
        "",
        &["STATE__MAX_TASK=5"],
        "environment FLOWER_EXPORTER_STATE__MAX_TASK: unknown key state.max_task: expected one of \
         max_workers, max_tasks, worker_timeout, purge_offline_workers, persistent, db, state_save_interval",
    );
    assert_refused(
        "",
        &["STAT__MAX_TASKS=5"],
        "environment FLOWER_EXPORTER_STAT__MAX_TASKS: unknown key stat.max_tasks: expected one of \
         broker, events, state, metrics, http, log",
    );
    let name = OsString::from("FLOWER_EXPORTER_BROKER__URL");
    let value = OsString::from_vec(b"redis://:hunter2\xff@h".to_vec());
    let error = load_from(&Cli::default(), [(name, value)], Path::new(NOWHERE)).unwrap_err();
    assert_eq!(error.to_string(), "environment FLOWER_EXPORTER_BROKER__URL: not valid UTF-8");
}

/// What is said, and the lines it is said about.
const BAD_VALUES: &[(&str, &[&str])] = &[
    (
        "expected a whole number from 1 to 100000000",
        &["state.max_tasks = -5", "state.max_tasks = 1.5", r#"state.max_tasks = "7""#],
    ),
    ("expected true or false", &[r#"state.persistent = "yes""#, "broker.tls.enabled = 1"]),
    ("expected text", &["state.db = 5", r#"broker.tls.ca_file = [1, "a"]"#]),
    (
        r#"expected a duration such as "500ms", "10m" or a number of seconds, from 1ms to 10years"#,
        &[
            "http.idle_timeout = -1",
            "http.idle_timeout = 0",
            "http.idle_timeout = inf",
            "http.idle_timeout = 1e300",
            r#"http.idle_timeout = "11years""#,
            r#"http.idle_timeout = "NaN""#,
        ],
    ),
    (
        r#"expected a duration such as "500ms", "10m" or a number of seconds, from 100ms to 10years"#,
        &["events.enable_interval = 0.05", "broker.reconnect_max = true"],
    ),
    (
        r#"expected a duration such as "500ms", "10m" or a number of seconds, from 1ms to 30days"#,
        &["broker.amqp.queue_ttl = 0", r#"broker.amqp.queue_expires = "50d""#],
    ),
    (
        r#"expected a duration such as "500ms", "10m" or a number of seconds, whole seconds from 1 to 65535"#,
        &[r#"broker.amqp.heartbeat = "1500ms""#, "broker.amqp.heartbeat = 0"],
    ),
    (
        r#"expected a duration such as "500ms", "10m" or a number of seconds, up to 10years; 0 means never"#,
        &[r#"state.worker_timeout = "never""#],
    ),
    (
        r#"expected a size such as "64MiB", "100kB" or a number of bytes, from 1KiB to 1GiB"#,
        &[r#"events.max_message = "12 parsecs""#, "events.max_message = 1"],
    ),
    ("expected a name of 1 to 248 bytes", &[r#"events.exchange = """#]),
    (
        r#"expected globs of worker hostnames, such as ["*@my-pod"]"#,
        &["events.hostnames = []", r#"events.hostnames = "*""#],
    ),
    (
        r#"expected globs of worker hostnames, such as ["*@my-pod"]; "[x" is none: unclosed character class; missing ']'"#,
        &[r#"events.hostnames = ["*@a", "[x"]"#],
    ),
    (
        "expected 1 to 100 ascending numbers of seconds, such as [0.1, 1, 10]",
        &[
            "metrics.task_runtime_metric_buckets = [1, 1]",
            "metrics.task_runtime_metric_buckets = [inf]",
            "metrics.task_runtime_metric_buckets = []",
        ],
    ),
    (
        r#"expected an address and a port, such as "0.0.0.0:9555", "[::]:9555" or ":9555""#,
        &[r#"http.listen = "example.org:80""#, r#"http.listen = "9555""#, "http.listen = 9555"],
    ),
    ("expected one of error, warn, info, debug, trace", &[r#"log.level = "loud""#, "log.level = 3"]),
    (r#"expected true, false or a prefix such as "/{db}.""#, &["broker.redis.fanout_prefix = 3"]),
];
#[test]
fn a_bad_value_is_told_in_one_line() {
    for (expected, lines) in BAD_VALUES {
        for line in *lines {
            assert_refused(line, &[], &format!("x.toml: {line}: {expected}"));
        }
    }
    assert_refused("broker = 5", &[], "x.toml: broker: expected a table [broker]");
    assert_refused(
        "broker.redis.sentinel_password = 123",
        &[],
        "x.toml: broker.redis.sentinel_password = ***: expected text",
    );
}

#[test]
fn a_mistake_outside_the_file_names_its_variable_or_option() {
    assert_refused(
        "",
        &["EVENTS__ENABLE_INTERVAL=soon"],
        "environment FLOWER_EXPORTER_EVENTS__ENABLE_INTERVAL = \"soon\": expected a duration such as \
         \"500ms\", \"10m\" or a number of seconds, from 100ms to 10years",
    );
    assert_refused(
        "",
        &["BROKER__URL="],
        "environment FLOWER_EXPORTER_BROKER__URL = ***: expected a broker URL such as \
         redis://localhost:6379/0, or several separated by `;`",
    );
    assert_eq!(
        load("", &[], &["--log-format", "xml"]).unwrap_err(),
        r#"command line --log-format = "xml": expected one of text, json"#
    );
}

#[test]
fn a_bad_file_is_told_by_place_and_not_by_content() {
    assert_refused(
        "[state]\nmax_workers = 1\n  url = redis://:hunter2@h\n",
        &[],
        "x.toml: line 3, column 9: invalid string, expected `\"`, `'`",
    );
    assert_refused(
        "[state]\nmax_task = 1",
        &[],
        "x.toml: unknown key state.max_task: expected one of max_workers, max_tasks, worker_timeout, \
         purge_offline_workers, persistent, db, state_save_interval",
    );
    assert_refused(
        "[broker.rediss]",
        &[],
        "x.toml: unknown key broker.rediss: expected one of url, url_file, connect_timeout, \
         reconnect_max, tls, amqp, redis",
    );
}

#[test]
fn sizes_durations_and_addresses_in_their_spellings() {
    for (text, bytes) in [
        ("'64KiB'", 65_536),
        ("'100kB'", 100_000),
        ("'1 gib'", 1 << 30),
        ("2048", 2048),
        ("'2048'", 2048),
        ("'5MB'", 5_000_000),
    ] {
        let file = format!("events.max_message = {text}");
        assert_eq!(settings(&file, &[], &[]).events.max_message, bytes, "{text}");
    }
    for (text, millis) in
        [("'500ms'", 500), ("'10m'", 600_000), ("5", 5000), ("'5'", 5000), ("0.25", 250), ("'1h 30s'", 3_630_000)]
    {
        let file = format!("http.idle_timeout = {text}");
        assert_eq!(settings(&file, &[], &[]).http.idle_timeout, Duration::from_millis(millis), "{text}");
    }
    for (text, address) in [
        ("127.0.0.1:1", "127.0.0.1:1"),
        ("[::]:9555", "[::]:9555"),
        (":0", "0.0.0.0:0"),
        ("localhost:80", "127.0.0.1:80"),
    ] {
        assert_eq!(settings("", &[], &["-l", text]).http.listen.to_string(), address);
    }
}

#[test]
fn the_report_is_a_file_that_loads_to_the_same_settings() {
    let file = "events = { hostnames = ['a\"b\\\\', '*'], max_backlog = '1GiB' }
        broker.redis = { fanout_prefix = '/x.', global_keyprefix = \"\\u0007\" }
        state = { worker_timeout = 0, max_workers = 7 }
        broker.url = ['redis://h', 'amqp://']";
    let loaded = load(file, &[], &[]).unwrap();
    let mut again = settings(&loaded.report(), &[], &[]);
    assert_eq!(again.broker.url.to_string(), "redis://h:6379/0;amqp://guest:***@localhost:5672//");
    again.broker.url = loaded.settings.broker.url.clone();
    again.broker.amqp.queue_expires = None;
    again.broker.amqp.prefetch = None;
    assert_eq!(again, loaded.settings);
    assert!(loaded.report().contains("\n# master_name is unset  # default\n"));
    assert!(loaded.report().starts_with("[broker]\nurl = "));
}

#[test]
fn a_password_is_never_printed() {
    let url = "redis://user:hunt%65r2@h:6379/0;amqp://:hunt%65r2@h";
    let variables = [format!("BROKER__URL={url}"), "BROKER__REDIS__SENTINEL_PASSWORD=hunter2".to_owned()];
    let variables: Vec<_> = variables.iter().map(String::as_str).collect();
    let loaded = load("", &variables, &[]).unwrap();
    let secret = loaded.settings.broker.redis.sentinel_password.as_ref().unwrap();
    let mut printed = vec![
        format!("{loaded:?}"),
        format!("{:#?}", loaded.settings),
        loaded.report(),
        loaded.settings.broker.url.to_string(),
        format!("{secret} {secret:?} {:?}", cli(&["-b", url])),
    ];
    assert_eq!(loaded.settings.broker.url[0].password.as_ref().map(Secret::expose), Some("hunter2"));
    assert!(loaded.report().contains("url = \"redis://user:***@h:6379/0;amqp://guest:***@h:5672//\""));

    for bad in [
        "hunter2",
        "hunter2@h",
        "redis:/:hunter2@h",
        "sqs://:hunter2@h",
        "redis://:hunter2@h:x",
        "redis://:hunter2@h/x",
        "redis://:hunter2",
        "redis://:1/hunter2@h",
        "redis://:1?hunter2@h",
        "redis://:1#hunter2@h",
        "redis://:hun/ter2@h",
        "redis://:hunter2@h?x=hunter2",
        "redis://:hunter2%ff@h",
        "redis://:hunter2@[h",
        "redis+socket://:hunter2@h/x",
        "redis://:hunter2@h?ssl_cert_reqs=hunter2",
        "sentinel://:hunter2@h;redis://:hunter2@h",
        "redis://:hunter2@h;h",
        "redis://:1?hunter2;x@h",
    ] {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("url");
        fs::write(&path, bad).unwrap();
        printed.push(load("", &[&format!("BROKER__URL={bad}")], &[]).unwrap_err());
        printed.push(load("", &[], &["-b", bad]).unwrap_err());
        printed.push(load(&format!("broker.url = ['{bad}']"), &[], &[]).unwrap_err());
        printed.push(load("", &[&format!("BROKER__URL_FILE={}", path.display())], &[]).unwrap_err());
    }
    let url = "redis://:hunter2@h";
    for misplaced in ["HTTP__LISTEN", "BROKER__URL_FILE", "CONFIG", "EVENTS__ENABLE_INTERVAL", "STATE__MAX_TASKS"] {
        printed.push(load("", &[&format!("{misplaced}={url}")], &[]).unwrap_err());
    }
    for args in [vec![url], vec!["--bro", url], vec!["--check-config=redis://:hunter2@h"]] {
        let args = ["flower-exporter"].into_iter().chain(args).map(OsString::from);
        printed.push(Cli::read(args).unwrap_err().to_string());
    }
    for text in printed {
        assert!(!text.contains("hunter2") && !text.contains("hunt%65r2"), "{text}");
    }
}

#[test]
fn a_url_file_wins_and_is_read_every_time() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("url");
    let variables = [format!("BROKER__URL_FILE={}", path.display())];
    let variables: Vec<_> = variables.iter().map(String::as_str).collect();
    let named = format!("broker.url_file = {path:?}");

    let missing = load("", &variables, &[]).unwrap_err();
    assert_eq!(missing, format!("{named}: No such file or directory (os error 2)"));
    fs::write(&path, " \n").unwrap();
    assert!(load("", &variables, &[]).unwrap_err().starts_with(&format!("{named}: expected a broker URL")));
    fs::write(&path, vec![b'x'; (64 << 10) + 1]).unwrap();
    assert_eq!(load("", &variables, &[]).unwrap_err(), format!("{named}: longer than 64 KiB"));

    fs::write(&path, "\n redis://a\n").unwrap();
    let on_top = settings("", &variables, &["-b", "redis://later"]).broker;
    assert_eq!(on_top.urls().unwrap().to_string(), "redis://later:6379/0", "a later layer wins");
    let file = format!("broker.url_file = {path:?}");
    let on_top = settings(&file, &["BROKER__URL=redis://later"], &[]).broker;
    assert_eq!(on_top.urls().unwrap().to_string(), "redis://later:6379/0");
    let broker = settings("broker.url = 'redis://ignored'", &variables, &[]).broker;
    assert_eq!(broker.urls().unwrap().to_string(), "redis://a:6379/0");
    fs::write(&path, "redis://b;amqp://c").unwrap();
    assert_eq!(broker.urls().unwrap().len(), 2);
}

#[test]
fn what_has_no_effect_is_told_of() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("url");
    fs::write(&path, "redis://a").unwrap();
    let variable = format!("BROKER__URL_FILE={}", path.display());
    let unused = |file: &str, variables: &[&str]| load(file, variables, &[]).unwrap().unused();
    let [told] = &unused("broker.url = 'redis://ignored'", &[&variable])[..] else { panic!("one line") };
    assert!(told.starts_with("broker.url ("), "{told}");
    assert!(told.ends_with("x.toml) is not used: broker.url_file (environment FLOWER_EXPORTER_BROKER__URL_FILE) is"));
    assert!(unused(EXAMPLE, &[&variable]).is_empty(), "the default says nothing");
    assert!(unused("broker.url = 'redis://used'", &[]).is_empty());
    let later = load("", &[&variable], &["-b", "redis://later"]).unwrap();
    assert!(later.unused().is_empty(), "the later layer wins");

    let told = "environment FLOWER_EXPORTER_BROKER_REDIS_MASTER_NAME is not read: \
                FLOWER_EXPORTER_BROKER__REDIS__MASTER_NAME is";
    let loaded = load("", &["BROKER_REDIS_MASTER_NAME=x", "PORT=tcp://10.0.0.1:9555", "SERVICE_HOST=x"], &[]).unwrap();
    assert_eq!(loaded.unused(), [told]);
    assert!(loaded.report().starts_with(&format!("# {told}\n[broker]\n")));
}

#[test]
fn tls_is_wanted_or_not() {
    let off = "broker.tls.enabled = false: broker.url asks for TLS, by amqps://, rediss:// or an ssl_ parameter: \
               expected one of both";
    for url in ["amqps://h", "redis://h;rediss://h", "redis://h?ssl_cert_reqs=none"] {
        assert_refused(&format!("broker = {{ url = '{url}', tls.enabled = false }}"), &[], off);
    }
    assert_refused(
        "broker = { url = 'redis+socket:///s', tls.enabled = true }",
        &[],
        "broker.tls.enabled = true: there is no TLS on redis+socket://: expected a URL with a host",
    );
    for (file, expected) in [
        ("broker.url = 'redis://h'", false),
        ("broker.url = 'redis://h?ssl_ca_certs=/ca'", true),
        ("broker.url = 'amqps://h'", true),
        ("broker = { url = 'redis://h', tls.enabled = true }", true),
        ("broker = { url = 'redis://h', tls.enabled = false }", false),
    ] {
        let broker = settings(file, &[], &[]).broker;
        assert_eq!(broker.tls_for(&broker.urls().unwrap()[0]), expected, "{file}");
    }
}

#[test]
fn sentinel_needs_the_name_of_its_master() {
    let unset = "broker.redis.master_name: unset: expected the master's name, which sentinel:// needs";
    assert_refused("broker.url = 'sentinel://h;sentinel://i'", &[], unset);
    settings("broker = { url = 'sentinel://h', redis.master_name = 'm' }", &[], &[]);
}

#[test]
fn a_reload_changes_what_can_change_live() {
    let old = Settings::default();
    let nothing = super::ReloadPlan { settings: old.clone(), live: Vec::new(), restart: Vec::new() };
    assert_eq!(reload(&old, &old.clone()), nothing);
    let new = settings(
        "http.listen = ':1'\nlog.level = 'trace'\nbroker = { url = 'redis://h', reconnect_max = 1 }",
        &[],
        &[],
    );
    let plan = reload(&old, &new);
    assert_eq!(plan.live, ["broker.reconnect_max", "log.level"]);
    assert_eq!(plan.restart, ["broker.url", "http.listen"]);

    let live: Vec<_> = KEYS.iter().filter(|key| key.adopt.is_some()).map(|key| key.name).collect();
    assert_eq!(
        live,
        [
            "broker.connect_timeout",
            "broker.reconnect_max",
            "events.enable_events",
            "events.enable_interval",
            "state.worker_timeout",
            "state.purge_offline_workers",
            "http.request_timeout",
            "http.idle_timeout",
            "log.level",
        ]
    );
}

#[test]
fn a_changed_password_needs_a_restart() {
    let with = |password: &str| settings("", &[], &["-b", &format!("redis://:{password}@h")]);
    assert_eq!(reload(&with("a"), &with("b")).restart, ["broker.url"]);
}

#[test]
fn secrets_are_marked_in_the_schema() {
    for name in ["broker.url", "broker.redis.sentinel_password"] {
        assert_eq!(schema::find(name).unwrap().kind, Kind::Secret);
    }
}

#[track_caller]
fn url(text: &str) -> BrokerUrl {
    text.parse().unwrap()
}

#[test]
fn urls_as_celery_users_write_them() {
    for (text, canonical) in [
        ("amqp://", "amqp://guest:***@localhost:5672//"),
        ("amqp://h", "amqp://guest:***@h:5672//"),
        ("amqp://h/", "amqp://guest:***@h:5672//"),
        ("amqp://h//", "amqp://guest:***@h:5672//"),
        ("amqp://h/%2F", "amqp://guest:***@h:5672//"),
        ("amqp://h/%2f", "amqp://guest:***@h:5672//"),
        ("amqp://h/v", "amqp://guest:***@h:5672/v"),
        ("amqp://h//v", "amqp://guest:***@h:5672//v"),
        ("amqp://h/a%40b%20c", "amqp://guest:***@h:5672/a%40b%20c"),
        ("pyamqp://u:p@h:1/v", "amqp://u:***@h:1/v"),
        ("librabbitmq://u@h", "amqp://u:***@h:5672//"),
        ("AMQPS://h", "amqps://guest:***@h:5671//"),
        ("amqp://h?ssl_cert_reqs=CERT_NONE", "amqps://guest:***@h:5672//?ssl_cert_reqs=none"),
        ("redis://", "redis://localhost:6379/0"),
        ("redis:///2", "redis://localhost:6379/2"),
        ("redis://h:/", "redis://h:6379/0"),
        ("redis://h//3", "redis://h:6379/3"),
        ("redis://:p@h/1", "redis://:***@h:6379/1"),
        ("redis://u:p@h", "redis://u:***@h:6379/0"),
        ("redis://mistaken@h", "redis://***@h:6379/0"),
        ("redis://:@h", "redis://h:6379/0"),
        ("redis://[::1]:7/0", "redis://[::1]:7/0"),
        ("redis://[fe80::1%25eth0]", "redis://[fe80::1%25eth0]:6379/0"),
        (
            "rediss://h?ssl_ca_certs=/a+b&ssl_certfile=%2Fc&ssl_keyfile=&ssl_check_hostname=False",
            "rediss://h:6379/0?ssl_ca_certs=/a%20b&ssl_certfile=/c&ssl_check_hostname=false",
        ),
        ("redis+socket:///run/r.sock", "redis+socket:///run/r.sock?virtual_host=0"),
        ("redis+socket://:p@/run/r.sock?virtual_host=/3", "redis+socket://:***@/run/r.sock?virtual_host=3"),
        ("sentinel://h", "sentinel://h:26379/0"),
    ] {
        assert_eq!(url(text).to_string(), canonical, "{text}");
    }
    assert_eq!(url("amqp://guest:guest@localhost:5672//"), BrokerUrl::default());
}

#[test]
fn url_parts_are_decoded() {
    let odd = url("amqp://us%3Aer:p@ss:w%2Frd%25@h/v%2Fw");
    assert_eq!(odd.username.as_deref(), Some("us:er"));
    assert_eq!(odd.password.as_ref().map(Secret::expose), Some("p@ss:w/rd%"));
    assert_eq!(odd.vhost, "v/w");
    assert_eq!(odd.address, Address::Tcp { host: "h".into(), port: 5672 });
    let socket = url("redis+socket:///a%20b?virtual_host=3");
    assert_eq!((socket.address, socket.db), (Address::Unix(PathBuf::from("/a b")), 3));
    let tls = url("rediss://h?ssl_cert_reqs=optional&ssl_check_hostname=true");
    assert_eq!((tls.tls, tls.ssl.cert_reqs, tls.ssl.check_hostname), (true, Some(CertReqs::Optional), Some(true)));
    assert_eq!((tls.transport, tls.username, tls.password), (Transport::Redis, None, None));
}

#[test]
fn a_list_of_urls_is_tried_in_turn_and_a_sentinel_set_is_one() {
    let urls: BrokerUrls = " redis://a ;; amqp://b;".parse().unwrap();
    assert_eq!(urls.iter().map(|url| url.transport).collect::<Vec<_>>(), [Transport::Redis, Transport::Amqp]);
    let set: BrokerUrls = "sentinel://:pw@a/2;sentinel://b:1/7".parse().unwrap();
    assert_eq!(set.to_string(), "sentinel://:***@a:26379/2;sentinel://:***@b:1/2");
    let error = |text: &str| text.parse::<BrokerUrls>().unwrap_err().to_string();
    assert_eq!(error("sentinel://a;redis://b"), "sentinel:// URLs cannot be mixed with other brokers");
    assert!(error("redis://a;redis://b:x;redis://c").starts_with("URL 2 of 3: the port is not a number"));
}

#[test]
fn bad_urls_say_what_is_accepted() {
    for (text, expected) in [
        ("localhost:6379", "no scheme: expected amqp, pyamqp, amqps, redis, rediss, redis+socket or sentinel"),
        (
            "sqs://k:s@",
            "sqs:// is not supported: expected amqp, pyamqp, amqps, redis, rediss, redis+socket or sentinel",
        ),
        (
            "sqla+sqlite:///x",
            "sqla+sqlite:// is not supported: expected amqp, pyamqp, amqps, redis, rediss, redis+socket or sentinel",
        ),
        ("redis://h:0", "the port is not"),
        ("redis://h:+1", "the port is not"),
        ("redis://h:65536", "the port is not"),
        ("redis://::1/0", "the port is not"),
        ("redis://[::g]/0", "the host is"),
        ("redis://[::1]x/0", "the host is"),
        ("redis://a b/0", "the host is"),
        ("redis://[::1%25!]/0", "the host is"),
        ("redis://h/x", "the database is"),
        ("redis://h/-1", "the database is"),
        ("redis://h/4294967296", "the database is"),
        ("redis+socket://h/x", "expected the path of a socket"),
        ("redis+socket://", "expected the path of a socket"),
        ("redis+socket:///x?ssl_cert_reqs=none", "unknown parameter ssl_cert_reqs: accepted are virtual_host;"),
        ("amqp://h?heartbeat=5", "unknown parameter heartbeat: accepted are ssl_cert_reqs, "),
        ("rediss://h?ssl_cert_reqs=maybe", "ssl_cert_reqs: expected required, optional or none"),
        ("rediss://h?ssl_check_hostname=1", "ssl_check_hostname: expected true or false"),
        ("redis://:a/b@h", "an `@` or `#` after the host"),
        ("amqp://h/%ff", "not valid UTF-8"),
    ] {
        let error = text.parse::<BrokerUrl>().unwrap_err().to_string();
        assert!(error.starts_with(expected), "{text}: {error}");
    }
}
