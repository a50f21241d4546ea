//! The device tree that describes the machine to the guest.

use crate::layout::{self, AddressSpace};
use std::ops::Range;
use vm_fdt::{FdtWriter, FdtWriterResult};

pub use vm_fdt::Error as FdtError;

/// What differs from VM to VM.
pub struct Description<'a> {
    /// RAM and PCIe windows.
    pub space: &'a AddressSpace,
    /// MPIDR affinity of each vCPU.
    pub cpus: &'a [u64],
    /// One past the last interrupt number; from [`layout::MSI_START`] on they belong to the MSI frame.
    pub intid_limit: u32,
    /// Kernel command line.
    pub command_line: &'a str,
    /// Initial RAM disk in guest RAM.
    pub initrd: Option<Range<u64>>,
    /// Fresh random bytes: the kernel stirs them into its pool and places itself with them.
    pub random: [u8; 64],
}

const PHANDLE_GIC: u32 = 1;
const PHANDLE_MSI: u32 = 2;
const PHANDLE_CLOCK: u32 = 3;
const PHANDLE_GPIO: u32 = 4;

const IRQ_SPI: u32 = 0;
const IRQ_PPI: u32 = 1;
const IRQ_LEVEL_HIGH: u32 = 4;
/// INTID of the first SPI and of the first PPI.
const FIRST_SPI: u32 = 32;
const KEY_POWER: u32 = 116;
/// PL011's reference clock; its value means nothing here.
const APB_CLOCK_HZ: u32 = 24_000_000;

/// Builds the flattened device tree.
///
/// # Errors
/// [`FdtError`] for a command line that holds a NUL.
pub fn build(d: &Description<'_>) -> Result<Vec<u8>, FdtError> {
    let mut fdt = FdtWriter::new()?;
    let root = fdt.begin_node("")?;
    fdt.property_string("compatible", "linux,dummy-virt")?;
    fdt.property_string("model", "Outboard virtual machine")?;
    fdt.property_u32("#address-cells", 2)?;
    fdt.property_u32("#size-cells", 2)?;
    fdt.property_u32("interrupt-parent", PHANDLE_GIC)?;
    fdt.property_null("dma-coherent")?;
    chosen(&mut fdt, d)?;
    memory(&mut fdt, d)?;
    cpus(&mut fdt, d.cpus)?;
    psci(&mut fdt)?;
    interrupt_controller(&mut fdt, d.cpus.len() as u64, d.intid_limit)?;
    timer(&mut fdt)?;
    clock(&mut fdt)?;
    serial(&mut fdt)?;
    rtc(&mut fdt)?;
    power_key(&mut fdt)?;
    pcie(&mut fdt, d.space)?;
    fdt.end_node(root)?;
    fdt.finish()
}

fn chosen(fdt: &mut FdtWriter, d: &Description<'_>) -> FdtWriterResult<()> {
    let node = fdt.begin_node("chosen")?;
    fdt.property_string("bootargs", d.command_line)?;
    fdt.property_string("stdout-path", &format!("/pl011@{:x}", layout::PL011))?;
    if let Some(initrd) = &d.initrd {
        fdt.property_u64("linux,initrd-start", initrd.start)?;
        fdt.property_u64("linux,initrd-end", initrd.end)?;
    }
    let (seed, kaslr) = d.random.split_at(56);
    fdt.property("rng-seed", seed)?;
    fdt.property("kaslr-seed", kaslr)?;
    fdt.end_node(node)
}

fn memory(fdt: &mut FdtWriter, d: &Description<'_>) -> FdtWriterResult<()> {
    let ram = &d.space.ram;
    let node = fdt.begin_node(&format!("memory@{:x}", ram.start))?;
    fdt.property_string("device_type", "memory")?;
    fdt.property_array_u64("reg", &[ram.start, ram.end - ram.start])?;
    fdt.end_node(node)
}

fn cpus(fdt: &mut FdtWriter, cpus: &[u64]) -> FdtWriterResult<()> {
    let node = fdt.begin_node("cpus")?;
    fdt.property_u32("#address-cells", 2)?;
    fdt.property_u32("#size-cells", 0)?;
    for mpidr in cpus {
        let cpu = fdt.begin_node(&format!("cpu@{mpidr:x}"))?;
        fdt.property_string("device_type", "cpu")?;
        fdt.property_string("compatible", "arm,armv8")?;
        fdt.property_string("enable-method", "psci")?;
        fdt.property_u64("reg", *mpidr)?;
        fdt.end_node(cpu)?;
    }
    fdt.end_node(node)
}

fn psci(fdt: &mut FdtWriter) -> FdtWriterResult<()> {
    let node = fdt.begin_node("psci")?;
    fdt.property_string_list("compatible", vec!["arm,psci-1.0".into(), "arm,psci-0.2".into()])?;
    fdt.property_string("method", "hvc")?;
    fdt.end_node(node)
}

fn interrupt_controller(fdt: &mut FdtWriter, cpus: u64, intid_limit: u32) -> FdtWriterResult<()> {
    let node = fdt.begin_node(&format!("intc@{:x}", layout::GIC_DISTRIBUTOR))?;
    fdt.property_string("compatible", "arm,gic-v3")?;
    fdt.property_null("interrupt-controller")?;
    fdt.property_u32("#interrupt-cells", 3)?;
    fdt.property_u32("#address-cells", 2)?;
    fdt.property_u32("#size-cells", 2)?;
    fdt.property_null("ranges")?;
    fdt.property_phandle(PHANDLE_GIC)?;
    let redistributors = [layout::GIC_REDISTRIBUTORS, cpus * 0x2_0000];
    fdt.property_array_u64(
        "reg",
        &[layout::GIC_DISTRIBUTOR, 0x1_0000, redistributors[0], redistributors[1]],
    )?;
    // GIC maintenance interrupt, unused by a guest at EL1.
    fdt.property_array_u32("interrupts", &[IRQ_PPI, 9, IRQ_LEVEL_HIGH])?;
    let msi = fdt.begin_node(&format!("v2m@{:x}", layout::MSI_FRAME))?;
    fdt.property_string("compatible", "arm,gic-v2m-frame")?;
    fdt.property_null("msi-controller")?;
    fdt.property_phandle(PHANDLE_MSI)?;
    fdt.property_array_u64("reg", &[layout::MSI_FRAME, 0x1000])?;
    fdt.property_u32("arm,msi-base-spi", layout::MSI_START)?;
    fdt.property_u32("arm,msi-num-spis", intid_limit - layout::MSI_START)?;
    fdt.end_node(msi)?;
    fdt.end_node(node)
}

fn timer(fdt: &mut FdtWriter) -> FdtWriterResult<()> {
    let node = fdt.begin_node("timer")?;
    fdt.property_string("compatible", "arm,armv8-timer")?;
    fdt.property_null("always-on")?;
    // Secure, non-secure, virtual and hypervisor timer: PPIs 13, 14, 11, 10 (INTIDs 29, 30, 27, 26).
    let interrupts: Vec<u32> =
        [13, 14, 11, 10].into_iter().flat_map(|ppi| [IRQ_PPI, ppi, IRQ_LEVEL_HIGH]).collect();
    fdt.property_array_u32("interrupts", &interrupts)?;
    fdt.end_node(node)
}

fn clock(fdt: &mut FdtWriter) -> FdtWriterResult<()> {
    let node = fdt.begin_node("apb-pclk")?;
    fdt.property_string("compatible", "fixed-clock")?;
    fdt.property_u32("#clock-cells", 0)?;
    fdt.property_u32("clock-frequency", APB_CLOCK_HZ)?;
    fdt.property_string("clock-output-names", "clk24mhz")?;
    fdt.property_phandle(PHANDLE_CLOCK)?;
    fdt.end_node(node)
}

fn bus_clock(fdt: &mut FdtWriter) -> FdtWriterResult<()> {
    fdt.property_array_u32("clocks", &[PHANDLE_CLOCK])?;
    fdt.property_string("clock-names", "apb_pclk")
}

/// What every PrimeCell's node has in common, but its clocks.
fn primecell(fdt: &mut FdtWriter, kind: &str, base: u64, intid: Option<u32>) -> FdtWriterResult<()> {
    fdt.property_string_list("compatible", vec![format!("arm,{kind}"), "arm,primecell".into()])?;
    fdt.property_array_u64("reg", &[base, layout::PRIMECELL_SIZE])?;
    if let Some(intid) = intid {
        fdt.property_array_u32("interrupts", &[IRQ_SPI, intid - FIRST_SPI, IRQ_LEVEL_HIGH])?;
    }
    Ok(())
}

fn serial(fdt: &mut FdtWriter) -> FdtWriterResult<()> {
    let node = fdt.begin_node(&format!("pl011@{:x}", layout::PL011))?;
    primecell(fdt, "pl011", layout::PL011, Some(layout::PL011_INTID))?;
    fdt.property_array_u32("clocks", &[PHANDLE_CLOCK, PHANDLE_CLOCK])?;
    fdt.property_string_list("clock-names", vec!["uartclk".into(), "apb_pclk".into()])?;
    fdt.end_node(node)
}

fn rtc(fdt: &mut FdtWriter) -> FdtWriterResult<()> {
    let node = fdt.begin_node(&format!("pl031@{:x}", layout::PL031))?;
    primecell(fdt, "pl031", layout::PL031, None)?;
    bus_clock(fdt)?;
    fdt.end_node(node)
}

fn power_key(fdt: &mut FdtWriter) -> FdtWriterResult<()> {
    let gpio = fdt.begin_node(&format!("pl061@{:x}", layout::PL061))?;
    primecell(fdt, "pl061", layout::PL061, Some(layout::PL061_INTID))?;
    bus_clock(fdt)?;
    fdt.property_null("gpio-controller")?;
    fdt.property_u32("#gpio-cells", 2)?;
    fdt.property_null("interrupt-controller")?;
    fdt.property_u32("#interrupt-cells", 2)?;
    fdt.property_u32("#address-cells", 0)?;
    fdt.property_phandle(PHANDLE_GPIO)?;
    fdt.end_node(gpio)?;
    let keys = fdt.begin_node("gpio-keys")?;
    fdt.property_string("compatible", "gpio-keys")?;
    let key = fdt.begin_node("poweroff")?;
    fdt.property_string("label", "GPIO Key Poweroff")?;
    fdt.property_u32("linux,code", KEY_POWER)?;
    fdt.property_array_u32("gpios", &[PHANDLE_GPIO, crate::POWER_KEY_PIN.into(), 0])?;
    fdt.end_node(key)?;
    fdt.end_node(keys)
}

/// PCI bus binding: the flags in a range's first cell (IEEE 1275 PCI supplement, section 2.2.1.1).
const PCI_IO: u32 = 0x0100_0000;
const PCI_MEM32: u32 = 0x0200_0000;
const PCI_MEM64_PREFETCHABLE: u32 = 0x4300_0000;

fn pcie(fdt: &mut FdtWriter, space: &AddressSpace) -> FdtWriterResult<()> {
    let node = fdt.begin_node(&format!("pcie@{:x}", layout::ECAM))?;
    fdt.property_string("compatible", "pci-host-ecam-generic")?;
    fdt.property_string("device_type", "pci")?;
    fdt.property_u32("#address-cells", 3)?;
    fdt.property_u32("#size-cells", 2)?;
    fdt.property_u32("#interrupt-cells", 1)?;
    fdt.property_u32("linux,pci-domain", 0)?;
    fdt.property_array_u32("bus-range", &[0, 0xff])?;
    fdt.property_null("dma-coherent")?;
    fdt.property_array_u64("reg", &[layout::ECAM, layout::ECAM_SIZE])?;
    fdt.property_array_u32("ranges", &pcie_ranges(space))?;
    fdt.property_u32("msi-parent", PHANDLE_MSI)?;
    // Requester IDs reach the frame as they are.
    fdt.property_array_u32("msi-map", &[0, PHANDLE_MSI, 0, 0x1_0000])?;
    interrupt_map(fdt)?;
    fdt.end_node(node)
}

/// The bridge's windows: kind, address on the bus (ports count from 0), guest-physical address, bytes.
fn pcie_ranges(space: &AddressSpace) -> Vec<u32> {
    let windows = [
        (PCI_IO, 0, &layout::PCI_IO_WINDOW),
        (PCI_MEM32, layout::PCI_WINDOW_32.start, &layout::PCI_WINDOW_32),
        (PCI_MEM64_PREFETCHABLE, space.pci_window_64.start, &space.pci_window_64),
    ];
    let mut ranges = Vec::new();
    for (kind, address, window) in windows {
        ranges.push(kind);
        for value in [address, window.start, window.end - window.start] {
            ranges.extend([(value >> 32) as u32, value as u32]);
        }
    }
    ranges
}

/// INTA to INTD of device `d` go to line `(d + pin) mod 4` (PCI-to-PCI bridge 1.2, table 9-1); four devices show all of it.
fn interrupt_map(fdt: &mut FdtWriter) -> FdtWriterResult<()> {
    fdt.property_array_u32("interrupt-map-mask", &[3 << 11, 0, 0, 7])?;
    let mut map = Vec::new();
    for device in 0..4 {
        for pin in 0..4 {
            let intid = layout::PCI_INTX_INTIDS.start + (device + pin) % 4;
            map.extend([device << 11, 0, 0, pin + 1]);
            // The GIC has two address cells, both zero here, before its three interrupt cells.
            map.extend([PHANDLE_GIC, 0, 0, IRQ_SPI, intid - FIRST_SPI, IRQ_LEVEL_HIGH]);
        }
    }
    fdt.property_array_u32("interrupt-map", &map)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn describe(command_line: &str, cpus: &[u64]) -> Result<Vec<u8>, FdtError> {
        let space = AddressSpace::new(512 << 20, 40).unwrap();
        let initrd = Some(0x4400_0000..0x4500_0000);
        build(&Description { space: &space, cpus, intid_limit: 96, command_line, initrd, random: [7; 64] })
    }

    #[test]
    fn fits_its_room_with_32_cpus_and_the_longest_command_line() {
        let cpus: Vec<u64> = (0..32).map(|i| (i % 16) | ((i / 16) << 8)).collect();
        // COMMAND_LINE_SIZE of arm64 Linux is 2048.
        let blob = describe(&"x".repeat(4096), &cpus).unwrap();
        assert_eq!(blob[..4], [0xd0, 0x0d, 0xfe, 0xed]);
        assert!((blob.len() as u64) < crate::boot::FDT_SIZE, "{} bytes", blob.len());
    }

    #[test]
    fn a_command_line_with_a_nul_is_refused() {
        assert!(describe("a\0b", &[0]).is_err());
    }

    #[test]
    fn io_ports_from_0_on_are_in_their_window() {
        let space = AddressSpace::new(512 << 20, 40).unwrap();
        let ranges = pcie_ranges(&space);
        assert_eq!(ranges.len(), 21);
        assert_eq!(ranges[..7], [0x0100_0000, 0, 0, 0, 0x0f00_0000, 0, 0x10_0000]);
    }

    /// The device tree compiler, where it is installed, finds no fault with the tree.
    #[test]
    fn dtc_accepts_it() {
        use std::io::Write;
        use std::process::{Command, Stdio};
        let blob = describe("console=ttyAMA0", &[0, 1]).unwrap();
        let mut dtc = Command::new("dtc");
        dtc.args(["-I", "dtb", "-O", "dts", "-o", "/dev/null", "-"])
            .stdin(Stdio::piped())
            .stderr(Stdio::piped());
        let Ok(mut dtc) = dtc.spawn() else {
            eprintln!("skipped: dtc is not installed");
            return;
        };
        dtc.stdin.take().unwrap().write_all(&blob).unwrap();
        let output = dtc.wait_with_output().unwrap();
        let messages = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(output.status.success() && messages.is_empty(), "{messages}");
    }
}
