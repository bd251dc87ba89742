//! Which NCCL versions are accepted.
//!
//! Survivors keep their process when a rank dies, so a communicator must be abortable without
//! ending the process, and a version in which that is broken is refused before it can hang a job.

use std::ffi::c_int;
use std::fmt;

/// A version of NCCL.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct NcclVersion {
    /// The first number.
    pub major: u32,
    /// The second.
    pub minor: u32,
    /// The third.
    pub patch: u32,
}

/// The oldest version whose abort leaves a usable process.
pub const OLDEST: NcclVersion = NcclVersion::new(2, 26, 2);
/// First and last of the versions in which that was broken again.
const BROKEN: (NcclVersion, NcclVersion) = (NcclVersion::new(2, 28, 3), NcclVersion::new(2, 28, 8));
/// The oldest version that accepts several ranks on one GPU.
pub(super) const SHARED_GPU: NcclVersion = NcclVersion::new(2, 30, 0);

impl NcclVersion {
    /// That version.
    pub const fn new(major: u32, minor: u32, patch: u32) -> Self {
        Self { major, minor, patch }
    }

    /// From `ncclGetVersion`, as `NCCL_VERSION` of nccl.h encodes it: up to 2.8 with two digits
    /// less.
    pub fn from_code(code: c_int) -> Self {
        let code = u32::try_from(code).unwrap_or(0);
        let unit = if code < 10_000 { 1000 } else { 10_000 };
        Self { major: code / unit, minor: code % unit / 100, patch: code % 100 }
    }

    /// Why a group must not use this version, if so.
    pub fn refusal(self) -> Option<String> {
        if self < OLDEST {
            return Some(format!(
                "NCCL {self} is too old: before {OLDEST} a communicator cannot be aborted without \
                 ending the process, so survivors of a lost rank would hang; install {OLDEST} or \
                 newer (but not {} to {})",
                BROKEN.0, BROKEN.1
            ));
        }
        if (BROKEN.0..=BROKEN.1).contains(&self) {
            return Some(format!(
                "NCCL {self} is known bad: from {} to {} an abort can hang, so survivors of a lost \
                 rank would too; install another version",
                BROKEN.0, BROKEN.1
            ));
        }
        None
    }
}

impl fmt::Display for NcclVersion {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}.{}", self.major, self.minor, self.patch)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn codes_are_read_as_the_header_writes_them() {
        for (code, shown) in [
            (2708, "2.7.8"),
            (2804, "2.8.4"),
            (20_905, "2.9.5"),
            (22_602, "2.26.2"),
            (23_007, "2.30.7"),
            (-1, "0.0.0"),
        ] {
            assert_eq!(NcclVersion::from_code(code).to_string(), shown);
        }
    }

    #[test]
    fn versions_whose_abort_hangs_are_refused_with_the_reason() {
        for (code, part) in [
            (2804, Some("too old")),
            (22_601, Some("too old")),
            (22_602, None),
            (22_706, None),
            (22_802, None),
            (22_803, Some("known bad")),
            (22_808, Some("known bad")),
            (22_809, None),
            (23_007, None),
        ] {
            let refusal = NcclVersion::from_code(code).refusal();
            match part {
                Some(part) => assert!(refusal.unwrap().contains(part), "{code}"),
                None => assert_eq!(refusal, None, "{code}"),
            }
        }
    }
}
