//! Rank processes of this host, as /proc shows them.

use nix::unistd::Pid;

/// Living rank processes whose parent is `parent`, with the rank they were started as, by rank.
pub fn rank_processes(parent: u32) -> Vec<(u32, Pid)> {
    let mut ranks = Vec::new();
    let Ok(entries) = std::fs::read_dir("/proc") else { return ranks };
    for entry in entries.flatten() {
        let Some(pid) = entry.file_name().to_str().and_then(|name| name.parse::<i32>().ok()) else {
            continue;
        };
        let Ok(stat) = std::fs::read_to_string(entry.path().join("stat")) else { continue };
        // The command's name may hold spaces: the fields go on after its closing bracket.
        let fields: Vec<&str> =
            stat.rsplit(')').next().unwrap_or_default().split_whitespace().collect();
        let is_child = fields.get(1).and_then(|ppid| ppid.parse().ok()) == Some(parent);
        if !is_child || fields.first() == Some(&"Z") {
            continue;
        }
        let environment = std::fs::read(entry.path().join("environ")).unwrap_or_default();
        let rank = environment
            .split(|byte| *byte == 0)
            .find_map(|pair| pair.strip_prefix(b"RANK="))
            .and_then(|value| String::from_utf8_lossy(value).parse().ok());
        if let Some(rank) = rank {
            ranks.push((rank, Pid::from_raw(pid)));
        }
    }
    ranks.sort_unstable();
    ranks
}
