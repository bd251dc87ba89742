//! How commands print: tables and lines for people, JSON documents for programs. Nothing else
//! writes to standard output.

use std::io::Write;
use std::time::Duration;

use comfy_table::Table;
use comfy_table::presets::NOTHING;
use serde::Serialize;

use crate::error::CliError;

/// Exit code when the reader of standard output is gone: that of a process ended by SIGPIPE.
const EXIT_CLOSED_PIPE: i32 = 141;

/// Prints one JSON document as one line. A closed pipe ends the process quietly, as `head` expects.
pub fn json(document: &impl Serialize) {
    match serde_json::to_string(document) {
        Ok(text) => line(&text),
        Err(error) => eprintln!("error: cannot print the result as JSON: {error}"),
    }
}

/// Prints one line. When nobody can read it any more the process ends: quietly, as `head` expects,
/// with the code of a closed pipe; loudly where the output is a full disk. An embedded cluster ends
/// with it, and its ranks with that; the job goes on with `resume`.
pub fn line(text: &str) {
    let Err(error) = writeln!(std::io::stdout(), "{text}") else { return };
    if error.kind() == std::io::ErrorKind::BrokenPipe {
        std::process::exit(EXIT_CLOSED_PIPE);
    }
    eprintln!("error: cannot write the result: {error}");
    std::process::exit(i32::from(api::ExitClass::Internal.code()));
}

/// Prints one line, and leaves it to the caller what becomes of a failure: for those who have to put
/// something right before they end.
pub fn try_line(text: &str) -> crate::error::Result<()> {
    let failed = |e| CliError::internal(format!("cannot write the result: {e}"));
    writeln!(std::io::stdout(), "{text}").map_err(failed)
}

/// Prints rows under a header; just `empty` when there are none.
pub fn table(header: &[&str], rows: Vec<Vec<String>>, empty: &str) {
    if rows.is_empty() {
        line(empty);
        return;
    }
    let mut table = Table::new();
    table.load_preset(NOTHING);
    table.set_header(header.iter().map(|name| name.to_uppercase()));
    for row in rows {
        table.add_row(row);
    }
    for text in table.to_string().lines() {
        line(text.trim_end());
    }
}

/// "3 s ago" for a time in milliseconds since the Unix epoch.
pub fn ago(time_ms: u64) -> String {
    format!("{} ago", span(Duration::from_millis(now_ms().saturating_sub(time_ms))))
}

/// Milliseconds since the Unix epoch.
pub fn now_ms() -> u64 {
    let since = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
    since.map_or(0, |since| since.as_millis() as u64)
}

/// "42 s", "3 min 5 s", "2 h 10 min".
pub fn span(duration: Duration) -> String {
    let seconds = duration.as_secs();
    match seconds {
        0..60 => format!("{seconds} s"),
        60..3600 => format!("{} min {} s", seconds / 60, seconds % 60),
        3600..86400 => format!("{} h {} min", seconds / 3600, seconds % 3600 / 60),
        _ => format!("{} d {} h", seconds / 86400, seconds % 86400 / 3600),
    }
}

/// "3.4 MiB".
pub fn bytes(count: u64) -> String {
    let units = ["B", "KiB", "MiB", "GiB", "TiB"];
    let mut value = count as f64;
    let mut unit = 0;
    while value >= 1024.0 && unit + 1 < units.len() {
        value /= 1024.0;
        unit += 1;
    }
    if unit == 0 { format!("{count} B") } else { format!("{value:.1} {}", units[unit]) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_and_spans_read_well() {
        assert_eq!(bytes(512), "512 B");
        assert_eq!(bytes(3 << 20), "3.0 MiB");
        assert_eq!(span(Duration::from_secs(185)), "3 min 5 s");
        assert_eq!(span(Duration::from_secs(7800)), "2 h 10 min");
    }
}
