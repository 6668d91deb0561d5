//! `metrics.worker_groups`: names that stand for several workers in the label `worker`.

use std::fmt;

use globset::{Glob, GlobSet, GlobSetBuilder};

use super::secret::printable;
use super::types::{FromRaw, Raw};

/// The name that the exporter uses itself, for workers beyond its limit.
const RESERVED: &str = "(other)";

/// Maximum length of a name in bytes, like that of every label value.
const MAX_NAME: usize = 256;

const EXPECTED: &str = r#"expected groups of workers, such as ["web=celery@web-*|celery@api-*", "all=*"]"#;

/// Named groups of workers, each with the globs of its members' hostnames.
#[derive(Clone)]
pub struct WorkerGroups {
    entries: Vec<String>,
    /// The distinct names, in the order of the entries.
    names: Vec<Box<str>>,
    /// The name of each group, and its globs, in the order of the entries.
    globs: GlobSet,
    /// The index of the name for each glob.
    group_of_glob: Vec<usize>,
}

impl WorkerGroups {
    /// The entries as configured: `NAME=GLOB|GLOB`.
    #[must_use]
    pub fn entries(&self) -> &[String] {
        &self.entries
    }

    /// The names of the groups, without duplicates.
    #[must_use]
    pub fn names(&self) -> &[Box<str>] {
        &self.names
    }

    /// The index in [`WorkerGroups::names`] of the first group that the hostname belongs to: one of its globs matches
    /// the entire hostname, or the hostname is the group's name.
    #[must_use]
    pub fn find(&self, hostname: &str) -> Option<usize> {
        self.globs.matches(hostname).into_iter().min().map(|glob| self.group_of_glob[glob])
    }

    /// Compiles the entries.
    ///
    /// # Errors
    /// Returns what is invalid: an entry without `=`, a name that is empty, reserved or longer than 256 bytes, or a glob.
    pub fn new(entries: Vec<String>) -> Result<Self, String> {
        let mut globs = GlobSetBuilder::new();
        let (mut names, mut group_of_glob) = (Vec::<Box<str>>::new(), Vec::new());
        for entry in &entries {
            let (name, patterns) = split(entry).map_err(|problem| format!("{:?} {problem}", printable(entry)))?;
            let group = names.iter().position(|known| **known == *name).unwrap_or_else(|| {
                names.push(name.into());
                names.len() - 1
            });
            for pattern in std::iter::once(globset::escape(name)).chain(patterns.into_iter().map(str::to_owned)) {
                let glob = Glob::new(&pattern)
                    .map_err(|error| format!("{:?} is not a valid glob: {}", printable(&pattern), error.kind()))?;
                globs.add(glob);
                group_of_glob.push(group);
            }
        }
        let globs = globs.build().map_err(|error| error.kind().to_string())?;
        Ok(Self { entries, names, globs, group_of_glob })
    }
}

/// Splits an entry into the name and the globs.
fn split(entry: &str) -> Result<(&str, Vec<&str>), String> {
    let (name, patterns) = entry.split_once('=').ok_or("has no =")?;
    let name = name.trim();
    let patterns: Vec<_> = patterns.split('|').map(str::trim).collect();
    match name {
        "" => Err("has no name before the =".to_owned()),
        RESERVED => Err(format!("has the reserved name {RESERVED}")),
        _ if name.len() > MAX_NAME => Err(format!("has a name of more than {MAX_NAME} bytes")),
        _ if patterns.contains(&"") => Err("has an empty glob".to_owned()),
        _ => Ok((name, patterns)),
    }
}

impl fmt::Debug for WorkerGroups {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.entries.fmt(f)
    }
}

impl PartialEq for WorkerGroups {
    fn eq(&self, other: &Self) -> bool {
        self.entries == other.entries
    }
}

/// A list of at least one `NAME=GLOB|GLOB`.
pub(super) struct Groups;

impl FromRaw<WorkerGroups> for Groups {
    fn from_raw(raw: Raw) -> Result<WorkerGroups, String> {
        match raw {
            Raw::Texts(entries) if !entries.is_empty() => {
                WorkerGroups::new(entries).map_err(|problem| format!("{EXPECTED}; {problem}"))
            }
            _ => Err(EXPECTED.to_owned()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn groups(entries: &[&str]) -> WorkerGroups {
        WorkerGroups::new(entries.iter().map(|entry| (*entry).to_owned()).collect()).unwrap()
    }

    #[test]
    fn the_first_match_decides() {
        let groups = groups(&["web=celery@web-*|celery@api-*", "a=gen?@*", "web=x[12]", "all = c*"]);
        assert_eq!(groups.names().iter().map(|name| &**name).collect::<Vec<_>>(), ["web", "a", "all"]);
        for (hostname, group) in [
            ("celery@web-1", Some(0)),
            ("celery@api-", Some(0)),
            ("x2", Some(0)),
            ("gen1@a/b", Some(1)),
            ("celery@other", Some(2)),
            ("gen12@a", None),
            ("a celery@web-1", None),
            ("", None),
        ] {
            assert_eq!(groups.find(hostname), group, "{hostname}");
        }
    }

    #[test]
    fn a_hostname_that_equals_a_name_joins_the_group() {
        let groups = groups(&["w*b=none", "w1b=x"]);
        assert_eq!((groups.find("w*b"), groups.find("w1b"), groups.find("w2b")), (Some(0), Some(1), None));
    }
}
