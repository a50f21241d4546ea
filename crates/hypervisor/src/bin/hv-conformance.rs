//! Runs the conformance suite on this host's hypervisor.
//!
//! Exit status: 0 if nothing failed, 1 if something did, 2 if the suite could not run.

#![allow(clippy::print_stdout, clippy::print_stderr)] // A developer's tool: nothing runs on after its output has failed.

use outboard_hypervisor::conformance::{self, Case, Verdict};
use serde_json::json;
use std::process::ExitCode;
use std::time::Duration;

const USAGE: &str = "\
usage: hv-conformance [--list] [--json] [NAME]...

Runs the cases whose names contain one of the NAMEs, or all, on this host's hypervisor.

  --list   print the names and stop
  --json   print one JSON object per line instead of text
";

#[derive(Default)]
struct Options {
    list: bool,
    json: bool,
    names: Vec<String>,
}

fn main() -> ExitCode {
    let mut options = Options::default();
    for argument in std::env::args().skip(1) {
        match argument.as_str() {
            "--list" => options.list = true,
            "--json" => options.json = true,
            "--help" | "-h" => {
                print!("{USAGE}");
                return ExitCode::SUCCESS;
            }
            flag if flag.starts_with('-') => {
                eprint!("hv-conformance: unknown option {flag}\n\n{USAGE}");
                return ExitCode::from(2);
            }
            name => options.names.push(name.to_owned()),
        }
    }
    let mut cases = conformance::cases();
    cases.retain(|c| options.names.is_empty() || options.names.iter().any(|n| c.name.contains(n.as_str())));
    if cases.is_empty() {
        eprintln!("hv-conformance: no case is named like {:?}; see --list", options.names);
        return ExitCode::from(2);
    }
    if options.list {
        for case in cases {
            println!("{}", case.name);
        }
        return ExitCode::SUCCESS;
    }
    match run(&cases, options.json) {
        Ok(0) => ExitCode::SUCCESS,
        Ok(_) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("hv-conformance: {error}");
            ExitCode::from(2)
        }
    }
}

/// Runs `cases` and gives the number that failed.
fn run(cases: &[Case], json: bool) -> outboard_hypervisor::Result<usize> {
    let hypervisor = outboard_hypervisor::native()?;
    let capabilities = hypervisor.capabilities()?;
    let (mut passed, mut failed, mut skipped) = (0, 0, 0);
    let mut stuck = false;
    for case in cases {
        let (verdict, took) = if stuck {
            (Verdict::Skipped("an earlier case is stuck and keeps its VM".into()), Duration::ZERO)
        } else {
            conformance::run(case, &hypervisor, &capabilities)
        };
        match &verdict {
            Verdict::Passed => passed += 1,
            Verdict::Skipped(_) => skipped += 1,
            Verdict::Failed(_) => failed += 1,
            Verdict::Stuck(_) => {
                failed += 1;
                stuck = true;
            }
        }
        print_case(case, &verdict, took, json);
    }
    if json {
        println!("{}", json!({ "passed": passed, "failed": failed, "skipped": skipped }));
    } else {
        println!("{passed} passed, {failed} failed, {skipped} skipped");
    }
    Ok(failed)
}

fn print_case(case: &Case, verdict: &Verdict, took: Duration, json: bool) {
    let (result, reason) = match verdict {
        Verdict::Passed => ("ok", None),
        Verdict::Failed(why) | Verdict::Stuck(why) => (if json { "failed" } else { "FAILED" }, Some(why)),
        Verdict::Skipped(why) => ("skipped", Some(why)),
    };
    let name = case.name;
    match reason {
        _ if json => {
            let milliseconds = took.as_millis() as u64;
            println!(
                "{}",
                json!({ "case": name, "result": result, "reason": reason, "milliseconds": milliseconds })
            );
        }
        Some(why) => println!("{result} {name} ({why})"),
        None => println!("{result} {name}"),
    }
}
