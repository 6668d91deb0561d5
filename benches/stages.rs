//! Benchmarks each stage by itself: `cargo bench --bench stages` reports times and throughput.
//!
//! `benches/instructions.sh` counts instructions instead, which are independent of noise. With `--count STAGE ROUNDS`,
//! the program only runs a stage for a number of rounds. The difference between two such runs is the cost of the
//! rounds.

mod workload;

use std::hint::black_box;
use std::sync::Arc;

use divan::counter::{BytesCount, ItemsCount};
use flower_exporter::metrics::encode::{Exposition, Format};
use flower_exporter::metrics::{Snapshot, SnapshotBuilder};
use flower_exporter::state::State;
use workload::{Deployment, TYPICAL, decode, enveloped, ingest, state};

/// Tasks per round, with four events each.
const TASKS: usize = 3_000;

fn main() {
    let arguments: Vec<String> = std::env::args().collect();
    match arguments.iter().position(|argument| argument == "--count") {
        None => divan::main(),
        Some(index) => count(&arguments[index + 1], arguments[index + 2].parse().expect("a number of rounds")),
    }
}

/// Runs a stage, and prints the number of events or lines per round.
fn count(name: &str, rounds: usize) {
    match name {
        "decode" => {
            let (messages, mut buffer) = (envelopes(), Vec::new());
            for _ in 0..rounds {
                decode(black_box(&messages), &mut buffer);
            }
            println!("{}", 4 * TASKS);
        }
        "ingest" => {
            let mut state = warm_state();
            let streams: Vec<_> = (1..8).map(|round| TYPICAL.bodies(TASKS * round, TASKS)).collect();
            for bodies in &streams[..rounds] {
                ingest(&mut state, black_box(bodies));
            }
            println!("{}", 4 * TASKS);
        }
        "render" => {
            let snapshot = snapshot(TYPICAL);
            let mut text = Vec::new();
            for _ in 0..rounds {
                text.clear();
                Exposition::new(Arc::clone(&snapshot), Format::Text, &[]).write(&mut text, usize::MAX >> 1);
            }
            println!("{}", String::from_utf8_lossy(&text).lines().count());
        }
        _ => panic!("unknown stage {name}; expected decode, ingest or render"),
    }
}

fn envelopes() -> Vec<Vec<u8>> {
    TYPICAL.bodies(0, TASKS).iter().map(|body| enveloped(body)).collect()
}

/// A state in which all workers and names are present.
fn warm_state() -> State {
    let mut state = state();
    ingest(&mut state, &TYPICAL.bodies(0, TASKS));
    state
}

fn snapshot(deployment: Deployment) -> Arc<Snapshot> {
    let mut state = state();
    ingest(&mut state, &deployment.bodies(0, deployment.workers * deployment.names));
    let mut builder = SnapshotBuilder::new(state.series());
    while !builder.step(state.series(), 1 << 20) {}
    Arc::new(builder.finish(state.series()))
}

/// Renders a scrape in pieces, as the server does. Returns its size in bytes.
fn render(snapshot: &Arc<Snapshot>) -> usize {
    let mut exposition = Exposition::new(Arc::clone(snapshot), Format::Text, &[]);
    let (mut piece, mut bytes) = (Vec::with_capacity(72 << 10), 0);
    loop {
        let more = exposition.write(&mut piece, 64 << 10);
        bytes += black_box(&piece).len();
        piece.clear();
        if !more {
            return bytes;
        }
    }
}

/// Decodes envelopes as received from Redis, and drops the events.
#[divan::bench]
fn decode_envelopes(bencher: divan::Bencher) {
    let (messages, mut buffer) = (envelopes(), Vec::new());
    let bytes: usize = messages.iter().map(Vec::len).sum();
    bencher
        .counter(ItemsCount::new(4 * TASKS))
        .counter(BytesCount::new(bytes))
        .bench_local(|| decode(black_box(&messages), &mut buffer));
}

/// Decodes bodies as received from `RabbitMQ`, and applies the events to the state and its series.
#[divan::bench]
fn ingest_bodies(bencher: divan::Bencher) {
    let mut state = warm_state();
    let streams: Vec<_> = (1..64).map(|round| TYPICAL.bodies(TASKS * round, TASKS)).collect();
    let bytes: usize = streams[0].iter().map(Vec::len).sum();
    let mut next = streams.iter().cycle();
    bencher.counter(ItemsCount::new(4 * TASKS)).counter(BytesCount::new(bytes)).bench_local(|| {
        ingest(&mut state, black_box(next.next().expect("an endless iterator")));
    });
}

/// Copies the values of a scrape. The ingest loop does this in short steps.
#[divan::bench(args = [1_000, 20_000])]
fn snapshot_label_sets(bencher: divan::Bencher, label_sets: usize) {
    let mut state = state();
    ingest(&mut state, &with_label_sets(label_sets).bodies(0, label_sets));
    bencher.counter(ItemsCount::new(label_sets)).bench_local(|| {
        let mut builder = SnapshotBuilder::new(state.series());
        while !builder.step(state.series(), 1 << 20) {}
        builder.finish(state.series())
    });
}

/// Renders the text of a scrape.
#[divan::bench(args = [1_000, 20_000])]
fn render_label_sets(bencher: divan::Bencher, label_sets: usize) {
    let snapshot = snapshot(with_label_sets(label_sets));
    bencher
        .counter(ItemsCount::new(label_sets))
        .counter(BytesCount::new(render(&snapshot)))
        .bench_local(|| render(black_box(&snapshot)));
}

fn with_label_sets(label_sets: usize) -> Deployment {
    Deployment { workers: label_sets / TYPICAL.names, names: TYPICAL.names }
}
