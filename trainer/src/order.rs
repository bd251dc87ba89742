//! Which samples a step holds: a pure function of (seed, step, index), the same for any number of
//! ranks. The job's data cursor is one number, the count of samples drawn so far.
//!
//! Samples are drawn without replacement: every epoch is a fresh permutation keyed by (seed,
//! epoch). Batches run on across epoch borders, so none is short.

/// The permutations of the epochs that the current batches touch (two at most).
#[derive(Debug)]
pub struct SampleOrder {
    seed: u64,
    len: u64,
    cached: Vec<(u64, Vec<u64>)>,
}

impl SampleOrder {
    /// The order over a data set of `len` samples, at least 1.
    pub fn new(seed: u64, len: u64) -> Self {
        assert!(len > 0, "a data set holds at least one sample");
        Self { seed, len, cached: Vec::new() }
    }

    /// The samples at cursor positions `first..first + count`.
    pub fn samples(&mut self, first: u64, count: u64) -> Vec<u64> {
        (first..first + count)
            .map(|position| {
                let (epoch, index) = (position / self.len, (position % self.len) as usize);
                self.permutation(epoch)[index]
            })
            .collect()
    }

    fn permutation(&mut self, epoch: u64) -> &[u64] {
        if let Some(at) = self.cached.iter().position(|(e, _)| *e == epoch) {
            return &self.cached[at].1;
        }
        if self.cached.len() == 2 {
            self.cached.remove(0);
        }
        self.cached.push((epoch, permutation(self.seed, epoch, self.len)));
        &self.cached[self.cached.len() - 1].1
    }
}

/// Fisher and Yates' shuffle (Durstenfeld, CACM 1964), driven by BLAKE3's extendable output.
fn permutation(seed: u64, epoch: u64, len: u64) -> Vec<u64> {
    let mut hasher = blake3::Hasher::new_derive_key("cohort 2026 sample order");
    hasher.update(&seed.to_le_bytes()).update(&epoch.to_le_bytes());
    let mut stream = RandomStream { reader: hasher.finalize_xof(), buffer: [0; 4096], at: 4096 };
    let mut order: Vec<u64> = (0..len).collect();
    for i in (1..len).rev() {
        order.swap(i as usize, stream.below(i + 1) as usize);
    }
    order
}

struct RandomStream {
    reader: blake3::OutputReader,
    buffer: [u8; 4096],
    at: usize,
}

impl RandomStream {
    fn next(&mut self) -> u64 {
        if self.at == self.buffer.len() {
            self.reader.fill(&mut self.buffer);
            self.at = 0;
        }
        let mut word = [0; 8];
        word.copy_from_slice(&self.buffer[self.at..self.at + 8]);
        self.at += 8;
        u64::from_le_bytes(word)
    }

    /// Uniform below `bound`, without bias: the incomplete last range is drawn again.
    fn below(&mut self, bound: u64) -> u64 {
        let limit = u64::MAX - u64::MAX % bound;
        loop {
            let word = self.next();
            if word < limit {
                return word % bound;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_sample_comes_once_per_epoch_and_batches_cross_epochs() {
        let (len, batch) = (101, 8);
        let mut order = SampleOrder::new(7, len);
        let mut seen = vec![0; len as usize];
        for step in 0..len {
            for sample in order.samples(step * batch, batch) {
                seen[sample as usize] += 1;
            }
        }
        assert!(seen.iter().all(|&n| n == batch), "{seen:?}");
    }

    #[test]
    fn the_order_depends_on_seed_and_epoch_only() {
        let straight = SampleOrder::new(3, 50).samples(0, 150);
        let mut resumed = SampleOrder::new(3, 50);
        assert_eq!(resumed.samples(70, 80), straight[70..]);
        assert_ne!(straight[..50], straight[50..100]);
        assert_ne!(SampleOrder::new(4, 50).samples(0, 50), straight[..50]);
    }
}
