//! `cluster self-test` in a process of its own: its end is the verdict, its standard output says what
//! failed.

use std::path::Path;
use std::process::Stdio;
use std::time::Duration;

use tokio::io::AsyncReadExt;
use tokio::process::Command;
use tokio::time::timeout;

/// The hidden command.
const COMMAND: &str = "self-test";
/// Most bytes taken of what it says.
const WORDS_BYTES_MAX: u64 = 2 << 10;

/// Runs it; killed after `limit`.
///
/// # Errors
/// What failed, in words.
pub(super) async fn run(program: &Path, limit: Duration) -> Result<(), String> {
    let shown = program.display();
    let mut child = Command::new(program)
        .arg(COMMAND)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .kill_on_drop(true)
        .spawn()
        .map_err(|error| format!("cannot start `{shown}`: {error}"))?;
    let stdout = child.stdout.take();
    let ends = async {
        let mut words = Vec::new();
        if let Some(stdout) = stdout {
            stdout.take(WORDS_BYTES_MAX).read_to_end(&mut words).await?;
        }
        let status = child.wait().await?;
        Ok::<_, std::io::Error>((status, words))
    };
    match timeout(limit, ends).await {
        Ok(Ok((status, _))) if status.success() => Ok(()),
        Ok(Ok((status, words))) => {
            let words = String::from_utf8_lossy(&words);
            let lines: Vec<&str> = words.lines().filter(|line| !line.trim().is_empty()).collect();
            Err(if lines.is_empty() { status.to_string() } else { lines.join("; ") })
        }
        Ok(Err(error)) => Err(format!("it cannot be waited for: {error}")),
        Err(_) => Err(format!("no end within {} s", limit.as_secs())),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn an_end_that_is_bad_or_does_not_come_is_named() {
        let limit = Duration::from_secs(60);
        assert_eq!(run(Path::new("/bin/true"), limit).await, Ok(()));
        assert_eq!(run(Path::new("/bin/false"), limit).await, Err("exit status: 1".into()));
        let found = run(Path::new("/no/such/program"), limit).await.expect_err("not there");
        assert!(found.starts_with("cannot start `/no/such/program`: No such file"), "{found}");
    }
}
