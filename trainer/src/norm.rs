//! The gradient's norm, in an order that belongs to the data: sums over fixed 4,096-element blocks
//! of each tensor, added in one fixed binary tree. Shards are cut at block edges only, so the same
//! bits come out however the state is divided.

use crate::parameters::Table;

/// Elements of one block.
pub const NORM_BLOCK: usize = 4096;

/// Squared L2 norm of a flat buffer.
pub fn squared_norm(table: &Table, values: &[f32]) -> f64 {
    let mut sums = Vec::with_capacity(table.len / NORM_BLOCK + table.entries.len());
    for entry in &table.entries {
        sums.extend(values[entry.range.clone()].chunks(NORM_BLOCK).map(block_sum));
    }
    tree_sum(&sums)
}

/// Eight running sums, so that the compiler may use vector registers without reordering.
fn block_sum(block: &[f32]) -> f64 {
    let mut lanes = [0f64; 8];
    let chunks = block.chunks_exact(8);
    let tail = chunks.remainder();
    for chunk in chunks {
        for (sum, value) in lanes.iter_mut().zip(chunk) {
            *sum += f64::from(*value) * f64::from(*value);
        }
    }
    for (sum, value) in lanes.iter_mut().zip(tail) {
        *sum += f64::from(*value) * f64::from(*value);
    }
    tree_sum(&lanes)
}

/// Adds halves: split at the largest power of two below the length.
fn tree_sum(sums: &[f64]) -> f64 {
    match sums {
        [] => 0.0,
        [one] => *one,
        _ => {
            let (left, right) = sums.split_at(sums.len().next_power_of_two() / 2);
            tree_sum(left) + tree_sum(right)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_tree_adds_everything_once() {
        for len in [0, 1, 2, 3, 5, 8, 1000] {
            let sums: Vec<f64> = (0..len).map(f64::from).collect();
            assert_eq!(tree_sum(&sums), f64::from(len * (len - 1).max(0) / 2));
        }
        let block: Vec<f32> = (0..4096).map(|i| (i % 7) as f32).collect();
        let exact: f64 = block.iter().map(|v| f64::from(v * v)).sum();
        assert_eq!(block_sum(&block), exact);
    }
}
