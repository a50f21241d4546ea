use crate::ConsoleTarget;
use outboard_hypervisor::VcpuOptions;
use std::path::PathBuf;

/// Everything a user says about a machine.
#[derive(Clone, Debug)]
pub struct MachineSpec {
    /// Kernel file.
    pub kernel: PathBuf,
    /// Initial RAM disk.
    pub initrd: Option<PathBuf>,
    /// Kernel command line.
    pub command_line: String,
    /// Number of vCPUs, 1 to 32.
    pub cpus: u32,
    /// Guest RAM in bytes.
    pub memory: u64,
    /// Where the serial console (PL011, `ttyAMA0`) goes.
    pub console: ConsoleTarget,
    /// End the process when the guest reboots.
    pub no_reboot: bool,
    /// For every vCPU.
    pub vcpu: VcpuOptions,
}
