//! What has to be true after a load test, judged from what the clients have seen.

use std::collections::{BTreeMap, BTreeSet};

use serde::Serialize;

use super::streams::Received;
use crate::trader::ListedTrade;

/// What answers to a trader's orders have acknowledged.
#[derive(Clone, Debug, Default)]
pub(crate) struct Acknowledged {
    /// The orders that were placed.
    pub(crate) orders: BTreeSet<String>,
    /// What they traded on arrival. What they trade later is told to whoever came then.
    pub(crate) trades: Vec<String>,
}

/// What one trader knows when all is over.
#[derive(Clone, Debug, Default)]
pub(crate) struct TraderEvidence {
    /// What answers have acknowledged, those of orders included that were asked for again.
    pub(crate) acknowledged: Acknowledged,
    /// The trader's list of trades.
    pub(crate) listed: Vec<ListedTrade>,
    /// The trades that the trader was notified of.
    pub(crate) notified: Vec<String>,
    /// What came over the trader's event streams, in the order in which it came, if there were any.
    pub(crate) streamed: Option<Vec<Received>>,
    /// Currencies in which a balance or a hold is below zero, or a hold above its balance.
    pub(crate) impossible_balances: Vec<String>,
}

/// Everything that is judged.
#[derive(Clone, Debug, Default)]
pub(crate) struct Evidence {
    pub(crate) traders: Vec<TraderEvidence>,
    /// Orders whose fate is not known, even after asking again.
    pub(crate) unresolved: Vec<String>,
    /// What the ledger's own audit has found, if it was asked.
    pub(crate) ledger: Option<Vec<String>>,
    /// Why there is no more evidence than this, if there should be.
    pub(crate) incomplete: Option<String>,
}

/// The verdict.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub(crate) struct Audit {
    /// Different trades seen.
    pub(crate) trades: usize,
    /// Trades acknowledged by answers.
    pub(crate) acknowledged: usize,
    /// Whether the ledger's own audit was asked: sums and balances of everybody.
    pub(crate) ledger_checked: bool,
    /// What is wrong. Nothing is the only good answer.
    pub(crate) findings: Vec<String>,
}

/// Judges. All traders of the lane may be ours, or not: a trade has at most two sides among them.
pub(crate) fn judge(evidence: &Evidence) -> Audit {
    let mut findings = Vec::new();
    let mut sides: BTreeMap<&str, usize> = BTreeMap::new();
    let mut acknowledged = 0;
    for (number, trader) in evidence.traders.iter().enumerate() {
        let listed = counts(trader.listed.iter().map(|trade| &trade.trade_id));
        for (trade, times) in &listed {
            *sides.entry(trade).or_default() += 1;
            if *times > 1 {
                findings.push(format!(
                    "trade {trade} is {times} times in the list of trader {number}"
                ));
            }
        }
        let told = counts(&trader.acknowledged.trades);
        for (&trade, &times) in &told {
            acknowledged += 1;
            if !listed.contains_key(trade) {
                findings.push(format!(
                    "trade {trade} was acknowledged to trader {number} and does not exist"
                ));
            }
            if times > 1 {
                findings.push(format!(
                    "trade {trade} was acknowledged {times} times to trader {number}"
                ));
            }
        }
        // An order that was executed twice: as another order that nobody knows, or by trades that no answer names.
        for trade in &trader.listed {
            let ListedTrade {
                trade_id,
                order_id,
                role,
            } = trade;
            if !trader.acknowledged.orders.contains(order_id) {
                findings.push(format!(
                    "trade {trade_id} of trader {number} is of order {order_id}, which was never acknowledged"
                ));
            } else if role == "taker" && !told.contains_key(trade_id.as_str()) {
                findings.push(format!(
                    "trade {trade_id} was made by order {order_id} of trader {number}, and never acknowledged"
                ));
            }
        }
        let notified = counts(&trader.notified);
        for trade in listed.keys() {
            let times = notified.get(trade).copied().unwrap_or_default();
            if times != 1 {
                findings.push(format!(
                    "trader {number} was notified {times} times of trade {trade}"
                ));
            }
        }
        let known: BTreeSet<&str> = listed.keys().copied().collect();
        for trade in notified.keys().filter(|trade| !known.contains(**trade)) {
            findings.push(format!(
                "trader {number} was notified of trade {trade}, which does not exist"
            ));
        }
        for finding in trader
            .streamed
            .iter()
            .flat_map(|streamed| gaps(streamed, &listed))
        {
            findings.push(format!("event stream of trader {number}: {finding}"));
        }
        for currency in &trader.impossible_balances {
            findings.push(format!("trader {number} has an impossible balance in {currency}"));
        }
    }
    for (trade, count) in &sides {
        if *count > 2 {
            findings.push(format!("trade {trade} has {count} sides"));
        }
    }
    findings.extend(
        evidence
            .unresolved
            .iter()
            .map(|order| format!("the fate of order {order} is unknown")),
    );
    findings.extend(
        evidence
            .ledger
            .iter()
            .flatten()
            .map(|problem| format!("ledger: {problem}")),
    );
    findings.extend(
        evidence
            .incomplete
            .iter()
            .map(|reason| format!("the audit could not be completed: {reason}")),
    );
    Audit {
        trades: sides.len(),
        acknowledged,
        ledger_checked: evidence.ledger.is_some(),
        findings,
    }
}

/// Numbers count from 1 without a gap, and every trade is among what came.
fn gaps(streamed: &[Received], listed: &BTreeMap<&str, usize>) -> Vec<String> {
    let order = (1..)
        .zip(streamed)
        .find(|(expected, received)| received.id != *expected);
    let order = order.map(|(expected, received)| format!("{} came instead of {expected}", received.id));
    let came: BTreeSet<&str> = streamed.iter().filter_map(|it| it.trade.as_deref()).collect();
    let missing = listed.keys().filter(|trade| !came.contains(**trade));
    let missing = missing.map(|trade| format!("trade {trade} is missing"));
    order.into_iter().chain(missing).collect()
}

fn counts<'a>(trades: impl IntoIterator<Item = &'a String>) -> BTreeMap<&'a str, usize> {
    let mut counts = BTreeMap::new();
    for trade in trades {
        *counts.entry(trade.as_str()).or_default() += 1;
    }
    counts
}

#[cfg(test)]
mod tests {
    use super::*;

    fn received(id: i64, trade: Option<&str>) -> Received {
        Received {
            id,
            trade: trade.map(str::to_owned),
        }
    }

    fn listed(trade: &str, order: &str, role: &str) -> ListedTrade {
        ListedTrade {
            trade_id: trade.to_owned(),
            order_id: order.to_owned(),
            role: role.to_owned(),
        }
    }

    fn acknowledged(orders: [&str; 2], trade: &str) -> Acknowledged {
        Acknowledged {
            orders: orders.map(str::to_owned).into(),
            trades: vec![trade.to_owned()],
        }
    }

    fn clean() -> Evidence {
        let trader = TraderEvidence {
            acknowledged: acknowledged(["came", "rested"], "1"),
            listed: vec![listed("2", "rested", "maker"), listed("1", "came", "taker")],
            notified: vec!["1".into(), "2".into()],
            streamed: Some(vec![
                received(1, None),
                received(2, Some("2")),
                received(3, Some("1")),
            ]),
            impossible_balances: Vec::new(),
        };
        let other = TraderEvidence {
            acknowledged: acknowledged(["other came", "other rested"], "2"),
            listed: vec![
                listed("2", "other came", "taker"),
                listed("1", "other rested", "maker"),
            ],
            ..trader.clone()
        };
        Evidence {
            traders: vec![trader, other],
            unresolved: Vec::new(),
            ledger: Some(Vec::new()),
            incomplete: None,
        }
    }

    #[test]
    fn a_clean_run_has_no_findings() {
        let audit = judge(&clean());
        assert_eq!(
            audit,
            Audit {
                trades: 2,
                acknowledged: 2,
                ledger_checked: true,
                findings: Vec::new()
            }
        );
    }

    #[test]
    fn each_kind_of_damage_is_found() {
        type Damage = (&'static str, fn(&mut Evidence));
        let damages: [Damage; 16] = [
            ("does not exist", |evidence| {
                evidence.traders[0].acknowledged.trades.push("3".into());
            }),
            ("2 times in the list", |evidence| {
                evidence.traders[0].listed.push(listed("1", "came", "taker"));
            }),
            ("acknowledged 2 times", |evidence| {
                evidence.traders[0].acknowledged.trades.push("1".into());
            }),
            (
                "trade 4 was made by order came of trader 0, and never",
                |evidence| {
                    evidence.traders[0].listed.push(listed("4", "came", "taker"));
                },
            ),
            ("trade 4 of trader 0 is of order twin, which", |evidence| {
                evidence.traders[0].listed.push(listed("4", "twin", "taker"));
            }),
            ("trade 4 of trader 1 is of order twin, which", |evidence| {
                evidence.traders[1].listed.push(listed("4", "twin", "maker"));
            }),
            ("notified 0 times", |evidence| {
                evidence.traders[1].notified.truncate(1);
            }),
            ("notified 2 times", |evidence| {
                evidence.traders[1].notified.push("1".into());
            }),
            ("notified of trade 9", |evidence| {
                evidence.traders[1].notified.push("9".into());
            }),
            ("has 3 sides", |evidence| {
                evidence.traders.push(evidence.traders[0].clone());
            }),
            ("impossible balance in USD", |evidence| {
                evidence.traders[0].impossible_balances.push("USD".into());
            }),
            ("trade 1 is missing", |evidence| {
                evidence.traders[0].streamed.as_mut().unwrap().truncate(2);
            }),
            ("3 came instead of 2", |evidence| {
                evidence.traders[0].streamed.as_mut().unwrap().remove(1);
            }),
            ("3 came instead of 4", |evidence| {
                let streamed = evidence.traders[0].streamed.as_mut().unwrap();
                streamed.push(received(3, Some("1")));
            }),
            ("fate of order a", |evidence| evidence.unresolved.push("a".into())),
            ("be completed: b", |evidence| {
                evidence.incomplete = Some("b".into());
            }),
        ];
        for (expected, damage) in damages {
            let mut evidence = clean();
            damage(&mut evidence);
            let findings = judge(&evidence).findings;
            assert!(
                findings.iter().any(|finding| finding.contains(expected)),
                "{expected} in {findings:?}"
            );
        }
        let mut evidence = clean();
        evidence.ledger = Some(vec!["currency does not sum to zero: USD".into()]);
        assert_eq!(judge(&evidence).findings.len(), 1);
    }
}
