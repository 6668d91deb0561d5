//! Renders the settings for flower-exporter.toml.example, docs/configuration.md and the manual page.

use std::fmt::Write;

use flower_exporter::config::{Setting, settings};

/// The lines of docs/configuration.md between which the tables are.
pub const BEGIN: &str = "<!-- Generated from src/config/schema.rs: cargo run --example manual -- --write -->\n";
pub const END: &str = "<!-- End of the generated part. -->\n";

const TOML_HEAD: &str = "\
# flower-exporter: every key with its default. Keys that are commented out have an example instead.
# Later sources override earlier ones: default, this file, environment (FLOWER_EXPORTER_BROKER__URL), command line
# (--broker). Durations: \"500ms\", \"10m\" or a number of seconds. Sizes: \"64MiB\" or a number of bytes.
";

/// The longest line of a comment, with `# `.
const WIDTH: usize = 118;

/// The example file: each key with its description, and its default or an example.
pub fn toml() -> String {
    let mut file = TOML_HEAD.to_owned();
    for (section, settings) in sections() {
        let _ = writeln!(file, "\n[{section}]");
        for setting in settings {
            file += &comment(setting.description);
            let (prefix, value) = match (setting.example, &setting.default) {
                (Some(example), _) => ("# ", example),
                (None, Some(default)) => ("", default.as_str()),
                (None, None) => unreachable!("a key without a default has an example"),
            };
            let _ = writeln!(file, "{prefix}{} = {value}", name(&setting));
        }
    }
    file
}

/// Tables of all settings, one for each section.
pub fn markdown() -> String {
    let mut page = String::new();
    for (section, settings) in sections() {
        let _ = write!(
            page,
            "\n### {section}\n\n| key, variable | type | default | change | meaning |\n{}\n",
            "| --- ".repeat(5) + "|"
        );
        for setting in settings {
            let default = default(&setting).map_or_else(|| "unset".to_owned(), |default| format!("`{default}`"));
            let change = if setting.live { "live" } else { "restart" };
            let Setting { key, variable, type_name, description, .. } = &setting;
            let _ = writeln!(page, "| `{key}`<br>`{variable}` | {type_name} | {default} | {change} | {description} |");
        }
    }
    page + "\n"
}

/// The settings as terms with their descriptions, for the manual page.
pub fn terms() -> impl Iterator<Item = (String, String)> {
    settings().map(|setting| {
        let default =
            default(&setting).map_or_else(|| "unset by default".to_owned(), |default| format!("default {default}"));
        let change = if setting.live { "a reload applies a change" } else { "a change requires a restart" };
        let term = format!("{} ({}, {default}, {change})", setting.key, setting.type_name);
        (term, setting.description.replace('`', ""))
    })
}

/// The page with the tables between `BEGIN` and `END`.
pub fn insert(page: &str) -> Option<String> {
    let (head, rest) = page.split_once(BEGIN)?;
    let (_, tail) = rest.split_once(END)?;
    Some(format!("{head}{BEGIN}{}{END}{tail}", markdown()))
}

/// The default as TOML. That of the URL is printed with its password, which is everybody's.
fn default(setting: &Setting) -> Option<&str> {
    let default = setting.default.as_deref()?;
    Some(setting.example.unwrap_or(default))
}

fn sections() -> Vec<(&'static str, Vec<Setting>)> {
    let mut sections: Vec<(_, Vec<_>)> = Vec::new();
    for setting in settings() {
        let section = setting.key.rsplit_once('.').expect("a key has a section").0;
        match sections.last_mut() {
            Some((last, settings)) if *last == section => settings.push(setting),
            _ => sections.push((section, vec![setting])),
        }
    }
    sections
}

fn name(setting: &Setting) -> &'static str {
    setting.key.rsplit_once('.').expect("a key has a section").1
}

/// The text as a TOML comment, in lines of at most `WIDTH`.
fn comment(text: &str) -> String {
    let mut comment = String::new();
    let mut line = "#".to_owned();
    for word in text.split(' ') {
        if line.len() + 1 + word.len() > WIDTH {
            let _ = writeln!(comment, "{line}");
            "#".clone_into(&mut line);
        }
        let _ = write!(line, " {word}");
    }
    comment + &line + "\n"
}
