use std::ffi::OsString;
use std::fs;
use std::os::unix::ffi::OsStringExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use super::Overrides;
use super::broker_url::{Address, BrokerUrl, BrokerUrls, CertReqs, Transport};
use super::load::load_from;
#[cfg(feature = "cli")]
use super::load::probe_from;
use super::schema::{self, KEYS, ValueKind};
use super::{Config, FanoutPrefix, Level, LoadedConfig, Secret, plan_reload};

const EXAMPLE: &str = include_str!(concat!(env!("CARGO_MANIFEST_DIR"), "/flower-exporter.toml.example"));
const NOWHERE: &str = "/nonexistent/flower-exporter.toml";

/// The overrides that the program derives from these arguments.
fn overrides(args: &[&str]) -> Overrides {
    let mut overrides = Overrides::default();
    for pair in args.chunks(2) {
        let value = Some(pair[1].to_owned());
        match pair[0] {
            "-b" | "--broker" => overrides.broker = value.map(Secret::from),
            "-l" | "--listen" => overrides.listen = value,
            "-c" | "--config" => overrides.config_file = value.map(PathBuf::from),
            "--web.config.file" => overrides.web_config_file = value,
            "--log-level" => overrides.log_level = value,
            "--log-format" => overrides.log_format = value,
            other => panic!("unknown option {other}"),
        }
    }
    overrides
}

/// Loads the text of a file, `NAME=value` variables without their prefix, and arguments.
fn load(file: &str, variables: &[&str], args: &[&str]) -> Result<LoadedConfig, String> {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("x.toml");
    fs::write(&path, file).unwrap();
    load_at(&path, variables, args).map_err(|error| {
        let error = error.replace(path.to_str().unwrap(), "x.toml");
        assert!(!error.contains('\n'), "more than one line: {error}");
        error
    })
}

fn load_at(path: &Path, variables: &[&str], args: &[&str]) -> Result<LoadedConfig, String> {
    let variables = variables.iter().map(|variable| {
        let (name, value) = variable.split_once('=').unwrap();
        (format!("FLOWER_EXPORTER_{name}").into(), value.into())
    });
    load_from(&overrides(args), variables, path).map_err(|error| error.to_string())
}

#[track_caller]
fn config(file: &str, variables: &[&str], args: &[&str]) -> Config {
    load(file, variables, args).unwrap().config
}

#[track_caller]
fn assert_invalid(file: &str, variables: &[&str], expected: &str) {
    assert_eq!(load(file, variables, &[]).unwrap_err(), expected);
}

#[test]
fn example_file_has_every_key_with_its_default() {
    assert_eq!(config(EXAMPLE, &[], &[]), Config::default());
    for key in KEYS {
        let section = format!("\n[{}]\n", key.section());
        let body = EXAMPLE.split_once(&section).unwrap().1.split("\n[").next().unwrap();
        let name = &key.name[key.section().len() + 1..];
        let comment = if key.example.is_some() { "# " } else { "" };
        let line = format!("{comment}{name} = ");
        assert!(body.lines().any(|text| text.starts_with(&line)), "{} is not listed", key.name);
    }
    let uncommented = EXAMPLE.replace("# queue_", "queue_").replace("# prefetch_count", "prefetch_count");
    let amqp = config(&uncommented, &[], &[]).broker.amqp;
    let defaults = Config::default().broker.amqp;
    assert_eq!(amqp.queue_expires, Some(defaults.effective_expires()));
    assert_eq!(amqp.prefetch_count, Some(defaults.effective_prefetch_count()));
}

#[test]
fn every_field_has_a_key() {
    let sections: std::collections::BTreeSet<_> = KEYS.iter().map(schema::Key::section).collect();
    for section in sections {
        // The error for an unknown field lists all fields.
        let text = format!("{section}.no_such_field = 1");
        let error = figment::Figment::from(<figment::providers::Toml as figment::providers::Format>::string(&text))
            .extract::<Config>()
            .unwrap_err();
        let figment::error::Kind::UnknownField(_, fields) = error.kind else { panic!("{error:?}") };
        let mut fields = fields.to_vec();
        let mut keys = schema::children(section);
        fields.sort_unstable();
        keys.sort_unstable();
        assert_eq!(keys, fields, "[{section}]");
    }
}

#[test]
fn a_key_is_optional_exactly_when_its_default_is_unset() {
    let defaults = Config::default();
    let effective = ["broker.amqp.queue_expires", "broker.amqp.prefetch_count"];
    for key in KEYS {
        let unset = (key.format)(&defaults).is_none() || effective.contains(&key.name);
        assert_eq!(key.optional, unset, "{}", key.name);
    }
}

#[test]
fn later_sources_override_earlier_ones() {
    let file = "[log]\nlevel = 'warn'";
    let environment = "LOG__LEVEL=error";
    let option = ["--log-level", "debug"];
    let level = |file, variables: &[&str], args: &[&str]| {
        let loaded = load(file, variables, args).unwrap();
        let report = loaded.report();
        let line = report.lines().find(|line| line.starts_with("level = ")).unwrap().to_owned();
        (loaded.config.log.level, line)
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
fn config_file_option_overrides_environment_and_default() {
    let dir = tempfile::tempdir().unwrap();
    let file = |name: &str, workers: u32| {
        let path = dir.path().join(name);
        fs::write(&path, format!("[state]\nmax_workers = {workers}")).unwrap();
        path.to_str().unwrap().to_owned()
    };
    let (default, environment, option) = (file("a", 1), file("b", 2), file("c", 3));
    let variable = format!("CONFIG={environment}");
    let workers = |variables: &[&str], args: &[&str]| {
        load_at(Path::new(&default), variables, args).unwrap().config.state.max_workers
    };
    assert_eq!(workers(&[], &[]), 1);
    assert_eq!(workers(&["CONFIG="], &[]), 1);
    assert_eq!(workers(&[&variable], &[]), 2);
    assert_eq!(workers(&[&variable], &["-c", &option]), 3);

    assert!(load_at(Path::new(NOWHERE), &[], &[]).is_ok());
    let missing = load_at(Path::new(&default), &[], &["-c", NOWHERE]).unwrap_err();
    assert_eq!(missing, format!("{NOWHERE}: No such file or directory (os error 2)"));
}

#[test]
fn environment_values_are_parsed_by_the_type_of_their_key() {
    let loaded = config(
        "[broker.redis]\nmaster_name = 'm'",
        &[
            "BROKER__REDIS__SENTINEL_PASSWORD=0123",
            "BROKER__REDIS__GLOBAL_KEYPREFIX=[\"a\"]",
            "BROKER__REDIS__MASTER_NAME=",
            "BROKER__REDIS__FANOUT_PREFIX=false",
            "BROKER__REDIS__FANOUT_PATTERNS=false",
            "BROKER__AMQP__PREFETCH_COUNT=20",
            "EVENTS__ENABLE_INTERVAL=2.5",
            "EVENTS__BUFFER_MAX_BYTES=1MiB",
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
    assert_eq!(loaded.broker.amqp.prefetch_count, Some(20));
    assert_eq!(loaded.events.enable_interval, Duration::from_millis(2500));
    assert_eq!(loaded.events.buffer_max_bytes, 1 << 20);
    let hostnames = loaded.events.hostnames.unwrap();
    assert_eq!(hostnames.patterns(), ["[ab]@x", "*@y", "12"]);
    assert!(hostnames.matches("b@x") && hostnames.matches("celery@y"));
    assert!(!hostnames.matches("c@x") && !hostnames.matches("celery@y.z"));
    assert_eq!(loaded.metrics.task_runtime_metric_buckets, [1.0, 2.5]);
    assert_eq!(loaded.state.worker_timeout, None);
    assert_eq!(loaded.http.listen.to_string(), "0.0.0.0:80");
}

#[test]
fn kubernetes_service_variables_are_ignored_and_unknown_keys_are_errors() {
    let kubernetes = ["PORT=tcp://10.0.0.1:9555", "SERVICE_HOST=10.0.0.1", "PORT_9555_TCP_ADDR=x"];
    assert_eq!(config("", &kubernetes, &[]), Config::default());
    assert_invalid(
        "",
        &["STATE__MAX_TASK=5"],
        "environment FLOWER_EXPORTER_STATE__MAX_TASK: unknown key state.max_task: expected one of \
         max_workers, max_tasks, worker_timeout, purge_offline_workers, purge_stopped_workers, persistent, db, \
         state_save_interval",
    );
    assert_invalid(
        "",
        &["STAT__MAX_TASKS=5"],
        "environment FLOWER_EXPORTER_STAT__MAX_TASKS: unknown key stat.max_tasks: expected one of \
         broker, events, state, metrics, http, log",
    );
    let name = OsString::from("FLOWER_EXPORTER_BROKER__URL");
    let value = OsString::from_vec(b"redis://:hunter2\xff@h".to_vec());
    let error = load_from(&Overrides::default(), [(name, value)], Path::new(NOWHERE)).unwrap_err();
    assert_eq!(error.to_string(), "environment FLOWER_EXPORTER_BROKER__URL: not valid UTF-8");
}

/// Error texts, and invalid lines that lead to them.
const INVALID_VALUES: &[(&str, &[&str])] = &[
    (
        "expected a whole number from 1 to 100000000",
        &["state.max_tasks = -5", "state.max_tasks = 1.5", r#"state.max_tasks = "7""#],
    ),
    ("expected true or false", &[r#"state.persistent = "yes""#, "broker.tls.enabled = 1"]),
    ("expected a string", &["state.db = 5", r#"broker.tls.ca_file = [1, "a"]"#]),
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
        &["events.enable_interval = 0.05", "broker.reconnect_backoff_max = true"],
    ),
    (
        r#"expected a duration such as "500ms", "10m" or a number of seconds, from 1ms to 30days"#,
        &["broker.amqp.message_ttl = 0", r#"broker.amqp.queue_expires = "50d""#],
    ),
    (
        r#"expected whole seconds from 1 to 65535, such as "10s" or 10"#,
        &[r#"broker.amqp.heartbeat = "1500ms""#, "broker.amqp.heartbeat = 0"],
    ),
    (
        r#"expected a duration such as "500ms", "10m" or a number of seconds, up to 10years; 0 means never"#,
        &[r#"state.worker_timeout = "never""#],
    ),
    (
        r#"expected a size such as "64MiB", "100kB" or a number of bytes, from 1KiB to 1GiB"#,
        &[r#"events.message_max_bytes = "12 parsecs""#, "events.message_max_bytes = 1"],
    ),
    ("expected a name of 1 to 218 bytes", &[r#"events.exchange = """#]),
    (
        r#"expected globs of worker hostnames, such as ["*@my-pod"]"#,
        &["events.hostnames = []", r#"events.hostnames = "*""#],
    ),
    (
        r#"expected groups of workers, such as ["web=celery@web-*|celery@api-*", "all=*"]"#,
        &["metrics.worker_groups = []", r#"metrics.worker_groups = "all=*""#],
    ),
    (
        r#"expected groups of workers, such as ["web=celery@web-*|celery@api-*", "all=*"]; "x" has no ="#,
        &[r#"metrics.worker_groups = ["all=*", "x"]"#],
    ),
    (
        r#"expected globs of worker hostnames, such as ["*@my-pod"]; "[x" is not a valid glob: unclosed character class; missing ']'"#,
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
        "expected a number above 1, such as 1.1",
        &[
            "metrics.native_histogram_bucket_factor = 1",
            "metrics.native_histogram_bucket_factor = -2.5",
            "metrics.native_histogram_bucket_factor = inf",
            r#"metrics.native_histogram_bucket_factor = "1.1x""#,
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
fn an_invalid_value_is_a_one_line_error() {
    for (expected, lines) in INVALID_VALUES {
        for line in *lines {
            assert_invalid(line, &[], &format!("x.toml: {line}: {expected}"));
        }
    }
    assert_invalid("broker = 5", &[], "x.toml: broker: expected a table [broker]");
    assert_invalid(
        "broker.redis.sentinel_password = 123",
        &[],
        "x.toml: broker.redis.sentinel_password = ***: expected a string",
    );
}

#[test]
fn an_error_names_the_variable_or_option() {
    assert_invalid(
        "",
        &["EVENTS__ENABLE_INTERVAL=soon"],
        "environment FLOWER_EXPORTER_EVENTS__ENABLE_INTERVAL = \"soon\": expected a duration such as \
         \"500ms\", \"10m\" or a number of seconds, from 100ms to 10years",
    );
    assert_invalid(
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
fn a_syntax_error_has_a_location_but_no_file_content() {
    assert_invalid(
        "[state]\nmax_workers = 1\n  url = redis://:hunter2@h\n",
        &[],
        "x.toml: line 3, column 9: invalid string, expected `\"`, `'`",
    );
    assert_invalid(
        "[state]\nmax_task = 1",
        &[],
        "x.toml: unknown key state.max_task: expected one of max_workers, max_tasks, worker_timeout, \
         purge_offline_workers, purge_stopped_workers, persistent, db, state_save_interval",
    );
    assert_invalid(
        "[broker.rediss]",
        &[],
        "x.toml: unknown key broker.rediss: expected one of url, url_file, connect_timeout, \
         reconnect_backoff_max, tls, amqp, redis",
    );
}

#[test]
fn sizes_durations_and_addresses_accept_several_formats() {
    for (text, bytes) in [
        ("'64KiB'", 65_536),
        ("'100kB'", 100_000),
        ("'1 gib'", 1 << 30),
        ("2048", 2048),
        ("'2048'", 2048),
        ("'5MB'", 5_000_000),
    ] {
        let file = format!("events.message_max_bytes = {text}");
        assert_eq!(config(&file, &[], &[]).events.message_max_bytes, bytes, "{text}");
    }
    for (text, millis) in
        [("'500ms'", 500), ("'10m'", 600_000), ("5", 5000), ("'5'", 5000), ("0.25", 250), ("'1h 30s'", 3_630_000)]
    {
        let file = format!("http.idle_timeout = {text}");
        assert_eq!(config(&file, &[], &[]).http.idle_timeout, Duration::from_millis(millis), "{text}");
    }
    for (text, address) in [
        ("127.0.0.1:1", "127.0.0.1:1"),
        ("[::]:9555", "[::]:9555"),
        (":0", "0.0.0.0:0"),
        ("localhost:80", "127.0.0.1:80"),
    ] {
        assert_eq!(config("", &[], &["-l", text]).http.listen.to_string(), address);
    }
}

#[test]
fn loading_the_report_yields_the_same_configuration() {
    let file = "events = { hostnames = ['a\"b\\\\', '*'], buffer_max_bytes = '1GiB' }
        broker.redis = { fanout_prefix = '/x.', global_keyprefix = \"\\u0007\" }
        state = { worker_timeout = 0, max_workers = 7 }
        broker.url = ['redis://h', 'amqp://']";
    let loaded = load(file, &[], &[]).unwrap();
    let mut reloaded = config(&loaded.report(), &[], &[]);
    assert_eq!(reloaded.broker.url.to_string(), "redis://h:6379/0;amqp://guest:***@localhost:5672//");
    reloaded.broker.url = loaded.config.broker.url.clone();
    reloaded.broker.amqp.queue_expires = None;
    reloaded.broker.amqp.prefetch_count = None;
    assert_eq!(reloaded, loaded.config);
    assert!(loaded.report().contains("\n# master_name is unset  # default\n"));
    assert!(loaded.report().starts_with("[broker]\nurl = "));
}

#[test]
fn a_password_is_never_printed() {
    let url = "redis://user:hunt%65r2@h:6379/0;amqp://:hunt%65r2@h";
    let variables = [format!("BROKER__URL={url}"), "BROKER__REDIS__SENTINEL_PASSWORD=hunter2".to_owned()];
    let variables: Vec<_> = variables.iter().map(String::as_str).collect();
    let loaded = load("", &variables, &[]).unwrap();
    let secret = loaded.config.broker.redis.sentinel_password.as_ref().unwrap();
    let mut printed = vec![
        format!("{loaded:?}"),
        format!("{:#?}", loaded.config),
        loaded.report(),
        loaded.config.broker.url.to_string(),
        format!("{secret} {secret:?} {:?}", overrides(&["-b", url])),
    ];
    assert_eq!(loaded.config.broker.url[0].password.as_ref().map(Secret::expose), Some("hunter2"));
    assert!(loaded.report().contains("url = \"redis://user:***@h:6379/0;amqp://guest:***@h:5672//\""));

    for invalid in [
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
        fs::write(&path, invalid).unwrap();
        printed.push(load("", &[&format!("BROKER__URL={invalid}")], &[]).unwrap_err());
        printed.push(load("", &[], &["-b", invalid]).unwrap_err());
        printed.push(load(&format!("broker.url = ['{invalid}']"), &[], &[]).unwrap_err());
        printed.push(load("", &[&format!("BROKER__URL_FILE={}", path.display())], &[]).unwrap_err());
    }
    let url = "redis://:hunter2@h";
    for misplaced in ["HTTP__LISTEN", "BROKER__URL_FILE", "CONFIG", "EVENTS__ENABLE_INTERVAL", "STATE__MAX_TASKS"] {
        printed.push(load("", &[&format!("{misplaced}={url}")], &[]).unwrap_err());
    }
    for text in printed {
        assert!(!text.contains("hunter2") && !text.contains("hunt%65r2"), "{text}");
    }
}

#[test]
fn url_file_overrides_url_and_is_read_on_every_call() {
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
    assert_eq!(load("", &variables, &[]).unwrap_err(), format!("{named}: file exceeds 64 KiB"));

    fs::write(&path, "\n redis://a\n").unwrap();
    let broker = config("", &variables, &["-b", "redis://later"]).broker;
    assert_eq!(broker.urls().unwrap().to_string(), "redis://later:6379/0", "a URL in a later source wins");
    let file = format!("broker.url_file = {path:?}");
    let broker = config(&file, &["BROKER__URL=redis://later"], &[]).broker;
    assert_eq!(broker.urls().unwrap().to_string(), "redis://later:6379/0");
    let broker = config("broker.url = 'redis://ignored'", &variables, &[]).broker;
    assert_eq!(broker.urls().unwrap().to_string(), "redis://a:6379/0");
    fs::write(&path, "redis://b;amqp://c").unwrap();
    assert_eq!(broker.urls().unwrap().len(), 2);
}

#[test]
fn values_without_effect_are_warnings() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("url");
    fs::write(&path, "redis://a").unwrap();
    let variable = format!("BROKER__URL_FILE={}", path.display());
    let warnings = |file: &str, variables: &[&str]| load(file, variables, &[]).unwrap().warnings();
    let [warning] = &warnings("broker.url = 'redis://ignored'", &[&variable])[..] else {
        panic!("expected one warning")
    };
    assert!(warning.starts_with("broker.url ("), "{warning}");
    assert!(
        warning.ends_with("is ignored because broker.url_file (environment FLOWER_EXPORTER_BROKER__URL_FILE) is set")
    );
    assert!(warnings(EXAMPLE, &[&variable]).is_empty(), "the default is not a value that the operator set");
    assert!(warnings("broker.url = 'redis://used'", &[]).is_empty());
    let later = load("", &[&variable], &["-b", "redis://later"]).unwrap();
    assert!(later.warnings().is_empty(), "a URL in a later source wins");

    let warning = "environment variable FLOWER_EXPORTER_BROKER_REDIS_MASTER_NAME is ignored; did you mean \
                   FLOWER_EXPORTER_BROKER__REDIS__MASTER_NAME?";
    let loaded = load("", &["BROKER_REDIS_MASTER_NAME=x", "PORT=tcp://10.0.0.1:9555", "SERVICE_HOST=x"], &[]).unwrap();
    assert_eq!(loaded.warnings(), [warning]);
    assert!(loaded.report().starts_with(&format!("# {warning}\n[broker]\n")));
}

#[test]
fn tls_is_enabled_by_the_url_or_by_the_setting() {
    let off = "broker.tls.enabled = false: broker.url requires TLS (amqps://, rediss:// or an ssl_ parameter): \
               enable TLS, or use a URL without it";
    for url in ["amqps://h", "redis://h;rediss://h", "redis://h?ssl_cert_reqs=none"] {
        assert_invalid(&format!("broker = {{ url = '{url}', tls.enabled = false }}"), &[], off);
    }
    assert_invalid(
        "broker = { url = 'redis+socket:///s', tls.enabled = true }",
        &[],
        "broker.tls.enabled = true: TLS is not supported on redis+socket://: expected a URL with a host",
    );
    for (file, expected) in [
        ("broker.url = 'redis://h'", false),
        ("broker.url = 'redis://h?ssl_ca_certs=/ca'", true),
        ("broker.url = 'amqps://h'", true),
        ("broker = { url = 'redis://h', tls.enabled = true }", true),
        ("broker = { url = 'redis://h', tls.enabled = false }", false),
    ] {
        let broker = config(file, &[], &[]).broker;
        assert_eq!(broker.tls_for(&broker.urls().unwrap()[0]), expected, "{file}");
    }
}

#[test]
fn sentinel_requires_a_master_name() {
    let unset = "broker.redis.master_name: required for sentinel:// URLs: expected the master's name";
    assert_invalid("broker.url = 'sentinel://h;sentinel://i'", &[], unset);
    config("broker = { url = 'sentinel://h', redis.master_name = 'm' }", &[], &[]);
}

#[test]
fn reload_applies_only_live_keys() {
    let old = Config::default();
    let unchanged = super::ReloadReport { config: old.clone(), applied: Vec::new(), requires_restart: Vec::new() };
    assert_eq!(plan_reload(&old, &old.clone()), unchanged);
    let new = config(
        "http.listen = ':1'\nlog.level = 'trace'\nbroker = { url = 'redis://h', reconnect_backoff_max = 1 }",
        &[],
        &[],
    );
    let report = plan_reload(&old, &new);
    assert_eq!(report.applied, ["broker.reconnect_backoff_max", "log.level"]);
    assert_eq!(report.requires_restart, ["broker.url", "http.listen"]);

    let applied: Vec<_> = KEYS.iter().filter(|key| key.live).map(|key| key.name).collect();
    assert_eq!(
        applied,
        [
            // A new live key belongs in this list.
            "broker.connect_timeout",
            "broker.reconnect_backoff_max",
            "events.enable_events",
            "events.enable_interval",
            "state.worker_timeout",
            "state.purge_offline_workers",
            "state.purge_stopped_workers",
            "http.request_timeout",
            "http.idle_timeout",
            "log.level",
        ]
    );
}

#[test]
fn a_changed_password_requires_a_restart() {
    let with = |password: &str| config("", &[], &["-b", &format!("redis://:{password}@h")]);
    assert_eq!(plan_reload(&with("a"), &with("b")).requires_restart, ["broker.url"]);
}

#[test]
fn schema_marks_secrets() {
    for name in ["broker.url", "broker.redis.sentinel_password"] {
        assert_eq!(schema::find(name).unwrap().kind, ValueKind::Secret);
    }
}

#[track_caller]
fn url(text: &str) -> BrokerUrl {
    text.parse().unwrap()
}

#[test]
fn celery_urls_have_a_canonical_form() {
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
        ("amqp://h?ssl_cert_reqs=CERT_NONE", "amqps://guest:***@h:5671//?ssl_cert_reqs=none"),
        ("amqp://h:0/v?ssl=false", "amqps://guest:***@h:5671/v"),
        ("amqp://h:5672?ssl=1&insist=1", "amqps://guest:***@h:5672//"),
        (
            "amqp://h/v?heartbeat=2.5&connect_timeout=7&login_method=EXTERNAL",
            "amqp://guest:***@h:5672/v?heartbeat=3&connect_timeout=7&login_method=EXTERNAL",
        ),
        ("amqp://h?heartbeat=0&unknown=&a", "amqp://guest:***@h:5672//"),
        ("redis://h:0?heartbeat=9&login_method=x&connect_timeout=3", "redis://h:6379/0?connect_timeout=3"),
        ("rediss://h?ssl_ca_path=/c&ssl_ca_data=a%0Ab", "rediss://h:6379/0?ssl_ca_path=/c&ssl_ca_data=a%0Ab"),
        ("redis+socket:///s?db=1&client_name=x&virtual_host=2", "redis+socket:///s?virtual_host=2"),
        ("redis://", "redis://localhost:6379/0"),
        ("redis:///2", "redis://localhost:6379/2"),
        ("redis://h:/", "redis://h:6379/0"),
        ("redis://h//3", "redis://h:6379/3"),
        ("redis://:p@h/1", "redis://:***@h:6379/1"),
        ("redis://u:p@h", "redis://u:***@h:6379/0"),
        ("redis://missing-colon@h", "redis://***@h:6379/0"),
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
fn url_components_are_percent_decoded() {
    let amqp = url("amqp://us%3Aer:p@ss:w%2Frd%25@h/v%2Fw");
    assert_eq!(amqp.username.as_deref(), Some("us:er"));
    assert_eq!(amqp.password.as_ref().map(Secret::expose), Some("p@ss:w/rd%"));
    assert_eq!(amqp.vhost, "v/w");
    assert_eq!(amqp.address, Address::Tcp { host: "h".into(), port: 5672 });
    let socket = url("redis+socket:///a%20b?virtual_host=3");
    assert_eq!((socket.address, socket.db), (Address::Unix(PathBuf::from("/a b")), 3));
    let tls = url("rediss://h?ssl_cert_reqs=optional&ssl_check_hostname=true");
    assert_eq!((tls.tls, tls.ssl.cert_reqs, tls.ssl.check_hostname), (true, Some(CertReqs::Optional), Some(true)));
    assert_eq!((tls.transport, tls.username, tls.password), (Transport::Redis, None, None));
}

#[test]
fn members_of_a_sentinel_set_share_the_options_of_the_first() {
    let urls: BrokerUrls = " redis://a ;; amqp://b;".parse().unwrap();
    assert_eq!(urls.iter().map(|url| url.transport).collect::<Vec<_>>(), [Transport::Redis, Transport::Amqp]);
    let set: BrokerUrls = "sentinel://:pw@a/2;sentinel://b:1/7".parse().unwrap();
    assert_eq!(set.to_string(), "sentinel://:***@a:26379/2;sentinel://:***@b:1/2");
    let error = |text: &str| text.parse::<BrokerUrls>().unwrap_err().to_string();
    assert_eq!(error("sentinel://a;redis://b"), "sentinel:// URLs cannot be mixed with other brokers");
    assert!(error("redis://a;redis://b:x;redis://c").starts_with("URL 2 of 3: the port is not a number"));
}

#[test]
fn mistakes_around_a_url_are_named_without_its_text() {
    let error = |text: &str| text.parse::<BrokerUrls>().unwrap_err().to_string();
    for quoted in ["\"redis://:pw@h/0\"", "'redis://:pw@h/0'"] {
        assert_eq!(error(quoted), "the URL is in quotes: remove them");
    }
    assert_eq!(error("BROKER_URL=redis://:pw@h"), "the URL begins with the name of a variable and `=`: remove them");
    assert!(error("localhost:6379").starts_with("no scheme before localhost:6379: expected amqp, "));
    assert!(error("10.0.0.1").starts_with("no scheme before 10.0.0.1: expected amqp, "));
    for possible_secret in ["hunter2", "hunter2:6379", "localhost:hunter2", "localhost:6379;hunter2"] {
        let error = error(possible_secret);
        assert!(error.contains("no scheme: expected") && !error.contains("hunter2"), "{error}");
    }
}

#[test]
fn url_errors_state_what_is_accepted() {
    for (text, expected) in [
        ("secret:6379", "no scheme: expected amqp, pyamqp, amqps, redis, rediss, redis+socket or sentinel"),
        (
            "sqs://k:s@",
            "sqs:// is not supported: expected amqp, pyamqp, amqps, redis, rediss, redis+socket or sentinel",
        ),
        (
            "sqla+sqlite:///x",
            "sqla+sqlite:// is not supported: expected amqp, pyamqp, amqps, redis, rediss, redis+socket or sentinel",
        ),
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
        ("redis+socket:///x?ssl_cert_reqs=none", "unknown parameter ssl_cert_reqs: expected virtual_host"),
        ("amqp://h?heart=5", "unknown parameter heart: expected heartbeat, connect_timeout, "),
        ("amqp://h?a%20b=5", "unknown parameter (not printed): expected heartbeat, "),
        ("amqp://h?heartbeat=x", "parameter heartbeat: expected seconds from 0 to 65535"),
        ("redis://h?connect_timeout=0", "parameter connect_timeout: expected a number of seconds above 0"),
        ("amqp://h?login_method=external", "parameter login_method: expected PLAIN, AMQPLAIN or EXTERNAL"),
        ("redis://h?credential_provider=a.b", "parameter credential_provider is not supported: set broker.url_file"),
        ("redis://h?socket_timeout=3", "parameter socket_timeout is not supported: set broker.connect_timeout"),
        ("redis://h?db=3", "parameter db is not supported: write the virtual host or database as the path"),
        ("redis://h?ssl=true", "parameter ssl is not supported: use rediss://"),
        ("rediss://h?ssl_cert_reqs=NONE", "parameter ssl_cert_reqs: expected required, optional or none"),
        ("rediss://h?ssl_password=x", "parameter ssl_password is not supported: decrypt the key"),
        ("redis://:a/b@h", "an `@` or `#` after the host"),
        ("amqp://h/%ff", "not valid UTF-8"),
    ] {
        let error = text.parse::<BrokerUrl>().unwrap_err().to_string();
        assert!(error.starts_with(expected), "{text}: {error}");
    }
}

#[test]
fn a_renamed_key_is_an_error_with_the_new_name() {
    for (old, new) in [
        ("broker.reconnect_max", "broker.reconnect_backoff_max"),
        ("broker.amqp.prefetch", "broker.amqp.prefetch_count"),
        ("broker.amqp.queue_ttl", "broker.amqp.message_ttl"),
        ("events.max_backlog", "events.buffer_max_bytes"),
        ("events.max_message", "events.message_max_bytes"),
        ("metrics.max_label_pairs", "metrics.max_label_sets"),
    ] {
        assert!(schema::find(old).is_none() && schema::find(new).is_some());
        assert_invalid(&format!("{old} = 5"), &[], &format!("x.toml: unknown key {old}: renamed to {new}"));
    }
    assert_invalid(
        "",
        &["EVENTS__MAX_BACKLOG=5"],
        "environment FLOWER_EXPORTER_EVENTS__MAX_BACKLOG: unknown key events.max_backlog: renamed to \
         events.buffer_max_bytes",
    );
}

#[test]
fn save_interval_rejects_milliseconds_without_a_unit() {
    let interval =
        |value: &str| config(&format!("state.state_save_interval = {value}"), &[], &[]).state.state_save_interval;
    assert_eq!(Config::default().state.state_save_interval, Some(Duration::from_millis(250)));
    assert_eq!(interval("0"), None);
    assert_eq!(interval("'0s'"), None);
    assert_eq!(interval("2.5"), Some(Duration::from_millis(2500)));
    assert_eq!(interval("3600"), Some(Duration::from_secs(3600)));
    assert_eq!(interval("'2h'"), Some(Duration::from_secs(7200)));
    // Flower's setting of this name is in milliseconds.
    for value in ["30000", "'30000'", "3600.5"] {
        let error = load(&format!("state.state_save_interval = {value}"), &[], &[]).unwrap_err();
        assert!(error.contains("Flower's setting is in milliseconds") && error.contains("ms\""), "{error}");
    }
    let error = load("", &["STATE__STATE_SAVE_INTERVAL=30000"], &[]).unwrap_err();
    assert!(error.ends_with("in milliseconds: write \"30000ms\""), "{error}");
}

#[test]
fn a_persistent_named_queue_requires_a_save_interval() {
    let with = |queue: &str, persistent: bool| {
        let file =
            format!("state = {{ state_save_interval = 0, persistent = {persistent} }}\nbroker.amqp = {{ {queue} }}");
        load(&file, &[], &[]).map(|_| ())
    };
    assert_eq!(with("queue = 'q'", false), Ok(()));
    assert_eq!(with("", true), Ok(()));
    let error = with("queue = 'q'", true).unwrap_err();
    assert!(error.starts_with("state.state_save_interval = 0: with broker.amqp.queue"), "{error}");
    let redis =
        "state = { state_save_interval = 0, persistent = true }\nbroker = { url = 'redis://h', amqp.queue = 'q' }";
    assert!(load(redis, &[], &[]).is_ok(), "Redis has no queues");
}

#[test]
fn only_amqp_urls_have_a_named_queue() {
    let config = config("broker.amqp.queue = 'q'\nbroker.url = 'amqp://a;redis://b'", &[], &[]);
    let urls = config.broker.urls().unwrap();
    let queues: Vec<_> = urls.iter().map(|url| config.for_url(url).broker.amqp.queue).collect();
    assert_eq!(queues, [Some("q".to_owned()), None]);
}

#[cfg(feature = "cli")]
#[test]
fn the_listen_address_alone_can_be_loaded() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("x.toml");
    let load = |file: &str, variables: &[(&str, &str)], args: &[&str]| {
        fs::write(&path, file).unwrap();
        let variables =
            variables.iter().map(|(name, value)| (format!("FLOWER_EXPORTER_{name}").into(), (*value).into()));
        probe_from(&overrides(args), variables, &path).map(|http| http.listen.port()).map_err(|e| e.to_string())
    };
    let file = "[http]\nlisten = \":1\"";
    assert_eq!(load(file, &[], &[]), Ok(1));
    assert_eq!(load(file, &[("HTTP__LISTEN", ":2")], &[]), Ok(2));
    assert_eq!(load(file, &[("HTTP__LISTEN", ":2")], &["-l", ":3"]), Ok(3));
    let invalid = [("STATE__MAX_TASKS", "many"), ("NO_SUCH__KEY", "1"), ("BROKER__URL_FILE", "/nonexistent")];
    assert_eq!(
        load("no_such_key = 1\n[http]\nlisten = \":1\"\nmax_connections = \"x\"", &invalid, &["-b", "x"]),
        Ok(1)
    );
    for absent in ["", "[http", "http = 1", "[http]\nlisten = \"x\""] {
        assert_eq!(load(absent, &[], &[]), Ok(9555), "{absent}");
        assert_eq!(load(absent, &[("HTTP__LISTEN", ":2")], &[]), Ok(2), "{absent}");
    }
    assert_eq!(load("", &[], &["-c", NOWHERE]), Ok(9555));
    assert!(load("", &[("HTTP__LISTEN", "x")], &[]).unwrap_err().contains("FLOWER_EXPORTER_HTTP__LISTEN = \"x\""));
    assert!(load("", &[], &["-l", "x"]).unwrap_err().contains("--listen = \"x\""));
}
