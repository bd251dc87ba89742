//! The sample ledger: proof that each pass over the data sees every sample exactly once, however
//! often ranks died, came and went.
//!
//! Every rank counts and hashes the samples that it feeds to the model, where it feeds them; the sums
//! go through the same reduction as the step's loss, so what a step that is thrown away has read is
//! thrown away with it. Hashes are added up, so neither order nor ranks matter; they have 32 bits, so
//! that sums of a step's are exact in an `f64`. When a pass is complete, its sum must be that over all
//! samples: one that is missing and another that came twice go unnoticed once in 2³² times.

use std::ops::RangeInclusive;

use api::samples::SampleTally;

/// Sums per pass: how many samples, and their hashes.
const SUMS: usize = 2;

/// Where the samples of a step lie in the passes over the data.
#[derive(Clone, Copy, Debug)]
pub struct StepSamples {
    /// Samples of the data set, at least 1.
    pub len: u64,
    /// Samples drawn before the step.
    pub first: u64,
    /// Samples of the step.
    pub count: u64,
}

impl StepSamples {
    /// The passes that the step has samples of.
    fn epochs(&self) -> RangeInclusive<u64> {
        self.first / self.len..=(self.first + self.count.max(1) - 1) / self.len
    }

    /// How many sums the step needs: the same on every rank.
    pub fn sums(&self) -> usize {
        SUMS * self.epochs().count()
    }

    /// Adds the samples `indices`, which are fed to the model, drawn `offset` after the step's first.
    pub fn add(&self, sums: &mut [f64], offset: u64, indices: &[u64]) {
        for (position, index) in (self.first + offset..).zip(indices) {
            let epoch = position / self.len;
            let at = SUMS * (epoch - self.first / self.len) as usize;
            sums[at] += 1.0;
            sums[at + 1] += hash(epoch, *index) as f64;
        }
    }

    /// Notes the sums over all ranks of a step that is about to be applied.
    ///
    /// # Errors
    /// When a pass has ended that did not see every sample exactly once.
    pub fn account(&self, tally: &mut SampleTally, sums: &[f64]) -> Result<(), String> {
        let mut next = *tally;
        for (epoch, sums) in self.epochs().zip(sums.chunks_exact(SUMS)) {
            if epoch != next.epoch {
                return Err(format!(
                    "step at sample {} has samples of epoch {epoch}, the ledger is in epoch {}",
                    self.first, next.epoch
                ));
            }
            next.count += sums[0] as u64;
            next.digest = next.digest.wrapping_add(sums[1] as u64);
            if self.first + self.count >= (epoch + 1) * self.len {
                self.close(&mut next)?;
            }
        }
        *tally = next;
        Ok(())
    }

    fn close(&self, tally: &mut SampleTally) -> Result<(), String> {
        let epoch = tally.epoch;
        let mut verified = tally.epochs_verified;
        if !tally.is_partial {
            let expected = (0..self.len).fold(0u64, |sum, i| sum.wrapping_add(hash(epoch, i)));
            if (tally.count, tally.digest) != (self.len, expected) {
                return Err(format!(
                    "epoch {epoch} fed {} samples to the model, with digest {:x}; the {} samples of \
                     the data, each once, have {expected:x}: this is a defect, please report it",
                    tally.count, tally.digest, self.len
                ));
            }
            verified += 1;
        }
        *tally = SampleTally { epochs_verified: verified, epoch: epoch + 1, ..Default::default() };
        Ok(())
    }
}

/// A ledger that begins when `drawn` samples have been drawn unseen.
pub fn beginning_at(drawn: u64, len: u64) -> SampleTally {
    SampleTally { epoch: drawn / len, is_partial: !drawn.is_multiple_of(len), ..Default::default() }
}

/// 32 bits of a sample in a pass: the finaliser of MurmurHash3 (Appleby, 2011) over both numbers.
fn hash(epoch: u64, sample: u64) -> u64 {
    let mut x = sample ^ epoch.wrapping_mul(0x9e37_79b9_7f4a_7c15);
    x = (x ^ (x >> 33)).wrapping_mul(0xff51_afd7_ed55_8ccd);
    x = (x ^ (x >> 33)).wrapping_mul(0xc4ce_b9fe_1a85_ec53);
    (x ^ (x >> 33)) >> 32
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::order::SampleOrder;

    /// Steps of `global` samples over `len`, the samples of each drawn by `ranks` in turn, changed by
    /// `tamper`; the tally at the end.
    fn tally(
        len: u64,
        global: u64,
        steps: u64,
        ranks: u64,
        mut tamper: impl FnMut(u64, &mut Vec<u64>),
    ) -> Result<SampleTally, String> {
        let mut order = SampleOrder::new(3, len);
        let mut tally = SampleTally::default();
        for step in 0..steps {
            let samples = StepSamples { len, first: step * global, count: global };
            let mut sums = vec![0.0; samples.sums()];
            for rank in 0..ranks {
                let (from, to) = (global * rank / ranks, global * (rank + 1) / ranks);
                let mut indices = order.samples(samples.first + from, to - from);
                if rank == 0 {
                    tamper(step, &mut indices);
                }
                samples.add(&mut sums, from, &indices);
            }
            samples.account(&mut tally, &sums)?;
        }
        Ok(tally)
    }

    #[test]
    fn whole_passes_are_verified_for_any_batch_and_ranks() {
        for (len, global, steps) in [(100, 10, 25), (101, 8, 50), (7, 64, 9), (1, 1, 4), (5, 5, 3)]
        {
            let one = tally(len, global, steps, 1, |_, _| {}).expect("each once");
            assert_eq!(one.epochs_verified, steps * global / len, "{len} {global}");
            assert_eq!(one.count, steps * global % len);
            assert_eq!(tally(len, global, steps, 3, |_, _| {}), Ok(one));
        }
    }

    #[test]
    fn a_sample_in_place_of_another_or_one_too_few_is_found() {
        let swapped = |step: u64, indices: &mut Vec<u64>| {
            if step == 4 {
                indices[0] = (indices[0] + 1) % 101;
            }
        };
        let error = tally(101, 8, 50, 2, swapped).expect_err("one came twice");
        assert!(error.starts_with("epoch 0 fed 101 samples"), "{error}");
        let dropped = |step: u64, indices: &mut Vec<u64>| {
            if step == 20 {
                indices.pop();
            }
        };
        let error = tally(101, 8, 50, 2, dropped).expect_err("one is missing");
        assert!(error.starts_with("epoch 1 fed 100 samples"), "{error}");
    }

    #[test]
    fn a_pass_that_began_unseen_is_left_out() {
        let (len, global) = (10, 4);
        let mut tally = beginning_at(8, len);
        let mut order = SampleOrder::new(3, len);
        for step in 2..8 {
            let samples = StepSamples { len, first: step * global, count: global };
            let mut sums = vec![0.0; samples.sums()];
            samples.add(&mut sums, 0, &order.samples(samples.first, global));
            samples.account(&mut tally, &sums).expect("each once");
        }
        assert_eq!((tally.epochs_verified, tally.epoch, tally.count), (2, 3, 2));
    }
}
