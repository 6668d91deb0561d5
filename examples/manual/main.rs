//! Writes what is generated from the definitions of the command line and the settings.
//!
//!     cargo run --example manual -- DIRECTORY    the manual page and the completions of bash, zsh and fish
//!     cargo run --example manual -- --write      flower-exporter.toml.example and the tables of docs/configuration.md

use std::error::Error;
use std::fs::{self, File};
use std::io::Write;
use std::path::{Path, PathBuf};

use clap::CommandFactory;
use clap_complete::{Shell, generate_to};
use clap_mangen::Man;
use clap_mangen::roff::{Roff, bold, roman};
use flower_exporter::cli::args::Args;

mod settings;

/// Sections after the options, each a list of terms with their descriptions.
const SECTIONS: [(&str, &[(&str, &str)]); 4] = [
    (
        "FILES",
        &[
            (
                "/etc/flower-exporter/flower-exporter.toml",
                "The configuration: each key with its default and its meaning. An unknown key or an invalid value \
                 aborts startup.",
            ),
            (
                "/etc/flower-exporter/broker-url",
                "The broker's URL, readable by root only. The systemd unit passes it on as a credential.",
            ),
            ("/var/lib/flower-exporter/state", "The saved state, with state.persistent."),
        ],
    ),
    (
        "ENVIRONMENT",
        &[
            (
                "FLOWER_EXPORTER_<SECTION>__<KEY>",
                "A setting, for example FLOWER_EXPORTER_BROKER__URL or FLOWER_EXPORTER_BROKER__REDIS__MASTER_NAME. It \
                 overrides the file. An option overrides it.",
            ),
            ("FLOWER_EXPORTER_CONFIG", "The configuration file, if --config is not given."),
        ],
    ),
    (
        "SIGNALS",
        &[
            (
                "SIGTERM, SIGINT",
                "Stop receiving, save the state, finish scrapes in flight and exit within 5 s. A second one exits \
                 immediately.",
            ),
            ("SIGHUP", "Reload the configuration. The log names the keys that require a restart."),
            ("SIGUSR1", "Save the state now."),
        ],
    ),
    (
        "EXIT STATUS",
        &[
            ("0", "Stopped by a signal, or the requested action succeeded."),
            ("1", "A system error. With --healthcheck: no exporter responds, or it is unhealthy."),
            (
                "2",
                "An invalid command line or configuration, an address in use, or a state file that another process has \
                 locked. One line on standard error names the cause.",
            ),
        ],
    ),
];

fn main() -> Result<(), Box<dyn Error>> {
    match std::env::args().nth(1).as_deref() {
        None => Err("the first argument must be --write, or the directory to write to".into()),
        Some("--write") => write_documents(),
        Some(directory) => write_manual(&PathBuf::from(directory)),
    }
}

/// Updates the files of the repository.
fn write_documents() -> Result<(), Box<dyn Error>> {
    let root = PathBuf::from(env!("CARGO_MANIFEST_DIR"));
    fs::write(root.join("flower-exporter.toml.example"), settings::toml())?;
    let path = root.join("docs/configuration.md");
    let page = settings::insert(&fs::read_to_string(&path)?).ok_or("docs/configuration.md lacks a marker")?;
    fs::write(path, page)?;
    Ok(())
}

fn write_manual(directory: &Path) -> Result<(), Box<dyn Error>> {
    fs::create_dir_all(directory)?;
    let mut command = Args::command();
    for shell in [Shell::Bash, Shell::Zsh, Shell::Fish] {
        generate_to(shell, &mut command, "flower-exporter", directory)?;
    }
    let mut page = File::create(directory.join("flower-exporter.1"))?;
    Man::new(command.version(env!("CARGO_PKG_VERSION"))).manual("User Commands").render(&mut page)?;
    let mut rest = Roff::new();
    rest.control("SH", ["SETTINGS"]);
    for (term, meaning) in settings::terms() {
        entry(&mut rest, &term, &meaning);
    }
    for (section, entries) in SECTIONS {
        rest.control("SH", [section]);
        for (term, meaning) in entries {
            entry(&mut rest, term, meaning);
        }
    }
    rest.control("SH", ["SEE ALSO"]).text([roman("celery(1), prometheus(1), systemd.service(5)")]);
    page.write_all(rest.render().as_bytes())?;
    Ok(())
}

fn entry(page: &mut Roff, term: &str, meaning: &str) {
    page.control("TP", []).text([bold(term)]).text([roman(meaning)]);
}
