//! What a job's rank-time cost, as people and programs see it.

use api::cost::Cost;
use api::records::{Goodput, JobStatus};
use serde_json::json;

use crate::output;

/// Rank-milliseconds that made no progress.
fn lost_ms(book: &Goodput) -> u64 {
    book.lost_ms + book.recovery_ms
}

/// The totals, in rank-seconds and in the currency of the workers' prices.
pub fn document(status: &JobStatus) -> serde_json::Value {
    let (cost, total) = (&status.cost, status.cost.total());
    let seconds = |milliseconds: u64| milliseconds as f64 / 1e3;
    let is_priced = total.priced_ms > 0;
    json!({
        "rank_seconds": seconds(total.rank_ms),
        "spot_rank_seconds": seconds(cost.spot.rank_ms),
        "on_demand_rank_seconds": seconds(cost.on_demand.rank_ms),
        "lost_rank_seconds": seconds(lost_ms(&status.goodput)),
        "unpriced_rank_seconds": seconds(cost.unpriced_ms()),
        "paid": is_priced.then_some(total.paid),
        "on_demand_price": is_priced.then_some(total.on_demand),
        "saved": is_priced.then_some(total.on_demand - total.paid),
        "saved_percent": cost.saved_fraction().map(|part| part * 100.0),
    })
}

/// One line of time and, where prices are known, one of money.
pub fn show(status: &JobStatus) {
    for line in lines(&status.cost, &status.goodput) {
        output::line(&line);
    }
}

fn lines(cost: &Cost, book: &Goodput) -> Vec<String> {
    let total = cost.total();
    if total.rank_ms == 0 {
        return Vec::new();
    }
    let seconds = |milliseconds: u64| milliseconds as f64 / 1e3;
    let mut lines = vec![format!(
        "cost                 {:.1} rank-seconds: {:.1} on spot workers, {:.1} on on-demand ones; \
         {:.1} lost (recovery, lost work)",
        seconds(total.rank_ms),
        seconds(cost.spot.rank_ms),
        seconds(cost.on_demand.rank_ms),
        seconds(lost_ms(book)),
    )];
    if total.priced_ms > 0 {
        let saved = cost.saved_fraction().map_or_else(String::new, |part| {
            format!(": {} saved, {:.1} %", amount(total.on_demand - total.paid), part * 100.0)
        });
        let without = match cost.unpriced_ms() {
            0 => String::new(),
            unpriced => {
                format!("; {:.1} rank-seconds have no price and are not in it", seconds(unpriced))
            }
        };
        lines.push(format!(
            "  paid {}, on demand it would have been {}{saved}{without}",
            amount(total.paid),
            amount(total.on_demand),
        ));
    }
    lines
}

/// Cents where they say something, more digits for what is less.
fn amount(value: f64) -> String {
    if value == 0.0 || value.abs() >= 1.0 { format!("{value:.2}") } else { format!("{value:.6}") }
}

#[cfg(test)]
mod tests {
    use super::*;
    use api::price::{Market, Prices, SlotRate};

    #[test]
    fn the_lines_say_what_has_no_price() {
        let mut cost = Cost::default();
        assert!(lines(&cost, &Goodput::default()).is_empty());
        cost.charge(&SlotRate::default(), 1_500);
        let book = Goodput { lost_ms: 200, recovery_ms: 300, ..Goodput::default() };
        assert_eq!(
            lines(&cost, &book),
            ["cost                 1.5 rank-seconds: 0.0 on spot workers, 1.5 on on-demand \
                 ones; 0.5 lost (recovery, lost work)"]
        );
        let prices = Some(Prices { paid: 3.0, on_demand: 12.0 });
        cost.charge(&SlotRate { market: Market::Spot, prices }, 3_600_000);
        assert_eq!(
            lines(&cost, &book)[1],
            "  paid 3.00, on demand it would have been 12.00: 9.00 saved, 75.0 %; 1.5 \
             rank-seconds have no price and are not in it"
        );
    }
}
