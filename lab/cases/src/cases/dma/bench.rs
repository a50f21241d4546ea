//! What `cargo xtask bench dma` runs: the module beside a plain reimplementation of the published scheme, in one guest, over the same device's
//! mappings, one after the other (`guest/module/tests/bench.c`).

use super::stress::{NVME_CLASS, RUN, STRESS, bind};
use crate::case::{Case, Group, HOST_OF_DMA};
use crate::guest::Guest;
use crate::guest::dma::{Stats, domains};
use crate::guest::function::GuestFunction;
use crate::host::{Assigned, Host, Kernel, Port};
use anyhow::{Context, Result, ensure};
use serde_json::json;
use std::fs;
use std::time::Duration;

const STEP: Duration = Duration::from_secs(1200);
/// Live mappings, and unmappings with mappings in a round of the published scheme, which takes long where many are live.
const LIVE: [(u32, u32); 3] = [(100, 2_000), (10_000, 2_000), (50_000, 500)];
/// The same in a round of ours: about as long as a round of the other.
const OURS: u32 = 50_000;
/// Times that all of it is measured with ours, little by little, since few and many live mappings are compared with each other: what the
/// machine does beside must not meet only one of them. What is compared with the published scheme differs by far more.
const PASSES: usize = 3;
/// Scatterlists of 256 entries.
const LISTS: u32 = 400;
const ENTRIES: u32 = 256;
const MODES: [&str; 2] = ["published", "ours"];

pub(super) fn cases() -> Vec<Case> {
    vec![Case {
        name: "bench-dma",
        about: "what `cargo xtask bench dma` runs",
        limit_s: 3600,
        host_kernel: HOST_OF_DMA,
        group: Group::Tool,
        host,
        guest,
    }]
}

fn host(host: &Host) -> Result<Option<String>> {
    let assigned = Assigned::bind(&[Port::Nvme])?;
    let mut vm = host.start(&host.guest(Kernel::V6_12).devices(&assigned).cpus(2).memory_mib(2048))?;
    for (live, _) in LIVE {
        for mode in MODES {
            let values = vm.note(&format!("{mode}-{live}"), STEP)?;
            host.log(format!("{live} live, {mode}: {values} ns"));
            host.fact(&format!("{mode}-{live}"), values);
        }
    }
    for mode in MODES {
        let exits = vm.note(&format!("{mode}-exits"), STEP)?;
        host.log(format!("exits for 1,000 entries, {mode}: {exits}"));
        host.fact(&format!("{mode}-exits"), exits);
    }
    vm.finish(STEP)?;
    assigned.release()?;
    Ok(None)
}

fn guest(guest: &mut Guest) -> Result<()> {
    guest.check_dma_myself();
    guest.need(STRESS)?;
    let function = GuestFunction::the(NVME_CLASS)?;
    bind(&function, STRESS)?;
    let mut ours = [const { Vec::new() }; LIVE.len()];
    for _ in 0..PASSES {
        for ((live, _), values) in LIVE.iter().zip(&mut ours) {
            values.extend(churn("ours", *live, OURS)?);
        }
    }
    for ((live, pairs), ours) in LIVE.into_iter().zip(ours) {
        guest.note(&format!("published-{live}"), churn("published", live, pairs)?);
        guest.note(&format!("ours-{live}"), ours);
    }
    for mode in MODES {
        let before = Stats::read(&domains()?[0])?.value("exits")?;
        let report = command(&format!("lists {mode} {LISTS}"))?;
        let exits = if mode == "ours" {
            Stats::read(&domains()?[0])?.value("exits")? - before
        } else {
            i64::try_from(values(&report, "exits").first().copied().context("it counts exits")?)?
        };
        ensure!(exits > 0, "no exit was counted: {report}");
        guest.note(&format!("{mode}-exits"), json!(exits as f64 * 1000.0 / f64::from(LISTS * ENTRIES)));
    }
    let stats = Stats::read(&domains()?[0])?;
    for key in ["failures", "live", "unknown", "lost"] {
        ensure!(stats.value(key)? == 0, "{key}:\n{}", stats.text);
    }
    Ok(())
}

/// Nanoseconds for an unmapping and a mapping, in each of five rounds.
fn churn(mode: &str, live: u32, pairs: u32) -> Result<Vec<u64>> {
    let report = command(&format!("churn {mode} {live} {pairs}"))?;
    let values = values(&report, "ns");
    ensure!(values.len() == 5 && values.iter().all(|ns| *ns > 0), "no measurements: {report}");
    Ok(values)
}

fn command(text: &str) -> Result<String> {
    fs::write(RUN, text).with_context(|| format!("'{text}' failed"))?;
    Ok(fs::read_to_string(RUN)?)
}

fn values(report: &str, key: &str) -> Vec<u64> {
    let lines = report.lines().filter_map(|line| line.strip_prefix(key)?.strip_prefix(' '));
    lines.filter_map(|value| value.parse().ok()).collect()
}
