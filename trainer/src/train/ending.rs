//! How a rank's work ends: the last save, the model.

use api::events::ModelFact;
use api::samples::SampleTally;
use api::session::{RankReport, StopCause};

use super::{End, Trainer, stateless};
use crate::error::TrainError;
use crate::held::Held;

impl Trainer {
    pub(super) fn stop_here(&mut self, held: &Held, why: StopCause) -> Result<End, TrainError> {
        self.save_and_report(held)?;
        let step = held.step();
        if self.is_first() {
            println!("stopped at step {}/{}", step.0, held.last_step);
            self.control.report(&RankReport::Stopped { step, why })?;
        }
        self.bound.queue.turn().barrier()?;
        self.bound.checkpoints.take_saver()?.finish()?;
        Ok(End::Stopped)
    }

    pub(super) fn finish(&mut self, held: &Held) -> Result<End, TrainError> {
        self.save_and_report(held)?;
        self.recorder.set_tag("writing the model");
        let mut saver = self.bound.checkpoints.take_saver()?;
        if self.is_first() {
            let Some(state) = &held.state else { return Err(stateless()) };
            let descriptor = serde_json::to_vec_pretty(&held.problem.descriptor)
                .map_err(|e| TrainError::Job(format!("model.json cannot be written: {e}")))?;
            let tensors = state.model_tensors(&held.table);
            let (key, sha256, bytes) = saver.put_model(&tensors, &descriptor)?;
            let (step, metrics) = (state.step, held.progress.metrics.clone());
            let samples = Some(held.progress.samples);
            let fact = ModelFact { key, sha256, bytes, step, metrics, samples };
            let SampleTally { epochs_verified, count, .. } = held.progress.samples;
            println!(
                "samples: {epochs_verified} whole epochs with every sample exactly once, and {count} \
                 of the next"
            );
            println!("model written: sha256 {} ({} bytes)", fact.sha256, fact.bytes);
            self.control.report(&RankReport::Finished(fact))?;
        }
        // Nobody leaves before the model is written: a failure of rank 0 is everyone's.
        self.bound.queue.turn().barrier()?;
        saver.finish()?;
        Ok(End::Finished)
    }

    /// A checkpoint of the current step, complete before this returns.
    fn save_and_report(&mut self, held: &Held) -> Result<(), TrainError> {
        self.busy("the last save")?;
        self.bound.checkpoints.hurry()?;
        self.stage(held)?;
        let bound = &mut self.bound;
        for fact in bound.checkpoints.flush(&mut *bound.queue.turn())? {
            self.control.report(&RankReport::Checkpoint(fact))?;
        }
        Ok(())
    }
}
