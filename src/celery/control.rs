//! Control broadcasts to the workers (`celery.app.control`, `kombu.pidbox`).
//!
//! A broadcast has no `reply_to`, so that no reply keys accumulate on the broker. The envelope has exactly the fields
//! that kombu itself writes. Without `properties` or `delivery_tag`, every Celery 5.7 worker drops its connection and
//! every 4.4 worker exits.

use serde_json::json;

/// A control command for all workers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Broadcast {
    /// Send task events from now on, as if started with `-E`.
    EnableEvents,
    /// Send one `worker-heartbeat` now.
    Heartbeat,
}

impl Broadcast {
    /// The command's `method` on the wire.
    #[must_use]
    pub const fn method(self) -> &'static str {
        match self {
            Self::EnableEvents => "enable_events",
            Self::Heartbeat => "heartbeat",
        }
    }

    /// The message body: JSON in UTF-8.
    #[must_use]
    pub fn body(self) -> String {
        let method = self.method();
        format!(r#"{{"method": "{method}", "arguments": {{}}, "destination": null, "pattern": null, "matcher": null}}"#)
    }

    /// The complete message for Redis, published to `exchange`, for example `celery.pidbox`. `delivery_tag` is a new
    /// UUID for every message.
    #[must_use]
    pub fn envelope(self, exchange: &str, delivery_tag: &str) -> String {
        json!({
            "body": base64_turbo::STANDARD.encode(self.body()),
            "content-encoding": "utf-8",
            "content-type": "application/json",
            "headers": {},
            "properties": {
                "delivery_mode": 2,
                "delivery_info": {"exchange": exchange, "routing_key": ""},
                "priority": 0,
                "body_encoding": "base64",
                "delivery_tag": delivery_tag,
            },
        })
        .to_string()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn envelope_matches_kombu_field_for_field() {
        assert_eq!(
            Broadcast::EnableEvents.envelope("celery.pidbox", "b1a0cd7e-4d8a-4e0e-9ae3-6d2b1c1c9b55"),
            concat!(
                r#"{"body":"eyJtZXRob2QiOiAiZW5hYmxlX2V2ZW50cyIsICJhcmd1bWVudHMiOiB7fSwgImRlc3RpbmF0aW9uIjogbnVsbCwg"#,
                r#"InBhdHRlcm4iOiBudWxsLCAibWF0Y2hlciI6IG51bGx9","content-encoding":"utf-8","content-type":"applicat"#,
                r#"ion/json","headers":{},"properties":{"body_encoding":"base64","delivery_info":{"exchange":"celery"#,
                r#".pidbox","routing_key":""},"delivery_mode":2,"delivery_tag":"b1a0cd7e-4d8a-4e0e-9ae3-6d2b1c1c9b5"#,
                r#"5","priority":0}}"#,
            )
        );
    }

    #[test]
    fn body_matches_pidbox() {
        assert_eq!(
            Broadcast::Heartbeat.body(),
            r#"{"method": "heartbeat", "arguments": {}, "destination": null, "pattern": null, "matcher": null}"#
        );
        assert!(serde_json::from_str::<serde_json::Value>(&Broadcast::EnableEvents.body()).is_ok());
    }
}
