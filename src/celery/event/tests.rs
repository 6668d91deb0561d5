use proptest::collection::vec;
use proptest::prelude::*;
use proptest::sample;

use super::decode::Draft;
use super::*;
use crate::celery::DecodeError;
use crate::celery::json::fast_json::Scanner;

/// The task ID and hostname of every event in `body`.
fn decode_all(body: &str, keep_raw: bool) -> Vec<Result<String, DecodeError>> {
    let mut decoded = Vec::new();
    decode(body.as_bytes(), keep_raw, |event| {
        decoded.push(event.map(|event| format!("{} {}", event.uuid, event.hostname)));
    });
    decoded
}

/// Decodes a body that contains exactly one event.
fn with_event(body: &str, check: impl FnOnce(&Event)) {
    let mut check = Some(check);
    decode(body.as_bytes(), true, |event| check.take().unwrap()(event.unwrap()));
    assert!(check.is_none());
}

const VALID: &str = r#"{"type": "task-received", "hostname": "w", "timestamp": 1, "uuid": "a"}"#;

#[test]
fn an_invalid_element_does_not_affect_the_others() {
    let ok = || Ok("a w".to_owned());
    for keep_raw in [false, true] {
        let batch = format!("[{VALID}, {{\"x\": nonsense}}, 5, {VALID},{VALID}]");
        assert_eq!(
            decode_all(&batch, keep_raw),
            [ok(), Err(DecodeError::Json), Err(DecodeError::NotAnEvent), ok(), ok()]
        );
        assert_eq!(decode_all(&format!("[{VALID}, {{\"type\": "), keep_raw), [ok(), Err(DecodeError::Json)]);
        assert_eq!(decode_all(VALID, keep_raw), [ok()]);
        assert_eq!(decode_all("[]", keep_raw), []);
        assert_eq!(
            decode_all(&format!("[5}}, }}, {VALID}]"), keep_raw),
            [Err(DecodeError::Json), Err(DecodeError::Json), ok()]
        );
    }
}

/// Events as Python encodes them: a received task, a succeeded task and a heartbeat.
const PYTHON: &str = concat!(
    r#"[{"hostname": "celery@w1", "utcoffset": 0.0, "pid": 77, "clock": 12, "uuid": "0b6a3b4e-9d3f-4a53-93a1", "#,
    r#""name": "shop.add", "args": "('it\\'s', \"\u00e9\")", "kwargs": "{}", "root_id": null, "retries": 1, "eta": null, "#,
    r#""timestamp": 1763820000.1234567, "type": "task-received"}, {"hostname": "w", "uuid": "a", "result": "[1, 2]", "#,
    r#""runtime": 8.8e-05, "timestamp": 1763820000.5, "type": "task-succeeded"}, {"hostname": "w", "freq": 2.0, "#,
    r#""active": 0, "processed": 3, "loadavg": [0.5, 0.25, 1], "sw_ident": "py-celery", "timestamp": -0.0, "#,
    r#""x": [[], {"a": {}}], "type": "worker-heartbeat"}]"#
);

fn debug_all(decode: impl FnOnce(&mut dyn FnMut(Result<&Event<'_>, DecodeError>))) -> Vec<String> {
    let mut decoded = Vec::new();
    decode(&mut |event| decoded.push(format!("{event:?}")));
    decoded
}

#[test]
fn fast_path_reads_events_that_python_encodes() {
    let mut rest = &PYTHON[1..];
    for _ in 0..3 {
        let length = Draft::default().scan(rest).unwrap();
        rest = rest[length..].trim_start_matches([',', ' ']);
    }
    assert_eq!(rest, "]");
}

proptest! {
    /// Both paths agree on events that Python encodes, intact or damaged.
    #[test]
    fn fast_path_agrees_with_serde(
        damage in vec((0..PYTHON.len(), sample::select(&b"\"\\{}[],: 0-.e1nu\x00\x80\n"[..])), 0..4),
        length in 0..PYTHON.len() * 2,
        keep_raw: bool,
    ) {
        let mut body = PYTHON.as_bytes().to_vec();
        for (at, byte) in damage {
            body[at] = byte;
        }
        body.truncate(length.max(1));
        let fast = debug_all(|each| decode(&body, keep_raw, each));
        let slow = debug_all(|each| decode_slow_path(&body, keep_raw, each));
        prop_assert_eq!(fast, slow);
    }
}

/// Events with the members in Celery's order, as its workers and clients write them.
const USUAL: [&str; 6] = [
    r#"{"hostname": "gen1@h", "utcoffset": 0.0, "pid": 7, "clock": 1, "uuid": "a", "root_id": "a", "parent_id": null, "name": "add", "args": "(2, 'x')", "kwargs": "{}", "retries": 0, "eta": null, "expires": null, "queue": "celery", "exchange": "", "routing_key": "celery", "timestamp": 1763820000.1234567, "type": "task-sent"}"#,
    r#"{"hostname": "celery@h", "utcoffset": -7, "pid": 7, "clock": 12, "uuid": "a", "name": "add", "args": "(2, 'x')", "kwargs": "{}", "root_id": "a", "parent_id": null, "retries": 0, "eta": null, "expires": null, "timestamp": 1763820000.125, "type": "task-received"}"#,
    r#"{"hostname": "celery@h", "utcoffset": 0.0, "pid": 7, "clock": 13, "uuid": "a", "timestamp": 1763820000.5, "type": "task-started"}"#,
    r#"{"hostname": "celery@h", "utcoffset": 0.0, "pid": 7, "clock": 14, "uuid": "a", "result": "4", "runtime": 0.04213751700008288, "timestamp": 1763820001.5, "type": "task-succeeded"}"#,
    r#"{"hostname": "celery@h", "utcoffset": 0.0, "pid": 7, "clock": 15, "uuid": "a", "exception": "KeyError('x')", "traceback": "Traceback:\n \"f.py\"\n", "timestamp": 1763820001.5, "type": "task-failed"}"#,
    r#"{"hostname": "celery@h", "utcoffset": 0.0, "pid": 7, "clock": 17, "freq": 2.0, "active": 0, "processed": 3, "loadavg": [0.5, 0.25, 1], "sw_ident": "py-celery", "sw_ver": "5.5.3", "sw_sys": "Linux", "timestamp": 1763820001.5, "type": "worker-heartbeat"}"#,
];

#[test]
fn usual_members_are_read_without_a_search() {
    for event in USUAL {
        let mut scanner = Scanner::new(event);
        assert_eq!(Draft::default().scan_usual_members(&mut scanner), Ok(true));
        assert_eq!(scanner.rest(), "}", "{event}");
    }
}

const UNUSUAL: [&str; 12] = [
    r#""w""#,
    r#""task-sent""#,
    "null",
    "7",
    "0.5",
    r#""""#,
    r#""\n""#,
    "[1, 2, 3]",
    r#"{"a": []}"#,
    "true",
    "01",
    "-0",
];

/// The members of an object as text.
fn members(object: &str) -> Vec<String> {
    let text = &object[1..object.len() - 1];
    text.split(", \"").map(|member| format!("\"{}", member.trim_start_matches('"'))).collect()
}

/// A member with one of Celery's names and any value.
fn unusual_member() -> impl Strategy<Value = String> {
    let usual: Vec<String> = USUAL.iter().flat_map(|event| members(event)).collect();
    (sample::select(usual), sample::select(&UNUSUAL[..]))
        .prop_map(|(usual, value)| format!("{}: {value}", usual.split_once(": ").unwrap().0))
}

proptest! {
    /// Members that are missing, repeated, in another order or of another type read as with `serde_json`, where the last
    /// one with a name wins.
    #[test]
    fn unusual_members_are_read_like_any_object(
        usual in sample::select(&USUAL[..]),
        unusual in vec((unusual_member(), 0..20_usize), 0..4),
        removed in vec(0..20_usize, 0..3),
    ) {
        let mut all = members(usual);
        for index in removed {
            let index = index % all.len();
            all.remove(index);
        }
        for (member, index) in unusual {
            all.insert(index % (all.len() + 1), member);
        }
        let body = format!("[{{{}}}]", all.join(", "));
        let fast = debug_all(|each| decode(body.as_bytes(), true, each));
        let slow = debug_all(|each| decode_slow_path(body.as_bytes(), true, each));
        prop_assert_eq!(fast, slow, "{}", body);
    }
}

#[test]
fn an_event_without_a_mandatory_field_is_invalid() {
    for (body, expected) in [
        ("", DecodeError::Json),
        ("5", DecodeError::NotAnEvent),
        (r#"{"hostname": "w", "timestamp": 1}"#, DecodeError::NoType),
        (r#"{"type": 1, "hostname": "w", "timestamp": 1}"#, DecodeError::NoType),
        (r#"{"type": "task-x", "hostname": null, "timestamp": 1}"#, DecodeError::NoHostname),
        (r#"{"type": "task-x", "hostname": "w", "timestamp": "1"}"#, DecodeError::NoTimestamp),
        (r#"{"type": "task-x", "hostname": "w", "timestamp": true}"#, DecodeError::NoTimestamp),
        (r#"{"type": "task-x", "hostname": "w", "timestamp": NaN}"#, DecodeError::NoTimestamp),
        (r#"{"type": "task-x", "hostname": "w", "timestamp": 1}"#, DecodeError::NoUuid),
    ] {
        assert_eq!(decode_all(body, false), [Err(expected)], "{body}");
    }
    assert_eq!(decode_all(r#"{"type": "worker-online", "hostname": "w"}"#, false), [Ok(" w".to_owned())]);
}

#[test]
fn fields_of_an_unexpected_type_read_as_absent() {
    with_event(
        r#"{"type": "task-succeeded", "hostname": "w", "timestamp": 1e0, "uuid": "a", "name": 5, "eta": "",
            "runtime": "2", "retries": -1, "loadavg": [1, 2], "active": true, "terminated": 1, "name": null}"#,
        |event| {
            assert_eq!((event.name.as_deref(), &event.eta, event.runtime), (None, &Eta::None, None));
            assert_eq!((event.retries, event.loadavg, event.active, event.terminated), (None, None, None, false));
        },
    );
}

#[test]
fn any_field_of_a_kept_event_can_be_read() {
    with_event(
        r#"{"type": "task-failed", "hostname": "w", "timestamp": 1.5, "uuid": "a", "exception": "E('\ud800')",
            "traceback": "Traceback…", "pid": 7, "extra": {"x": NaN}, "retries": 3, "eta": "2026-01-01T00:00:00"}"#,
        |event| {
            assert_eq!(event.exception().as_deref(), Some("E('\u{fffd}')"));
            assert_eq!(event.traceback().as_deref(), Some("Traceback…"));
            assert_eq!(event.field("pid").as_deref(), Some("7"));
            assert_eq!(event.field("nothing"), None);
            assert_eq!((event.retries, &event.eta), (Some(3), &Eta::At("2026-01-01T00:00:00".into())));
        },
    );
    let body = r#"{"type": "task-failed", "hostname": "w", "timestamp": 1, "uuid": "a", "exception": "\ud800"}"#;
    with_event(body, |event| assert_eq!(event.exception().as_deref(), Some("\u{fffd}")));
}

#[test]
fn deep_nesting_does_not_overflow_the_stack() {
    let deep = format!("{}{}", "[".repeat(100_000), "]".repeat(100_000));
    let batch = format!(
        r#"[{{"type": "task-x", "hostname": "w", "timestamp": 1, "uuid": "a", "args": {deep}}},{deep},{VALID}]"#
    );
    let ok = || Ok("a w".to_owned());
    assert_eq!(decode_all(&batch, false), [ok(), Err(DecodeError::NotAnEvent), ok()]);
    assert_eq!(decode_all(&deep, false), [Err(DecodeError::NotAnEvent)]);
}

#[test]
fn times_are_converted_when_they_are_in_range() {
    let kind = r#""type": "worker-heartbeat", "hostname": "w""#;
    with_event(&format!(r#"{{{kind}, "timestamp": -1.5, "freq": 2.5}}"#), |event| {
        assert_eq!(event.timestamp(), UNIX_EPOCH.checked_sub(Duration::from_millis(1500)));
        assert_eq!(event.freq(), Some(Duration::from_millis(2500)));
    });
    with_event(&format!(r#"{{{kind}, "timestamp": 1e300, "freq": -1}}"#), |event| {
        assert_eq!((event.timestamp(), event.freq(), event.runtime()), (None, None, None));
    });
}
