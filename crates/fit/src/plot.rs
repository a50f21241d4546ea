//! Entries and bytes over time as an SVG picture.

use std::fmt::Write as _;

use crate::report::Report;

const WIDTH: f64 = 900.0;
const PANEL: f64 = 200.0;
const LEFT: f64 = 90.0;
const TOP: f64 = 40.0;
const GAP: f64 = 34.0;
/// Points of a line at most: one for each pixel.
const COLUMNS: usize = 780;
/// Blue, orange, grey: told apart in any colour vision, and in print.
const COLOURS: [&str; 3] = ["#0072b2", "#d55e00", "#777777"];

/// Two panels for each report: entries and MiB, each with a line for each policy and the limit.
pub fn svg(reports: &[Report]) -> String {
    let each = TOP + 2.0 * (PANEL + GAP);
    let mut svg = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {WIDTH} {height}\" \
         font-family=\"sans-serif\" font-size=\"12\">\n\
         <rect width=\"100%\" height=\"100%\" fill=\"white\"/>\n",
        height = each * reports.len() as f64,
    );
    for (index, report) in reports.iter().enumerate() {
        let top = each * index as f64;
        let _ = writeln!(
            svg,
            "<text x=\"{LEFT}\" y=\"{:.0}\" font-weight=\"bold\">{}</text>",
            top + 18.0,
            escape(&report.trace)
        );
        for (row, (policy, colour)) in report.rows.iter().zip(COLOURS).enumerate() {
            let x = LEFT + 420.0 + 120.0 * row as f64;
            let _ = writeln!(
                svg,
                "<text x=\"{x}\" y=\"{:.0}\" fill=\"{colour}\">{}</text>",
                top + 18.0,
                policy.policy.name()
            );
        }
        let mib = |bytes: u64| bytes as f64 / f64::from(1 << 20);
        panel(&mut svg, top + TOP, "entries", report, f64::from(report.limits.entries), |s| {
            f64::from(s.entries)
        });
        panel(&mut svg, top + TOP + PANEL + GAP, "MiB mapped", report, mib(report.limits.bytes), |s| {
            mib(s.bytes)
        });
    }
    svg.push_str("</svg>\n");
    svg
}

fn panel(
    svg: &mut String,
    top: f64,
    title: &str,
    report: &Report,
    limit: f64,
    value: impl Fn(&crate::replay::Sample) -> f64,
) {
    let samples = || report.rows.iter().flat_map(|row| &row.replay.samples);
    let end = samples().map(|s| s.at).max().unwrap_or(0).max(1) as f64;
    let peak = samples().map(&value).fold(1.0, f64::max);
    // The limit belongs into the picture unless that would press all lines to the floor.
    let shown = limit <= 4.0 * peak;
    let most = 1.05 * if shown { peak.max(limit) } else { peak };
    let width = WIDTH - LEFT - 20.0;
    let x = |at: u64| LEFT + width * at as f64 / end;
    let y = |value: f64| top + PANEL * (1.0 - value / most);
    let _ = writeln!(
        svg,
        "<rect x=\"{LEFT}\" y=\"{top}\" width=\"{width}\" height=\"{PANEL}\" fill=\"none\" stroke=\"#ccc\"/>"
    );
    for part in [0.0, 0.25, 0.5, 0.75, 1.0] {
        let at = y(most * part);
        let _ = writeln!(
            svg,
            "<text x=\"{:.0}\" y=\"{:.1}\" text-anchor=\"end\">{:.0}</text>",
            LEFT - 6.0,
            at + 4.0,
            most * part
        );
    }
    let note = if shown {
        let _ = writeln!(
            svg,
            "<line x1=\"{LEFT}\" x2=\"{:.0}\" y1=\"{at:.1}\" y2=\"{at:.1}\" stroke=\"#c00\" stroke-dasharray=\"6 4\"/>",
            LEFT + width,
            at = y(limit)
        );
        format!("limit {limit:.0}")
    } else {
        format!("limit {limit:.0}, {:.0} times the peak", limit / peak)
    };
    let _ = writeln!(
        svg,
        "<text x=\"{LEFT}\" y=\"{:.0}\">{title} ({note}), over {:.1} s</text>",
        top - 5.0,
        end / 1e6
    );
    for (row, colour) in report.rows.iter().zip(COLOURS) {
        let mut points = String::new();
        let columns = row.replay.samples.len().div_ceil(COLUMNS).max(1);
        let mut before = None;
        for chunk in row.replay.samples.chunks(columns) {
            let high = chunk.iter().map(&value).fold(0.0, f64::max);
            // In steps: between two calls nothing changes, and a slope would say otherwise.
            if let Some(before) = before.replace(high) {
                let _ = write!(points, "{:.1},{:.1} ", x(chunk[0].at), y(before));
            }
            let _ = write!(points, "{:.1},{:.1} ", x(chunk[0].at), y(high));
        }
        let _ = writeln!(
            svg,
            "<polyline points=\"{points}\" fill=\"none\" stroke=\"{colour}\" stroke-width=\"1.5\"/>"
        );
    }
}

fn escape(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;")
}
