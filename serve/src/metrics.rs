//! Counters of a model server, printed in Prometheus' text format (version 0.0.4).

use std::fmt::Write;
use std::sync::Mutex;
use std::sync::PoisonError;
use std::time::Duration;

/// Upper edges of the latency buckets, in seconds.
const LATENCY_EDGES: [f64; 12] =
    [0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 10.0];

/// All counters of one server.
#[derive(Debug, Default)]
pub struct Metrics {
    inner: Mutex<Counters>,
}

#[derive(Debug, Default)]
struct Counters {
    responses: std::collections::BTreeMap<u16, u64>,
    buckets: [u64; LATENCY_EDGES.len()],
    latency_sum: f64,
    latency_count: u64,
    batches: u64,
    batched: u64,
    abandoned: u64,
}

/// What is waiting now.
#[derive(Clone, Copy, Debug)]
pub struct Waiting {
    /// Bodies that wait for the model.
    pub depth: usize,
    /// Bytes of bodies that are held.
    pub bytes: u64,
}

impl Metrics {
    /// One invocation was answered.
    pub fn answered(&self, status: u16, took: Duration) {
        let mut counters = self.inner.lock().unwrap_or_else(PoisonError::into_inner);
        *counters.responses.entry(status).or_default() += 1;
        let seconds = took.as_secs_f64();
        counters.latency_sum += seconds;
        counters.latency_count += 1;
        for (bucket, edge) in counters.buckets.iter_mut().zip(LATENCY_EDGES) {
            *bucket += u64::from(seconds <= edge);
        }
    }

    /// A batch of `size` requests was computed.
    pub fn batch(&self, size: usize) {
        let mut counters = self.inner.lock().unwrap_or_else(PoisonError::into_inner);
        counters.batches += 1;
        counters.batched += size as u64;
    }

    /// A caller left before its answer.
    pub fn abandoned(&self) {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner).abandoned += 1;
    }

    /// The text that a scraper reads.
    pub fn render(&self, waiting: Waiting) -> String {
        let counters = self.inner.lock().unwrap_or_else(PoisonError::into_inner);
        let mut text = String::new();
        let mut family = |name: &str, kind: &str, help: &str, lines: Vec<String>| {
            // Writing to a String cannot fail.
            let _ = writeln!(text, "# HELP {name} {help}\n# TYPE {name} {kind}");
            lines.iter().for_each(|line| text.push_str(&format!("{name}{line}\n")));
        };
        let responses = counters
            .responses
            .iter()
            .map(|(status, count)| format!("{{status=\"{status}\"}} {count}"))
            .collect();
        family("cohort_serve_responses_total", "counter", "Answered invocations.", responses);
        let mut latency: Vec<String> = LATENCY_EDGES
            .iter()
            .zip(counters.buckets)
            .map(|(edge, count)| format!("_bucket{{le=\"{edge}\"}} {count}"))
            .collect();
        latency.push(format!("_bucket{{le=\"+Inf\"}} {}", counters.latency_count));
        latency.push(format!("_sum {}", counters.latency_sum));
        latency.push(format!("_count {}", counters.latency_count));
        let help = "Time from the whole body to the answer.";
        family("cohort_serve_latency_seconds", "histogram", help, latency);
        let batches = vec![format!(" {}", counters.batches)];
        family("cohort_serve_batches_total", "counter", "Computed batches.", batches);
        let batched = vec![format!(" {}", counters.batched)];
        family("cohort_serve_batched_requests_total", "counter", "Requests in them.", batched);
        let abandoned = vec![format!(" {}", counters.abandoned)];
        let help = "Callers who left before their answer.";
        family("cohort_serve_abandoned_total", "counter", help, abandoned);
        let depth = vec![format!(" {}", waiting.depth)];
        family("cohort_serve_queue_depth", "gauge", "Requests waiting now.", depth);
        let bytes = vec![format!(" {}", waiting.bytes)];
        family("cohort_serve_queue_bytes", "gauge", "Bytes of request bodies held now.", bytes);
        text
    }
}
