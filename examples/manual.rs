//! Writes the manual page and the completions of bash, zsh and fish, generated from the command line's definition.
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
use flower_exporter::cli::args::Args;

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
    let directory =
        PathBuf::from(std::env::args_os().nth(1).ok_or("the first argument must be the directory to write to")?);
    fs::create_dir_all(&directory)?;
    let mut command = Args::command();
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
