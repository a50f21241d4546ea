//! Every device of the passthrough cases once more, under a Mac's limits: the same drivers, the same data. The module `outboard_dma` is loaded
//! before, its statistics are looked at after (`guest/dma.rs`), and Outboard runs with a Mac's limits from the kernel too (`host/limits.rs`).

mod bench;
mod ends;
mod load;
mod stress;

use crate::case::Case;

/// Names of the passthrough cases, and of the same with `dma=mac`.
const MAC: [(&str, &str); 9] = [
    ("passthrough-nvme", "dma-mac-nvme"),
    ("passthrough-ahci", "dma-mac-ahci"),
    ("passthrough-xhci", "dma-mac-xhci"),
    ("passthrough-e1000e", "dma-mac-e1000e"),
    ("passthrough-hda", "dma-mac-hda"),
    ("passthrough-multifunction", "dma-mac-multifunction"),
    ("passthrough-two-devices", "dma-mac-two-devices"),
    ("passthrough-reboot", "dma-mac-reboot"),
    ("passthrough-removal", "dma-mac-removal"),
];

pub(super) fn cases() -> Vec<Case> {
    let again = super::passthrough::cases().into_iter().filter_map(mac);
    again.chain(ends::cases()).chain(load::cases()).chain(stress::cases()).chain(bench::cases()).collect()
}

fn mac(case: Case) -> Option<Case> {
    let (_, name) = MAC.iter().find(|(plain, _)| *plain == case.name)?;
    Some(Case { name, about: "the same under a Mac's DMA limits", ..case })
}

#[cfg(test)]
mod tests {
    use crate::host::Dma;

    /// Without a driver that asks for memory; and the abuse, which is the same work twice.
    const WITHOUT: [&str; 4] =
        ["passthrough-errors", "passthrough-rtx5090", "passthrough-abuse", "bench-passthrough"];

    #[test]
    fn each_passthrough_case_also_runs_under_a_macs_limits() {
        for case in super::super::passthrough::cases() {
            let runs = super::MAC.iter().any(|(plain, _)| *plain == case.name);
            assert_ne!(runs, WITHOUT.contains(&case.name), "{}", case.name);
        }
        assert!(super::cases().iter().all(|case| Dma::of(case.name) != Dma::Identity));
    }
}
