//! How many cases run and how long they may take.

use std::time::Duration;

use collective::Transport;

/// Cases of each kind and transport where nobody asks for more.
const CASES: u64 = 5;
/// An error must be there within this time of the fault or the push, and a group within this time.
const FAULT_LIMIT: Duration = Duration::from_secs(1);
/// What a person takes for at once.
const MISMATCH_LIMIT: Duration = Duration::from_millis(100);

/// The times of all ranks of some cases.
#[derive(Default)]
pub struct Figures {
    /// To the error.
    pub errors: Vec<Duration>,
    /// To form the next group.
    pub forms: Vec<Duration>,
}

pub struct Plan {
    seed: u64,
    cases: u64,
    /// Whether the limits hold: not where other tests take the cores.
    timed: bool,
}

impl Plan {
    pub fn from_environment() -> Self {
        let number = |name| {
            let text = std::env::var(name).ok()?;
            Some(text.parse().unwrap_or_else(|_| panic!("{name}={text} is no number")))
        };
        let cases = number("COHORT_FAULTS");
        let fresh = || crate::message::now().subsec_nanos().into();
        Self {
            seed: number("COHORT_FAULTS_SEED").unwrap_or_else(fresh),
            cases: cases.unwrap_or(CASES),
            timed: cases.is_some(),
        }
    }

    /// Runs cases of a fault, and prints a row of the table.
    pub fn run(&self, fault: &str, transport: Transport, case: impl Fn(u64) -> Figures) {
        let figures = self.collect(case);
        let (errors, forms) = (row(&figures.errors), row(&figures.forms));
        println!("| {fault} | {} | {} | {errors} | {forms} |", name(transport), self.cases);
        self.check("error", &figures.errors, FAULT_LIMIT);
        self.check("next group", &figures.forms, FAULT_LIMIT);
    }

    /// The same for calls that differ: no group follows.
    pub fn run_mismatches(&self, transport: Transport, case: impl Fn(u64) -> Figures) {
        let figures = self.collect(case);
        let errors = row(&figures.errors);
        println!("| mismatch | {} | {} | {errors} | | |", name(transport), self.cases);
        self.check("error", &figures.errors, MISMATCH_LIMIT);
    }

    fn collect(&self, case: impl Fn(u64) -> Figures) -> Figures {
        let mut all = Figures::default();
        for seed in (0..self.cases).map(|index| self.seed.wrapping_add(index)) {
            let figures = case(seed);
            all.errors.extend(figures.errors);
            all.forms.extend(figures.forms);
        }
        all.errors.sort();
        all.forms.sort();
        all
    }

    fn check(&self, what: &str, sorted: &[Duration], limit: Duration) {
        let slowest = sorted.last().copied().unwrap_or_default();
        assert!(!self.timed || slowest <= limit, "the slowest {what} took {slowest:?}");
    }
}

/// What the table and a rank's orders call it.
pub fn name(transport: Transport) -> &'static str {
    match transport {
        Transport::Shared => "shm",
        Transport::Tcp => "tcp",
        Transport::Auto => "hosts",
    }
}

/// The median and the longest of sorted times, as cells of a table.
fn row(sorted: &[Duration]) -> String {
    let shown = |time: Option<&Duration>| match time {
        Some(time) => format!("{:.1} ms", time.as_secs_f64() * 1e3),
        None => String::new(),
    };
    format!("{} | {}", shown(sorted.get(sorted.len() / 2)), shown(sorted.last()))
}
