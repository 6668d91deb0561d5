//! Writes the manual page and the completions of bash, zsh and fish, from the command line's own definition.
//!
//!     cargo run --example manual -- DIRECTORY

use std::error::Error;
use std::fs::{self, File};
use std::io::Write;
use std::path::PathBuf;

use clap::CommandFactory;
use clap_complete::{Shell, generate_to};
use clap_mangen::Man;
use clap_mangen::roff::{Roff, roman};
use flower_exporter::settings::cli::Cli;

/// What the options do not say: section, then pairs of a term and its meaning.
const SECTIONS: [(&str, &[(&str, &str)]); 4] = [
    (
        "FILES",
        &[
            (
                "/etc/flower-exporter/flower-exporter.toml",
                "The settings, each key with its default and what it does. An unknown key or an impossible value stops \
                 the start.",
            ),
            (
                "/etc/flower-exporter/broker-url",
                "The broker's URL, readable by root alone: the systemd unit hands it over as a credential.",
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
                 wins over the file; an option wins over it.",
            ),
            ("FLOWER_EXPORTER_CONFIG", "The settings file, where --config is not given."),
        ],
    ),
    (
        "SIGNALS",
        &[
            (
                "SIGTERM, SIGINT",
                "Stop reading, save the state, finish scrapes in flight, end within 5 s. A second one ends at once.",
            ),
            ("SIGHUP", "Read the settings again. What can change live does; the log names what takes a restart."),
            ("SIGUSR1", "Save the state now."),
        ],
    ),
    (
        "EXIT STATUS",
        &[
            ("0", "Told to stop, or what was asked for is done."),
            ("1", "The system refused something; with --healthcheck: no exporter there, or it is stuck."),
            (
                "2",
                "A mistake in the command line or the settings, a taken port, or saved state that another exporter has open. One line on standard error names it.",
            ),
        ],
    ),
];

fn main() -> Result<(), Box<dyn Error>> {
    let directory = PathBuf::from(std::env::args_os().nth(1).ok_or("the directory to write to is missing")?);
    fs::create_dir_all(&directory)?;
    let mut command = Cli::command();
    for shell in [Shell::Bash, Shell::Zsh, Shell::Fish] {
        generate_to(shell, &mut command, "flower-exporter", &directory)?;
    }
    let mut page = File::create(directory.join("flower-exporter.1"))?;
    Man::new(command.version(env!("CARGO_PKG_VERSION"))).manual("User Commands").render(&mut page)?;
    let mut rest = Roff::new();
    for (section, entries) in SECTIONS {
        rest.control("SH", [section]);
        for (term, meaning) in entries {
            rest.control("TP", []).text([clap_mangen::roff::bold(*term)]).text([roman(*meaning)]);
        }
    }
    rest.control("SH", ["SEE ALSO"]).text([roman("celery(1), prometheus(1), systemd.service(5)")]);
    page.write_all(rest.render().as_bytes())?;
    Ok(())
}
