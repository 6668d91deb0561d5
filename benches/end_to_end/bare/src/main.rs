//! The baseline consumer, `bare [--discard|--floor] URL PORT`: receives and decodes Celery's events without tracking any
//! state.
//!
//! It decodes all fields that the exporter needs and interns the names. It responds to every HTTP request to PORT with
//! the number of task events so far. With `--discard`, it drops what it reads from Redis without parsing it, which is
//! the highest rate that any subscriber can reach. With `--floor`, it does only what no exporter can avoid: it receives,
//! decodes base64, and looks up each event's task in a table of 100,000.

use std::hint::black_box;
use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;

use anyhow::{Context, Result, bail};
use base64_simd::{Out, STANDARD};
use foldhash::fast::FixedState;
use futures_util::StreamExt;
use hashbrown::HashMap;
use lapin::options::{
    BasicAckOptions, BasicConsumeOptions, BasicQosOptions, ExchangeDeclareOptions, QueueBindOptions,
    QueueDeclareOptions,
};
use lapin::types::FieldTable;
use lapin::{Connection, ConnectionProperties, ExchangeKind};
use serde::Deserialize;

const READ_SIZE: usize = 256 << 10;
const PREFETCH: u16 = 1000;

#[derive(Deserialize)]
struct Envelope<'a> {
    body: &'a str,
    #[serde(rename = "content-type")]
    content_type: &'a str,
}

#[derive(Deserialize)]
struct Event<'a> {
    #[serde(rename = "type")]
    kind: &'a str,
    hostname: &'a str,
    timestamp: f64,
    uuid: Option<&'a str>,
    name: Option<&'a str>,
    eta: Option<&'a str>,
    runtime: Option<f64>,
    active: Option<f64>,
    processed: Option<f64>,
}

/// What is done with each message.
#[derive(Clone, Copy, PartialEq)]
enum Mode {
    Decode,
    Floor,
    Discard,
}

/// As many bytes as the exporter keeps of a task.
type Task = [u64; 17];
const TASKS: usize = 100_000;

struct Decoder {
    mode: Mode,
    names: HashMap<Box<str>, u64, FixedState>,
    buffer: Vec<u8>,
    /// Only with `--floor`.
    tasks: Vec<Task>,
    events: Arc<AtomicU64>,
    /// Depends on every field, so that the compiler cannot remove the decoding of any.
    digest: u64,
}

impl Decoder {
    fn new(mode: Mode) -> Self {
        Self {
            mode,
            names: HashMap::default(),
            buffer: Vec::new(),
            // Not zero, so that the memory is not shared.
            tasks: if mode == Mode::Floor { vec![[1; 17]; TASKS] } else { Vec::new() },
            events: Arc::default(),
            digest: 0,
        }
    }

    /// The body of an envelope without parsing it: the first string that is a value.
    fn body_text(payload: &[u8]) -> Result<&[u8]> {
        let text = payload.strip_prefix(br#"{"body": ""#).context("expected the body first")?;
        Ok(&text[..memchr::memchr(b'"', text).context("expected a quote")?])
    }

    /// Finds the tasks of the events by their ids, and touches the memory of each.
    fn look_up(&mut self, body: &[u8]) {
        const KEY: &[u8] = br#""uuid": ""#;
        let mut count = 0;
        for at in memchr::memmem::find_iter(body, KEY) {
            let id = body.get(at + KEY.len()..).and_then(|id| id.first_chunk()).copied().map_or(0, u64::from_le_bytes);
            let slot = (u128::from(id.wrapping_mul(0x9E37_79B9_7F4A_7C15)) * TASKS as u128) >> 64;
            // Three cache lines: the task, and as much as its index and its label set take.
            let task = &mut self.tasks[slot as usize];
            task[0] = task[0].rotate_left(5) ^ task[8] ^ task[16] ^ id;
            count += 1;
        }
        self.events.fetch_add(count, Ordering::Relaxed);
    }

    fn envelope(&mut self, payload: &[u8]) -> Result<()> {
        let text = match self.mode {
            Mode::Floor => Self::body_text(payload)?,
            _ => Self::parsed_body_text(payload)?,
        };
        let mut buffer = std::mem::take(&mut self.buffer);
        buffer.resize(buffer.len().max(STANDARD.estimated_decoded_length(text.len())), 0);
        let body = STANDARD.decode(text, Out::from_slice(&mut buffer))?;
        self.body(body)?;
        self.buffer = buffer;
        Ok(())
    }

    fn parsed_body_text(payload: &[u8]) -> Result<&[u8]> {
        let envelope: Envelope = serde_json::from_slice(payload)?;
        if envelope.content_type != "application/json" {
            bail!("unsupported content type {}", envelope.content_type);
        }
        Ok(envelope.body.as_bytes())
    }

    fn body(&mut self, body: &[u8]) -> Result<()> {
        if self.mode == Mode::Floor {
            self.look_up(body);
            return Ok(());
        }
        if body.first() == Some(&b'[') {
            let events: Vec<Event> = serde_json::from_slice(body)?;
            events.iter().for_each(|event| self.event(event));
        } else {
            self.event(&serde_json::from_slice(body)?);
        }
        Ok(())
    }

    fn event(&mut self, event: &Event) {
        let names =
            [Some(event.kind), Some(event.hostname), event.name].map(|name| name.map_or(0, |name| self.id(name)));
        let numbers = [Some(event.timestamp), event.runtime, event.active, event.processed];
        let texts = [event.uuid, event.eta].map(|text| text.map_or(0, |text| text.len() as u64));
        let all = names.into_iter().chain(numbers.map(|number| number.map_or(0, f64::to_bits))).chain(texts);
        self.digest = black_box(all.fold(self.digest, |digest, value| digest.rotate_left(5) ^ value));
        if event.kind.starts_with("task-") {
            self.events.fetch_add(1, Ordering::Relaxed);
        }
    }

    fn id(&mut self, name: &str) -> u64 {
        if let Some(id) = self.names.get(name) {
            return *id;
        }
        let id = self.names.len() as u64;
        self.names.insert(name.into(), id);
        id
    }
}

/// The start and end of the bulk string whose RESP header is at `at`, or `None` if it is incomplete.
fn bulk_string(bytes: &[u8], at: usize) -> Option<(usize, usize)> {
    let line = bytes.get(at..)?.iter().position(|byte| *byte == b'\n')?;
    let length = bytes[at + 1..at + line - 1].iter().fold(0, |sum, digit| sum * 10 + usize::from(digit - b'0'));
    let (start, end) = (at + line + 1, at + line + 1 + length);
    (bytes.len() >= end + 2).then_some((start, end))
}

/// The start and end of the payload in the `*4 pmessage pattern channel payload` at `at`, or `None` if it is
/// incomplete.
fn message(bytes: &[u8], at: usize) -> Option<(usize, usize)> {
    let mut end = at + 2;
    let mut start = 0;
    for _ in 0..4 {
        (start, end) = bulk_string(bytes, end + 2)?;
    }
    Some((start, end))
}

fn redis(url: &str, port: u16, mode: Mode) -> Result<()> {
    let (address, db) = url.trim_start_matches("redis://").split_once('/').context("expected redis://HOST:PORT/DB")?;
    let mut socket = TcpStream::connect(address)?;
    socket.write_all(format!("PSUBSCRIBE /{db}.celeryev/*\r\n").as_bytes())?;
    let mut buffer = vec![0; READ_SIZE];
    if socket.read(&mut buffer)? == 0 || !buffer.starts_with(b"*3\r\n$10\r\npsubscribe") {
        bail!("failed to subscribe: {}", String::from_utf8_lossy(&buffer[..64]));
    }
    let mut decoder = Decoder::new(mode);
    serve(port, &decoder.events)?;
    let mut filled = 0;
    loop {
        if buffer.len() - filled < READ_SIZE / 2 {
            buffer.resize(buffer.len() * 2, 0);
        }
        match socket.read(&mut buffer[filled..])? {
            0 => bail!("disconnected by the server"),
            _ if mode == Mode::Discard => continue,
            count => filled += count,
        }
        let mut at = 0;
        while let Some((start, end)) = message(&buffer[..filled], at) {
            decoder.envelope(&buffer[start..end])?;
            at = end + 2;
        }
        buffer.copy_within(at..filled, 0);
        filled -= at;
    }
}

async fn rabbitmq(url: &str, port: u16, mode: Mode) -> Result<()> {
    let connection = Connection::connect(url, ConnectionProperties::default()).await?;
    let channel = connection.create_channel().await?;
    let durable = ExchangeDeclareOptions { durable: true, ..Default::default() };
    channel.exchange_declare("celeryev".into(), ExchangeKind::Topic, durable, FieldTable::default()).await?;
    let exclusive = QueueDeclareOptions { exclusive: true, ..Default::default() };
    channel.queue_declare("celeryev.bare".into(), exclusive, FieldTable::default()).await?;
    let binding = QueueBindOptions::default();
    channel.queue_bind("celeryev.bare".into(), "celeryev".into(), "#".into(), binding, FieldTable::default()).await?;
    channel.basic_qos(PREFETCH, BasicQosOptions::default()).await?;
    let consume = BasicConsumeOptions { exclusive: true, ..Default::default() };
    let mut consumer = channel.basic_consume("celeryev.bare".into(), "".into(), consume, FieldTable::default()).await?;
    let mut decoder = Decoder::new(mode);
    serve(port, &decoder.events)?;
    while let Some(delivery) = consumer.next().await.transpose()? {
        decoder.body(&delivery.data)?;
        if delivery.delivery_tag % u64::from(PREFETCH / 2) == 0 {
            channel.basic_ack(delivery.delivery_tag, BasicAckOptions { multiple: true }).await?;
        }
    }
    bail!("disconnected by the server")
}

/// Serves the number of task events over HTTP, on a separate thread.
fn serve(port: u16, events: &Arc<AtomicU64>) -> Result<()> {
    let (listener, events) = (TcpListener::bind(("127.0.0.1", port))?, Arc::clone(events));
    thread::spawn(move || {
        for mut client in listener.incoming().flatten() {
            let body = format!("bare_events_total {}\n", events.load(Ordering::Relaxed));
            // A client that has disconnected needs no response.
            let _ = client.read(&mut [0; 1024]);
            let _ = write!(client, "HTTP/1.0 200 OK\r\nContent-Length: {}\r\n\r\n{body}", body.len());
        }
    });
    Ok(())
}

fn main() -> Result<()> {
    let mut arguments: Vec<String> = std::env::args().skip(1).collect();
    let mode = match arguments.first().map(String::as_str) {
        Some("--discard") => Mode::Discard,
        Some("--floor") => Mode::Floor,
        _ => Mode::Decode,
    };
    arguments.drain(..usize::from(mode != Mode::Decode));
    let [url, port] = &arguments[..] else { bail!("usage: bare [--discard|--floor] URL PORT") };
    let port = port.parse()?;
    if url.starts_with("redis:") {
        return redis(url, port, mode);
    }
    tokio::runtime::Builder::new_current_thread().enable_all().build()?.block_on(rabbitmq(url, port, mode))
}
