//! Prints every failed task with its exception, and serves the metrics beside that.
//!
//!     cargo run --example failed_tasks -- redis://localhost:6379/0 127.0.0.1:9555
//!
//! Ends when its standard input does.

use std::error::Error;
use std::sync::mpsc;
use std::thread;

use flower_exporter::celery::EventKind;
use flower_exporter::daemon::Exporter;
use flower_exporter::settings::Settings;
use tokio::io::AsyncReadExt;

#[tokio::main(flavor = "current_thread")]
async fn main() -> Result<(), Box<dyn Error>> {
    let mut args = std::env::args().skip(1);
    let mut settings = Settings::default();
    settings.broker.url = args.next().ok_or("the broker's URL is missing")?.parse()?;
    settings.http.listen = args.next().ok_or("the address to listen on is missing")?.parse()?;

    // The observer must not block: printing happens on a thread of its own.
    let (failed, lines) = mpsc::channel::<(String, String)>();
    thread::spawn(move || {
        for (uuid, exception) in lines {
            println!("{uuid} failed: {exception}");
        }
    });
    let exporter = Exporter::start(
        settings,
        vec![Box::new(move |event| {
            if event.kind == EventKind::TaskFailed {
                let exception = event.exception().unwrap_or_else(|| "(no exception told)".to_owned());
                // The printing thread lives as long as this channel.
                let _ = failed.send((event.uuid.to_string(), exception));
            }
        })],
    )
    .await?;
    eprintln!("serving http://{}/metrics", exporter.address());

    tokio::io::stdin().read_to_end(&mut Vec::new()).await?;
    for task in exporter.tasks(0, 1000).await {
        println!("{} {} is {:?}", task.uuid, task.name, task.state);
    }
    exporter.stop().await;
    Ok(())
}
