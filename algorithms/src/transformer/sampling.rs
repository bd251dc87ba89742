//! Chooses the next token: a pure function of the logits, the request and the token's position.

use std::cmp::Ordering;

use crate::algorithm::GenerateInput;
use crate::random;

/// The `index`-th generated token of a request.
pub(super) fn next_token(logits: &[f32], input: &GenerateInput, index: u64) -> u32 {
    if input.temperature == 0.0 || input.top_k == Some(1) {
        return best(logits);
    }
    let mut candidates: Vec<usize> = (0..logits.len()).collect();
    if let Some(top) = input.top_k.map(|k| k as usize)
        && top < candidates.len()
    {
        candidates.select_nth_unstable_by(top, |&a, &b| likelier_first(logits, a, b));
        candidates.truncate(top);
        candidates.sort_unstable();
    }
    let temperature = f64::from(input.temperature);
    let max = candidates.iter().map(|&i| logits[i]).fold(f32::NEG_INFINITY, f32::max);
    // In f64 with the portable exponential, so that the same request gives the same text anywhere.
    let weight = |&i: &usize| libm::exp((f64::from(logits[i]) - f64::from(max)) / temperature);
    let weights: Vec<f64> = candidates.iter().map(weight).collect();
    let mut generator = random::stream(
        "cohort generated token",
        &[&input.seed.to_le_bytes(), &index.to_le_bytes()],
    );
    let mut left = random::unit(&mut generator) * weights.iter().sum::<f64>();
    for (&candidate, weight) in candidates.iter().zip(&weights) {
        left -= weight;
        if left <= 0.0 {
            return candidate as u32;
        }
    }
    // Rounding can leave a crumb.
    best(logits)
}

/// By descending logit, then ascending token: a total order.
fn likelier_first(logits: &[f32], a: usize, b: usize) -> Ordering {
    logits[b].total_cmp(&logits[a]).then(a.cmp(&b))
}

fn best(logits: &[f32]) -> u32 {
    (0..logits.len()).min_by(|&a, &b| likelier_first(logits, a, b)).unwrap_or(0) as u32
}

#[cfg(test)]
mod tests {
    use super::*;

    fn request(temperature: f32, top_k: Option<u32>, seed: u64) -> GenerateInput {
        GenerateInput { prompt: "x".into(), max_tokens: 1, temperature, top_k, seed }
    }

    #[test]
    fn cold_requests_take_the_likeliest_token() {
        let logits = [0.0, 2.0, 2.0, -1.0];
        assert_eq!(next_token(&logits, &request(0.0, None, 1), 0), 1);
        assert_eq!(next_token(&logits, &request(1.0, Some(1), 1), 0), 1);
    }

    #[test]
    fn draws_follow_the_distribution_and_respect_top_k() {
        let logits = [0.0f32, 1.0, 2.0, f32::NEG_INFINITY];
        let mut counts = [0u32; 4];
        for index in 0..20_000 {
            counts[next_token(&logits, &request(1.0, None, 9), index) as usize] += 1;
        }
        let total: f64 = [0.0f64, 1.0, 2.0].iter().map(|x| x.exp()).sum();
        for (i, count) in counts.iter().enumerate().take(3) {
            let expected = (i as f64).exp() / total * 20_000.0;
            assert!((f64::from(*count) - expected).abs() < 300.0, "{counts:?}");
        }
        assert_eq!(counts[3], 0);
        for index in 0..1000 {
            assert_ne!(next_token(&logits, &request(5.0, Some(2), 3), index), 0);
        }
    }

    #[test]
    fn the_same_seed_and_position_give_the_same_token() {
        let logits: Vec<f32> = (0..100).map(|i| (i % 7) as f32).collect();
        let draw = |seed, index| next_token(&logits, &request(1.0, None, seed), index);
        let first: Vec<u32> = (0..20).map(|i| draw(1, i)).collect();
        assert_eq!(first, (0..20).map(|i| draw(1, i)).collect::<Vec<_>>());
        assert_ne!(first, (0..20).map(|i| draw(2, i)).collect::<Vec<_>>());
    }
}
