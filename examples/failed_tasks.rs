//! Prints every failed task with its exception, and serves the metrics at the same time.
//!
//!     cargo run --example failed_tasks -- redis://localhost:6379/0 127.0.0.1:9555
//!
//! Exits when its standard input is closed.

use std::error::Error;
use std::sync::mpsc;
use std::thread;

use flower_exporter::{Config, EventKind, Exporter};
use tokio::io::AsyncReadExt;

#[tokio::main(flavor = "current_thread")]
async fn main() -> Result<(), Box<dyn Error>> {
    let mut args = std::env::args().skip(1);
    let mut config = Config::default();
    config.broker.url = args.next().ok_or("the first argument must be the broker's URL")?.parse()?;
    config.http.listen = args.next().ok_or("the second argument must be the address of /metrics")?.parse()?;

    // The observer must not block, so a separate thread prints.
    let (failed, lines) = mpsc::channel::<(String, String)>();
    thread::spawn(move || {
        for (uuid, exception) in lines {
            println!("{uuid} failed: {exception}");
        }
    });
    let exporter = Exporter::builder(config)
        .observer(move |event| {
            if event.kind == EventKind::TaskFailed {
                let exception = event.exception().unwrap_or_else(|| "(no exception)".to_owned());
                // Sending cannot fail: the printing thread runs as long as this channel exists.
                let _ = failed.send((event.uuid.to_string(), exception));
            }
        })
        .start()
        .await?;
    eprintln!("serving http://{}/metrics", exporter.address());

    tokio::io::stdin().read_to_end(&mut Vec::new()).await?;
    for task in exporter.tasks(0, 1000).await {
        println!("{} {} is {:?}", task.uuid, task.name, task.state);
    }
    exporter.shutdown().await?;
    Ok(())
}
