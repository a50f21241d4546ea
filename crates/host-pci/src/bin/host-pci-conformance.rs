//! Runs the conformance suite on a function of this host that is bound to vfio-pci.
//!
//! Exit status: 0 if nothing failed, 1 if something did, 2 if the suite could not run.

#![allow(clippy::print_stdout, clippy::print_stderr)] // A developer's tool: nothing runs on after its output has failed.

use std::process::ExitCode;

#[cfg(target_os = "linux")]
fn main() -> ExitCode {
    linux::main()
}

#[cfg(not(target_os = "linux"))]
fn main() -> ExitCode {
    eprintln!("host-pci-conformance: {}", outboard_host_pci::host::Refusal::NotYet);
    ExitCode::from(2)
}

#[cfg(target_os = "linux")]
mod linux {
    use outboard_bus::{Width, poll_readable};
    use outboard_host_pci::Selection;
    use outboard_host_pci::conformance::{self, Subject, Verdict};
    use outboard_host_pci::host::Host;
    use outboard_host_pci::vfio::DmaPolicy;
    use std::process::ExitCode;
    use std::time::{Duration, Instant};

    const USAGE: &str = "\
usage: host-pci-conformance BUS:DEVICE[.FUNCTION] [--mac] [NAME]...
       host-pci-conformance BUS:DEVICE[.FUNCTION] --await-removal

Runs the cases whose names contain one of the NAMEs, or all, on a function that is bound to vfio-pci;
of a whole slot on its first function, with the others open beside it.

  --mac             have a DART choose the bus addresses
  --await-removal   hold the function open until the host wants it back, at most a minute, then give it back";

    pub fn main() -> ExitCode {
        let mut arguments = std::env::args().skip(1);
        let Some(selection) = arguments.next().and_then(|a| a.parse().ok()) else {
            eprintln!("{USAGE}");
            return ExitCode::from(2);
        };
        let mut names: Vec<String> = arguments.collect();
        let mac = names.iter().position(|name| name == "--mac").map(|at| names.remove(at)).is_some();
        let policy = if mac { DmaPolicy::MAC } else { DmaPolicy::Identity };
        if names == ["--await-removal"] {
            return match await_removal(selection) {
                Ok(()) => ExitCode::SUCCESS,
                Err(error) => {
                    println!("{error}");
                    ExitCode::FAILURE
                }
            };
        }
        if run(selection, policy, &names) { ExitCode::SUCCESS } else { ExitCode::FAILURE }
    }

    fn run(selection: Selection, policy: DmaPolicy, names: &[String]) -> bool {
        let open = || open(selection, policy);
        let (mut passed, mut skipped, mut failed) = (0, 0, 0);
        for case in conformance::cases() {
            if !names.is_empty() && !names.iter().any(|n| case.name.contains(n.as_str())) {
                continue;
            }
            let started = Instant::now();
            let verdict = case.run(&open);
            let ms = started.elapsed().as_millis();
            match verdict {
                Verdict::Passed => {
                    passed += 1;
                    println!("pass {} ({ms} ms)", case.name);
                }
                Verdict::Skipped(why) => {
                    skipped += 1;
                    println!("skip {}: {why}", case.name);
                }
                Verdict::Failed(why) => {
                    failed += 1;
                    println!("FAIL {}: {why}", case.name);
                }
            }
        }
        println!("{selection}: {passed} passed, {skipped} skipped, {failed} failed");
        failed == 0 && passed > 0
    }

    fn await_removal(selection: Selection) -> Result<(), String> {
        let subject = open(selection, DmaPolicy::Identity)?;
        let function = &subject.function;
        function.set_bus_master(true).map_err(|e| e.to_string())?;
        println!("{selection}: waiting for its removal");
        let started = Instant::now();
        let gone = poll_readable(&[function.removal()], Some(Duration::from_secs(60)));
        if !gone.map_err(|e| e.to_string())?[0] {
            return Err(format!("{selection} was not removed"));
        }
        println!(
            "{selection}: removal after {} ms; class {:x?}",
            started.elapsed().as_millis(),
            function.config_read(8, Width::B4)
        );
        drop(subject);
        println!("{selection}: given back after {} ms", started.elapsed().as_millis());
        Ok(())
    }

    fn open(selection: Selection, policy: DmaPolicy) -> Result<Subject, String> {
        let host = Host::this().map_err(|e| e.to_string())?;
        let mut opened = host.open_slot(selection, policy).map_err(|e| e.to_string())?;
        let function = opened.functions.remove(0);
        Ok(Subject { function, domain: opened.domain, beside: opened.functions })
    }
}
