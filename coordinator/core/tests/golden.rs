//! Golden scripts: `tests/scripts/*.txt` are the list of behaviours.
//!
//! A script is a sequence of blocks divided by blank lines: comments (`#`), commands, `---`, and the
//! complete trace of what the leader decided. `UPDATE_GOLDEN=1` writes the traces anew; read the
//! difference before you commit it. Commands:
//!
//! ```text
//! submit NAME [ranks=2] [min=1 max=4] [wait=5s] [spares=1] [replace] [keep=1] [keep_every=200] [keep_best=1] [max_failures=0] [max_time=60s] [max_wait=60s] [relaxed] [request=ID]
//! stop NAME | stop-endpoint NAME | resume NAME
//! deploy NAME model=MODEL [listen=127.0.0.1:0] [request=ID]
//! hello WORKER [slots=2] [spot=0.3/1.2] [on_demand=1.2] [unhealthy=WHY] [host=H] [incarnation=1] [cluster=ID] [TASK[@PORT][~GENERATION][+peers][+state][+waits] …]
//! detach WORKER | heartbeat WORKER | staying WORKER
//! leaving WORKER [scope=drains|avoided] [CAUSE …]
//! drain WORKER [deadline=120000] | undrain WORKER
//! checked WORKER [late] [WHAT FAILED …]     answers its last check order, or one that nobody waits for
//! listening TASK [on=WORKER] [fingerprint=F]    running TASK [STEP] [state=none]
//! step TASK 7 [compute=1.5]
//! busy TASK    broken TASK [STEP] [blames=r1]    paused TASK STEP    ready TASK [fingerprint=F] (a spare)
//! [of=g1] with any report: the generation it was made in; else the newest its process is part of
//! checkpoint TASK 100 [generation=1] [digest=D] [loss=0.5] finished TASK 200    stopped TASK 150 [time]
//! failed TASK [blames=r1] [fatal] MESSAGE …
//! exit TASK completed|killed|signal=9|code=1|not-started [fatal] [MESSAGE …]
//! adopted NAME g1 [200 300 …]    diagnosed NAME g1 [suspect=r1] TEXT …
//! tick [+MILLISECONDS] | wait +MILLISECONDS (with heartbeats and ticks) | new-leader | workers | record NAME | goodput NAME
//! quiet COMMAND      runs a command without its trace, for what another script shows in full
//! run NAME           quiet: every rank of the current gang listens, then runs
//! ```

mod support;

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::fs;
use std::net::SocketAddr;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;

use api::events::{CheckpointFact, JobEvent, ModelFact, Slowest, StepMetrics, StepTime};
use api::ids::{Generation, Name, Secret, Step as TrainStep, TaskId};
use api::job::{BestMode, Determinism, Elastic, JobSpec, KeepBest, Ranks};
use api::price::{HostPrice, Market};
use api::records::{
    CheckpointRecord, EndpointRecord, EndpointSpec, JobRecord, KIND_CHECKPOINT, KIND_ENDPOINT,
    KIND_JOB, Placement,
};
use api::session::{
    Assignment, CoordinatorMessage, ExitCause, LeaveScope, RankOrder, RankReport, StopCause,
    TaskEvent, TaskView, WorkerHello, WorkerMessage,
};
use coordinator_core::{Decision, Effect, Input, Outcome, Refusal, SessionId, Write};
use support::{Shell, Step, metrics};

#[test]
fn every_script_gives_its_trace() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/scripts");
    let entries = fs::read_dir(&folder).expect("the scripts' folder");
    let mut paths: Vec<_> = entries.map(|entry| entry.expect("an entry").path()).collect();
    paths.sort();
    assert!(paths.len() >= 20, "found only {} scripts in {}", paths.len(), folder.display());
    let is_update = std::env::var_os("UPDATE_GOLDEN").is_some();
    let mut differing = Vec::new();
    for path in paths {
        let script = fs::read_to_string(&path).expect("a script");
        let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        let played = catch_unwind(AssertUnwindSafe(|| play(&name, &script)));
        let Ok(traced) = played else {
            differing.push(format!("{name}: failed, see above"));
            continue;
        };
        if traced == script {
            continue;
        }
        if is_update {
            fs::write(&path, &traced).expect("the script can be written");
        } else {
            differing.push(format!("{name}:\n{}", first_difference(&script, &traced)));
        }
    }
    assert!(differing.is_empty(), "traces differ:\n\n{}", differing.join("\n\n"));
}

fn first_difference(expected: &str, found: &str) -> String {
    let lines = expected.lines().map(Some).chain(std::iter::repeat(None));
    let others = found.lines().map(Some).chain(std::iter::repeat(None));
    let longest = expected.lines().count().max(found.lines().count());
    let mut pairs = lines.zip(others).take(longest).enumerate();
    match pairs.find(|(_, (a, b))| a != b) {
        Some((line, (a, b))) => format!(
            "line {}\n  expected: {}\n  found:    {}",
            line + 1,
            a.unwrap_or("(end)"),
            b.unwrap_or("(end)")
        ),
        None => "they differ in line ends".into(),
    }
}

/// Runs a script and returns it with the traces found.
fn play(name: &str, script: &str) -> String {
    let mut stage = Stage::new();
    let mut played = String::new();
    for block in script.split("\n\n").map(|block| block.trim_matches('\n')) {
        if block.is_empty() {
            continue;
        }
        let mut input: Vec<&str> = block.lines().take_while(|line| *line != "---").collect();
        input.retain(|line| !line.trim().is_empty());
        let mut trace = String::new();
        for line in input.iter().filter(|line| !line.starts_with('#')) {
            let several = input.iter().filter(|line| !line.starts_with('#')).count() > 1;
            let is_silent = line.starts_with("quiet ") || line.starts_with("run ");
            if several && !is_silent {
                writeln!(trace, "> {line}").expect("memory");
            }
            let lines = catch_unwind(AssertUnwindSafe(|| stage.command(line)))
                .unwrap_or_else(|_| panic!("{name}: `{line}` failed, see above"));
            lines.iter().for_each(|line| writeln!(trace, "{line}").expect("memory"));
        }
        if !played.is_empty() {
            played.push('\n');
        }
        writeln!(played, "{}", input.join("\n")).expect("memory");
        if !trace.is_empty() {
            write!(played, "---\n{trace}").expect("memory");
        }
    }
    played
}

/// The shell and what the scripts leave unsaid: session numbers, and which worker a task is on.
struct Stage {
    shell: Shell,
    sessions: u64,
    attached: BTreeMap<String, SessionId>,
    hosts: BTreeMap<TaskId, String>,
    /// The number of each worker's last check order.
    checks: BTreeMap<String, u64>,
}

/// The words of a command: plain ones and `key=value` pairs.
struct Words<'a> {
    plain: Vec<&'a str>,
    pairs: BTreeMap<&'a str, &'a str>,
}

impl<'a> Words<'a> {
    fn of(line: &'a str) -> Self {
        let mut words = Self { plain: Vec::new(), pairs: BTreeMap::new() };
        for word in line.split_whitespace() {
            match word.split_once('=') {
                Some((key, value)) => {
                    words.pairs.insert(key, value);
                }
                None => words.plain.push(word),
            }
        }
        words
    }

    fn at(&self, index: usize) -> &'a str {
        self.plain
            .get(index)
            .unwrap_or_else(|| panic!("word {index} of {:?} is missing", self.plain))
    }

    fn number(&self, key: &str) -> Option<u64> {
        self.pairs.get(key).map(|text| number(text))
    }

    fn has(&self, word: &str) -> bool {
        self.plain.contains(&word)
    }

    fn rest(&self, from: usize) -> String {
        let rest: Vec<&str> =
            self.plain.iter().skip(from).copied().filter(|word| *word != "fatal").collect();
        rest.join(" ")
    }
}

impl Stage {
    fn new() -> Self {
        let (attached, hosts, checks) = (BTreeMap::new(), BTreeMap::new(), BTreeMap::new());
        Self { shell: Shell::new(), sessions: 0, attached, hosts, checks }
    }

    fn command(&mut self, line: &str) -> Vec<String> {
        if let Some(command) = line.strip_prefix("quiet ") {
            self.command(command);
            return Vec::new();
        }
        let words = Words::of(line);
        match words.at(0) {
            "run" => {
                self.run(words.at(1));
                Vec::new()
            }
            "new-leader" => {
                self.shell.new_leader();
                self.attached.clear();
                Vec::new()
            }
            "wait" => self.wait(number(words.at(1))),
            "workers" => self.workers(),
            "record" => self.record(words.at(1)),
            "goodput" => self.goodput(words.at(1)),
            _ => {
                let input = self.input(&words);
                let steps = self.shell.feed(input, words.pairs.get("request").copied());
                for view in self.shell.leader.workers(self.shell.now) {
                    assert!(view.used <= view.slots, "oversubscribed: {view:?}");
                }
                self.trace(&steps)
            }
        }
    }

    fn run(&mut self, name: &str) {
        let job = self.shell.job(name).expect("a job to run");
        let tasks: Vec<String> = job
            .status
            .gang
            .iter()
            .map(|place| place.task(&job.spec.name, job.status.generation).to_string())
            .collect();
        for command in ["listening", "running"] {
            for task in &tasks {
                self.command(&format!("{command} {task}"));
            }
        }
        let job = self.shell.job(name).expect("a job to run");
        assert_eq!(
            job.status.phase,
            api::records::Phase::Running,
            "`run {name}`: {:?}",
            job.status
        );
    }

    /// Time goes by and every attached worker sends its heartbeats.
    fn wait(&mut self, milliseconds: u64) -> Vec<String> {
        let mut left = milliseconds;
        let mut lines = Vec::new();
        while left > 0 {
            let step = left.min(1_000);
            left -= step;
            self.shell.now = self.shell.now.plus(step);
            for session in self.attached.clone().into_values() {
                let message = WorkerMessage::Heartbeat;
                self.shell.feed(Input::WorkerMessage { session, message }, None);
            }
            let steps = self.shell.feed(Input::Tick, None);
            lines.extend(self.trace(&steps));
        }
        // The same waiting, said again each second, is one line.
        lines.dedup();
        lines
    }

    fn input(&mut self, words: &Words<'_>) -> Input {
        let name = || -> Name { words.at(1).parse().expect("a name") };
        match words.at(0) {
            "tick" => {
                if let Some(text) = words.plain.get(1) {
                    self.shell.now = self.shell.now.plus(number(text));
                }
                Input::Tick
            }
            "away" => {
                let milliseconds = number(words.at(1));
                self.shell.now = self.shell.now.plus(milliseconds);
                Input::WasAway { milliseconds }
            }
            "submit" => Input::Submit { spec: spec(words) },
            "stop" => Input::Stop { kind: KIND_JOB.into(), name: name() },
            "stop-endpoint" => Input::Stop { kind: KIND_ENDPOINT.into(), name: name() },
            "resume" => Input::Resume { name: name() },
            "deploy" => {
                let model = words.pairs["model"].parse().expect("a name");
                let listen = words.pairs.get("listen").unwrap_or(&"127.0.0.1:0");
                let listen = listen.parse().expect("an address");
                Input::Deploy { spec: EndpointSpec { name: name(), model, listen } }
            }
            "adopted" => {
                let generation = Generation(number(words.at(2)));
                let steps = words.plain.iter().skip(3).map(|step| number(step));
                let facts = steps.map(|step| fact(words.at(1), generation, step, "aa")).collect();
                Input::Adopted { job: name(), generation, facts }
            }
            "diagnosed" => Input::Diagnosed {
                job: name(),
                generation: Generation(number(words.at(2))),
                suspect: words.number("suspect").map(|rank| api::Rank(rank as u32)),
                text: words.rest(3),
            },
            "hello" => self.hello(words),
            "detach" => {
                let session = self.attached.remove(words.at(1)).expect("an attached worker");
                Input::WorkerDetached { session }
            }
            "heartbeat" => {
                let session = self.attached[words.at(1)];
                Input::WorkerMessage { session, message: WorkerMessage::Heartbeat }
            }
            "leaving" => {
                let session = self.attached[words.at(1)];
                let scope = match words.pairs.get("scope").copied() {
                    None => LeaveScope::Ends,
                    Some("drains") => LeaveScope::Drains,
                    Some("avoided") => LeaveScope::Avoided,
                    Some(other) => panic!("`{other}` is not a scope"),
                };
                let (deadline_ms, cause) = (None, words.rest(2));
                let message = WorkerMessage::Leaving { deadline_ms, cause, scope };
                Input::WorkerMessage { session, message }
            }
            "staying" => {
                let session = self.attached[words.at(1)];
                Input::WorkerMessage { session, message: WorkerMessage::Staying }
            }
            "checked" => {
                let session = self.attached[words.at(1)];
                let late = u64::from(words.has("late"));
                let request = self.checks.get(words.at(1)).copied().unwrap_or_default() + late;
                let failed = words.rest(2).replace("late", "");
                let failed = (!failed.is_empty()).then_some(failed).into_iter().collect();
                Input::WorkerMessage {
                    session,
                    message: WorkerMessage::Checked { request, failed },
                }
            }
            "drain" => Input::Drain { worker: name(), deadline_ms: words.number("deadline") },
            "undrain" => Input::Undrain { worker: name() },
            _ => self.task_event(words),
        }
    }

    fn hello(&mut self, words: &Words<'_>) -> Input {
        let worker = words.at(1);
        self.sessions += 1;
        let session = SessionId(self.sessions);
        self.attached.insert(worker.to_owned(), session);
        let view = |word: &&str| {
            let flag = |text: &'_ str, flag: &str| match text.strip_suffix(flag) {
                Some(rest) => (rest.to_owned(), true),
                None => (text.to_owned(), false),
            };
            let (rest, waits) = flag(word, "+waits");
            let (rest, holds_state) = flag(&rest, "+state");
            let (rest, has_peers) = flag(&rest, "+peers");
            let (rest, generation) = match rest.split_once('~') {
                Some((rest, generation)) => (rest, Some(Generation(number(generation)))),
                None => (rest.as_str(), None),
            };
            let (id, port) = rest.split_once('@').unwrap_or((rest, ""));
            let port = (!port.is_empty()).then(|| u16::try_from(number(port)).expect("a port"));
            let address = port.map(|port| SocketAddr::from(([127, 0, 0, 1], port)));
            TaskView { task: task(id), address, has_peers, generation, holds_state, waits }
        };
        let tasks: Vec<TaskView> = words.plain.iter().skip(2).map(view).collect();
        for view in &tasks {
            self.hosts.insert(view.task.clone(), worker.to_owned());
        }
        let text = |key: &str, other: &str| (*words.pairs.get(key).unwrap_or(&other)).to_owned();
        let hello = WorkerHello {
            cluster_id: text("cluster", "cohort"),
            token: Secret::new("checked by the shell"),
            name: worker.parse().expect("a name"),
            host: text("host", &format!("host-of-{worker}")),
            slots: words.number("slots").unwrap_or(2) as u32,
            price: price(words),
            unhealthy: words.pairs.get("unhealthy").map(|text| (*text).to_owned()),
            incarnation: words.number("incarnation").unwrap_or(1),
            version: "0.1.0".into(),
            tasks,
        };
        Input::WorkerHello { session, hello }
    }

    fn task_event(&mut self, words: &Words<'_>) -> Input {
        let task = task(words.at(1));
        let step = || TrainStep(number(words.at(2)));
        let generation = words.number("of").map(Generation);
        let generation = generation.unwrap_or_else(|| self.generation_of(&task));
        let report = match words.at(0) {
            "listening" => RankReport::Listening {
                address: SocketAddr::from(([127, 0, 0, 1], 4_000 + task.rank.0 as u16)),
                fingerprint: (*words.pairs.get("fingerprint").unwrap_or(&"avx2/1")).to_owned(),
            },
            "running" => {
                let step = words.plain.get(2).map_or(0, |step| number(step));
                let holds_state = words.pairs.get("state") != Some(&"none");
                RankReport::Running { step: TrainStep(step), holds_state }
            }
            "busy" => RankReport::Busy { what: "validation".into() },
            "paused" => RankReport::Paused { step: step() },
            "ready" => RankReport::Ready {
                fingerprint: (*words.pairs.get("fingerprint").unwrap_or(&"avx2/1")).to_owned(),
            },
            "broken" => RankReport::Broken {
                step: words.plain.get(2).map(|step| TrainStep(number(step))),
                message: "its peer is gone".into(),
                blames: words.number("blames").map(|rank| api::Rank(rank as u32)),
            },
            "step" => {
                let slowest = words
                    .number("slowest")
                    .map(|rank| Slowest { rank: api::Rank(rank as u32), ratio: 2.0 });
                let compute =
                    words.pairs.get("compute").map_or(0.0, |s| s.parse().expect("seconds"));
                let time = StepTime { compute, ..StepTime::default() };
                RankReport::Step(StepMetrics { slowest, time, ..metrics(step()) })
            }
            "checkpoint" => {
                let generation = words.number("generation").map_or(generation, Generation);
                let digest = words.pairs.get("digest").copied().unwrap_or("aa");
                let job = task.workload.to_string();
                let mut fact = fact(&job, generation, number(words.at(2)), digest);
                if let Some(loss) = words.pairs.get("loss") {
                    let loss = loss.parse().expect("a number");
                    fact.metrics.insert("validation:loss".into(), loss);
                }
                RankReport::Checkpoint(fact)
            }
            "finished" => RankReport::Finished(ModelFact {
                key: format!("models/{}/{}", task.workload, task.generation),
                sha256: "ab".into(),
                bytes: 10,
                step: step(),
                metrics: BTreeMap::from([("train:loss".into(), 0.5), ("bad".into(), f64::NAN)]),
                samples: None,
            }),
            "stopped" => {
                let by_time = words.has("time").then_some(StopCause::MaxTime);
                RankReport::Stopped { step: step(), why: by_time.unwrap_or_default() }
            }
            "failed" => RankReport::Failed {
                message: words.rest(2),
                retryable: !words.has("fatal"),
                blames: words.number("blames").map(|rank| api::Rank(rank as u32)),
                damaged: words.number("damaged").map(TrainStep),
            },
            "exit" => return self.say(words, task, TaskEvent::Exited { cause: cause(words) }),
            other => panic!("`{other}` is not a command"),
        };
        self.say(words, task, TaskEvent::Report { generation, report })
    }

    /// The newest generation that a process is part of.
    fn generation_of(&self, task: &TaskId) -> Generation {
        let job = self.shell.job(task.workload.as_str());
        let current = job.map(|job| (job.status.generation, job.status.gang));
        match current {
            Some((generation, gang))
                if gang.iter().any(|place| place.task(&task.workload, generation) == *task) =>
            {
                generation
            }
            _ => task.generation,
        }
    }

    fn say(&self, words: &Words<'_>, task: TaskId, event: TaskEvent) -> Input {
        let host = self.hosts.get(&task).map(String::as_str);
        let worker = words.pairs.get("on").copied().or(host);
        let worker = worker.unwrap_or_else(|| panic!("nobody was told to start {task}: say on=…"));
        let session = *self.attached.get(worker).unwrap_or(&SessionId(0));
        Input::WorkerMessage { session, message: WorkerMessage::Task { task, event } }
    }

    // ---- the trace --------------------------------------------------------------------------

    fn trace(&mut self, steps: &[Step]) -> Vec<String> {
        let mut lines = Vec::new();
        for step in steps {
            let mut own = self.trace_decision(&step.decision, step.outcome.as_ref());
            if step.is_tick && own.is_empty() {
                continue;
            }
            if step.is_tick {
                own.insert(0, "tick".into());
            }
            lines.extend(own);
        }
        if lines.is_empty() {
            lines.push("(nothing)".into());
        }
        lines
    }

    fn trace_decision(&mut self, decision: &Decision, outcome: Option<&Outcome>) -> Vec<String> {
        let mut lines = Vec::new();
        if decision.transaction.is_none()
            && let Some(outcome) = outcome
        {
            lines.push(format!("  answered before: {outcome:?}"));
        }
        if let Some(reason) = &decision.reason {
            lines.push(format!("  because {reason}"));
        }
        if let Some(transaction) = &decision.transaction {
            lines.extend(transaction.writes.iter().map(trace_write));
        }
        match &decision.reply {
            Some(Ok(key)) => lines.push(format!("  reply {key}")),
            Some(Err(Refusal::NotFound(text))) => lines.push(format!("  not found: {text}")),
            Some(Err(Refusal::Conflict(text))) => lines.push(format!("  conflict: {text}")),
            Some(Err(Refusal::Invalid(text))) => lines.push(format!("  invalid: {text}")),
            None => {}
        }
        let effects = decision.effects.iter().filter_map(|effect| self.trace_effect(effect));
        lines.extend(effects.collect::<Vec<_>>());
        lines
    }

    fn worker_of(&self, session: SessionId) -> String {
        let found = self.attached.iter().find(|(_, other)| **other == session);
        found.map_or_else(|| format!("session {session}"), |(worker, _)| worker.clone())
    }

    fn trace_effect(&mut self, effect: &Effect) -> Option<String> {
        let text = match effect {
            Effect::Send { session, message } => {
                let worker = self.worker_of(*session);
                if let CoordinatorMessage::Start { task, .. } = message {
                    self.hosts.insert(task.clone(), worker.clone());
                }
                if let CoordinatorMessage::Check { request, .. } = message {
                    self.checks.insert(worker.clone(), *request);
                }
                format!("to {worker}: {}", trace_message(message))
            }
            Effect::CloseSession { session, reason } => {
                let worker = self.worker_of(*session);
                self.attached.retain(|_, other| other != session);
                format!("close {worker}: {reason}")
            }
            // The write above shows it.
            Effect::Publish { event: JobEvent::Status(_), .. } => return None,
            Effect::Publish { job, event } => format!("publish {job}: {}", trace_event(event)),
            Effect::Adopt { job, generation, after } => {
                let after = after.map_or("the beginning".into(), |step| step.to_string());
                format!("search the store for checkpoints of {job} {generation} after {after}")
            }
            Effect::Diagnose { job, generation } => {
                format!("lay the flight logs of {job} {generation} side by side")
            }
            Effect::Sweep { job, ended } => {
                let ended = ended.map(|ended| format!(", {ended} has ended")).unwrap_or_default();
                format!("sweep the store of {job}{ended}")
            }
            Effect::ForgetSecret { job, generation } => format!("forget secret {job} {generation}"),
        };
        Some(format!("  {text}"))
    }

    fn workers(&self) -> Vec<String> {
        let views = self.shell.leader.workers(self.shell.now);
        let lines = views.into_iter().map(|view| {
            format!(
                "  {} {} of {} used, {}, lease {} ms: {}",
                view.name,
                view.used,
                view.slots,
                match view.reason.as_str() {
                    "" => view.state.to_string(),
                    reason => format!("{} ({reason})", view.state),
                },
                view.lease_ms,
                view.tasks.join(" ")
            )
        });
        lines.collect()
    }

    /// Where the job's time went, but for what is nothing.
    fn goodput(&self, name: &str) -> Vec<String> {
        let job = self.shell.job(name).expect("a job");
        let json = serde_json::to_value(job.status.goodput).expect("a book");
        let fields = json.as_object().expect("an object").iter().filter(|(_, value)| **value != 0);
        let parts: Vec<String> = fields.map(|(key, value)| format!("{key} {value}")).collect();
        vec![format!("  {}", parts.join(", "))]
    }

    fn record(&self, name: &str) -> Vec<String> {
        let job = self.shell.job(name).expect("a job");
        let json = serde_json::to_value(&job.status).expect("a status");
        let fields = json.as_object().expect("an object").iter();
        fields.map(|(key, value)| format!("  {key}: {value}")).collect()
    }
}

/// "digits/g1/r0" as a task.
fn task(text: &str) -> TaskId {
    let mut parts = text.split('/');
    let mut next = |what: &str| parts.next().unwrap_or_else(|| panic!("{text}: no {what}"));
    let workload = next("name").parse().expect("a name");
    let generation = number(next("generation"));
    let rank = number(next("rank"));
    TaskId {
        workload,
        generation: Generation(generation),
        rank: api::Rank(u32::try_from(rank).expect("a rank")),
    }
}

/// The number in "g3", "r1" or "100".
fn number(text: &str) -> u64 {
    text.trim_start_matches(|c: char| !c.is_ascii_digit())
        .parse()
        .unwrap_or_else(|_| panic!("`{text}` is not a number"))
}

fn spec(words: &Words<'_>) -> JobSpec {
    let text = format!(
        "name = \"{}\"\nalgorithm = \"transformer\"\n[stop]\nmax_steps = 1000\n",
        words.at(1)
    );
    let mut spec = JobSpec::parse(&text, "job.toml", Path::new("/data"), &[]).expect("a job");
    let nonzero = |key: &str| {
        let value = words.number(key).map(|n| u32::try_from(n).expect("small"));
        value.and_then(std::num::NonZeroU32::new)
    };
    if let Some(ranks) = nonzero("ranks") {
        spec.resources.ranks = Ranks::Fixed(ranks);
    }
    if let Some((min, max)) = nonzero("min").zip(nonzero("max")) {
        spec.resources.ranks = Ranks::Elastic(Elastic { min, max });
    }
    if let Some(wait) = words.pairs.get("wait") {
        spec.recovery.wait_for_replacement = wait.parse().expect("a span");
    }
    if words.has("replace") {
        spec.recovery.stragglers = api::job::Stragglers::Replace;
    }
    if let Some(spares) = words.number("spares") {
        spec.recovery.spares = spares as u32;
    }
    if let Some(keep) = nonzero("keep") {
        spec.checkpoint.keep = keep;
    }
    if let Some(steps) = words.number("keep_every") {
        spec.checkpoint.keep_every_steps = steps;
    }
    if let Some(count) = nonzero("keep_best") {
        let metric = "validation:loss".to_owned();
        spec.evaluate.every_steps = spec.checkpoint.every_steps;
        spec.checkpoint.keep_best = Some(KeepBest { metric, mode: BestMode::Min, count });
    }
    if let Some(failures) = words.number("max_failures") {
        spec.recovery.max_failures = failures as u32;
    }
    if let Some(time) = words.pairs.get("max_time") {
        spec.stop.max_time = Some(time.parse().expect("a span"));
    }
    if let Some(time) = words.pairs.get("max_wait") {
        spec.stop.max_wait = Some(time.parse().expect("a span"));
    }
    if words.has("relaxed") {
        spec.parallel.determinism = Determinism::Relaxed;
    }
    spec
}

/// "spot" or "spot=0.3/1.2", "on_demand=1.2"; else an on-demand host without a price.
fn price(words: &Words<'_>) -> HostPrice {
    let number = |text: &str| text.parse::<f64>().expect("a price");
    if let Some((paid, on_demand)) = words.pairs.get("spot").and_then(|text| text.split_once('/')) {
        let (price, on_demand) = (Some(number(paid)), Some(number(on_demand)));
        return HostPrice { market: Market::Spot, price, on_demand };
    }
    let price = words.pairs.get("on_demand").map(|text| number(text));
    HostPrice { market: Market::OnDemand, price, on_demand: None }
}

fn fact(job: &str, generation: Generation, step: u64, digest: &str) -> CheckpointFact {
    CheckpointFact {
        step: TrainStep(step),
        generation,
        manifest_key: format!("{job}/{step:012}-{generation}.json"),
        manifest_digest: digest.to_owned(),
        bytes: 64,
        metrics: BTreeMap::new(),
    }
}

fn cause(words: &Words<'_>) -> ExitCause {
    if let Some(signal) = words.number("signal") {
        return ExitCause::Signal { signal: signal as i32, message: words.rest(2) };
    }
    if let Some(code) = words.number("code") {
        let retryable = !words.has("fatal");
        let damaged = words.number("damaged").map(TrainStep);
        return ExitCause::Code { code: code as i32, message: words.rest(2), retryable, damaged };
    }
    match words.at(2) {
        "completed" => ExitCause::Completed,
        "killed" if words.plain.len() > 3 => ExitCause::Killed { reason: words.rest(3) },
        "killed" => ExitCause::Killed { reason: "told to".into() },
        "not-started" => ExitCause::NotStarted { reason: words.rest(3) },
        other => panic!("`{other}` is not an end"),
    }
}

fn trace_write(write: &Write) -> String {
    let (key, json) = match write {
        Write::Put { key, json } => (key, json),
        Write::Delete { key } => return format!("  delete {key}"),
    };
    let text = match key.kind.as_str() {
        KIND_JOB => {
            let job: JobRecord = serde_json::from_slice(json).expect("a job");
            let s = job.status;
            let checkpoint = s.checkpoint.map_or("-".into(), |fact| fact.step.to_string());
            let place = |p: &Placement| {
                let stays = if p.started_as.is_some() { "*" } else { "" };
                format!("{}:{}{stays}", p.rank, p.worker)
            };
            let gang: Vec<_> = s.gang.iter().map(place).collect();
            let completed: Vec<_> = s.completed.iter().map(ToString::to_string).collect();
            let completed = match completed.is_empty() {
                true => String::new(),
                false => format!(" completed {}", completed.join(" ")),
            };
            format!(
                "{} {} [{}]{completed} failures {} checkpoint {checkpoint}: {}",
                s.phase,
                s.generation,
                gang.join(" "),
                s.failures,
                s.reason
            )
        }
        KIND_ENDPOINT => {
            let endpoint: EndpointRecord = serde_json::from_slice(json).expect("an endpoint");
            let s = endpoint.status;
            let gang: Vec<_> = s.gang.iter().map(|p| p.worker.to_string()).collect();
            let address = s.address.map_or("-".into(), |address| address.to_string());
            format!(
                "{} {} [{}] failures {} address {address}: {}",
                s.phase,
                s.generation,
                gang.join(" "),
                s.failures,
                s.reason
            )
        }
        KIND_CHECKPOINT => {
            let record: CheckpointRecord = serde_json::from_slice(json).expect("a checkpoint");
            let damaged = if record.damaged.is_some() { ", damaged" } else { "" };
            format!("{} of {}{damaged}", record.fact.step, record.fact.generation)
        }
        _ => String::from_utf8_lossy(json).into_owned(),
    };
    format!("  put {key}: {text}")
}

fn trace_message(message: &CoordinatorMessage) -> String {
    match message {
        CoordinatorMessage::Welcome { node, heartbeat } => {
            format!("welcome by {node}, heartbeat {heartbeat}")
        }
        CoordinatorMessage::Start { task, assignment } => match assignment.as_ref() {
            Assignment::Train(train) => {
                assert!(train.secret.reveal().is_empty(), "the core knows no secret");
                let restore = train.restore.as_ref();
                let restore = restore.map_or("nothing".into(), |fact| fact.step.to_string());
                let spare = if train.spare { " as a spare" } else { "" };
                format!(
                    "start {task}{spare} of {} local {}/{} restoring {restore} elapsed {}",
                    train.world_size, train.local_rank, train.local_world_size, train.elapsed
                )
            }
            Assignment::Serve(serve) => format!("start {task} serving {}", serve.model.key),
        },
        CoordinatorMessage::Deliver { task, order } => {
            let order = match order {
                RankOrder::Peers { addresses, .. } => {
                    let ports: Vec<String> = addresses.iter().map(ToString::to_string).collect();
                    format!("peers {}", ports.join(" "))
                }
                RankOrder::Regroup(regroup) => {
                    assert!(regroup.secret.reveal().is_empty(), "the core knows no secret");
                    format!(
                        "regroup as {} of {} in {} ({})",
                        regroup.rank, regroup.world_size, regroup.generation, regroup.reason
                    )
                }
                RankOrder::Committed { step } => format!("committed {step}"),
                RankOrder::Stop { reason } => format!("stop ({reason})"),
                RankOrder::Pause { reason } => format!("pause ({reason})"),
                other => format!("{other:?}"),
            };
            format!("{task} {order}")
        }
        CoordinatorMessage::Kill { task, reason } => format!("kill {task} ({reason})"),
        CoordinatorMessage::Stacks { task, .. } => format!("stacks of {task}"),
        CoordinatorMessage::Drain { deadline, reason } => {
            let within = deadline.map(|span| format!(" within {span}")).unwrap_or_default();
            format!("drain{within} ({reason})")
        }
        CoordinatorMessage::Undrain => "undrain".into(),
        CoordinatorMessage::Check { reason, .. } => format!("check the host ({reason})"),
    }
}

fn trace_event(event: &JobEvent) -> String {
    match event {
        JobEvent::Status(status) => format!("status {}", status.phase),
        JobEvent::Step(metrics) => format!("step {}", metrics.step),
        JobEvent::Evaluation(evaluation) => format!("evaluation {}", evaluation.step),
        JobEvent::Checkpoint(fact) => format!("checkpoint {}", fact.step),
        JobEvent::Note { generation, rank, text } => {
            let rank = rank.map(|rank| format!(" {rank}")).unwrap_or_default();
            format!("note {generation}{rank}: {text}")
        }
    }
}
