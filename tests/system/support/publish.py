"""Publishes events by kombu, as Celery's dispatcher does, and raw messages."""

import base64
import json
import uuid

import amqp
from celery.events.event import get_exchange
from kombu import Connection, Producer

#: A JSON object nested deeper than a recursive parser can read.
DEEP = b'{"a":' * 100_000 + b"1" + b"}" * 100_000


def envelope(
    body,
    *,
    content_type="application/json",
    content_encoding="utf-8",
    headers=None,
    exchange="celeryev",
    routing_key="task.sent",
    encoding="base64",
):
    """The JSON object in which kombu wraps a message on Redis; `body` is bytes, or text when `encoding` is None."""
    properties = {
        "delivery_mode": 1,
        "delivery_info": {"exchange": exchange, "routing_key": routing_key},
        "priority": 0,
        "body_encoding": encoding,
        "delivery_tag": str(uuid.uuid4()),
    }
    if encoding == "base64":
        body = base64.b64encode(body if isinstance(body, bytes) else body.encode()).decode()
    else:
        del properties["body_encoding"]
    return {
        "body": body,
        "content-encoding": content_encoding,
        "content-type": content_type,
        "headers": headers or {"hostname": "w"},
        "properties": properties,
    }


class Publisher:
    """A connection that publishes to one broker's event exchange, in order."""

    def __init__(self, broker, exchange="celeryev"):
        self.broker, self.name = broker, exchange
        self.connection = Connection(broker.url, transport_options=broker.options)
        self.exchange = get_exchange(self.connection, exchange)
        self.producer = Producer(self.connection, exchange=self.exchange, serializer="json", auto_declare=False)

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.connection.release()

    def _publish(self, body, routing_key, hostname):
        self.producer.publish(
            body,
            routing_key=routing_key,
            exchange=self.exchange.name,
            declare=[self.exchange],
            serializer="json",
            headers={"hostname": hostname},
            delivery_mode=1,
        )

    def send(self, item):
        """One event, or a list of them: the batch that workers send as `task.multi`."""
        if isinstance(item, list):
            self._publish(item, "task.multi", item[0]["hostname"])
        else:
            self._publish(item, item["type"].replace("-", "."), item["hostname"])

    def raw(
        self, body, *, content_type="application/json", content_encoding="utf-8", headers=None, routing_key="task.sent"
    ):
        """A message with exactly these bytes as its body."""
        if self.broker.name == "redis":
            self.bytes(
                json.dumps(
                    envelope(
                        body,
                        content_type=content_type,
                        content_encoding=content_encoding,
                        headers=headers,
                        exchange=self.name,
                        routing_key=routing_key,
                    )
                ),
                routing_key,
            )
        else:
            self.exchange(self.connection.default_channel).declare()
            self.connection.default_channel.basic_publish(
                amqp.Message(
                    body,
                    content_type=content_type,
                    content_encoding=content_encoding,
                    application_headers=headers or {},
                ),
                exchange=self.name,
                routing_key=routing_key,
            )

    def bytes(self, payload, routing_key="task.sent"):
        """Redis only: a payload that need not be an envelope."""
        receivers = self.broker.client().publish(f"/{self.broker.db}.{self.name}/{routing_key}", payload)
        assert receivers, "no client is subscribed"
