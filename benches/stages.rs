//! Benchmarks each stage by itself: `cargo bench --bench stages` reports times and throughput.
//!
//! `benches/instructions.sh` counts instructions instead, which are independent of noise. With `--count STAGE ROUNDS`,
//! the program only runs a stage for a number of rounds. The difference between two such runs is the cost of the
//! rounds. `benches/options.sh` also uses `--scrapes OPTIONS`.

mod workload;

use std::hint::black_box;
use std::sync::Arc;
use std::time::Instant;

use divan::counter::{BytesCount, ItemsCount};
use flower_exporter::metrics::encode::{Exposition, Format};
use flower_exporter::metrics::{SeriesOptions, Snapshot, SnapshotBuilder};
use flower_exporter::state::State;
use workload::{Deployment, TYPICAL, all_options, decode, enveloped, ingest, state, state_with};

/// Tasks per round, with four events each.
const TASKS: usize = 3_000;
/// Label sets of a large scrape.
const LABEL_SETS: usize = 20_000;
/// Scrapes of each format that are timed.
const SCRAPES: usize = 31;
/// Tasks in each label set.
const RUNS: usize = 80;
/// Rounds of tasks before those that are counted.
const FILLING: usize = 27;

fn main() {
    let arguments: Vec<String> = std::env::args().collect();
    let number = |index: usize| arguments[index].parse().expect("a number");
    let modes = ["--count", "--scrapes"];
    match arguments.iter().position(|argument| modes.contains(&&**argument)) {
        None => divan::main(),
        Some(index) if arguments[index] == "--scrapes" => time_scrapes(&arguments[index + 1]),
        Some(index) => count(&arguments[index + 1], number(index + 2)),
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
        "ingest-default" => count_runtimes(SeriesOptions::default(), rounds),
        "ingest-all" => count_runtimes(all_options(), rounds),
        _ => panic!("unknown stage {name}"),
    }
}

/// Ingests tasks with many different runtimes into a state that has seen such tasks before.
fn count_runtimes(options: SeriesOptions, rounds: usize) {
    let (mut state, deployment) = (state_with(options), Deployment { varied: true, ..TYPICAL });
    // The first tasks create most of the buckets.
    for round in 0..FILLING {
        ingest(&mut state, &deployment.bodies(TASKS * round, TASKS));
    }
    let streams: Vec<_> = (FILLING..FILLING + 8).map(|round| deployment.bodies(TASKS * round, TASKS)).collect();
    for bodies in &streams[..rounds] {
        ingest(&mut state, black_box(bodies));
    }
    println!("{}", 4 * TASKS);
}

/// Prints how many milliseconds a scrape of 20,000 label sets takes in text and in protobuf: medians of alternating runs.
fn time_scrapes(options: &str) {
    let snapshot = snapshot_of(&filled_state(options));
    let mut times = [Format::Text, Format::Protobuf].map(|format| (format, Vec::new()));
    for _ in 0..SCRAPES {
        for (format, times) in &mut times {
            let start = Instant::now();
            black_box(encode(&snapshot, *format));
            times.push(start.elapsed().as_secs_f64() * 1e3);
        }
    }
    for (_, mut times) in times {
        times.sort_by(f64::total_cmp);
        print!("{:.1} ", times[SCRAPES / 2]);
    }
    println!();
}

/// A state with 20,000 label sets, and eighty tasks in each of them.
fn filled_state(options: &str) -> State {
    let options = if options == "all" { all_options() } else { SeriesOptions::default() };
    let (mut state, deployment) = (state_with(options), Deployment { varied: true, ..with_label_sets(LABEL_SETS) });
    let chunk = 10_000;
    for first in (0..RUNS * LABEL_SETS).step_by(chunk) {
        ingest(&mut state, &deployment.bodies(first, chunk));
    }
    state
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
    snapshot_of(&state)
}

fn snapshot_of(state: &State) -> Arc<Snapshot> {
    let mut builder = SnapshotBuilder::new(state.series());
    while !builder.step(state.series(), 1 << 20) {}
    Arc::new(builder.finish(state.series()))
}

/// Renders a scrape in pieces, as the server does. Returns its size in bytes.
fn render(snapshot: &Arc<Snapshot>) -> usize {
    encode(snapshot, Format::Text)
}

fn encode(snapshot: &Arc<Snapshot>, format: Format) -> usize {
    let mut exposition = Exposition::new(Arc::clone(snapshot), format, &[]);
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
    Deployment { workers: label_sets / TYPICAL.names, ..TYPICAL }
}
