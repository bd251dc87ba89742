//! What a job's rank-time cost, by the market of the workers that it ran on.
//!
//! Kept in the job's record beside its goodput and written with it, so that it goes on through
//! changes of leader. Every rank of a gang counts from its placement to the end of its generation;
//! spares and the idle slots of a host do not.

use serde::{Deserialize, Serialize};

use crate::price::{Market, SlotRate};

const MS_PER_HOUR: f64 = 3_600_000.0;

/// What the ranks on workers of one market used.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct MarketCost {
    /// Rank-milliseconds: one rank for one millisecond.
    pub rank_ms: u64,
    /// Those of them on workers that announced their prices.
    pub priced_ms: u64,
    /// What was paid for the latter.
    pub paid: f64,
    /// What they would have cost on demand.
    pub on_demand: f64,
}

impl MarketCost {
    fn plus(self, other: Self) -> Self {
        Self {
            rank_ms: self.rank_ms.saturating_add(other.rank_ms),
            priced_ms: self.priced_ms.saturating_add(other.priced_ms),
            paid: self.paid + other.paid,
            on_demand: self.on_demand + other.on_demand,
        }
    }
}

/// What a job used over its life, up to the last write of its record.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Cost {
    /// On spot workers.
    pub spot: MarketCost,
    /// On on-demand workers.
    pub on_demand: MarketCost,
}

impl Cost {
    /// Adds a rank's time on a slot of that rate.
    pub fn charge(&mut self, rate: &SlotRate, rank_ms: u64) {
        let entry = match rate.market {
            Market::Spot => &mut self.spot,
            Market::OnDemand => &mut self.on_demand,
        };
        let mut used = MarketCost { rank_ms, ..MarketCost::default() };
        if let Some(prices) = &rate.prices {
            let hours = rank_ms as f64 / MS_PER_HOUR;
            used.priced_ms = rank_ms;
            used.paid = prices.paid * hours;
            used.on_demand = prices.on_demand * hours;
        }
        *entry = entry.plus(used);
    }

    /// Both markets together.
    pub fn total(&self) -> MarketCost {
        self.spot.plus(self.on_demand)
    }

    /// Rank-milliseconds whose price is not known.
    pub fn unpriced_ms(&self) -> u64 {
        let total = self.total();
        total.rank_ms.saturating_sub(total.priced_ms)
    }

    /// The part of the on-demand price that was saved, negative where more was paid; none where no
    /// price is known.
    pub fn saved_fraction(&self) -> Option<f64> {
        let total = self.total();
        (total.on_demand > 0.0).then(|| 1.0 - total.paid / total.on_demand)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::price::Prices;

    #[test]
    fn what_has_no_price_counts_as_time_only() {
        let mut cost = Cost::default();
        let prices = Some(Prices { paid: 0.3, on_demand: 1.2 });
        cost.charge(&SlotRate { market: Market::Spot, prices }, 7_200_000);
        cost.charge(&SlotRate::default(), 1_000);
        let total = cost.total();
        assert_eq!((total.rank_ms, cost.unpriced_ms()), (7_201_000, 1_000));
        assert!((total.paid - 0.6).abs() < 1e-12 && (total.on_demand - 2.4).abs() < 1e-12);
        assert!((cost.saved_fraction().expect("priced") - 0.75).abs() < 1e-12);
        assert_eq!((cost.spot.rank_ms, cost.on_demand.rank_ms), (7_200_000, 1_000));
        assert_eq!(Cost::default().saved_fraction(), None);
    }
}
