//! Does a workload fit a Mac? Replays recorded DMA calls through a policy and the model of a Mac's IOMMU.
//!
//! [`run`] is `outboard fit`; the parts are public for tests and benchmarks.

mod adaptive;
mod ftrace;
mod host;
mod plot;
mod published;
mod read;
mod replay;
mod report;

pub mod generate;
pub mod trace;

use std::io::{self, Write};
use std::path::PathBuf;

pub use host::Limits;
pub use read::{ReadError, read};
pub use replay::{
    Cause, Detail, FirstFailure, LimitsError, Policy, Replay, Sample, Scheme, replay, tightest,
};
pub use report::{Report, Row};

/// Replay DMA traces and say whether they fit a Mac.
///
/// A trace is a text file, xz-compressed or not: lines `m MICROSECONDS ID ADDRESS:LENGTH,...` and `u MICROSECONDS ID`
/// (hexadecimal addresses and lengths), or the kernel's dma:* trace events. `generated:NAME` replays a generated one:
/// scattered, clusters, games.
#[derive(Debug, Clone, clap::Args)]
pub struct Args {
    /// Traces to replay.
    #[arg(required = true, value_name = "TRACE")]
    pub traces: Vec<PathBuf>,
    /// Bytes that may be mapped at a time; K, M and G stand for KiB, MiB and GiB.
    #[arg(long, value_name = "BYTES", default_value = "1536M", value_parser = bytes)]
    pub limit_bytes: u64,
    /// Mappings that may exist at a time.
    #[arg(long, value_name = "N", default_value_t = Limits::MAC.entries,
          value_parser = clap::value_parser!(u32).range(1..=1 << 30))]
    pub limit_entries: u32,
    /// Also find the smallest limits under which each trace runs without a failed mapping.
    #[arg(long)]
    pub tightest: bool,
    /// Print one JSON object for each trace, one a line, instead of tables.
    #[arg(long)]
    pub json: bool,
    /// Draw entries and bytes over time into this SVG file.
    #[arg(long, value_name = "FILE.svg")]
    pub plot: Option<PathBuf>,
    /// Only DMA calls of this device, where a trace has several.
    #[arg(long, value_name = "NAME")]
    pub device: Option<String>,
}

fn bytes(text: &str) -> Result<u64, String> {
    let bytes = outboard_cli::parse_size(text, 1)?;
    match (outboard_dart::GRANULE..=1 << 40).contains(&bytes) {
        true => Ok(bytes),
        false => Err("needs 16 KiB (one piece of a Mac's memory) to 1 TiB".to_owned()),
    }
}

/// Why `outboard fit` failed.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A trace could not be read.
    #[error(transparent)]
    Read(#[from] ReadError),
    /// The limits cannot be used.
    #[error(transparent)]
    Limits(#[from] LimitsError),
    /// The picture could not be written.
    #[error("cannot write the plot {path}: {source}")]
    Plot {
        /// The file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// Standard output could not be written.
    #[error("cannot write the results: {0}")]
    Output(#[from] io::Error),
    /// The results do not go into JSON; cannot happen for valid results.
    #[error("cannot print the results as JSON: {0}")]
    Json(#[from] serde_json::Error),
}

/// `outboard fit`: replays the traces in `args` and writes the results to `out`. True if all fit with the windows policy.
///
/// # Errors
/// [`Error`] says which trace, option or file, and why.
pub fn run(args: &Args, out: &mut dyn Write) -> Result<bool, Error> {
    let limits = Limits { bytes: args.limit_bytes, entries: args.limit_entries };
    let detail = if args.plot.is_some() { Detail::Samples } else { Detail::Counts };
    let (mut all_fit, mut reports) = (true, Vec::new());
    for path in &args.traces {
        let trace = read(path, args.device.as_deref())?;
        let report = compare(&trace, limits, detail, args.tightest)?;
        all_fit &= report
            .rows
            .iter()
            .all(|row| !matches!(row.policy, Policy::Adaptive(_)) || row.replay.failures == 0);
        let text = if args.json { report.json()? + "\n" } else { report.table() + "\n" };
        out.write_all(text.as_bytes())?;
        reports.push(report);
    }
    if let Some(path) = &args.plot {
        outboard_cli::replace_file(path, plot::svg(&reports).as_bytes())
            .map_err(|source| Error::Plot { path: path.clone(), source })?;
    }
    Ok(all_fit)
}

/// One trace through every policy.
///
/// # Errors
/// [`LimitsError`] if the limits cannot be used.
pub fn compare(
    trace: &trace::Trace,
    limits: Limits,
    detail: Detail,
    with_tightest: bool,
) -> Result<Report, LimitsError> {
    let mut rows = Vec::new();
    for policy in Policy::all() {
        let replayed = replay(trace, policy, limits, detail)?;
        let (tightest_bytes, tightest_entries) =
            if with_tightest { tightest(trace, policy, limits)? } else { (None, None) };
        rows.push(Row { policy, replay: replayed, tightest_bytes, tightest_entries });
    }
    Ok(Report { trace: trace.name.clone(), limits, lost: trace.lost, missing: trace.missing, rows })
}
