//! Builds the fake library, one copy per test: its faults and counters are global to a copy.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::{Mutex, PoisonError};
use std::time::Instant;

use collective::CollectiveError;
use collective::nccl::{Libraries, LibraryPaths};

use crate::ranks::HANG;

/// Two tests must not run the compiler for the same file.
static BUILDING: Mutex<()> = Mutex::new(());

#[derive(Clone, Copy, Debug)]
#[repr(i32)]
pub enum Counter {
    Aborts = 0,
    Destroys = 1,
    Allocations = 2,
    Frees = 3,
    Registered = 4,
    Deregistered = 5,
    Launches = 6,
    UsesAfterEnd = 9,
    Contexts = 11,
    /// Communicators whose initialisation has begun.
    Formings = 12,
}

/// A copy of the fake library.
#[derive(Clone)]
pub struct Fake {
    path: PathBuf,
}

impl Fake {
    /// A copy for the test of that name; none, with a word about it, if there is no C compiler.
    pub fn build(test: &str, defines: &[&str]) -> Option<Self> {
        let _building = BUILDING.lock().unwrap_or_else(PoisonError::into_inner);
        let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fake_nccl/fake.c");
        let path = Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("libfake-{test}.so"));
        let mut compiler = Command::new(std::env::var_os("CC").unwrap_or_else(|| "cc".into()));
        compiler.args(["-O1", "-shared", "-fPIC", "-pthread"]).args(defines);
        let output = match compiler.arg(source).arg("-o").arg(&path).arg("-lm").output() {
            Ok(output) => output,
            Err(error) => {
                eprintln!("SKIPPED {test}: no C compiler to build the fake NCCL with: {error}");
                return None;
            }
        };
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        Some(Self { path })
    }

    pub fn paths(&self) -> LibraryPaths {
        LibraryPaths { nccl: Some(self.path.clone()), cuda: Some(self.path.clone()) }
    }

    pub fn open(&self) -> Result<Libraries, CollectiveError> {
        Libraries::open(&self.paths())
    }

    /// The copy that the loader has opened.
    pub fn library(&self) -> libloading::Library {
        // SAFETY: our own library; its constructors do nothing.
        unsafe { libloading::Library::new(&self.path) }.unwrap()
    }

    /// Calls one of the fault switches: `void fake_NAME(int)`.
    pub fn switch(&self, name: &str, value: i32) {
        let library = self.library();
        // SAFETY: all of them have this type.
        unsafe { library.get::<unsafe extern "C" fn(i32)>(name.as_bytes()).unwrap()(value) };
    }

    pub fn count(&self, counter: Counter) -> i64 {
        let library = self.library();
        // SAFETY: `long fake_counter(int)`.
        unsafe {
            library.get::<unsafe extern "C" fn(i32) -> i64>(b"fake_counter").unwrap()(
                counter as i32,
            )
        }
    }

    /// Waits until a counter has a value: frees happen on another thread.
    #[track_caller]
    pub fn expect(&self, counter: Counter, value: i64) {
        // The library is C and tells nobody: only looking helps, up to a generous deadline.
        let deadline = Instant::now() + HANG;
        loop {
            let found = self.count(counter);
            if found == value {
                return;
            }
            assert!(Instant::now() < deadline, "{counter:?} is {found}, expected {value}");
            std::thread::yield_now();
        }
    }
}
