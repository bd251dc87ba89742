//! What clients ask for: submit, stop, resume, deploy. Each answer is a record's key or a refusal
//! that says what was found and what to do.

use std::sync::Arc;

use api::document::nearest;
use api::ids::Name;
use api::job::JobSpec;
use api::records::{
    EndpointRecord, EndpointSpec, EndpointStatus, JobRecord, JobStatus, KIND_ENDPOINT, KIND_JOB,
    KIND_MODEL, ModelRecord, Phase,
};
use serde::de::DeserializeOwned;

use super::Leader;
use super::decision::{Effect, Millis, Refusal};
use super::draft::{Draft, Expect};
use super::gang::Gang;
use super::index::Workload;
use super::reason::Reason;
use super::train::BY_A_USER;
use crate::records::Records;
use crate::transaction::RecordKey;

/// Jobs and endpoints that are not at their end. Every input looks at each of them.
const LIVE_MAX: usize = 1_000;
/// Jobs recorded, ended ones included: they make up the snapshot, at a few KiB each.
const JOBS_MAX: usize = 20_000;
/// Largest specification as JSON; the file it comes from may have as much.
const SPEC_BYTES_MAX: usize = 1 << 20;
/// Names listed in a refusal.
const NAMES_SHOWN: usize = 10;

type Reply = Result<RecordKey, Refusal>;

impl Leader {
    pub(super) fn submit(
        &mut self,
        draft: &mut Draft,
        records: &Records,
        now: Millis,
        spec: JobSpec,
    ) -> Reply {
        check_spec(&spec)?;
        let name = spec.name.clone();
        if records.get(KIND_JOB, name.as_str()).is_some() {
            return Err(Refusal::Conflict(self.name_taken(records, &name)));
        }
        self.check_free(&name, KIND_JOB)?;
        self.check_room()?;
        if records.count(KIND_JOB) >= JOBS_MAX {
            return Err(Refusal::Conflict(format!("{JOBS_MAX} jobs are recorded, no more fit")));
        }
        let status = JobStatus {
            phase: Phase::Queued,
            reason: "submitted".into(),
            submitted_ms: now.0,
            accounted_ms: Some(now.0),
            ..JobStatus::default()
        };
        let record = Arc::new(JobRecord { spec, status });
        self.put_job(draft, Expect::Absent, Arc::clone(&record));
        Ok(RecordKey::new(KIND_JOB, name.as_str()))
    }

    fn name_taken(&self, records: &Records, name: &Name) -> String {
        match records.read::<JobRecord>(KIND_JOB, name.as_str()) {
            Ok(Some((_, other))) => {
                let JobStatus { phase, submitted_ms, .. } = other.status;
                let hint = match phase {
                    Phase::Stopped | Phase::Failed => {
                        format!(", or continue that one with `cluster resume {name}`")
                    }
                    _ => String::new(),
                };
                format!(
                    "a job `{name}` was submitted on {} and is {phase}: choose another name{hint}",
                    utc(submitted_ms)
                )
            }
            _ => {
                format!("a job `{name}` exists and its record cannot be read: choose another name")
            }
        }
    }

    /// A job and an endpoint of one name are never live together.
    fn check_free(&self, name: &Name, kind: &str) -> Result<(), Refusal> {
        let Some(entry) = self.index.get(name) else { return Ok(()) };
        let (other, phase) = (entry.workload.kind(), entry.workload.phase());
        if other == kind {
            return Ok(());
        }
        Err(Refusal::Conflict(format!(
            "{} `{name}` is {phase}, and a job and an endpoint of one name cannot both be active: \
             choose another name, or wait for it to end or stop it",
            with_article(other)
        )))
    }

    fn check_room(&self) -> Result<(), Refusal> {
        if self.index.len() < LIVE_MAX {
            return Ok(());
        }
        let text =
            format!("{LIVE_MAX} jobs and endpoints are queued or running: wait or stop some");
        Err(Refusal::Conflict(text))
    }

    pub(super) fn stop(
        &mut self,
        draft: &mut Draft,
        records: &Records,
        now: Millis,
        kind: &str,
        name: &Name,
    ) -> Reply {
        let key = RecordKey::new(kind, name.as_str());
        let version = match kind {
            KIND_JOB => {
                let (version, job) = find::<JobRecord>(records, KIND_JOB, name)?;
                self.stop_job(draft, version, &Arc::new(job.clone()), now);
                job.status.phase
            }
            KIND_ENDPOINT => {
                let (version, endpoint) = find::<EndpointRecord>(records, KIND_ENDPOINT, name)?;
                self.stop_endpoint(draft, version, &endpoint);
                endpoint.status.phase
            }
            other => {
                let text = format!("cannot stop a `{other}`: expected a job or an endpoint");
                return Err(Refusal::Invalid(text));
            }
        };
        if !draft.has_writes() {
            let text = format!("nothing to stop: `{name}` is {version} already");
            draft.because(Reason::Remark(text));
        }
        Ok(key)
    }

    fn stop_job(&mut self, draft: &mut Draft, version: u64, job: &Arc<JobRecord>, now: Millis) {
        let generation = job.status.generation;
        // With a newcomer that waits for a large state a boundary may be minutes away.
        let is_apart = self.gangs.get(&job.spec.name).is_some_and(Gang::is_broken)
            || self.waits_for_state(job);
        match job.status.phase {
            // What they hold is not thrown away: they meet, and then they are asked to stop.
            Phase::Starting | Phase::Running
                if (job.status.phase == Phase::Starting || is_apart) && self.holds_state(job) =>
            {
                if !job.status.stop_asked {
                    self.change_job(draft, version, job, |status| {
                        status.stop_asked = true;
                        status.reason =
                            "asked to stop: its ranks meet first, to save what they hold".into();
                    });
                }
            }
            Phase::Queued => {
                self.change_job(draft, version, job, |status| {
                    status.phase = Phase::Stopped;
                    status.reason = "stopped while queued".into();
                    status.ended_ms = Some(now.0);
                });
            }
            // Its ranks hold nothing worth a checkpoint: they are killed right after.
            Phase::Starting => {
                self.change_job(draft, version, job, |status| {
                    status.phase = Phase::Stopped;
                    status.reason = "stopped while starting".into();
                    status.ended_ms = Some(now.0);
                });
                let job = job.spec.name.clone();
                draft.effect(Effect::ForgetSecret { job, generation });
            }
            Phase::Running => self.stop_at_a_boundary(draft, version, job),
            Phase::Stopping | Phase::Stopped | Phase::Succeeded | Phase::Failed => {}
        }
    }

    /// Has a gang that runs save its state after the step that it makes, and leave.
    pub(super) fn stop_at_a_boundary(
        &mut self,
        draft: &mut Draft,
        version: u64,
        job: &Arc<JobRecord>,
    ) {
        self.change_job(draft, version, job, |status| {
            status.phase = Phase::Stopping;
            status.reason = "asked to stop: writing a checkpoint".into();
        });
        self.tell_to_stop(draft, &job.spec.name, job.status.generation, BY_A_USER);
    }

    fn stop_endpoint(&mut self, draft: &mut Draft, version: u64, endpoint: &EndpointRecord) {
        let EndpointStatus { phase, generation, .. } = endpoint.status;
        match phase {
            Phase::Queued | Phase::Starting => {
                self.change_endpoint(draft, version, endpoint, |status| {
                    status.phase = Phase::Stopped;
                    status.reason = format!("stopped while {phase}");
                    status.address = None;
                });
            }
            Phase::Running => {
                self.change_endpoint(draft, version, endpoint, |status| {
                    status.phase = Phase::Stopping;
                    status.reason = "asked to stop: finishing its requests".into();
                });
                self.tell_to_stop(draft, &endpoint.spec.name, generation, BY_A_USER);
            }
            Phase::Stopping | Phase::Stopped | Phase::Succeeded | Phase::Failed => {}
        }
    }

    pub(super) fn resume(&mut self, draft: &mut Draft, records: &Records, name: &Name) -> Reply {
        let (version, job) = find::<JobRecord>(records, KIND_JOB, name)?;
        let refuse = |text: String| Err(Refusal::Conflict(text));
        match job.status.phase {
            Phase::Stopped | Phase::Failed => {}
            Phase::Succeeded => {
                return refuse(format!(
                    "job `{name}` has succeeded, there is nothing to resume: its model is `{name}`"
                ));
            }
            Phase::Stopping => {
                let text = "is still stopping: resume it once it is stopped";
                return refuse(format!("job `{name}` {text}"));
            }
            phase @ (Phase::Queued | Phase::Starting | Phase::Running) => {
                return refuse(format!("job `{name}` is {phase}: there is nothing to resume"));
            }
        }
        self.check_free(name, KIND_JOB)?;
        self.check_room()?;
        self.change_job(draft, version, &job, |status| {
            status.phase = Phase::Queued;
            status.reason = "resumed".into();
            status.failures = 0;
            status.stop_asked = false;
            status.fails_with = None;
            status.elapsed_at_resume_ms = status.elapsed_ms;
            status.queued_at_resume_ms = status.goodput.queued_ms;
            status.ended_ms = None;
        });
        Ok(RecordKey::new(KIND_JOB, name.as_str()))
    }

    pub(super) fn deploy(
        &mut self,
        draft: &mut Draft,
        records: &Records,
        now: Millis,
        spec: EndpointSpec,
    ) -> Reply {
        // The client checks it too, but a client may be of another version.
        if !spec.listen.ip().is_loopback() {
            return Err(Refusal::Invalid(format!(
                "an endpoint cannot listen on {}: it speaks plain HTTP and so listens on loopback \
                 only; choose 127.0.0.1 or [::1] and put a proxy with TLS in front of it",
                spec.listen
            )));
        }
        find::<ModelRecord>(records, KIND_MODEL, &spec.model)?;
        let name = spec.name.clone();
        let found = records.read::<EndpointRecord>(KIND_ENDPOINT, name.as_str());
        let (expect, generation, gang) = match found {
            Ok(None) => (Expect::Absent, Default::default(), Vec::new()),
            // A name whose endpoint has ended is free again; generations go on, so that nothing of
            // the former one is taken for the new one's.
            Ok(Some((version, old))) if old.status.phase.is_terminal() => {
                (Expect::Version(version), old.status.generation, old.status.gang)
            }
            Ok(Some((_, old))) => {
                return Err(Refusal::Conflict(format!(
                    "an endpoint `{name}` of model `{}` is {}: choose another name, or stop that \
                     one first",
                    old.spec.model, old.status.phase
                )));
            }
            Err(error) => return Err(Refusal::Conflict(error.to_string())),
        };
        self.check_free(&name, KIND_ENDPOINT)?;
        self.check_room()?;
        let status = EndpointStatus {
            phase: Phase::Queued,
            reason: "deployed".into(),
            submitted_ms: now.0,
            generation,
            gang,
            ..EndpointStatus::default()
        };
        let record = Arc::new(EndpointRecord { spec, status });
        let key = RecordKey::new(KIND_ENDPOINT, name.as_str());
        draft.put(key.clone(), expect, &*record);
        self.index.set(Workload::Endpoint(record));
        draft.decided(Reason::Changed { name, text: "queued: deployed".into() });
        Ok(key)
    }
}

/// The rules a specification must keep, once more on the leader: a client may be of another version.
fn check_spec(spec: &JobSpec) -> Result<(), Refusal> {
    spec.validate().map_err(|error| Refusal::Invalid(error.to_string()))?;
    let json = serde_json::to_vec(spec).map_err(|e| Refusal::Invalid(e.to_string()))?;
    if json.len() > SPEC_BYTES_MAX {
        let text = format!("the job has {} bytes, expected at most {SPEC_BYTES_MAX}", json.len());
        return Err(Refusal::Invalid(text));
    }
    // A number that JSON cannot hold would be read back as something else.
    match serde_json::from_slice::<JobSpec>(&json) {
        Ok(read) if read == *spec => Ok(()),
        _ => Err(Refusal::Invalid("a hyperparameter is not a finite number".into())),
    }
}

/// The record of that name, or a refusal that helps to find it.
fn find<T: DeserializeOwned>(
    records: &Records,
    kind: &'static str,
    name: &Name,
) -> Result<(u64, T), Refusal> {
    match records.read::<T>(kind, name.as_str()) {
        Ok(Some(found)) => Ok(found),
        Ok(None) => Err(Refusal::NotFound(not_found(records, kind, name))),
        Err(error) => Err(Refusal::Conflict(error.to_string())),
    }
}

fn not_found(records: &Records, kind: &str, name: &Name) -> String {
    let names: Vec<&str> = records.list(kind, "").map(|(key, _)| key.id.as_str()).collect();
    let hint = match nearest(name.as_str(), &names) {
        Some(near) => format!(": did you mean `{near}`?"),
        None if names.is_empty() => format!(": there is no {kind} yet"),
        None => {
            let more = if names.len() > NAMES_SHOWN { ", …" } else { "" };
            let shown: Vec<&str> = names.iter().copied().take(NAMES_SHOWN).collect();
            format!(": there are {}{more}", shown.join(", "))
        }
    };
    let other = if kind == KIND_JOB { KIND_ENDPOINT } else { KIND_JOB };
    if let (KIND_MODEL, Ok(Some((_, job)))) =
        (kind, records.read::<JobRecord>(other, name.as_str()))
    {
        let phase = job.status.phase;
        return format!("no {kind} `{name}`: its job is {phase} and has not made it yet");
    }
    if kind != KIND_MODEL && records.get(other, name.as_str()).is_some() {
        return format!("no {kind} `{name}`: that is {}", with_article(other));
    }
    format!("no {kind} `{name}`{hint}")
}

fn with_article(kind: &str) -> String {
    let article = if kind.starts_with(['a', 'e', 'i', 'o', 'u']) { "an" } else { "a" };
    format!("{article} {kind}")
}

/// "2026-08-22 10:11:12 UTC". Days to date as in Howard Hinnant's "chrono-Compatible Low-Level Date
/// Algorithms", `civil_from_days`, for days after 1970 only.
fn utc(milliseconds: u64) -> String {
    let seconds = milliseconds / 1_000;
    let (days, of_day) = (seconds / 86_400, seconds % 86_400);
    let shifted = days + 719_468;
    let (era, of_era) = (shifted / 146_097, shifted % 146_097);
    let year_of_era = (of_era - of_era / 1_460 + of_era / 36_524 - of_era / 146_096) / 365;
    let of_year = of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let shifted_month = (5 * of_year + 2) / 153;
    let day = of_year - (153 * shifted_month + 2) / 5 + 1;
    let month = if shifted_month < 10 { shifted_month + 3 } else { shifted_month - 9 };
    let year = year_of_era + era * 400 + u64::from(month <= 2);
    let (hour, minute, second) = (of_day / 3_600, of_day / 60 % 60, of_day % 60);
    format!("{year:04}-{month:02}-{day:02} {hour:02}:{minute:02}:{second:02} UTC")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dates_are_those_of_the_calendar() {
        for (seconds, expected) in [
            (0, "1970-01-01 00:00:00 UTC"),
            (951_782_400, "2000-02-29 00:00:00 UTC"),
            (1_709_164_800, "2024-02-29 00:00:00 UTC"),
            (1_767_225_599, "2025-12-31 23:59:59 UTC"),
        ] {
            assert_eq!(utc(seconds * 1_000), expected);
        }
    }
}
