//! Names that no two writers share. Not secrets: only unlikely to meet twice.

use std::hash::{BuildHasher, Hasher, RandomState};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::SystemTime;

/// 16 hexadecimal digits, different at every call in every process.
pub(crate) fn nonce() -> String {
    static CALLS: AtomicU64 = AtomicU64::new(0);
    let mut hasher = blake3::Hasher::new();
    // The standard library seeds each process's hashers from the operating system.
    hasher.update(&RandomState::new().build_hasher().finish().to_le_bytes());
    hasher.update(&std::process::id().to_le_bytes());
    hasher.update(&CALLS.fetch_add(1, Ordering::Relaxed).to_le_bytes());
    let since = SystemTime::UNIX_EPOCH.elapsed().unwrap_or_default();
    hasher.update(&since.as_nanos().to_le_bytes());
    hasher.finalize().to_hex()[..16].to_owned()
}
