//! The environment of a task: one pure function, so that built-ins, scripts and images see the same
//! variables that torchrun's users know.

use std::collections::BTreeMap;

use crate::ids::TaskId;

/// Names the folder in which ranks keep data they fetched; the worker's own.
pub const SCRATCH_VARIABLE: &str = "COHORT_SCRATCH";

/// What the environment depends on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TaskPlace<'a> {
    /// Which task.
    pub task: &'a TaskId,
    /// Ranks in the gang.
    pub world_size: u32,
    /// Ranks before this one on the same worker.
    pub local_rank: u32,
    /// Ranks of the gang on this worker.
    pub local_world_size: u32,
    /// Threads the task computes with.
    pub threads: u32,
}

/// The variables of a task, over the worker's own environment. Never holds a secret.
pub fn task_environment(place: &TaskPlace<'_>) -> BTreeMap<&'static str, String> {
    let threads = place.threads.to_string();
    BTreeMap::from([
        ("RANK", place.task.rank.0.to_string()),
        ("WORLD_SIZE", place.world_size.to_string()),
        ("LOCAL_RANK", place.local_rank.to_string()),
        ("LOCAL_WORLD_SIZE", place.local_world_size.to_string()),
        ("COHORT_JOB", place.task.workload.to_string()),
        ("COHORT_GENERATION", place.task.generation.0.to_string()),
        ("OMP_NUM_THREADS", threads.clone()),
        ("RAYON_NUM_THREADS", threads),
    ])
}
