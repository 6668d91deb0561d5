//! The limit of open files.

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

/// Files and sockets besides HTTP connections: the broker, the state, the log, the runtimes.
const OTHER_FILES: u64 = 32;

/// Raises the soft limit to the hard limit. Returns a warning if that is not enough for `http.max_connections`.
pub(super) fn raise_limit(max_connections: usize) -> Option<String> {
    let limit = getrlimit(Resource::Nofile);
    if let Err(error) = setrlimit(Resource::Nofile, Rlimit { current: limit.maximum, ..limit }) {
        tracing::debug!(%error, "failed to raise the limit of open files");
    }
    warning(getrlimit(Resource::Nofile).current, max_connections)
}

/// `limit` is `None` if there is none.
fn warning(limit: Option<u64>, max_connections: usize) -> Option<String> {
    let required = max_connections as u64 + OTHER_FILES;
    let limit = limit.filter(|limit| *limit < required)?;
    Some(format!(
        "the limit of {limit} open files is too low for http.max_connections = {max_connections}; raise it to {required} \
         (ulimit -n, LimitNOFILE), or lower http.max_connections"
    ))
}

#[cfg(test)]
mod tests {
    use super::warning;

    #[test]
    fn a_limit_below_the_connections_and_other_files_is_a_warning() {
        assert_eq!(warning(None, 64), None);
        assert_eq!(warning(Some(96), 64), None);
        assert!(warning(Some(95), 64).is_some_and(|warning| warning.contains("raise it to 96")));
    }
}
