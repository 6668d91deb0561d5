//! One benchmark a stage: `cargo bench --bench stages` shows times and throughput, `benches/instructions.sh` counts
//! instructions, which no noise moves.
//!
//! With `--count STAGE ROUNDS` a stage is merely run so many times; the difference between two such runs is what a round costs.

mod workload;

use std::hint::black_box;
use std::sync::Arc;

use divan::counter::{BytesCount, ItemsCount};
use flower_exporter::metrics::text::{Exposition, Format};
use flower_exporter::metrics::{Copying, Snapshot};
use flower_exporter::state::State;
use workload::{Cluster, USUAL, decode, enveloped, ingest, state};

/// Tasks of a round, each with four events.
const TASKS: usize = 3_000;

fn main() {
    let arguments: Vec<String> = std::env::args().collect();
    match arguments.iter().position(|argument| argument == "--count") {
        None => divan::main(),
        Some(place) => count(&arguments[place + 1], arguments[place + 2].parse().expect("a number of rounds")),
    }
}

/// Prints how many events or lines a round has.
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
            let mut state = warm();
            let streams: Vec<_> = (1..8).map(|round| USUAL.bodies(TASKS * round, TASKS)).collect();
            for bodies in &streams[..rounds] {
                ingest(&mut state, black_box(bodies));
            }
            println!("{}", 4 * TASKS);
        }
        "render" => {
            let snapshot = snapshot(USUAL);
            let mut text = Vec::new();
            for _ in 0..rounds {
                text.clear();
                Exposition::new(Arc::clone(&snapshot), Format::Text, &[]).write(&mut text, usize::MAX >> 1);
            }
            println!("{}", String::from_utf8_lossy(&text).lines().count());
        }
        _ => panic!("no stage {name}: decode, ingest, render"),
    }
}

fn envelopes() -> Vec<Vec<u8>> {
    USUAL.bodies(0, TASKS).iter().map(|body| enveloped(body)).collect()
}

/// A state that knows all workers and names.
fn warm() -> State {
    let mut state = state();
    ingest(&mut state, &USUAL.bodies(0, TASKS));
    state
}

fn snapshot(cluster: Cluster) -> Arc<Snapshot> {
    let mut state = state();
    ingest(&mut state, &cluster.bodies(0, cluster.workers * cluster.names));
    let mut copying = Copying::start(state.series());
    while !copying.proceed(state.series(), 1 << 20) {}
    Arc::new(copying.finish(state.series()))
}

/// Writes a scrape as it is served, in pieces. Returns its bytes.
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

/// An envelope as it comes over Redis, to events, which are dropped.
#[divan::bench]
fn decode_envelopes(bencher: divan::Bencher) {
    let (messages, mut buffer) = (envelopes(), Vec::new());
    let bytes: usize = messages.iter().map(Vec::len).sum();
    bencher
        .counter(ItemsCount::new(4 * TASKS))
        .counter(BytesCount::new(bytes))
        .bench_local(|| decode(black_box(&messages), &mut buffer));
}

/// A body as it comes over `RabbitMQ`, to state and series.
#[divan::bench]
fn ingest_bodies(bencher: divan::Bencher) {
    let mut state = warm();
    let streams: Vec<_> = (1..64).map(|round| USUAL.bodies(TASKS * round, TASKS)).collect();
    let bytes: usize = streams[0].iter().map(Vec::len).sum();
    let mut next = streams.iter().cycle();
    bencher.counter(ItemsCount::new(4 * TASKS)).counter(BytesCount::new(bytes)).bench_local(|| {
        ingest(&mut state, black_box(next.next().expect("no end")));
    });
}

/// Copying the numbers of a scrape, which the event path waits for a slice at a time.
#[divan::bench(args = [1_000, 20_000])]
fn copy(bencher: divan::Bencher, pairs: usize) {
    let mut state = state();
    ingest(&mut state, &of_pairs(pairs).bodies(0, pairs));
    bencher.counter(ItemsCount::new(pairs)).bench_local(|| {
        let mut copying = Copying::start(state.series());
        while !copying.proceed(state.series(), 1 << 20) {}
        copying.finish(state.series())
    });
}

/// Writing the text of a scrape.
#[divan::bench(args = [1_000, 20_000])]
fn render_pairs(bencher: divan::Bencher, pairs: usize) {
    let snapshot = snapshot(of_pairs(pairs));
    bencher
        .counter(ItemsCount::new(pairs))
        .counter(BytesCount::new(render(&snapshot)))
        .bench_local(|| render(black_box(&snapshot)));
}

fn of_pairs(pairs: usize) -> Cluster {
    Cluster { workers: pairs / USUAL.names, names: USUAL.names }
}
