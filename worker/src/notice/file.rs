//! A file that something else on the host writes: a script of the provider, a scheduler, a person.

use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use serde::Deserialize;

use super::metadata::Trouble;
use super::{Notice, Source, Urgency};

/// A larger file is read no further.
const FILE_BYTES_MAX: u64 = 4 << 10;

/// The source "file".
pub(crate) struct NoticeFile {
    path: PathBuf,
    /// What it held when it was last looked at, where that was not JSON.
    unsettled: Option<String>,
}

impl NoticeFile {
    pub(crate) fn new(path: PathBuf) -> Self {
        Self { path, unsettled: None }
    }
}

impl Source for NoticeFile {
    fn name(&self) -> &'static str {
        "file"
    }

    async fn look(&mut self) -> Result<Option<Notice>, Trouble> {
        let path = self.path.clone();
        let read = tokio::task::spawn_blocking(move || read(&path)).await;
        let read = read.map_err(std::io::Error::other).and_then(|read| read);
        let found = read.map_err(|source| {
            let path = self.path.display().to_string();
            Trouble::File { path, source }
        })?;
        let Some((text, written)) = found else {
            self.unsettled = None;
            return Ok(None);
        };
        if let Some(notice) = parse(&text, &self.path, written) {
            return Ok(Some(notice));
        }
        // Whoever writes it may not be done: it counts as it is once it has not changed for a while.
        let is_settled = self.unsettled.as_ref() == Some(&text);
        self.unsettled = Some(text);
        Ok(is_settled.then(|| plain(&self.path)))
    }
}

/// Its content and when it was written; `None` when it is not there.
fn read(path: &Path) -> std::io::Result<Option<(String, SystemTime)>> {
    let file = match File::open(path) {
        Ok(file) => file,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(error),
    };
    let written = file.metadata()?.modified()?;
    let mut bytes = Vec::new();
    file.take(FILE_BYTES_MAX).read_to_end(&mut bytes)?;
    Ok(Some((String::from_utf8_lossy(&bytes).into_owned(), written)))
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Content {
    #[serde(default)]
    deadline_seconds: Option<u64>,
    #[serde(default)]
    reason: String,
}

/// What the content says, where it is complete JSON. The deadline counts from when it was written.
fn parse(text: &str, path: &Path, written: SystemTime) -> Option<Notice> {
    let content: Content = serde_json::from_str(text).ok()?;
    let in_time = |seconds| written.checked_add(Duration::from_secs(seconds));
    let deadline = content.deadline_seconds.and_then(in_time);
    let cause = match content.reason.trim() {
        "" => plain(path).cause,
        reason => reason.to_owned(),
    };
    Some(Notice { cause, deadline, urgency: Urgency::Leave, acknowledge: None })
}

/// The file is there: that alone is a notice.
fn plain(path: &Path) -> Notice {
    let cause = format!("the file `{}` asks for it", path.display());
    Notice { cause, deadline: None, urgency: Urgency::Leave, acknowledge: None }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_deadline_counts_from_the_writing() {
        let written = SystemTime::UNIX_EPOCH + Duration::from_secs(100);
        let path = Path::new("/run/leave");
        let text = r#"{"deadline_seconds": 20, "reason": "the rack is moved"}"#;
        let notice = parse(text, path, written).expect("a notice");
        assert_eq!(notice.cause, "the rack is moved");
        assert_eq!(notice.deadline, Some(written + Duration::from_secs(20)));
        let notice = parse("{}", path, written).expect("a notice");
        assert_eq!((&*notice.cause, notice.deadline), ("the file `/run/leave` asks for it", None));
        assert_eq!(parse(r#"{"deadline": 20}"#, path, written), None, "a mistyped key");
    }

    #[tokio::test]
    async fn a_file_that_is_no_json_counts_once_it_is_settled() {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("leave");
        let mut source = NoticeFile::new(path.clone());
        assert_eq!(source.look().await.expect("looks"), None);
        // Made by `> leave`, filled later.
        std::fs::write(&path, "").expect("writes");
        assert_eq!(source.look().await.expect("looks"), None);
        std::fs::write(&path, r#"{"reason": "x"}"#).expect("writes");
        assert_eq!(source.look().await.expect("looks").map(|n| n.cause).as_deref(), Some("x"));
        std::fs::write(&path, "bye").expect("writes");
        assert_eq!(source.look().await.expect("looks"), None);
        assert_eq!(source.look().await.expect("looks"), Some(plain(&path)));
        std::fs::remove_file(&path).expect("removes");
        assert_eq!(source.look().await.expect("looks"), None);
        let mut source = NoticeFile::new(folder.path().to_owned());
        assert!(source.look().await.is_err(), "a folder cannot be read");
    }
}
