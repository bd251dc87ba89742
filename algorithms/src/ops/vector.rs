//! Loops over slices that the compiler turns into vector instructions.
//!
//! Every sum has a fixed shape (sixteen partial sums, folded pairwise) and no multiplication is
//! contracted with an addition, so the result does not depend on the width of the registers.

/// Partial sums per reduction: fills a 512-bit register, or two of 256 bits.
const LANES: usize = 16;

/// Runs `body` compiled for the widest instruction set that this machine has (AVX2 on x86-64; the
/// baseline elsewhere). Whatever `body` calls must be `#[inline(always)]` to profit.
#[inline(always)]
pub(crate) fn vectorized<R>(body: impl FnOnce() -> R) -> R {
    #[cfg(target_arch = "x86_64")]
    {
        if let Some(simd) = pulp::x86::V3::try_new() {
            return pulp::Simd::vectorize(simd, Run(body));
        }
    }
    body()
}

#[cfg(target_arch = "x86_64")]
struct Run<F>(F);

#[cfg(target_arch = "x86_64")]
impl<R, F: FnOnce() -> R> pulp::WithSimd for Run<F> {
    type Output = R;

    #[inline(always)]
    fn with_simd<S: pulp::Simd>(self, _simd: S) -> R {
        (self.0)()
    }
}

#[inline(always)]
fn fold(partial: [f32; LANES]) -> f32 {
    let mut partial = partial;
    let mut width = LANES / 2;
    while width > 0 {
        for i in 0..width {
            partial[i] += partial[i + width];
        }
        width /= 2;
    }
    partial[0]
}

/// Sum of `term(x)` over a slice.
#[inline(always)]
pub(crate) fn sum_of(values: &[f32], term: impl Fn(f32) -> f32) -> f32 {
    let mut partial = [0f32; LANES];
    let (chunks, rest) = values.as_chunks::<LANES>();
    for chunk in chunks {
        for (sum, &x) in partial.iter_mut().zip(chunk) {
            *sum += term(x);
        }
    }
    for (sum, &x) in partial.iter_mut().zip(rest) {
        *sum += term(x);
    }
    fold(partial)
}

/// Sum of `term(x, y)` over two slices of the same length.
#[inline(always)]
pub(crate) fn sum_of_pairs(a: &[f32], b: &[f32], term: impl Fn(f32, f32) -> f32) -> f32 {
    let mut partial = [0f32; LANES];
    let (a_chunks, a_rest) = a.as_chunks::<LANES>();
    let (b_chunks, b_rest) = b.as_chunks::<LANES>();
    for (x, y) in a_chunks.iter().zip(b_chunks) {
        for i in 0..LANES {
            partial[i] += term(x[i], y[i]);
        }
    }
    for ((sum, &x), &y) in partial.iter_mut().zip(a_rest).zip(b_rest) {
        *sum += term(x, y);
    }
    fold(partial)
}

/// Scalar product.
#[inline(always)]
pub(crate) fn dot(a: &[f32], b: &[f32]) -> f32 {
    sum_of_pairs(a, b, |x, y| x * y)
}

/// `target += factor * values`.
#[inline(always)]
pub(crate) fn add_scaled(target: &mut [f32], factor: f32, values: &[f32]) {
    for (t, &v) in target.iter_mut().zip(values) {
        *t += factor * v;
    }
}

/// Largest value; NaN only if all are.
#[inline(always)]
pub(crate) fn maximum(values: &[f32]) -> f32 {
    let mut partial = [f32::NEG_INFINITY; LANES];
    let (chunks, rest) = values.as_chunks::<LANES>();
    for chunk in chunks {
        for (max, &x) in partial.iter_mut().zip(chunk) {
            *max = if x > *max { x } else { *max };
        }
    }
    for (max, &x) in partial.iter_mut().zip(rest) {
        *max = if x > *max { x } else { *max };
    }
    partial.iter().fold(f32::NEG_INFINITY, |a, &b| if b > a { b } else { a })
}

/// e^x within 2 units in the last place, without a branch (Cephes' `expf`: Cody–Waite reduction and
/// a polynomial of degree 5). Clamped to the range of normal numbers; NaN stays NaN, so that a
/// diverged model is seen to have diverged.
#[inline(always)]
pub(crate) fn exp(x: f32) -> f32 {
    // 1.5 · 2^23: adding it rounds to the nearest whole number, left in the low bits.
    const ROUND: f32 = 12_582_912.0;
    const LN2_HIGH: f32 = 0.693_359_4;
    const LN2_LOW: f32 = -2.121_944_4e-4;
    let x = if x > 88.0 { 88.0 } else { x };
    let x = if x < -87.3 { -87.3 } else { x };
    let rounded = x * std::f32::consts::LOG2_E + ROUND;
    let n = rounded - ROUND;
    let r = x - n * LN2_HIGH - n * LN2_LOW;
    let mut p = 1.987_569_2e-4;
    p = p * r + 1.398_2e-3;
    p = p * r + 8.333_452e-3;
    p = p * r + 4.166_579_6e-2;
    p = p * r + 1.666_666_5e-1;
    p = p * r + 5e-1;
    let mantissa = p * (r * r) + r + 1.0;
    let exponent = rounded.to_bits().wrapping_sub(ROUND.to_bits()).wrapping_add(127) << 23;
    mantissa * f32::from_bits(exponent)
}

/// Replaces scores by softmax(scale · scores).
#[inline(always)]
pub(crate) fn softmax_in_place(scores: &mut [f32], scale: f32) {
    let max = maximum(scores) * scale;
    for s in scores.iter_mut() {
        *s = exp(*s * scale - max);
    }
    let inverse = 1.0 / sum_of(scores, |x| x);
    for s in scores.iter_mut() {
        *s *= inverse;
    }
}

/// Adds every row of `rows` (each of `totals.len()` columns) onto `totals`, top to bottom.
#[inline(always)]
pub(crate) fn add_rows(totals: &mut [f32], rows: &[f32]) {
    for row in rows.chunks_exact(totals.len()) {
        for (total, &x) in totals.iter_mut().zip(row) {
            *total += x;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exp_is_within_two_units_in_the_last_place() {
        for i in -87_000..88_000 {
            let x = i as f32 / 1000.0;
            let exact = f64::from(x).exp();
            let error = (f64::from(exp(x)) - exact).abs() / exact;
            assert!(error < 2.4e-7, "exp({x}) = {}, expected {exact}", exp(x));
        }
        assert!(exp(f32::NAN).is_nan());
        assert!(exp(f32::NEG_INFINITY) < 2e-38);
    }

    #[test]
    fn vector_and_scalar_code_give_the_same_bits() {
        let values: Vec<f32> = (0..1003).map(|i| ((i * 37 % 101) as f32 - 50.0) / 17.0).collect();
        let wide = vectorized(
            #[inline(always)]
            || (sum_of(&values, exp), dot(&values, &values), maximum(&values)),
        );
        let narrow = (sum_of(&values, exp), dot(&values, &values), maximum(&values));
        assert_eq!(wide.0.to_bits(), narrow.0.to_bits());
        assert_eq!(wide.1.to_bits(), narrow.1.to_bits());
        assert_eq!(wide.2, narrow.2);
    }
}
