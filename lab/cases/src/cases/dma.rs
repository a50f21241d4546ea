//! Every device of the passthrough cases once more, under a Mac's limits: the same drivers, the same data. The module `outboard_dma` is loaded
//! before, its statistics are looked at after (`guest/dma.rs`), and Outboard runs with a Mac's limits from the kernel too (`host/limits.rs`).

mod bench;
mod ends;
mod kdump;
mod late;
mod load;
mod misuse;
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

/// And of those with too little room; `load` has the one with an NVMe disk.
const TIGHT: [(&str, &str); 6] = [
    ("passthrough-ahci", "dma-tight-ahci"),
    ("passthrough-xhci", "dma-tight-xhci"),
    ("passthrough-e1000e", "dma-tight-e1000e"),
    ("passthrough-hda", "dma-tight-hda"),
    ("passthrough-multifunction", "dma-tight-multifunction"),
    ("passthrough-two-devices", "dma-tight-two-devices"),
];

pub(super) fn cases() -> Vec<Case> {
    let again = super::passthrough::cases().into_iter().filter_map(mac);
    let tight = super::passthrough::cases().into_iter().filter_map(tight);
    again
        .chain(tight)
        .chain(ends::cases())
        .chain(kdump::cases())
        .chain(late::cases())
        .chain(load::cases())
        .chain(misuse::cases())
        .chain(stress::cases())
        .chain(bench::cases())
        .collect()
}

fn mac(case: Case) -> Option<Case> {
    let (_, name) = MAC.iter().find(|(plain, _)| *plain == case.name)?;
    Some(Case { name, about: "the same under a Mac's DMA limits", ..case })
}

fn tight(case: Case) -> Option<Case> {
    let (_, name) = TIGHT.iter().find(|(plain, _)| *plain == case.name)?;
    Some(Case {
        name,
        about: "the same with 24 MiB in 666 mappings, and at times with no room at all",
        ..case
    })
}

#[cfg(test)]
mod tests {
    use crate::host::Dma;

    /// Without a driver that asks for memory; and the abuse, which is the same work twice.
    const WITHOUT: [&str; 6] = [
        "passthrough-errors",
        "passthrough-rtx5090",
        "passthrough-hotadd",
        "passthrough-io-ports",
        "passthrough-abuse",
        "bench-passthrough",
    ];

    #[test]
    fn each_passthrough_case_also_runs_under_a_macs_limits() {
        for case in super::super::passthrough::cases() {
            let runs = super::MAC.iter().any(|(plain, _)| *plain == case.name);
            assert_ne!(runs, WITHOUT.contains(&case.name), "{}", case.name);
        }
        assert!(super::cases().iter().all(|case| Dma::of(case.name) != Dma::Identity));
    }
}
