//! Options that a back end must refuse rather than ignore.

use crate::conformance::guest::{report, start};
use crate::conformance::rig::{Bench, Context, Outcome, expect, expect_refusal, gic_config};
use crate::conformance::{Case, case};
use crate::{Error, GicConfig, VcpuOptions, VmOptions};

pub const CASES: &[Case] = &[
    case("capabilities", capabilities),
    case("total-store-order", tso),
    case("vm-options-refused", vm_options),
    case("controller-layouts-refused", layouts),
];

fn unsupported(e: &Error) -> bool {
    matches!(e, Error::Unsupported { .. })
}

/// The answers are within what the architecture has, and stay the same.
fn capabilities(context: &Context) -> Outcome {
    let caps = &context.capabilities;
    expect("the same answer twice", &context.hypervisor.capabilities()?, caps)?;
    expect("at least one vCPU", caps.max_vcpus >= 1, true)?;
    expect("32 to 52 address bits", (32..=52).contains(&caps.max_ipa_bits), true)
}

/// Granted where the back end says so, refused elsewhere.
fn tso(context: &Context) -> Outcome {
    let vcpu = VcpuOptions { tso: true, ..VcpuOptions::default() };
    let options = VmOptions { vcpu, ..context.options(1) };
    if !context.capabilities.tso {
        return expect_refusal(
            "total store order",
            context.hypervisor.create_vm(&options).map(drop),
            unsupported,
        );
    }
    let bench = Bench::with(context, &options)?;
    let mut a = start();
    a.mov(1, 5);
    report(&mut a, 1);
    bench.load(a);
    bench.boot_cpu()?.expect_report("with total store order", 5)
}

fn vm_options(context: &Context) -> Outcome {
    let (good, caps) = (context.options(1), &context.capabilities);
    for (what, options) in [
        ("no vCPU", VmOptions { vcpus: 0, ..good.clone() }),
        ("one vCPU too many", VmOptions { vcpus: caps.max_vcpus + 1, ..good.clone() }),
        ("far too many vCPUs", VmOptions { vcpus: u32::MAX, ..good.clone() }),
        ("too wide addresses", VmOptions { ipa_bits: caps.max_ipa_bits + 1, ..good.clone() }),
        ("impossible addresses", VmOptions { ipa_bits: 64, ..good.clone() }),
        ("no addresses", VmOptions { ipa_bits: 0, ..good.clone() }),
    ] {
        expect_refusal(what, context.hypervisor.create_vm(&options).map(drop), unsupported)?;
    }
    drop(context.hypervisor.create_vm(&good)?);
    Ok(())
}

/// A refused layout leaves the VM as it was: a good one still works.
fn layouts(context: &Context) -> Outcome {
    let vm = context.hypervisor.create_vm(&context.options(2))?;
    let good = gic_config();
    let end = 1 << context.options(2).ipa_bits;
    let refused = |e: &Error| {
        matches!(e, Error::Unsupported { .. } | Error::Overlap { .. } | Error::BeyondAddressLimit { .. })
    };
    for (what, config) in [
        ("an unaligned distributor", GicConfig { distributor: good.distributor + 0x1000, ..good.clone() }),
        (
            "unaligned redistributors",
            GicConfig { redistributors: good.redistributors + 0x8000, ..good.clone() },
        ),
        ("an unaligned frame", GicConfig { msi_frame: good.msi_frame + 0x4000, ..good.clone() }),
        ("a frame over the distributor", GicConfig { msi_frame: good.distributor, ..good.clone() }),
        ("redistributors beyond the limit", GicConfig { redistributors: end - 0x2_0000, ..good.clone() }),
        ("private interrupts as MSIs", GicConfig { msi_intids: 16..40, ..good.clone() }),
        ("MSIs beyond the limit", GicConfig { msi_intids: 100..161, ..good.clone() }),
        ("an odd limit", GicConfig { intid_limit: 100, ..good.clone() }),
        ("no SPI", GicConfig { intid_limit: 32, msi_intids: 32..32, ..good.clone() }),
        ("too high a limit", GicConfig { intid_limit: 2048, ..good.clone() }),
    ] {
        expect_refusal(what, vm.create_interrupt_controller(&config).map(drop), refused)?;
    }
    vm.create_interrupt_controller(&good)?;
    drop(vm.bind_vcpu(0)?);
    Ok(())
}
