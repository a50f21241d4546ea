//! `cargo xtask bench`: Outboard beside the distribution's QEMU in the same lab session.

mod dma;

use crate::lab::{self, Sample};
use crate::paths::Paths;
use anyhow::{Context, Result, bail};
use clap::{Args, Subcommand};
use lab_cases::protocol::Vmm;
use serde::Serialize;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

/// Options of `cargo xtask bench`.
#[derive(Args)]
pub struct Options {
    #[command(subcommand)]
    what: What,
}

#[derive(Subcommand)]
enum What {
    /// Time to init, memory, MMIO, disk, network
    Boot {
        /// Write ratios and medians as JSON
        #[arg(long, value_name = "FILE")]
        json: Option<PathBuf>,
    },
    /// DMA mappings: the guest's module beside the published scheme
    Dma {
        /// Write ratios and medians as JSON
        #[arg(long, value_name = "FILE")]
        json: Option<PathBuf>,
    },
}

/// Metrics of `bench boot`: name, unit.
const METRICS: [(&str, &str); 6] = [
    ("time_to_init", "ms"),
    ("extra_memory", "MiB"),
    ("mmio_round_trip", "ns"),
    ("blk_rand_read_4k", "reads/s"),
    ("blk_seq_read_128k", "MiB/s"),
    ("net_throughput", "MiB/s"),
];

/// The form that every benchmark of the project writes.
#[derive(Serialize)]
struct Results {
    ratios: BTreeMap<&'static str, f64>,
    medians: BTreeMap<&'static str, Medians>,
}

#[derive(Clone, Copy, Serialize)]
struct Medians {
    outboard: f64,
    qemu: f64,
}

/// Runs the benchmark and prints its results.
pub fn run(paths: &Paths, options: &Options) -> Result<bool> {
    let json = match &options.what {
        What::Boot { json } => json,
        What::Dma { json } => return dma::run(paths, json.as_deref()),
    };
    let samples = lab::samples(paths, "bench-boot")?;
    let results = evaluate(&samples)?;
    println!("{:<20} {:>12} {:>12} {:>8}", "median of 5", "Outboard", "QEMU", "ratio");
    for (name, unit) in METRICS {
        let Medians { outboard, qemu } = results.medians[name];
        println!("{name:<20} {outboard:>12.2} {qemu:>12.2} {:>8.3}  {unit}", results.ratios[name]);
    }
    write(&results, json.as_deref())?;
    Ok(true)
}

fn evaluate(samples: &[Sample]) -> Result<Results> {
    let mut results = Results { ratios: BTreeMap::new(), medians: BTreeMap::new() };
    for (name, _) in METRICS {
        let of = |vmm| {
            let mine = samples.iter().filter(|sample| sample.metric == name && sample.vmm == vmm);
            median(mine.map(|sample| sample.value).collect())
        };
        let (Some(outboard), Some(qemu)) = (of(Vmm::Outboard), of(Vmm::Qemu)) else {
            bail!("the benchmark brought no value for {name}");
        };
        results.medians.insert(name, Medians { outboard, qemu });
        results.ratios.insert(name, outboard / qemu);
    }
    Ok(results)
}

fn write(results: &impl Serialize, file: Option<&Path>) -> Result<()> {
    let Some(file) = file else { return Ok(()) };
    let text = serde_json::to_string_pretty(results)?;
    std::fs::write(file, text + "\n").with_context(|| format!("cannot write {}", file.display()))
}

fn median(mut values: Vec<f64>) -> Option<f64> {
    values.sort_by(f64::total_cmp);
    let middle = values.len() / 2;
    if values.len().is_multiple_of(2) {
        Some((values.get(middle.checked_sub(1)?)? + values[middle]) / 2.0)
    } else {
        values.get(middle).copied()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn medians_and_ratios() {
        assert_eq!(median(vec![]), None);
        assert_eq!(median(vec![3.0, 1.0, 2.0]), Some(2.0));
        assert_eq!(median(vec![4.0, 1.0, 2.0, 3.0]), Some(2.5));
        let mut samples = Vec::new();
        for (metric, _) in METRICS {
            for (vmm, value) in [(Vmm::Outboard, 5.0), (Vmm::Qemu, 10.0)] {
                samples.push(Sample { metric: metric.into(), vmm, value });
            }
        }
        let results = evaluate(&samples).expect("all there");
        assert!(results.ratios.values().all(|ratio| *ratio == 0.5));
        samples.retain(|sample| sample.metric != "net_throughput");
        assert!(evaluate(&samples).is_err());
    }
}
