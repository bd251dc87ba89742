//! Where the store's key comes from: a file, or what a command prints. It is never shown.

use std::io::Read;
use std::os::unix::process::CommandExt;
use std::process::{Child, Command, Stdio};
use std::sync::mpsc;
use std::time::{Duration, Instant};

use api::config::EncryptionSection;
use nix::sys::signal::{Signal, killpg};
use nix::unistd::Pid;

use crate::error::StoreError;
use crate::sealing::{KEY_BYTES, MasterKey, id_text};

/// A command that has not answered by then never will: nobody types a passphrase here.
const COMMAND_WAIT: Duration = Duration::from_secs(30);
/// How often is looked whether a command that has answered has ended, too: most have by then.
const END_POLL: Duration = Duration::from_millis(5);
/// A key's text and then some; what prints more prints something else.
const OUTPUT_BYTES_MAX: u64 = 1024;

/// The key that a store is encrypted under. Its `Debug` shows an id that tells keys apart and says
/// nothing about them.
#[derive(Clone, Debug)]
pub struct StoreKey(pub(crate) MasterKey);

impl StoreKey {
    /// The key that the section names; none when it names none.
    ///
    /// # Errors
    /// When file or command give no key. What they give is not repeated.
    pub fn load(section: &EncryptionSection) -> Result<Option<Self>, StoreError> {
        let (source, bytes) = match (&section.key_file, section.key_command.as_slice()) {
            (file, [program, arguments @ ..]) if file.as_os_str().is_empty() => {
                let source = format!("store.encryption.key_command `{program}`");
                let output = run(program, arguments, COMMAND_WAIT).map_err(|problem| {
                    StoreError::Settings(format!("{source}: {problem}: run it by hand to see why"))
                })?;
                (source, output)
            }
            (file, _) if !file.as_os_str().is_empty() => {
                let source = format!("store.encryption.key_file `{}`", file.display());
                let bytes = std::fs::File::open(file).and_then(|file| {
                    let mut bytes = Vec::new();
                    file.take(OUTPUT_BYTES_MAX).read_to_end(&mut bytes)?;
                    Ok(bytes)
                });
                let bytes = bytes.map_err(|error| {
                    StoreError::Settings(format!(
                        "{source} cannot be read: {error}: copy the store's key to this host, or \
                         make one for a new store with `openssl rand -hex 32`"
                    ))
                })?;
                (source, bytes)
            }
            _ => return Ok(None),
        };
        parse(&bytes).map(|key| Some(Self(MasterKey::new(key)))).ok_or_else(|| {
            StoreError::Settings(format!(
                "{source} gives {} bytes that are no key, expected {} hexadecimal digits or {} raw \
                 bytes: `openssl rand -hex 32` makes one",
                bytes.len(),
                2 * KEY_BYTES,
                KEY_BYTES
            ))
        })
    }

    /// A key from its bytes.
    pub fn from_bytes(bytes: [u8; KEY_BYTES]) -> Self {
        Self(MasterKey::new(bytes))
    }

    /// What tells it from other keys.
    pub fn id(&self) -> String {
        id_text(&self.0.id())
    }
}

fn parse(bytes: &[u8]) -> Option<[u8; KEY_BYTES]> {
    // Text of that length is a passphrase or half a key: random bytes are, once in 10^14.
    let is_text = bytes.iter().all(|byte| byte.is_ascii_graphic() || byte.is_ascii_whitespace());
    if let Some(raw) = bytes.try_into().ok().filter(|_| !is_text) {
        return Some(raw);
    }
    let text = bytes.trim_ascii();
    let mut key = [0; KEY_BYTES];
    if text.len() != 2 * KEY_BYTES {
        return None;
    }
    for (byte, pair) in key.iter_mut().zip(text.chunks_exact(2)) {
        let digit = |digit: u8| (digit as char).to_digit(16).and_then(|d| u8::try_from(d).ok());
        *byte = digit(pair[0])? << 4 | digit(pair[1])?;
    }
    Some(key)
}

/// Runs a command and takes what it prints. Its errors go where this process's go.
fn run(program: &str, arguments: &[String], wait: Duration) -> Result<Vec<u8>, String> {
    let mut child = Command::new(program)
        .args(arguments)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        // So that what it starts can be ended with it.
        .process_group(0)
        .spawn()
        .map_err(|error| format!("it cannot be started: {error}"))?;
    let deadline = Instant::now() + wait;
    let output = read_in_time(&mut child, wait);
    let ended = loop {
        match child.try_wait() {
            Ok(None) if output.is_ok() && Instant::now() < deadline => {
                std::thread::sleep(END_POLL);
            }
            ended => break ended,
        }
    };
    let status = match ended {
        Ok(Some(status)) => status,
        _ => {
            // Its group has its number until it is waited for; it may have ended just now.
            let _ = killpg(Pid::from_raw(child.id() as i32), Signal::SIGKILL);
            child.wait().map_err(|error| error.to_string())?;
            return Err(output.err().unwrap_or_else(|| late(wait)));
        }
    };
    match output {
        Ok(output) if status.success() => Ok(output),
        Ok(_) => Err(format!("it failed ({status})")),
        Err(problem) => Err(problem),
    }
}

/// Reads to the end of the output on a thread of its own, so that waiting has an end.
fn read_in_time(child: &mut Child, wait: Duration) -> Result<Vec<u8>, String> {
    let Some(stdout) = child.stdout.take() else { return Err("it has no output".into()) };
    let (sender, receiver) = mpsc::channel();
    std::thread::spawn(move || {
        let mut output = Vec::new();
        let read = stdout.take(OUTPUT_BYTES_MAX).read_to_end(&mut output);
        // Nobody listens any more after the deadline.
        let _ = sender.send(read.map(|_| output));
    });
    match receiver.recv_timeout(wait) {
        Ok(read) => read.map_err(|error| error.to_string()),
        Err(_) => Err(late(wait)),
    }
}

fn late(wait: Duration) -> String {
    format!("no answer, or no end, within {} s", wait.as_secs())
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;

    const HEX: &str = "000102030405060708090a0b0c0d0e0f101112131415161718191A1B1C1D1E1F";

    fn file(path: &Path) -> EncryptionSection {
        EncryptionSection { key_file: path.to_owned(), ..EncryptionSection::default() }
    }

    fn command(script: &str) -> EncryptionSection {
        let key_command = ["sh", "-c", script].map(str::to_owned).to_vec();
        EncryptionSection { key_command, ..EncryptionSection::default() }
    }

    fn id(section: &EncryptionSection) -> String {
        StoreKey::load(section).expect("loads").expect("a key").id()
    }

    #[test]
    fn a_key_comes_from_a_file_or_a_command_in_digits_or_bytes() {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("key");
        let raw: [u8; 32] = std::array::from_fn(|i| i as u8);
        let expected = StoreKey::from_bytes(raw).id();
        for content in [HEX.as_bytes(), format!("{HEX}\n").as_bytes(), &raw[..]] {
            std::fs::write(&path, content).expect("written");
            assert_eq!(id(&file(&path)), expected);
        }
        assert_eq!(id(&command(&format!("echo {HEX}"))), expected);
        assert!(StoreKey::load(&EncryptionSection::default()).expect("nothing").is_none());
    }

    #[test]
    fn what_is_no_key_is_refused_and_not_repeated() {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("key");
        let refused =
            |section: &EncryptionSection| StoreKey::load(section).expect_err("refused").to_string();
        assert!(refused(&file(&path)).contains("cannot be read"));
        let secret = "almost-a-secret";
        let phrase = "correct horse battery stapler 1\n";
        assert_eq!(phrase.len(), KEY_BYTES);
        for content in [secret, &HEX[..63], &HEX[..32], phrase, &HEX.replace('0', "x"), ""] {
            std::fs::write(&path, content).expect("written");
            let text = refused(&file(&path));
            assert!(text.contains("expected 64 hexadecimal digits"), "{text}");
            assert!(content.is_empty() || !text.contains(content), "{text}");
        }
        let text = refused(&command(&format!("echo {secret}; exit 3")));
        assert!(text.contains("exit status: 3") && !text.contains(secret), "{text}");
        let text = refused(&command("true"));
        assert!(text.contains("gives 0 bytes"), "{text}");
        let absent = EncryptionSection {
            key_command: vec!["/no/such/program".into()],
            ..EncryptionSection::default()
        };
        assert!(refused(&absent).contains("cannot be started"));
    }

    #[test]
    fn a_command_that_does_not_end_is_killed_with_all_that_it_started() {
        let wait = Duration::from_millis(200);
        let sh = |script: &str| run("sh", &["-c".to_owned(), script.to_owned()], wait);
        // It has said all it has to say, and stays.
        let text = sh("exec 1>&-; exec sleep 3600").expect_err("it does not end");
        assert!(text.contains("no end"), "{text}");
        // A pipe that what it started holds ends once that is gone, too.
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("fifo");
        let made = Command::new("mkfifo").arg(&path).status().expect("it starts");
        assert!(made.success());
        let (sender, gone) = mpsc::channel();
        let fifo = path.clone();
        std::thread::spawn(move || {
            let mut held = std::fs::File::open(fifo).expect("opens once it is written to");
            let _ = held.read_to_end(&mut Vec::new());
            sender.send(()).expect("awaited");
        });
        let script = format!("sleep 3600 > '{}' | sleep 3600", path.display());
        sh(&script).expect_err("no answer");
        gone.recv_timeout(Duration::from_secs(60)).expect("the first part of the pipe is gone");
    }
}
