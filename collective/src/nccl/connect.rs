//! Forming a group: the ranks tell each other over an existing CPU group what they have, then NCCL
//! connects them.
//!
//! Every rank says whether it can use NCCL before any of them waits inside it. So a rank that has
//! no library, no GPU or another version is named on all ranks, at once, with its reason.

use std::collections::HashMap;

use api::Rank;

use crate::communicator::Communicator;
use crate::error::CollectiveError;
use crate::nccl::comm::unique_id;
use crate::nccl::device::Device;
use crate::nccl::ffi::{UNIQUE_ID_BYTES, UniqueId};
use crate::nccl::version::{NcclVersion, SHARED_GPU};

/// NCCL accepts several ranks on one GPU only with this set to 1.
const SHARED_GPU_VARIABLE: &str = "NCCL_MULTI_RANK_GPU_ENABLE";
/// Characters of a rank's reason that are sent: it ends in errors and logs.
const REASON_CHARS_MAX: usize = 1000;

const READY: u8 = 1;
const REFUSED: u8 = 0;

/// What a rank brings to a group.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Ready {
    version: NcclVersion,
    uuid: [u8; 16],
    /// Rank 0's invitation; all zero from the others.
    id: UniqueId,
}

impl Ready {
    fn encode(report: &Result<Self, CollectiveError>) -> Vec<u8> {
        match report {
            Ok(ready) => {
                let mut bytes = vec![READY];
                for part in [ready.version.major, ready.version.minor, ready.version.patch] {
                    bytes.extend(part.to_le_bytes());
                }
                bytes.extend(ready.uuid);
                bytes.extend(ready.id.0);
                bytes
            }
            Err(error) => {
                let reason: String = error.to_string().chars().take(REASON_CHARS_MAX).collect();
                let mut bytes = vec![REFUSED];
                bytes.extend(reason.into_bytes());
                bytes
            }
        }
    }

    /// What a rank said, or why it cannot join.
    fn decode(bytes: &[u8]) -> Result<Self, String> {
        let (kind, rest) = bytes.split_first().ok_or("it said nothing")?;
        if *kind == REFUSED {
            return Err(String::from_utf8_lossy(rest).into_owned());
        }
        let unreadable = || format!("it said {} bytes that are no report", bytes.len());
        let (numbers, rest) = rest.split_first_chunk::<12>().ok_or_else(unreadable)?;
        let (uuid, rest) = rest.split_first_chunk::<16>().ok_or_else(unreadable)?;
        let id: [u8; UNIQUE_ID_BYTES] = rest.try_into().map_err(|_| unreadable())?;
        let [a, b, c, d, e, f, g, h, i, j, k, l] = *numbers;
        let [major, minor, patch] =
            [[a, b, c, d], [e, f, g, h], [i, j, k, l]].map(u32::from_le_bytes);
        let version = NcclVersion { major, minor, patch };
        Ok(Self { version, uuid: *uuid, id: UniqueId(id) })
    }
}

/// Whether the environment lets ranks share a GPU.
fn sharing_enabled() -> bool {
    std::env::var(SHARED_GPU_VARIABLE).is_ok_and(|value| value.trim() == "1")
}

/// Tells the other ranks what this one has, and returns rank 0's invitation.
pub(super) fn meet(
    device: &Result<Device, CollectiveError>,
    control: &mut dyn Communicator,
) -> Result<UniqueId, CollectiveError> {
    let report = device.as_ref().map_err(Clone::clone).and_then(|device| {
        let first = control.rank().0 == 0;
        let libraries = device.libraries();
        let id = if first { unique_id(libraries)? } else { UniqueId([0; UNIQUE_ID_BYTES]) };
        Ok(Ready { version: libraries.nccl_version(), uuid: device.uuid(), id })
    });
    let reports = control.gather_bytes(&Ready::encode(&report))?;
    report?;
    agree(&reports, sharing_enabled())
}

/// The invitation, if all ranks can follow it together.
fn agree(reports: &[Vec<u8>], sharing: bool) -> Result<UniqueId, CollectiveError> {
    let mut ready = Vec::with_capacity(reports.len());
    for (rank, bytes) in (0..).map(Rank).zip(reports) {
        let what = || format!("NCCL on {rank}");
        let report =
            Ready::decode(bytes).map_err(|reason| CollectiveError::unavailable(what(), reason))?;
        ready.push(report);
    }
    let mut seen: HashMap<[u8; 16], Rank> = HashMap::new();
    let first = ready.first().map(|report| (report.version, report.id));
    let Some((version, id)) = first else {
        return Err(CollectiveError::unavailable("NCCL", "the group has no ranks"));
    };
    for (rank, report) in (0..).map(Rank).zip(&ready) {
        if report.version != version {
            let found = report.version;
            let message =
                format!("r0 has NCCL {version} but {rank} has {found}: install one version");
            return Err(CollectiveError::unavailable("a common NCCL", message));
        }
        if let Some(other) = seen.insert(report.uuid, rank)
            && (!sharing || version < SHARED_GPU)
        {
            let message = format!(
                "NCCL gives each rank its own GPU; to share one set {SHARED_GPU_VARIABLE}=1 with \
                 NCCL {SHARED_GPU} or newer (found {version})"
            );
            let what = format!("one GPU for both {other} and {rank}");
            return Err(CollectiveError::unavailable(what, message));
        }
    }
    Ok(id)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn report(version: (u32, u32, u32), gpu: u8, id: u8) -> Vec<u8> {
        let version = NcclVersion::new(version.0, version.1, version.2);
        let ready = Ready { version, uuid: [gpu; 16], id: UniqueId([id; UNIQUE_ID_BYTES]) };
        let bytes = Ready::encode(&Ok(ready.clone()));
        assert_eq!(Ready::decode(&bytes), Ok(ready));
        bytes
    }

    fn refused(reports: &[Vec<u8>], sharing: bool) -> String {
        agree(reports, sharing).unwrap_err().to_string()
    }

    #[test]
    fn ranks_that_agree_follow_the_invitation_of_rank_0() {
        let reports = [report((2, 30, 7), 1, 9), report((2, 30, 7), 2, 0)];
        assert_eq!(agree(&reports, false).unwrap(), UniqueId([9; UNIQUE_ID_BYTES]));
    }

    #[test]
    fn a_rank_that_cannot_follow_is_named_with_its_reason() {
        let good = report((2, 27, 5), 1, 9);
        let no_library = CollectiveError::unavailable("NCCL", "cannot open `libnccl.so.2`");
        let refusal = Ready::encode(&Err(no_library));
        let shown = refused(&[good.clone(), refusal], false);
        assert!(shown.contains("NCCL on r1") && shown.contains("libnccl.so.2"), "{shown}");
        let shown = refused(&[good.clone(), report((2, 30, 7), 2, 0)], false);
        assert!(shown.contains("r0 has NCCL 2.27.5 but r1 has 2.30.7"), "{shown}");
        for bytes in [vec![], vec![READY], vec![READY; 400]] {
            let shown = refused(&[good.clone(), bytes], false);
            assert!(shown.contains("NCCL on r1"), "{shown}");
        }
    }

    #[test]
    fn a_shared_gpu_needs_the_variable_and_the_version() {
        for (version, sharing, fits) in
            [((2, 30, 7), false, false), ((2, 30, 7), true, true), ((2, 27, 5), true, false)]
        {
            let reports = [report(version, 1, 9), report(version, 2, 0), report(version, 1, 0)];
            match fits {
                true => assert!(agree(&reports, sharing).is_ok()),
                false => {
                    let shown = refused(&reports, sharing);
                    assert!(shown.contains("one GPU for both r0 and r2"), "{shown}");
                    assert!(shown.contains(SHARED_GPU_VARIABLE), "{shown}");
                }
            }
        }
    }
}
