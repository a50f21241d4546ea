//! `cargo xtask lab`: an emulated arm64 host, Outboard in it, a guest in that.

mod devices;
mod devicetree;
mod formats;
mod images;
mod libraries;
mod modules;
mod monitor;
mod packages;
mod peer;
mod report;
mod session;
mod shell;

pub use report::Counts;

use crate::arm64::Toolchain;
use crate::debian::setup;
use crate::guest_module;
use crate::paths::Paths;
use crate::process::Advise;
use crate::progress;
use images::Extras;
use report::{CaseResult, Progress, Report};
use session::Session;

use anyhow::{Context, Result, anyhow, bail};
use clap::Args;
use lab_cases::Group;
use lab_cases::host::Kernel;
use lab_cases::protocol::{Command, Event, Outcome, Vmm};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

/// The release whose suites the lab uses on every machine: kernels 6.1 and 6.12 both live there.
pub const RELEASE: &str = "bookworm";
/// How much longer than a case's own limit the answer may take.
const GRACE: Duration = Duration::from_secs(60);

/// Options of `cargo xtask lab`.
#[derive(Args, Default)]
pub struct Options {
    /// Stay in the guest: a shell on its console (Ctrl-A x leaves)
    #[arg(long)]
    shell: bool,
    /// Run this case instead of the demonstration (may be given several times)
    #[arg(long = "case", value_name = "NAME")]
    names: Vec<String>,
    /// Run all cases
    #[arg(long)]
    cases: bool,
    /// List the cases
    #[arg(long)]
    list: bool,
    /// Write the report as JSON
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    /// Let the distribution's QEMU run the guests instead of Outboard, to compare
    #[arg(long)]
    peer: bool,
    /// Guests of Linux 6.12 boot the kernel that was built in this folder instead, with its modules: one that checks itself, for instance
    #[arg(long, value_name = "DIR")]
    guest_kernel: Option<PathBuf>,
}

/// Runs it. Whether everything succeeded.
pub fn run(paths: &Paths, options: &Options) -> Result<bool> {
    if options.list {
        for case in lab_cases::all() {
            let tool = if case.group == Group::Tool { " (only by name)" } else { "" };
            println!("{:<18} {}{tool}", case.name, case.about);
        }
        return Ok(true);
    }
    let names = chosen(options)?;
    let start = Instant::now();
    let vmm = if options.peer { Vmm::Qemu } else { Vmm::Outboard };
    let mut progress = Progress::new();
    let mut report = Report::default();
    let result =
        prepare_and_run(paths, &names, vmm, options.guest_kernel.as_deref(), &mut progress, &mut report);
    let result = close(result, paths, &mut progress);
    report.phases = progress.take();
    let counts = report.counts();
    report.ok = result.is_ok() && counts.failed == 0;
    report.error = result.as_ref().err().map(|error| format!("{error:#}"));
    if let Some(file) = &options.json {
        report.write(file)?;
    }
    result?;
    print_summary(&report, start.elapsed());
    if !report.ok {
        println!("The logs are kept in {}", paths.logs().display());
    }
    Ok(report.ok)
}

/// Names of the cases to run.
fn chosen(options: &Options) -> Result<Vec<String>> {
    for name in &options.names {
        if lab_cases::find(name).is_none() {
            bail!("there is no case '{name}'; `cargo xtask lab --list` lists them");
        }
    }
    if options.shell {
        return Ok(vec!["shell".into()]);
    }
    if options.cases {
        return Ok(test_cases());
    }
    if options.names.is_empty() {
        Ok(vec!["demo".into(), "passthrough-nvme".into()])
    } else {
        Ok(options.names.clone())
    }
}

/// Runs all cases and returns how many ended how. Those that ran count even when the lab breaks down in the middle.
pub fn run_all_cases(paths: &Paths) -> Counts {
    let (mut progress, mut report) = (Progress::new(), Report::default());
    let result = prepare_and_run(paths, &test_cases(), Vmm::Outboard, None, &mut progress, &mut report);
    let mut counts = report.counts();
    if let Err(error) = close(result, paths, &mut progress) {
        println!("  FAILED   lab: {error:#}");
        counts.failed += 1;
    }
    counts
}

/// One measurement.
pub struct Sample {
    /// What was measured.
    pub metric: String,
    /// On which monitor.
    pub vmm: Vmm,
    /// In the metric's unit.
    pub value: f64,
}

/// Runs a benchmark case and returns what it measured.
pub fn samples(paths: &Paths, case: &str) -> Result<Vec<Sample>> {
    let (mut progress, mut report) = (Progress::new(), Report::default());
    let names = [case.to_owned()];
    let result = prepare_and_run(paths, &names, Vmm::Outboard, None, &mut progress, &mut report);
    close(result, paths, &mut progress)?;
    if let Some(CaseResult { outcome: Outcome::Failed(reason), .. }) = report.cases.pop() {
        bail!("{reason}");
    }
    Ok(report.samples)
}

/// Runs a case by itself and returns the facts that it found.
pub fn facts(paths: &Paths, case: &str) -> Result<BTreeMap<String, serde_json::Value>> {
    let (mut progress, mut report) = (Progress::new(), Report::default());
    let result = prepare_and_run(paths, &[case.to_owned()], Vmm::Outboard, None, &mut progress, &mut report);
    close(result, paths, &mut progress)?;
    if let Some(CaseResult { outcome: Outcome::Failed(reason), .. }) = report.cases.pop() {
        bail!("{reason}");
    }
    Ok(report.facts)
}

/// The end of a run: an error is followed by the phase that it came from and the place of the logs.
fn close(result: Result<()>, paths: &Paths, progress: &mut Progress) -> Result<()> {
    // In every case, so that nothing moves on the terminal any more.
    let phase = progress.forget();
    result.advise(|| {
        let phase = phase.map_or_else(String::new, |name| format!("It failed in phase '{name}'. "));
        format!("{phase}The logs are kept in {}", paths.logs().display())
    })
}

/// Names of the cases that `--cases` runs.
fn test_cases() -> Vec<String> {
    lab_cases::all()
        .iter()
        .filter(|case| case.group == Group::Test)
        .map(|case| case.name.to_owned())
        .collect()
}

fn prepare_and_run(
    paths: &Paths,
    names: &[String],
    vmm: Vmm,
    own_kernel: Option<&Path>,
    progress: &mut Progress,
    report: &mut Report,
) -> Result<()> {
    let extras = Extras { peer: needs_peer(names, vmm), dma_module: needs_dma_module(names), own_kernel };
    prepare(paths, extras, progress)?;
    for kernel in images::HOST_KERNELS {
        let mut names = names.iter().filter(|name| host_kernel(name) == Some(kernel)).peekable();
        if names.peek().is_none() {
            continue;
        }
        progress.begin(&format!("start the emulated host, Linux {}", kernel.name()));
        let mut session = Session::start(paths, &images::host(paths, kernel))?;
        progress.end();
        for name in names {
            run_case(&mut session, name, vmm, progress, report)?;
        }
        progress.begin("switch the host off");
        session.power_off()?;
        progress.end();
    }
    Ok(())
}

fn host_kernel(case: &str) -> Option<Kernel> {
    lab_cases::find(case).map(|case| case.host_kernel)
}

/// Prepares everything, with `extras`.
fn prepare(paths: &Paths, extras: Extras<'_>, progress: &mut Progress) -> Result<()> {
    progress.begin("prepare the machine");
    setup::ensure(paths, &setup::LAB)?;
    progress.begin("prepare Debian packages");
    let packages = packages::Packages::prepare(paths)?;
    progress.begin("build for arm64");
    let toolchain = Toolchain::prepare(paths)?;
    let mut wanted = vec!["lab-agent"];
    wanted.extend(
        ["outboard", "outboard-hypervisor", "outboard-host-pci"]
            .iter()
            .filter(|name| has_program(paths, name)),
    );
    let programs = toolchain.build(paths, &wanted)?;
    progress.begin("prepare images");
    empty_logs(paths)?;
    images::prepare(paths, &packages, &programs, extras)?;
    progress.end();
    Ok(())
}

/// Runs one case and adds what it reports.
pub fn run_case(
    session: &mut Session,
    name: &str,
    vmm: Vmm,
    progress: &mut Progress,
    report: &mut Report,
) -> Result<()> {
    let case = lab_cases::find(name).context("the case is in the table")?;
    session.send(&Command::Run { case: name.into(), vmm, limit_s: case.limit_s })?;
    if name == "shell" {
        return match shell::run(session)? {
            Outcome::Failed(reason) => Err(anyhow!("{reason}")),
            Outcome::Passed | Outcome::Skipped(_) => Ok(()),
        };
    }
    let demo = name == "demo";
    let mut parts = Counts::default();
    progress.begin(name);
    loop {
        match session.next(Duration::from_secs(case.limit_s) + GRACE)? {
            Event::Phase { name: phase, ms } => {
                progress.done(&phase, ms);
            }
            Event::Fact(key, value) if key == "guest" => report.guest = value,
            Event::Fact(key, value) if key == "device" => report.device = value,
            Event::Fact(key, value) => {
                report.facts.insert(key, value);
            }
            Event::Sample { metric, vmm, value } => report.samples.push(Sample { metric, vmm, value }),
            Event::Console(_) | Event::Ready { .. } => {}
            Event::Monitor(line) => {
                let said = session.monitor(&line)?;
                session.send(&Command::Monitored(said))?;
            }
            Event::Log(text) => progress::say(&format!("    {text}")),
            Event::Part { name: part, outcome } => {
                let name = format!("{name}/{part}");
                progress::say(&result_line(&name, &outcome));
                parts.add(&outcome);
                report.cases.push(CaseResult { name, outcome, counts: true, ms: None });
            }
            Event::Done { outcome, ms, .. } => {
                if let (true, Outcome::Failed(reason)) = (demo, &outcome) {
                    bail!("{reason}\n{}", session.console_tail());
                }
                if demo {
                    // The sum of the phases that the case has reported.
                    progress.forget();
                } else {
                    progress.end();
                }
                let counts = parts == Counts::default() || matches!(outcome, Outcome::Failed(_));
                let outcome = match outcome {
                    Outcome::Passed if parts.failed > 0 => {
                        Outcome::Failed(format!("{} parts failed", parts.failed))
                    }
                    other => other,
                };
                progress::say(&result_line(name, &outcome));
                report.cases.push(CaseResult { name: name.into(), outcome, counts, ms: Some(ms) });
                return Ok(());
            }
        }
    }
}

fn result_line(name: &str, outcome: &Outcome) -> String {
    match outcome {
        Outcome::Passed => format!("  passed   {name}"),
        Outcome::Skipped(reason) => format!("  skipped  {name}: {reason}"),
        Outcome::Failed(reason) => format!("  FAILED   {name}: {reason}"),
    }
}

fn print_summary(report: &Report, took: Duration) {
    for (key, value) in &report.facts {
        println!("  {key}: {}", value.as_str().map_or_else(|| value.to_string(), str::to_owned));
    }
    if !report.guest.is_null() {
        println!("  guest: {}", report.guest);
    }
    if !report.device.is_null() {
        println!("  device: {}", report.device);
    }
    let counts = report.counts();
    println!(
        "{} in {:.1} s: {} passed, {} failed, {} skipped",
        if report.ok { "The lab succeeded" } else { "The lab FAILED" },
        took.as_secs_f64(),
        counts.passed,
        counts.failed,
        counts.skipped
    );
}

/// `cargo xtask module`: builds the guest's kernel module and says where it is.
pub fn build_modules(paths: &Paths, newest: bool) -> Result<bool> {
    progress::begin("build the guest's kernel module");
    let packages = packages::Packages::prepare(paths)?;
    let mut all = images::guest_modules(paths, &packages)?;
    if newest {
        all.insert("newest".into(), guest_module::build_newest(paths)?);
    }
    progress::end();
    for (kernel, built) in all {
        for file in built.files {
            println!("  {kernel:<6} {}", file.display());
        }
    }
    Ok(true)
}

/// Builds the module out of a package's `source`, as DKMS does, for the lab's kernels. What DKMS would keep goes into `tree`.
pub fn build_package(
    paths: &Paths,
    source: &std::path::Path,
    tree: &std::path::Path,
) -> Result<Vec<(&'static str, std::path::PathBuf)>> {
    let packages = packages::Packages::prepare(paths)?;
    images::dkms_modules(paths, &packages, source, tree)
}

/// Whether the workspace has the package: crates come one after the other.
fn has_program(paths: &Paths, package: &str) -> bool {
    let folder = package.strip_prefix("outboard-").unwrap_or(package);
    paths.root.join("crates").join(folder).join("Cargo.toml").is_file()
}

/// Whether the distribution's QEMU must be in the share: it runs the guests, or its `qemu-img` makes and checks images.
fn needs_peer(names: &[String], vmm: Vmm) -> bool {
    let needs = |name: &String| ["disk-", "bench-", "bad-input"].iter().any(|start| name.starts_with(start));
    vmm == Vmm::Qemu || names.iter().any(needs)
}

/// Whether guests need our kernel module; their cases are named so.
fn needs_dma_module(names: &[String]) -> bool {
    let needs =
        |name: &String| ["dma-", "quirk-"].iter().any(|start| name.starts_with(start)) || name == "bench-dma";
    names.iter().any(needs)
}

fn empty_logs(paths: &Paths) -> Result<()> {
    for entry in std::fs::read_dir(paths.logs())? {
        let path = entry?.path();
        if path.file_name().is_some_and(|name| name != "build.log") {
            std::fs::remove_file(&path).with_context(|| format!("cannot remove {}", path.display()))?;
        }
    }
    Ok(())
}
