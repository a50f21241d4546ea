//! `cargo xtask bench dma`: what a DMA mapping costs in the guest, through the module and through the published scheme.

use super::{median, write};
use crate::lab;
use crate::paths::Paths;
use anyhow::{Context, Result};
use serde::Serialize;
use serde_json::Value;
use std::collections::BTreeMap;
use std::path::Path;

/// Numbers of live mappings that are measured.
const LIVE: [u32; 3] = [100, 10_000, 50_000];

#[derive(Serialize)]
struct Results {
    ratios: BTreeMap<&'static str, f64>,
    medians: BTreeMap<String, Medians>,
}

#[derive(Clone, Copy, Serialize)]
struct Medians {
    outboard: f64,
    published: f64,
}

pub(super) fn run(paths: &Paths, json: Option<&Path>) -> Result<bool> {
    let results = evaluate(&lab::facts(paths, "bench-dma")?)?;
    println!("{:<28} {:>12} {:>12}", "median", "Outboard", "published");
    for (name, Medians { outboard, published }) in &results.medians {
        println!("{name:<28} {outboard:>12.2} {published:>12.2}");
    }
    for (name, ratio) in &results.ratios {
        println!("{name:<28} {ratio:>12.3}");
    }
    write(&results, json)?;
    Ok(true)
}

fn evaluate(facts: &BTreeMap<String, Value>) -> Result<Results> {
    let value = |key: &str| -> Result<f64> {
        let fact = facts.get(key).with_context(|| format!("the benchmark brought no {key}"))?;
        let numbers = fact
            .as_array()
            .map_or_else(|| vec![fact.as_f64()], |all| all.iter().map(Value::as_f64).collect());
        median(numbers.into_iter().flatten().collect()).with_context(|| format!("{key} is no measurement"))
    };
    let both = |key: &str| -> Result<Medians> {
        Ok(Medians {
            outboard: value(&format!("ours-{key}"))?,
            published: value(&format!("published-{key}"))?,
        })
    };
    let mut medians = BTreeMap::new();
    for live in LIVE {
        medians.insert(format!("map_unmap_ns_{live}_live"), both(&live.to_string())?);
    }
    let (few, most, exits) = (both("100")?, both("50000")?, both("exits")?);
    medians.insert("exits_per_1000_segments".to_owned(), exits);
    let ratios = BTreeMap::from([
        ("map_unmap_50k_speedup", most.published / most.outboard),
        ("map_unmap_flatness", most.outboard / few.outboard),
        ("exits_per_segment", exits.outboard / exits.published),
    ]);
    Ok(Results { ratios, medians })
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn ratios_are_those_of_the_issue() {
        let mut facts = BTreeMap::new();
        for (key, value) in [
            ("ours-100", json!([10, 11, 12])),
            ("ours-10000", json!([11])),
            ("ours-50000", json!([12, 13, 14])),
            ("published-100", json!([20])),
            ("published-10000", json!([300])),
            ("published-50000", json!([2600])),
            ("ours-exits", json!(1.5)),
            ("published-exits", json!(6.0)),
        ] {
            facts.insert(key.to_owned(), value);
        }
        let results = evaluate(&facts).expect("all there");
        assert_eq!(results.ratios["map_unmap_50k_speedup"], 200.0);
        assert_eq!(results.ratios["map_unmap_flatness"], 13.0 / 11.0);
        assert_eq!(results.ratios["exits_per_segment"], 0.25);
        facts.remove("ours-exits");
        assert!(evaluate(&facts).is_err());
    }
}
