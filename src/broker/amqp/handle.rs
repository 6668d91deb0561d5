//! The half that sends. It owns both connections: dropping it closes everything.

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use lapin::options::BasicAckOptions;
use lapin::{Channel, Connection};

use super::connection::ShutdownOnDrop;
use super::publisher::Publisher;
use super::to_broker_error;
use super::topology::Topology;
use super::witness::Witnesses;
use crate::broker::error::within;
use crate::broker::{BrokerError, QueueStats};
use crate::celery::Broadcast;
use crate::inbox::DeliveryTag;

pub struct BrokerHandle {
    pub(super) connection: Connection,
    pub(super) consumer_channel: Channel,
    pub(super) topology: Topology,
    pub(super) publisher: Publisher,
    pub(super) witnesses: Arc<Witnesses>,
    pub(super) response_timeout: Duration,
    /// See [`crate::broker::BrokerHandle::initial_queue_depth`].
    pub(in crate::broker) initial_queue_depth: u32,
    pub(super) _shutdown_on_drop: ShutdownOnDrop,
}

impl fmt::Debug for BrokerHandle {
    fn fmt(&self, formatter: &mut fmt::Formatter) -> fmt::Result {
        formatter.debug_struct("BrokerHandle").field("queue", &self.topology.queue).finish_non_exhaustive()
    }
}

impl BrokerHandle {
    pub(in crate::broker) async fn broadcast(&self, command: Broadcast) -> Result<(), BrokerError> {
        self.publisher.broadcast(command).await
    }

    pub(in crate::broker) async fn send_witness(&self) -> Result<(), BrokerError> {
        self.witnesses.send(&self.publisher, &self.topology, &self.consumer_channel).await
    }

    pub(in crate::broker) fn blocked_reason(&self) -> Option<BrokerError> {
        self.publisher.blocked_reason()
    }

    pub(in crate::broker) async fn close(&self) {
        // The connections end either way. While an alarm lasts, the server does not read from the publisher's.
        let closing = self.connection.close(200, "exporter is closing the connection".into());
        let _ = tokio::join!(closing, self.publisher.close());
    }

    pub(in crate::broker) async fn acknowledge(&self, tag: DeliveryTag) -> Result<(), BrokerError> {
        // 0 would mean every message.
        let tag = if self.topology.is_durable { tag.0.saturating_sub(1) } else { tag.0 };
        if tag == 0 {
            return Ok(());
        }
        self.consumer_channel.basic_ack(tag, BasicAckOptions { multiple: true }).await.map_err(to_broker_error)
    }

    /// Also checks that the broker responds: lapin's own heartbeats only detect missing bytes.
    pub(in crate::broker) async fn redeclare(&self) -> Result<QueueStats, BrokerError> {
        within(self.response_timeout, self.topology.redeclare(&self.consumer_channel)).await
    }
}
