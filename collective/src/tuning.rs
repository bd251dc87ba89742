//! From measured times to a table of algorithms.
//!
//! Pure. For each operation and number of ranks: the fewest runs of sizes whose one algorithm is
//! nowhere clearly slower than the fastest, so that noise does not make rules. Numbers of ranks that
//! can share their runs do. Whatever was not measured keeps the rules of the default table.

use std::collections::BTreeMap;

use crate::selection::{Algorithm, Rule, Selectable, Selection, SelectionError};

/// A time this many times another is clearly longer; less may be noise: on a shared machine medians
/// of one algorithm differ by as much.
const CLEARLY: f64 = 1.1;

/// What one algorithm took.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Measurement {
    /// Of which operation.
    pub operation: Selectable,
    /// Number of ranks.
    pub world: u32,
    /// Bytes of the whole buffer.
    pub bytes: u64,
    /// By which algorithm.
    pub algorithm: Algorithm,
    /// The median time of a call.
    pub seconds: f64,
}

/// Seconds by the algorithm's place in [`Algorithm::ALL`]; infinite where not measured.
type Times = [f64; Algorithm::ALL.len()];

/// What was measured among one number of ranks.
struct World {
    ranks: u32,
    /// In ascending order.
    sizes: Vec<(u64, Times)>,
}

/// Neighbouring sizes with one algorithm.
struct Run {
    /// The last of its sizes, by index.
    last: usize,
    algorithm: Algorithm,
}

impl Selection {
    /// The table that measurements ask for. The ring, which only fast sums may take, stands before
    /// the rule of all others where it is clearly faster than that.
    ///
    /// # Errors
    /// [`SelectionError::Length`] for more numbers of ranks than a table can tell apart.
    pub fn tuned(measured: &[Measurement]) -> Result<Self, SelectionError> {
        let default = Self::default();
        let mut rules = Vec::new();
        for operation in [Selectable::AllReduce, Selectable::ReduceLanes] {
            let worlds = worlds(measured, operation);
            for (group, runs) in groups(&worlds) {
                rules.extend(group_rules(operation, group, &runs));
            }
            rules.extend(default.rules().iter().filter(|rule| rule.operation == operation));
        }
        Self::new(rules)
    }
}

/// One operation's measurements by number of ranks and size. What only the ring was measured for
/// says nothing about the others and is left out.
fn worlds(measured: &[Measurement], operation: Selectable) -> Vec<World> {
    let mut worlds: BTreeMap<u32, BTreeMap<u64, Times>> = BTreeMap::new();
    for one in measured.iter().filter(|one| one.operation == operation) {
        let times = worlds.entry(one.world).or_default().entry(one.bytes);
        times.or_insert([f64::INFINITY; Algorithm::ALL.len()])[one.algorithm as usize] =
            one.seconds;
    }
    let sizes = |sizes: BTreeMap<u64, Times>| -> Vec<(u64, Times)> {
        sizes.into_iter().filter(|(_, times)| fastest(times).is_finite()).collect()
    };
    let worlds = worlds.into_iter().map(|(ranks, of)| World { ranks, sizes: sizes(of) });
    worlds.filter(|world| !world.sizes.is_empty()).collect()
}

/// The algorithms that any sum may take.
fn deterministic() -> impl Iterator<Item = Algorithm> {
    Algorithm::ALL.into_iter().filter(|algorithm| *algorithm != Algorithm::Ring)
}

fn fastest(times: &Times) -> f64 {
    deterministic().map(|algorithm| times[algorithm as usize]).fold(f64::INFINITY, f64::min)
}

/// Neighbouring numbers of ranks that need together no more runs than one of them alone.
fn groups(worlds: &[World]) -> Vec<(&[World], Vec<Run>)> {
    let mut found: Vec<(std::ops::Range<usize>, Vec<Run>)> = Vec::new();
    for index in 0..worlds.len() {
        let alone = runs(&worlds[index..=index]).unwrap_or_default();
        if let Some((range, before)) = found.last_mut()
            && let Some(together) = runs(&worlds[range.start..=index])
            && together.len() <= before.len().max(alone.len())
        {
            (*range, *before) = (range.start..index + 1, together);
        } else {
            found.push((index..index + 1, alone));
        }
    }
    found.into_iter().map(|(range, runs)| (&worlds[range], runs)).collect()
}

/// The fewest runs in which no world is clearly slower than it could be; none if there are no such.
/// Of algorithms that reach as far, the one that is faster there on the whole.
fn runs(worlds: &[World]) -> Option<Vec<Run>> {
    let sizes = || worlds.iter().map(|world| world.sizes.iter().map(|(bytes, _)| bytes));
    let (first, mut others) = (sizes().next()?, sizes().skip(1));
    if !others.all(|other| other.eq(first.clone())) {
        return None;
    }
    let len = first.len();
    let slowdown = |size: usize, algorithm: Algorithm| {
        let of = |world: &World| {
            let times = &world.sizes[size].1;
            times[algorithm as usize] / fastest(times)
        };
        worlds.iter().map(of).fold(1.0, f64::max)
    };
    let mut runs: Vec<Run> = Vec::new();
    let mut start = 0;
    while start < len {
        let reach = |algorithm: Algorithm| {
            let near = (start..len).map(|size| slowdown(size, algorithm));
            let near: Vec<f64> = near.take_while(|slowdown| *slowdown <= CLEARLY).collect();
            (near.len(), -near.iter().map(|slowdown| slowdown.ln()).sum::<f64>(), algorithm)
        };
        let further = |a: &(usize, f64, Algorithm), b: &(usize, f64, Algorithm)| {
            a.0.cmp(&b.0).then(a.1.total_cmp(&b.1))
        };
        let (sizes, _, algorithm) = deterministic().map(reach).max_by(further)?;
        if sizes == 0 {
            return None;
        }
        start += sizes;
        runs.push(Run { last: start - 1, algorithm });
    }
    Some(runs)
}

/// The rules of worlds that share their runs. A rule holds up to a size, the last one for all.
fn group_rules(operation: Selectable, worlds: &[World], runs: &[Run]) -> Vec<Rule> {
    let (Some(first), Some(last)) = (worlds.first(), worlds.last()) else { return Vec::new() };
    let choices: Vec<(Algorithm, bool)> = (0..first.sizes.len())
        .filter_map(|size| {
            let run = runs.iter().find(|run| size <= run.last)?;
            Some((run.algorithm, is_ring_faster(worlds, size, run.algorithm)))
        })
        .collect();
    let mut rules = Vec::new();
    for (size, (algorithm, ring)) in choices.iter().enumerate() {
        let next = choices.get(size + 1);
        // Halfway to the next size, as sizes go.
        let bytes_max = first.sizes.get(size + 1).map(|(above, _)| {
            let below = first.sizes[size].0;
            (below as f64 * *above as f64).sqrt() as u64
        });
        let mut rule = |algorithm| {
            let (world_min, world_max) = (first.ranks, Some(last.ranks));
            rules.push(Rule { operation, world_min, world_max, bytes_max, algorithm });
        };
        if *ring && next != Some(&(*algorithm, true)) {
            rule(Algorithm::Ring);
        }
        // A ring that begins at the next size would reach down to here.
        if next.is_none_or(|(other, then)| other != algorithm || (*then && !ring)) {
            rule(*algorithm);
        }
    }
    rules
}

fn is_ring_faster(worlds: &[World], size: usize, than: Algorithm) -> bool {
    let faster = |world: &World| {
        let times = &world.sizes[size].1;
        times[Algorithm::Ring as usize] * CLEARLY < times[than as usize]
    };
    worlds.iter().all(faster)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::communicator::Reduction;
    use crate::selection::Question;
    use Algorithm::{Direct, HalvingDoubling, RecursiveDoubling, Ring, Scatter};

    const KIB: u64 = 1 << 10;

    /// Of all-reduces: microseconds by algorithm at 1, 4, 16 … KiB.
    fn measured(world: u32, times: &[(Algorithm, &[f64])]) -> Vec<Measurement> {
        let of = |(algorithm, times): &(Algorithm, &[f64])| {
            let algorithm = *algorithm;
            let one = move |(index, time): (usize, &f64)| Measurement {
                operation: Selectable::AllReduce,
                world,
                bytes: KIB << (2 * index),
                algorithm,
                seconds: time * 1e-6,
            };
            times.iter().enumerate().map(one).collect::<Vec<_>>()
        };
        times.iter().flat_map(of).collect()
    }

    /// What was learned, without the default table's rules: "2–4 ≤8192 direct".
    fn learned(measured: &[Measurement]) -> Vec<String> {
        let table = Selection::tuned(measured).unwrap();
        let shown = |rule: &Rule| {
            let sizes = rule.bytes_max.map_or("any".to_owned(), |most| format!("≤{most}"));
            format!("{}–{} {sizes} {}", rule.world_min, rule.world_max.unwrap(), rule.algorithm)
        };
        table.rules().iter().filter(|rule| rule.world_min > 1).map(shown).collect()
    }

    #[test]
    fn algorithms_change_between_the_sizes_where_another_is_faster() {
        let measured = measured(
            4,
            &[(Direct, &[10.0, 12.0, 40.0, 200.0]), (Scatter, &[20.0, 20.0, 25.0, 60.0])],
        );
        assert_eq!(learned(&measured), ["4–4 ≤8192 direct", "4–4 any scatter"]);
    }

    #[test]
    fn noise_makes_no_rules_and_a_clear_win_does() {
        let quiet = [(Direct, &[10.0, 10.4, 10.0, 10.3][..]), (Scatter, &[10.4, 10.0, 10.2, 10.0])];
        assert_eq!(learned(&measured(2, &quiet)), ["2–2 any scatter"]);
        let clear = [(Direct, &[10.0, 10.0, 10.0, 10.0][..]), (Scatter, &[12.0, 8.0, 12.0, 12.0])];
        assert_eq!(
            learned(&measured(2, &clear)),
            ["2–2 ≤2048 direct", "2–2 ≤8192 scatter", "2–2 any direct"]
        );
    }

    #[test]
    fn numbers_of_ranks_that_agree_share_a_rule() {
        let of = |world, low: f64| {
            measured(world, &[(Direct, &[low, 90.0]), (RecursiveDoubling, &[9.0, 30.0])])
        };
        let agree = [of(2, 8.8), of(4, 9.3)].concat();
        assert_eq!(learned(&agree), ["2–4 any recursive_doubling"]);
        let differ = [of(2, 4.0), of(4, 12.0)].concat();
        assert_eq!(
            learned(&differ),
            ["2–2 ≤2048 direct", "2–2 any recursive_doubling", "4–4 any recursive_doubling"]
        );
        // Three ranks do not combine by pairs.
        let three = [of(2, 9.0), measured(3, &[(Direct, &[9.0, 90.0])]), of(4, 9.0)].concat();
        assert_eq!(
            learned(&three),
            ["2–2 any recursive_doubling", "3–3 any direct", "4–4 any recursive_doubling"]
        );
    }

    #[test]
    fn a_ring_stands_before_the_rule_of_sums_that_keep_their_order() {
        let times = [(Scatter, &[10.0, 20.0, 40.0][..]), (Ring, &[30.0, 19.5, 30.0])];
        let measured = measured(4, &times);
        assert_eq!(
            learned(&measured),
            ["4–4 ≤8192 scatter", "4–4 any ring", "4–4 any scatter"],
            "19.5 beside 20 is noise"
        );
        assert!(learned(&measured[3..]).is_empty(), "a ring alone says nothing");
    }

    #[test]
    fn what_was_not_measured_stays_as_it_was() {
        let table = Selection::tuned(&measured(4, &[(Scatter, &[1.0])])).unwrap();
        let question = |world, operation| Question {
            operation,
            world,
            bytes: 4096,
            pairs: false,
            reduction: Reduction::Deterministic,
        };
        assert_eq!(table.choose(question(4, Selectable::AllReduce)), Scatter);
        for world in [2, 3, 5, 8] {
            assert_eq!(table.choose(question(world, Selectable::AllReduce)), Direct);
        }
        assert_eq!(table.choose(question(4, Selectable::ReduceLanes)), Direct);
        assert_eq!(Selection::tuned(&[]).unwrap(), Selection::default());
    }

    #[test]
    fn no_choice_is_clearly_slower_than_the_fastest() {
        let mut state = 1u64;
        let mut random = move || {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            1.0 + (state >> 40) as f64 / (1 << 24) as f64 / 5.0
        };
        for _ in 0..200 {
            let mut all = Vec::new();
            for world in [2, 3, 4, 8] {
                for algorithm in Algorithm::ALL {
                    if algorithm.is_by_pairs() && world == 3 {
                        continue;
                    }
                    let times: Vec<f64> = (0..6).map(|_| random()).collect();
                    all.extend(measured(world, &[(algorithm, &times)]));
                }
            }
            let table = Selection::tuned(&all).unwrap();
            for Measurement { operation, world, bytes, .. } in all.clone() {
                let cell = |one: &&Measurement| (one.world, one.bytes) == (world, bytes);
                for reduction in [Reduction::Deterministic, Reduction::Fast] {
                    let pairs = world != 3;
                    let bytes = bytes as usize;
                    let chosen =
                        table.choose(Question { operation, world, bytes, pairs, reduction });
                    let time = |algorithm| {
                        let of = |one: &&Measurement| one.algorithm == algorithm;
                        all.iter().filter(cell).find(of).map_or(f64::INFINITY, |one| one.seconds)
                    };
                    let best = deterministic().map(time).fold(f64::INFINITY, f64::min);
                    assert!(time(chosen) <= best * CLEARLY * 1.000_001, "{chosen} {table:?}");
                }
            }
        }
    }

    #[test]
    fn halving_may_be_chosen_for_large_buffers() {
        let times = [(Scatter, &[10.0, 20.0][..]), (HalvingDoubling, &[14.0, 15.0])];
        assert_eq!(
            learned(&measured(8, &times)),
            ["8–8 ≤2048 scatter", "8–8 any halving_doubling"]
        );
    }
}
