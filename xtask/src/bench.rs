//! `cargo xtask bench`: Outboard beside the distribution's QEMU in the same lab session.

mod dma;

use crate::lab::{self, Sample};
use crate::paths::Paths;
use anyhow::{Context, Result};
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
    /// An NVMe disk of the host in the guest: throughput, interrupts, registers
    Passthrough {
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

/// A benchmark: a case of the lab, and what it measures.
struct Benchmark {
    case: &'static str,
    /// Name, unit; each also a ratio, Outboard over QEMU.
    metrics: &'static [(&'static str, &'static str)],
    /// Name of a ratio of two more metrics within Outboard: the first over the second, with their unit.
    within: &'static [(&'static str, [&'static str; 2], &'static str)],
}

const BOOT: Benchmark = Benchmark {
    case: "bench-boot",
    metrics: &[
        ("time_to_init", "ms"),
        ("extra_memory", "MiB"),
        ("mmio_round_trip", "ns"),
        ("blk_rand_read_4k", "reads/s"),
        ("blk_seq_read_128k", "MiB/s"),
        ("net_throughput", "MiB/s"),
    ],
    within: &[],
};

const PASSTHROUGH: Benchmark = Benchmark {
    case: "bench-passthrough",
    metrics: &[("nvme_rand_read_4k", "reads/s"), ("nvme_seq_read_128k", "MiB/s"), ("irq_round_trip", "ns")],
    within: &[("bar_mapped_speedup", ["bar_read_trapped", "bar_read_mapped"], "ns")],
};

/// The form that every benchmark of the project writes.
#[derive(Serialize)]
struct Results {
    ratios: BTreeMap<&'static str, f64>,
    medians: BTreeMap<&'static str, Medians>,
}

#[derive(Clone, Copy, Serialize)]
struct Medians {
    outboard: f64,
    /// None where there is nothing to compare with.
    #[serde(skip_serializing_if = "Option::is_none")]
    qemu: Option<f64>,
}

/// Runs the benchmark and prints its results.
pub fn run(paths: &Paths, options: &Options) -> Result<bool> {
    let (benchmark, json) = match &options.what {
        What::Boot { json } => (BOOT, json),
        What::Passthrough { json } => (PASSTHROUGH, json),
        What::Dma { json } => return dma::run(paths, json.as_deref()),
    };
    let samples = lab::samples(paths, benchmark.case)?;
    let results = evaluate(&benchmark, &samples)?;
    println!("{:<20} {:>12} {:>12} {:>8}", "median of 5", "Outboard", "QEMU", "ratio");
    for (name, unit) in benchmark.metrics {
        let Medians { outboard, qemu } = results.medians[name];
        let qemu = qemu.unwrap_or(f64::NAN);
        println!("{name:<20} {outboard:>12.2} {qemu:>12.2} {:>8.3}  {unit}", results.ratios[name]);
    }
    for (ratio, metrics, unit) in benchmark.within {
        for name in metrics {
            println!("{name:<20} {:>12.2} {:>12} {:>8}  {unit}", results.medians[name].outboard, "", "");
        }
        println!("{ratio:<20} {:>12} {:>12} {:>8.3}", "", "", results.ratios[ratio]);
    }
    write(&results, json.as_deref())?;
    Ok(true)
}

fn evaluate(benchmark: &Benchmark, samples: &[Sample]) -> Result<Results> {
    let mut results = Results { ratios: BTreeMap::new(), medians: BTreeMap::new() };
    let of = |name: &str, vmm| {
        let mine = samples.iter().filter(|sample| sample.metric == name && sample.vmm == vmm);
        median(mine.map(|sample| sample.value).collect())
            .with_context(|| format!("the benchmark brought no value for {name}"))
    };
    for (name, _) in benchmark.metrics {
        let (outboard, qemu) = (of(name, Vmm::Outboard)?, of(name, Vmm::Qemu)?);
        results.medians.insert(name, Medians { outboard, qemu: Some(qemu) });
        results.ratios.insert(name, outboard / qemu);
    }
    for (ratio, [over, under], _) in benchmark.within {
        for name in [over, under] {
            let outboard = of(name, Vmm::Outboard)?;
            results.medians.insert(name, Medians { outboard, qemu: None });
        }
        results.ratios.insert(ratio, results.medians[over].outboard / results.medians[under].outboard);
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
        for (metric, _) in BOOT.metrics {
            for (vmm, value) in [(Vmm::Outboard, 5.0), (Vmm::Qemu, 10.0)] {
                samples.push(Sample { metric: (*metric).into(), vmm, value });
            }
        }
        let results = evaluate(&BOOT, &samples).expect("all there");
        assert!(results.ratios.values().all(|ratio| *ratio == 0.5));
        samples.retain(|sample| sample.metric != "net_throughput");
        assert!(evaluate(&BOOT, &samples).is_err());
    }

    #[test]
    fn a_ratio_within_outboard_needs_no_qemu() {
        let sample = |metric: &str, vmm, value| Sample { metric: metric.into(), vmm, value };
        let mut samples = vec![
            sample("bar_read_trapped", Vmm::Outboard, 3000.0),
            sample("bar_read_mapped", Vmm::Outboard, 100.0),
        ];
        for (metric, _) in PASSTHROUGH.metrics {
            samples.extend([Vmm::Outboard, Vmm::Qemu].map(|vmm| sample(metric, vmm, 1.0)));
        }
        let results = evaluate(&PASSTHROUGH, &samples).expect("all there");
        assert_eq!(results.ratios["bar_mapped_speedup"], 30.0);
        assert_eq!(results.ratios["irq_round_trip"], 1.0);
        assert!(!serde_json::to_string(&results.medians["bar_read_mapped"]).expect("plain").contains("qemu"));
    }
}
