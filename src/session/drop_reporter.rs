//! Logs dropped messages: within a second, then once a minute, and at the end.

use std::convert::Infallible;
use std::time::Duration;

use tokio::time::sleep;

use crate::inbox::Inbox;

const DROP_REPORT_DELAY: Duration = Duration::from_secs(1);
const DROP_REPORT_INTERVAL: Duration = Duration::from_secs(59);

pub(super) struct DropReporter<'s> {
    inbox: &'s Inbox,
    reported: u64,
}

impl<'s> DropReporter<'s> {
    pub(super) fn new(inbox: &'s Inbox) -> Self {
        Self { inbox, reported: 0 }
    }

    pub(super) async fn run(&mut self) -> Infallible {
        loop {
            self.inbox.messages_dropped().await;
            sleep(DROP_REPORT_DELAY).await;
            self.report();
            sleep(DROP_REPORT_INTERVAL).await;
        }
    }

    /// Logs how many messages were dropped since the last report, if any were.
    pub(super) fn report(&mut self) {
        let total = self.inbox.dropped_messages();
        let dropped = total - self.reported;
        if dropped > 0 {
            tracing::warn!(dropped, dropped_total = total, "dropping messages: buffer full (events.buffer_max_bytes)");
            self.reported = total;
        }
    }
}

#[cfg(test)]
mod tests {
    use futures_util::FutureExt;

    use super::*;
    use crate::inbox::{Batch, Encoding, Message};
    use crate::observability::{Health, SelfMetrics};

    #[test]
    fn each_dropped_message_is_reported_once() {
        let (inbox, _inbox_rx) = Inbox::new(1, SelfMetrics::new().unwrap().into(), Health::default().into());
        let mut reporter = DropReporter::new(&inbox);
        reporter.report();
        assert_eq!(reporter.reported, 0);
        let message = Message { bytes: "large".into(), encoding: Encoding::RawBody, redelivered: false };
        let (_permit, dropped) = inbox.truncate_to_capacity(&mut Batch::new(vec![message; 3], None));
        assert_eq!(dropped, 2);
        assert!(inbox.messages_dropped().now_or_never().is_some());
        reporter.report();
        assert_eq!(reporter.reported, 2);
        assert!(inbox.messages_dropped().now_or_never().is_none());
    }
}
