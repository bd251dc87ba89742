//! What a process holds: descriptors, threads, and shared memory of groups.

use std::collections::BTreeSet;
use std::fs;

use serde::{Deserialize, Serialize};

/// The name of a group's memory, as the kernel shows it.
const SEGMENT: &str = "/memfd:cohort-collective";

#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Census {
    /// What each open descriptor is.
    pub descriptors: Vec<String>,
    /// The names of the threads.
    pub threads: Vec<String>,
    /// The inodes of mapped segments.
    pub segments: BTreeSet<u64>,
}

impl Census {
    /// Of this process.
    pub fn take() -> Self {
        let entries = |folder| fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path());
        // The one through which this list is read has no target any more.
        let targets = entries("/proc/self/fd").collect::<Vec<_>>().into_iter();
        let targets = targets.filter_map(|path| fs::read_link(path).ok());
        let mut descriptors: Vec<String> =
            targets.map(|target| target.to_string_lossy().into_owned()).collect();
        let names = entries("/proc/self/task");
        let names = names.filter_map(|path| fs::read_to_string(path.join("comm")).ok());
        let mut threads: Vec<String> = names.map(|name| name.trim().to_owned()).collect();
        descriptors.sort();
        threads.sort();
        let maps = fs::read_to_string("/proc/self/maps").unwrap();
        Self { descriptors, threads, segments: segments(&maps).collect() }
    }
}

/// The inodes of the segments in a list of mappings.
fn segments(maps: &str) -> impl Iterator<Item = u64> {
    let inode = |line: &str| line.split_whitespace().nth(4).and_then(|inode| inode.parse().ok());
    maps.lines().filter(|line| line.contains(SEGMENT)).filter_map(inode)
}

/// The processes that map one of these segments.
pub fn holders(inodes: &BTreeSet<u64>) -> Vec<String> {
    let processes = fs::read_dir("/proc").unwrap().map(|entry| entry.unwrap().path());
    // Others' processes end or hide their mappings; ours did neither.
    let holds = |maps: String| segments(&maps).any(|inode| inodes.contains(&inode));
    processes
        .filter(|process| fs::read_to_string(process.join("maps")).is_ok_and(holds))
        .map(|process| process.display().to_string())
        .collect()
}
