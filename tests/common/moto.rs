//! An S3 server of a test's own: one that may be slowed down or stopped without harm to other tests.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Condvar, Mutex};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

/// The server; killed when dropped.
pub struct Moto {
    child: Child,
    /// Where it listens.
    pub address: String,
}

impl Moto {
    /// Starts the program that `COHORT_MOTO_SERVER` names; none, loudly, where that is not set.
    pub fn start() -> Option<Self> {
        let Ok(program) = std::env::var("COHORT_MOTO_SERVER") else {
            eprintln!("SKIPPED: COHORT_MOTO_SERVER is not set: `bash tests/run` installs a server");
            return None;
        };
        let mut command = Command::new(program);
        command.args(["-H", "127.0.0.1", "-p", "0"]).stdin(Stdio::null()).stdout(Stdio::null());
        let mut child = command.stderr(Stdio::piped()).spawn().expect("it starts");
        let mut lines = BufReader::new(child.stderr.take().expect("piped")).lines();
        let address = lines
            .by_ref()
            .map_while(Result::ok)
            .find_map(|line| Some(line.split_once("Running on http://")?.1.trim().to_owned()))
            .expect("it says where it listens");
        // Read on, or it would wait for its log to be.
        std::thread::spawn(move || lines.map_while(Result::ok).for_each(drop));
        Some(Self { child, address })
    }

    /// Its process.
    pub fn pid(&self) -> Pid {
        Pid::from_raw(self.child.id() as i32)
    }

    /// Makes a bucket.
    pub fn make_bucket(&self, name: &str) {
        let mut socket = TcpStream::connect(&self.address).expect("connects");
        let head = format!(
            "PUT /{name} HTTP/1.1\r\nhost: {}\r\nconnection: close\r\nauthorization: \
             AWS4-HMAC-SHA256 Credential=test/20260101/us-east-1/s3/aws4_request, \
             SignedHeaders=host, Signature=00\r\ncontent-length: 0\r\n\r\n",
            self.address
        );
        socket.write_all(head.as_bytes()).expect("sent");
        let mut answer = String::new();
        socket.read_to_string(&mut answer).expect("an answer");
        assert!(answer.starts_with("HTTP/1.1 200"), "{answer}");
    }
}

impl Drop for Moto {
    fn drop(&mut self) {
        // It may have been stopped.
        let _ = kill(self.pid(), Signal::SIGCONT);
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// A cluster.toml with a bucket as its store, reached at `endpoint`.
pub fn config(folder: &Path, endpoint: &str, bucket: &str) -> PathBuf {
    let path = folder.join("cluster.toml");
    let text = format!(
        "[store]\nuri = \"s3://{bucket}/prefix\"\n[store.s3]\nendpoint = \"http://{endpoint}\"\n\
         access_key_id = \"test\"\nsecret_access_key = \"test-secret\"\nallow_http = true\n"
    );
    std::fs::write(&path, text).expect("written");
    path
}

/// A way to a server on which answers can be held back: a store that is slow for as long as a test
/// wants.
pub struct Gate {
    /// Where it listens.
    pub address: String,
    held: Arc<(Mutex<bool>, Condvar)>,
}

impl Gate {
    /// Open at first.
    pub fn before(server: &str) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
        let address = listener.local_addr().expect("bound").to_string();
        let held = Arc::new((Mutex::new(false), Condvar::new()));
        let (server, gate) = (server.to_owned(), Arc::clone(&held));
        std::thread::spawn(move || {
            for client in listener.incoming().map_while(Result::ok) {
                let Ok(upstream) = TcpStream::connect(&server) else { continue };
                let ends = (client.try_clone(), upstream.try_clone());
                let (Ok(client_too), Ok(upstream_too)) = ends else { continue };
                let gate = Arc::clone(&gate);
                std::thread::spawn(move || forward(client, upstream, None));
                std::thread::spawn(move || forward(upstream_too, client_too, Some(&gate)));
            }
        });
        Self { address, held }
    }

    /// Holds answers back from now on, or lets all pass.
    pub fn hold(&self, is_held: bool) {
        *self.held.0.lock().expect("no panic") = is_held;
        self.held.1.notify_all();
    }
}

impl Drop for Gate {
    fn drop(&mut self) {
        self.hold(false);
    }
}

/// What one end sends goes to the other, as long as the gate is open.
fn forward(mut from: TcpStream, mut to: TcpStream, gate: Option<&(Mutex<bool>, Condvar)>) {
    let mut buffer = [0; 16 << 10];
    while let Ok(length) = from.read(&mut buffer) {
        if let Some((held, changed)) = gate {
            let held = held.lock().expect("no panic");
            drop(changed.wait_while(held, |held| *held).expect("no panic"));
        }
        if length == 0 || to.write_all(&buffer[..length]).is_err() {
            break;
        }
    }
    let _ = to.shutdown(Shutdown::Write);
}
