//! How far a benchmark is: a bar on a terminal, plain lines otherwise.

use std::io::IsTerminal;
use std::time::Duration;

use indicatif::{ProgressBar, ProgressStyle};

/// Shows each case as it begins.
pub struct Progress {
    bar: Option<ProgressBar>,
    done: usize,
    cases: usize,
}

impl Progress {
    /// Begins with nothing done of `cases`.
    pub fn new(cases: usize) -> Self {
        let bar = std::io::stderr().is_terminal().then(|| {
            let bar = ProgressBar::new(cases as u64);
            if let Ok(style) = ProgressStyle::with_template("[{bar:32}] {pos}/{len} {msg}") {
                bar.set_style(style.progress_chars("=> "));
            }
            // Not more often: drawing takes time from the ranks.
            bar.enable_steady_tick(Duration::from_secs(1));
            bar
        });
        Self { bar, done: 0, cases }
    }

    /// The next case begins.
    pub fn begin(&mut self, what: &str) {
        match &self.bar {
            Some(bar) => {
                bar.set_position(self.done as u64);
                bar.set_message(what.to_owned());
            }
            None => eprintln!("{}/{} {what}", self.done + 1, self.cases),
        }
        self.done += 1;
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
    }
}
