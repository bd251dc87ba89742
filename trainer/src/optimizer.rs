//! AdamW and SGD over flat buffers. Element by element, so the result depends neither on threads
//! nor on how the buffers are cut.

use std::collections::BTreeMap;

use api::schema::Value;
use rayon::prelude::*;

use crate::parameters::Table;
use crate::schedule::{Schedule, Shape};

/// Elements that one task updates; a multiple of the norm's block.
const CHUNK: usize = 1 << 16;

/// Which rule.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Rule {
    /// Adam with decoupled weight decay (Loshchilov and Hutter, 2019).
    AdamW {
        /// Decay of the first moment.
        beta1: f32,
        /// Decay of the second moment.
        beta2: f32,
        /// Added to the root of the second moment.
        epsilon: f32,
    },
    /// Stochastic gradient descent with heavy-ball momentum (0: none).
    Sgd {
        /// Part of the former update that goes on.
        momentum: f32,
    },
}

/// An optimiser with its settings; its state lies beside the parameters in [`OptimizerState`].
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Optimizer {
    /// Which rule.
    pub rule: Rule,
    /// Weight decay, for parameters that ask for it.
    pub weight_decay: f32,
    /// Largest gradient norm; larger ones are scaled down. 0: no limit.
    pub clip_norm: f64,
    /// Learning rate over steps.
    pub schedule: Schedule,
}

/// Moments, one buffer each of the parameters' length; empty where the rule has none.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct OptimizerState {
    /// First moment, or momentum.
    pub m: Vec<f32>,
    /// Second moment.
    pub v: Vec<f32>,
}

impl Optimizer {
    /// Reads the common hyperparameters that every algorithm's schema has; they are resolved, so
    /// each is present and in range.
    pub fn from_hyperparameters(values: &BTreeMap<String, Value>, total_steps: u64) -> Self {
        let float = |name: &str| match values.get(name) {
            Some(Value::Float(v)) => *v,
            Some(Value::Integer(v)) => *v as f64,
            _ => 0.0,
        };
        let text = |name: &str| match values.get(name) {
            Some(Value::Text(v)) => v.as_str(),
            _ => "",
        };
        let rule = if text("optimizer") == "sgd" {
            Rule::Sgd { momentum: float("momentum") as f32 }
        } else {
            Rule::AdamW {
                beta1: float("beta1") as f32,
                beta2: float("beta2") as f32,
                epsilon: float("epsilon") as f32,
            }
        };
        let shape = match text("schedule") {
            "linear" => Shape::Linear,
            "cosine" => Shape::Cosine,
            _ => Shape::Constant,
        };
        let schedule = Schedule {
            shape,
            peak: float("learning_rate"),
            min_ratio: float("min_learning_rate_ratio"),
            warmup: float("warmup_steps") as u64,
            total: total_steps,
        };
        Self {
            rule,
            weight_decay: float("weight_decay") as f32,
            clip_norm: float("clip_norm"),
            schedule,
        }
    }

    /// How many moments it keeps of a parameter.
    pub fn moments(&self) -> usize {
        match self.rule {
            Rule::AdamW { .. } => 2,
            Rule::Sgd { momentum } => usize::from(momentum > 0.0),
        }
    }

    /// Moments for `len` parameters, all 0.
    pub fn initial_state(&self, len: usize) -> OptimizerState {
        match self.rule {
            Rule::AdamW { .. } => OptimizerState { m: vec![0.0; len], v: vec![0.0; len] },
            Rule::Sgd { momentum } if momentum > 0.0 => {
                OptimizerState { m: vec![0.0; len], v: Vec::new() }
            }
            Rule::Sgd { .. } => OptimizerState::default(),
        }
    }

    /// Factor that brings a gradient of this norm within the limit.
    pub fn clip_factor(&self, norm: f64) -> f32 {
        if self.clip_norm > 0.0 && norm > self.clip_norm {
            (self.clip_norm / norm) as f32
        } else {
            1.0
        }
    }

    /// Applies step `step` (from 0). `gradient` is the mean gradient; it is multiplied by `scale`
    /// (clipping) on the way.
    pub fn apply(
        &self,
        step: u64,
        table: &Table,
        values: &mut [f32],
        state: &mut OptimizerState,
        gradient: &[f32],
        scale: f32,
    ) {
        let rate = self.schedule.rate(step);
        for entry in &table.entries {
            let range = entry.range.clone();
            let decay = if entry.spec.decay { self.weight_decay } else { 0.0 };
            let keep = (1.0 - rate * f64::from(decay)) as f32;
            let (w, g) = (&mut values[range.clone()], &gradient[range.clone()]);
            match self.rule {
                Rule::AdamW { beta1, beta2, epsilon } => {
                    let update = AdamUpdate::new(step, rate, beta1, beta2, epsilon, keep, scale);
                    let (m, v) = (&mut state.m[range.clone()], &mut state.v[range]);
                    w.par_chunks_mut(CHUNK)
                        .zip(m.par_chunks_mut(CHUNK))
                        .zip(v.par_chunks_mut(CHUNK))
                        .zip(g.par_chunks(CHUNK))
                        .for_each(|(((w, m), v), g)| update.apply(w, m, v, g));
                }
                Rule::Sgd { momentum } if momentum > 0.0 => {
                    for ((w, m), g) in w.iter_mut().zip(&mut state.m[range]).zip(g) {
                        *m = momentum * *m + *g * scale;
                        *w = *w * keep - rate as f32 * *m;
                    }
                }
                Rule::Sgd { .. } => {
                    for (w, g) in w.iter_mut().zip(g) {
                        *w = *w * keep - rate as f32 * (*g * scale);
                    }
                }
            }
        }
    }
}

/// The scalars of one AdamW step, bias corrections folded in.
struct AdamUpdate {
    beta1: f32,
    beta2: f32,
    epsilon: f32,
    keep: f32,
    scale: f32,
    step_size: f32,
    inverse_root: f32,
}

impl AdamUpdate {
    fn new(
        step: u64,
        rate: f64,
        beta1: f32,
        beta2: f32,
        epsilon: f32,
        keep: f32,
        scale: f32,
    ) -> Self {
        let power = |beta: f32| 1.0 - libm::pow(f64::from(beta), (step + 1) as f64);
        Self {
            beta1,
            beta2,
            epsilon,
            keep,
            scale,
            step_size: (rate / power(beta1)) as f32,
            inverse_root: (1.0 / power(beta2).sqrt()) as f32,
        }
    }

    fn apply(&self, w: &mut [f32], m: &mut [f32], v: &mut [f32], g: &[f32]) {
        for (((w, m), v), g) in w.iter_mut().zip(m).zip(v).zip(g) {
            let g = *g * self.scale;
            *m = self.beta1 * *m + (1.0 - self.beta1) * g;
            *v = self.beta2 * *v + (1.0 - self.beta2) * (g * g);
            let denominator = v.sqrt() * self.inverse_root + self.epsilon;
            *w = *w * self.keep - self.step_size * (*m / denominator);
        }
    }
}

#[cfg(test)]
mod tests {
    use algorithms::{Init, ParamSpec};

    use super::*;
    use crate::parameters::Entry;

    fn table(len: usize) -> Table {
        let spec = ParamSpec { name: "w".into(), shape: vec![len], init: Init::Zeros, decay: true };
        #[expect(clippy::single_range_in_vec_init, reason = "one block of one entry")]
        let blocks = vec![0..1];
        Table { entries: vec![Entry { spec, block: 0, range: 0..len }], blocks, len }
    }

    fn optimizer(rule: Rule) -> Optimizer {
        let schedule =
            Schedule { shape: Shape::Constant, peak: 0.1, min_ratio: 0.0, warmup: 0, total: 10 };
        Optimizer { rule, weight_decay: 0.1, clip_norm: 1.0, schedule }
    }

    #[test]
    fn adamw_follows_its_definition() {
        let rule = Rule::AdamW { beta1: 0.9, beta2: 0.99, epsilon: 1e-8 };
        let adam = optimizer(rule);
        let (mut w, mut state) = (vec![1.0f32, -2.0], adam.initial_state(2));
        let (mut m, mut v, mut expected) = ([0f64; 2], [0f64; 2], [1.0f64, -2.0]);
        for step in 0..5 {
            let g = [0.5 - step as f32 * 0.2, 0.3];
            adam.apply(step, &table(2), &mut w, &mut state, &g, 1.0);
            for i in 0..2 {
                let g = f64::from(g[i]);
                m[i] = 0.9 * m[i] + 0.1 * g;
                v[i] = 0.99 * v[i] + 0.01 * g * g;
                let t = (step + 1) as f64;
                let m_hat = m[i] / (1.0 - 0.9f64.powf(t));
                let v_hat = v[i] / (1.0 - 0.99f64.powf(t));
                expected[i] *= 1.0 - 0.1 * 0.1;
                expected[i] -= 0.1 * m_hat / (v_hat.sqrt() + 1e-8);
            }
        }
        for i in 0..2 {
            assert!((f64::from(w[i]) - expected[i]).abs() < 1e-5, "{w:?} {expected:?}");
        }
    }

    #[test]
    fn sgd_with_momentum_follows_its_definition() {
        let sgd = optimizer(Rule::Sgd { momentum: 0.5 });
        let (mut w, mut state) = (vec![1.0f32], sgd.initial_state(1));
        sgd.apply(0, &table(1), &mut w, &mut state, &[1.0], 0.5);
        assert!((w[0] - (0.99 - 0.05)).abs() < 1e-6);
        assert_eq!((sgd.clip_factor(0.5), sgd.clip_factor(4.0)), (1.0, 0.25));
    }

    #[test]
    fn moments_are_counted_as_they_are_kept() {
        let adam = Rule::AdamW { beta1: 0.9, beta2: 0.99, epsilon: 1e-8 };
        for rule in [adam, Rule::Sgd { momentum: 0.5 }, Rule::Sgd { momentum: 0.0 }] {
            let optimizer = optimizer(rule);
            let state = optimizer.initial_state(7);
            assert_eq!(state.m.len() + state.v.len(), 7 * optimizer.moments());
        }
    }
}
