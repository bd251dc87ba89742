//! raft-rs's log lines (slog) as tracing events. One level lower than raft-rs means them: its `info`
//! is a protocol trace, while our operators' `info` is "the leader changed".

use std::fmt::{self, Write};

use slog::{KV, Level};

/// Hands every record to tracing; formats nothing that nobody listens to.
struct TracingDrain;

/// The logger for a raft node.
pub(super) fn logger() -> slog::Logger {
    slog::Logger::root(TracingDrain, slog::o!())
}

impl slog::Drain for TracingDrain {
    type Ok = ();
    type Err = slog::Never;

    fn log(
        &self,
        record: &slog::Record<'_>,
        values: &slog::OwnedKVList,
    ) -> Result<(), slog::Never> {
        if !enabled(record.level()) {
            return Ok(());
        }
        let mut line = Line(record.msg().to_string());
        // Writing into a String cannot fail.
        let _ = record.kv().serialize(record, &mut line);
        let _ = values.serialize(record, &mut line);
        match record.level() {
            Level::Critical | Level::Error => tracing::error!(target: "raft", "{}", line.0),
            Level::Warning => tracing::warn!(target: "raft", "{}", line.0),
            Level::Info => tracing::debug!(target: "raft", "{}", line.0),
            Level::Debug | Level::Trace => tracing::trace!(target: "raft", "{}", line.0),
        }
        Ok(())
    }

    fn is_enabled(&self, level: Level) -> bool {
        enabled(level)
    }
}

/// Whether tracing wants raft's lines of this level.
fn enabled(level: Level) -> bool {
    match level {
        Level::Critical | Level::Error => tracing::enabled!(target: "raft", tracing::Level::ERROR),
        Level::Warning => tracing::enabled!(target: "raft", tracing::Level::WARN),
        Level::Info => tracing::enabled!(target: "raft", tracing::Level::DEBUG),
        Level::Debug | Level::Trace => tracing::enabled!(target: "raft", tracing::Level::TRACE),
    }
}

/// A message followed by its ` key=value` fields.
struct Line(String);

impl slog::Serializer for Line {
    fn emit_arguments(&mut self, key: slog::Key, value: &fmt::Arguments<'_>) -> slog::Result {
        // Writing into a String cannot fail.
        let _ = write!(self.0, " {key}={value}");
        Ok(())
    }
}
