//! Whether a Redis server has disconnected a client whose output buffer exceeded its limit.

/// How many clients a server has disconnected for that reason since it was started (`INFO server stats`).
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct OutputLimitDisconnects {
    /// Identifies the process of the server.
    run_id: String,
    count: u64,
}

impl OutputLimitDisconnects {
    /// `None` before Redis 7.2, which does not report them.
    pub(super) fn parse(info: &str) -> Option<Self> {
        let field = |name: &str| info.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'));
        let count = field("client_output_buffer_limit_disconnections")?.trim().parse().ok()?;
        Some(Self { run_id: field("run_id")?.trim().to_owned(), count })
    }

    /// Whether this process of the server has disconnected a client since `before`.
    pub(super) fn has_increased_since(&self, before: &Self) -> bool {
        self.run_id == before.run_id && self.count > before.count
    }
}

#[cfg(test)]
mod tests {
    use super::OutputLimitDisconnects;

    #[test]
    fn the_counts_of_one_process_are_compared() {
        let parse = |run_id: &str, count: &str| {
            OutputLimitDisconnects::parse(&format!(
                "# Server\r\nrun_id:{run_id}\r\n# Stats\r\nclient_output_buffer_limit_disconnections:{count}\r\n"
            ))
        };
        let before = parse("a", "1").unwrap();
        assert!(parse("a", "2").unwrap().has_increased_since(&before));
        assert!(!parse("a", "1").unwrap().has_increased_since(&before));
        assert!(!parse("b", "2").unwrap().has_increased_since(&before));
        assert_eq!((parse("a", "x"), OutputLimitDisconnects::parse("# Stats\r\n")), (None, None));
    }
}
