//! What a host costs: its market and its prices, as its worker announces them.
//!
//! Prices are per hour of the whole host, as a provider's bill has them, in whatever currency the
//! cluster's owner counts: nothing converts them. A slot costs its part of the host.

use std::fmt;

use serde::{Deserialize, Serialize};

/// How a host was got.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Market {
    /// It stays until its owner gives it back.
    #[default]
    OnDemand,
    /// Its provider may take it back at any time.
    Spot,
}

impl fmt::Display for Market {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::OnDemand => "on-demand",
            Self::Spot => "spot",
        })
    }
}

/// A host's market, and its prices where its worker knows them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct HostPrice {
    /// How it was got.
    pub market: Market,
    /// What is paid for an hour of the host; absent: not known.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub price: Option<f64>,
    /// What an hour of such a host costs on demand; absent: what is paid, on an on-demand host.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub on_demand: Option<f64>,
}

impl HostPrice {
    /// What one of its `slots` costs. A price that is no amount is taken for not known.
    pub fn per_slot(&self, slots: u32) -> SlotRate {
        let is_amount = |price: &f64| price.is_finite() && *price >= 0.0;
        let on_demand = self.on_demand.or(match self.market {
            Market::OnDemand => self.price,
            Market::Spot => None,
        });
        let both = self.price.filter(is_amount).zip(on_demand.filter(is_amount));
        let part = f64::from(slots.max(1));
        let prices =
            both.map(|(paid, on_demand)| Prices { paid: paid / part, on_demand: on_demand / part });
        SlotRate { market: self.market, prices }
    }
}

/// What a slot costs.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct SlotRate {
    /// How its host was got.
    pub market: Market,
    /// Absent: not known.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub prices: Option<Prices>,
}

/// Prices of an hour.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Prices {
    /// What is paid.
    pub paid: f64,
    /// What the same costs on demand.
    pub on_demand: f64,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_slot_costs_its_part_of_the_host() {
        let spot = HostPrice { market: Market::Spot, price: Some(1.0), on_demand: Some(4.0) };
        let prices = spot.per_slot(4).prices;
        assert_eq!(prices, Some(Prices { paid: 0.25, on_demand: 1.0 }));
        let plain = HostPrice { price: Some(4.0), ..HostPrice::default() };
        assert_eq!(plain.per_slot(2).prices, Some(Prices { paid: 2.0, on_demand: 2.0 }));
        for unknown in [
            HostPrice::default(),
            HostPrice { on_demand: None, ..spot },
            HostPrice { price: Some(-1.0), ..spot },
            HostPrice { on_demand: Some(f64::NAN), ..spot },
        ] {
            assert_eq!(unknown.per_slot(4).prices, None, "{unknown:?}");
        }
    }
}
