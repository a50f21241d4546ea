use super::*;
use crate::{IoPorts, PciAddress, QUARANTINED, Selection};
use std::fs;
use std::os::unix::fs::symlink;
use tempfile::TempDir;

/// A host in a temporary folder, with a kernel that binds drivers when it is told to.
struct Fake {
    root: TempDir,
}

/// What the kernel does on a write.
struct Kernel {
    root: PathBuf,
    /// Drivers that do not take what they are offered.
    unwilling: &'static [&'static str],
}

impl Kernel {
    fn driver_for(&self, device: &Path) -> Option<String> {
        let wanted = text(&device.join("driver_override"));
        let driver =
            if wanted.is_empty() || wanted == "(null)" { text(&device.join("home")) } else { wanted };
        let there = self.root.join("sys/bus/pci/drivers").join(&driver).is_dir();
        (!driver.is_empty() && there && !self.unwilling.contains(&driver.as_str())).then_some(driver)
    }
}

impl SysfsWriter for Kernel {
    fn write(&self, path: &Path, text: &str) -> io::Result<()> {
        let device = self.root.join("sys/bus/pci/devices").join(text.trim());
        match path.file_name().and_then(|n| n.to_str()) {
            Some("driver_override") => fs::write(path, if text == "\n" { "(null)\n" } else { text }),
            Some("unbind") => fs::remove_file(device.join("driver")),
            Some("drivers_probe") => match self.driver_for(&device) {
                Some(driver) if !device.join("driver").exists() => {
                    let late = device.join("late_group");
                    if late.exists() {
                        fs::rename(late, device.join("iommu_group"))?;
                    }
                    symlink(self.root.join("sys/bus/pci/drivers").join(driver), device.join("driver"))
                }
                _ => Ok(()),
            },
            _ => Err(io::ErrorKind::NotFound.into()),
        }
    }
}

impl Fake {
    fn new() -> Self {
        let fake = Self { root: TempDir::new().unwrap() };
        for driver in ["vfio-pci", "nvme", "e1000e", "pcieport"] {
            fake.folder(&format!("sys/bus/pci/drivers/{driver}"));
        }
        fake.folder("sys/bus/pci/devices");
        fake
    }

    fn host(&self) -> Host {
        self.host_with_unwilling(&[])
    }

    fn host_with_unwilling(&self, unwilling: &'static [&'static str]) -> Host {
        let root = self.root.path().to_owned();
        Host::at(self.root.path(), Box::new(Kernel { root, unwilling }))
    }

    fn folder(&self, path: &str) -> PathBuf {
        let path = self.root.path().join(path);
        fs::create_dir_all(&path).unwrap();
        path
    }

    fn file(&self, path: &str, text: &str) {
        let path = self.root.path().join(path);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, text).unwrap();
    }

    fn link(&self, from: &str, to: &str) {
        let from = self.root.path().join(from);
        fs::create_dir_all(from.parent().unwrap()).unwrap();
        symlink(self.root.path().join(to), from).unwrap();
    }

    /// A function with a driver (none if empty) in an IOMMU group.
    fn function(&self, address: &str, ids: [&str; 3], driver: &str, group: Option<u32>) {
        let real = format!("sys/devices/pci0000:00/{address}");
        for (name, value) in ["vendor", "device", "class"].into_iter().zip(ids) {
            self.file(&format!("{real}/{name}"), &format!("0x{value}\n"));
        }
        self.file(&format!("{real}/driver_override"), "(null)\n");
        self.file(&format!("{real}/home"), driver);
        let header = if ids[2].starts_with("0604") { 1 } else { 0 };
        let mut config = [0u8; 64];
        config[0x0e] = header;
        fs::write(self.root.path().join(format!("{real}/config")), config).unwrap();
        self.link(&format!("sys/bus/pci/devices/{address}"), &real);
        if !driver.is_empty() {
            self.link(&format!("{real}/driver"), &format!("sys/bus/pci/drivers/{driver}"));
        }
        if let Some(group) = group {
            self.link(&format!("{real}/iommu_group"), &format!("sys/kernel/iommu_groups/{group}"));
            self.link(&format!("sys/kernel/iommu_groups/{group}/devices/{address}"), &real);
        }
    }

    fn nvme(&self) {
        self.function("0000:01:00.0", ["1b36", "0010", "010802"], "nvme", Some(2));
    }

    /// A block device of the NVMe disk, or below another block device.
    fn block(&self, path: &str, number: &str) {
        let name = path.rsplit('/').next().unwrap();
        self.file(&format!("{path}/dev"), number);
        self.link(&format!("sys/class/block/{name}"), path);
    }

    fn disk(&self) -> &'static str {
        let disk = "sys/devices/pci0000:00/0000:01:00.0/nvme/nvme0/nvme0n1";
        self.block(disk, "259:0");
        self.link("sys/block/nvme0n1", disk);
        self.block(&format!("{disk}/nvme0n1p1"), "259:1");
        self.file(&format!("{disk}/nvme0n1p1/partition"), "1");
        disk
    }

    fn mounted(&self, number: &str, place: &str, source: &str) {
        let line = format!("22 1 {number} / {place} rw,relatime shared:1 - ext4 {source} rw\n");
        self.file("proc/self/mountinfo", &line);
    }

    fn driver(&self, address: &str) -> Option<String> {
        link_name(&self.root.path().join(format!("sys/bus/pci/devices/{address}/driver")))
    }

    /// Everything that stands against giving away the NVMe disk.
    fn obstacles(&self) -> Vec<Refusal> {
        let host = self.host();
        let functions = host.select(slot()).unwrap();
        host.obstacles(&functions[0], &functions)
    }
}

fn slot() -> Selection {
    "01:00".parse().unwrap()
}

fn address(text: &str) -> PciAddress {
    text.parse().unwrap()
}

#[test]
fn a_function_is_read_from_sysfs() {
    let fake = Fake::new();
    fake.nvme();
    let resource = "0x0000000010000000 0x0000000010003fff 0x0000000000140204\n\
        0x0000000000000000 0x0000000000000000 0x0000000000000000\n\
        0x0000000000001000 0x000000000000101f 0x0000000000040101\n\
        0x0000008000000000 0x000000800fffffff 0x000000000014220c\n";
    fake.file("sys/devices/pci0000:00/0000:01:00.0/resource", resource);
    let all = fake.host().functions().unwrap();
    assert_eq!(all.len(), 1);
    let f = &all[0];
    assert_eq!((f.vendor, f.device, f.class), (0x1b36, 0x10, 0x01_0802));
    assert_eq!((f.driver.as_deref(), f.group, f.bridge), (Some("nvme"), Some(2), false));
    let memory = |wide, prefetchable| BarSpace::Memory { wide, prefetchable };
    let expected = [
        BarInfo { index: 0, space: memory(true, false), len: 16 << 10 },
        BarInfo { index: 2, space: BarSpace::Io, len: 32 },
        BarInfo { index: 3, space: memory(true, true), len: 256 << 20 },
    ];
    assert_eq!(f.bars, expected);
    assert_eq!(f.io_ports, IoPorts::None, "the header says nothing of ports");
    let mut config = [0; 64];
    config[0x18..0x1c].copy_from_slice(&0x1001_u32.to_le_bytes());
    fs::write(fake.root.path().join("sys/devices/pci0000:00/0000:01:00.0/config"), config).unwrap();
    assert_eq!(fake.host().functions().unwrap()[0].io_ports, IoPorts::Reachable);
    let unset = resource.replace("0x0000000000040101", "0x0000000020040101");
    fake.file("sys/devices/pci0000:00/0000:01:00.0/resource", &unset);
    let function = fake.host().functions().unwrap().remove(0);
    assert_eq!((function.io_ports, function.bars.len()), (IoPorts::Unassigned, 2));
    assert!(fake.obstacles().is_empty());
}

#[test]
fn names_come_from_the_hosts_database_or_are_numbers() {
    let fake = Fake::new();
    fake.nvme();
    let function = &fake.host().functions().unwrap()[0];
    let none = fake.host().names();
    assert_eq!((none.device(function), none.class(function)), ("1b36:0010".into(), "class 0108".into()));
    let database = "1b36  Red Hat, Inc.\n\t0010  QEMU NVM Express Controller\nC 01  Mass storage controller\n\
        \t08  Non-Volatile memory controller\n";
    fake.file("usr/share/misc/pci.ids", database);
    let names = fake.host().names();
    assert_eq!(names.device(function), "Red Hat, Inc. QEMU NVM Express Controller");
    assert_eq!(names.class(function), "Non-Volatile memory controller");
}

#[test]
fn binding_and_releasing_go_there_and_back() {
    let fake = Fake::new();
    fake.nvme();
    let host = fake.host();
    assert_eq!(host.bind(slot()).unwrap(), [address("01:00.0")]);
    assert_eq!(fake.driver("0000:01:00.0").as_deref(), Some("vfio-pci"));
    assert!(matches!(host.bind(slot()), Err(Refusal::AlreadyBound(_))));
    let released = host.release(slot()).unwrap();
    assert_eq!(released, [(address("01:00.0"), Some("nvme".into()))]);
    assert!(matches!(host.release(slot()), Err(Refusal::NotOurs(_))));
}

#[test]
fn a_slot_is_bound_whole_and_a_function_alone() {
    let fake = Fake::new();
    for function in ["0000:01:00.0", "0000:01:00.1"] {
        fake.function(function, ["8086", "10d3", "020000"], "e1000e", Some(3));
    }
    let host = fake.host();
    // Alone it is not viable: the other function is in its group.
    let alone = host.bind(Selection::from(address("01:00.1"))).unwrap_err();
    assert!(
        matches!(&alone, Refusal::GroupShared { others, .. } if others == "0000:01:00.0 (driver e1000e)"),
        "{alone}"
    );
    assert_eq!(host.bind(slot()).unwrap().len(), 2);
    assert_eq!(host.release(Selection::from(address("01:00.1"))).unwrap().len(), 1);
    assert_eq!(fake.driver("0000:01:00.0").as_deref(), Some("vfio-pci"));
    assert_eq!(fake.driver("0000:01:00.1").as_deref(), Some("e1000e"));
}

#[test]
fn a_binding_that_fails_is_undone() {
    let fake = Fake::new();
    fake.nvme();
    let error = fake.host_with_unwilling(&["vfio-pci"]).bind(slot()).unwrap_err();
    assert!(matches!(error, Refusal::NotTaken { .. }), "{error}");
    assert_eq!(fake.driver("0000:01:00.0").as_deref(), Some("nvme"));
    assert_eq!(fake.host().functions().unwrap()[0].driver_override, None);
}

#[test]
fn without_vfio_nothing_is_touched() {
    let fake = Fake::new();
    fake.nvme();
    fs::remove_dir(fake.root.path().join("sys/bus/pci/drivers/vfio-pci")).unwrap();
    assert!(matches!(fake.host().bind(slot()), Err(Refusal::NoVfio)));
    assert_eq!(fake.driver("0000:01:00.0").as_deref(), Some("nvme"));
}

#[test]
fn what_is_not_there_is_unknown() {
    let fake = Fake::new();
    fake.nvme();
    for text in ["02:00", "01:00.1", "0001:01:00"] {
        let selection: Selection = text.parse().unwrap();
        assert!(matches!(fake.host().bind(selection), Err(Refusal::Unknown(s)) if s == selection));
        assert!(matches!(fake.host().release(selection), Err(Refusal::Unknown(_))));
    }
}

#[test]
fn without_an_iommu_it_is_refused() {
    let fake = Fake::new();
    fake.function("0000:01:00.0", ["1b36", "0010", "010802"], "nvme", None);
    assert!(matches!(fake.obstacles()[..], [Refusal::NoIommu(_)]));
    assert!(matches!(fake.host().bind(slot()), Err(Refusal::NoIommu(_))));
}

#[test]
fn without_a_driver_its_group_may_be_yet_to_come() {
    let fake = Fake::new();
    fake.function("0000:01:00.0", ["1234", "11e8", "00ff00"], "", None);
    assert!(matches!(fake.obstacles()[..], [Refusal::NoIommu(_)]), "no IOMMU at all");
    fake.folder("sys/kernel/iommu_groups/0");
    assert!(fake.obstacles().is_empty());
    // vfio-pci takes nothing without a group.
    let error = fake.host_with_unwilling(&["vfio-pci"]).bind(slot()).unwrap_err();
    assert!(matches!(error, Refusal::NoIommu(_)), "{error}");
}

#[test]
fn a_group_that_shows_only_with_the_driver_is_looked_at_then() {
    let fake = Fake::new();
    fake.function("0000:01:00.0", ["1b36", "0010", "010802"], "nvme", Some(2));
    fake.function("0000:01:00.1", ["8086", "10d3", "020000"], "", Some(2));
    let sibling = fake.root.path().join("sys/bus/pci/devices/0000:01:00.1");
    fs::rename(sibling.join("iommu_group"), sibling.join("late_group")).unwrap();
    let error = fake.host().bind("01:00.1".parse().unwrap()).unwrap_err();
    assert!(matches!(error, Refusal::GroupShared { group: 2, .. }), "{error}");
    assert_eq!((fake.driver("0000:01:00.0").as_deref(), fake.driver("0000:01:00.1")), (Some("nvme"), None));
    assert_eq!(fake.host().bind(slot()).unwrap().len(), 2, "together they can be given");
}

#[test]
fn a_group_with_foreign_devices_is_refused_and_one_with_bridges_is_not() {
    let fake = Fake::new();
    fake.nvme();
    fake.function("0000:00:01.0", ["1b36", "000c", "060400"], "pcieport", Some(2));
    fake.function("0000:01:01.0", ["1234", "11e8", "00ff00"], "", Some(2));
    assert!(fake.obstacles().is_empty());
    fake.function("0000:02:00.0", ["8086", "10d3", "020000"], "e1000e", Some(2));
    let [Refusal::GroupShared { group: 2, others, .. }] = &fake.obstacles()[..] else { panic!() };
    assert_eq!(others, "0000:02:00.0 (driver e1000e)");
    // The host bridge has the config header of an endpoint.
    fake.function("0000:00:00.0", ["1b36", "0008", "060000"], "", None);
    for bridge in ["00:01", "00:00"] {
        assert!(matches!(fake.host().bind(bridge.parse().unwrap()), Err(Refusal::Bridge(_))));
    }
}

#[test]
fn a_disk_that_is_mounted_is_refused_through_every_layer() {
    let fake = Fake::new();
    fake.nvme();
    let disk = fake.disk();
    assert!(fake.obstacles().is_empty(), "a disk that nobody uses is free");
    let expect = |part: &str| {
        let error = fake.host().bind(slot()).unwrap_err();
        assert!(matches!(error, Refusal::Disk { .. }) && error.to_string().contains(part), "{error}");
    };
    fake.mounted("259:0", "/data", "/dev/nvme0n1");
    expect("nvme0n1 is mounted at /data;");
    fake.mounted("259:1", "/", "/dev/root");
    expect("nvme0n1 (nvme0n1p1) is mounted at /;");
    // btrfs has no number of its own in the list of mounts, but names its device.
    fake.mounted("0:35", "/home", "/dev/nvme0n1p1");
    expect("is mounted at /home");
    // Device mapper on RAID on the partition.
    fake.file("proc/self/mountinfo", "");
    fake.block("sys/devices/virtual/block/md0", "9:0");
    fake.block("sys/devices/virtual/block/dm-0", "253:0");
    fake.folder(&format!("{disk}/nvme0n1p1/holders/md0"));
    fake.folder("sys/devices/virtual/block/md0/holders/dm-0");
    assert!(fake.obstacles().is_empty());
    fake.mounted("253:0", "/srv/my\\040disk", "/dev/mapper/vg-lv");
    expect("nvme0n1 (dm-0) is mounted at /srv/my disk");
    fake.file("proc/self/mountinfo", "");
    fake.file("proc/swaps", "Filename Type Size Used Priority\n/dev/nvme0n1p1 partition 1 0 -2\n");
    expect("is swap space");
    fake.file("proc/swaps", "");
    fake.folder("sys/fs/btrfs/uuid/devices/nvme0n1p1");
    expect("mounted btrfs");
    assert_eq!(fake.driver("0000:01:00.0").as_deref(), Some("nvme"));
}

#[test]
fn a_disk_with_several_paths_is_found() {
    let fake = Fake::new();
    fake.nvme();
    fake.folder("sys/devices/pci0000:00/0000:01:00.0/nvme/nvme0/nvme0c0n1");
    fake.block("sys/devices/virtual/nvme-subsystem/nvme-subsys0/nvme0n1", "259:0");
    fake.link("sys/block/nvme0n1", "sys/devices/virtual/nvme-subsystem/nvme-subsys0/nvme0n1");
    fake.mounted("259:0", "/", "/dev/nvme0n1");
    assert!(matches!(fake.obstacles()[..], [Refusal::Disk { .. }]));
}

#[test]
fn a_network_in_use_is_refused() {
    let fake = Fake::new();
    fake.function("0000:01:00.0", ["8086", "10d3", "020000"], "e1000e", Some(2));
    let interface = "sys/devices/pci0000:00/0000:01:00.0/net/eth0";
    fake.folder(interface);
    fake.link("sys/class/net/eth0", interface);
    assert!(fake.obstacles().is_empty(), "an interface that nobody uses is free");
    let route = |line: &str| {
        let head = "Iface Destination Gateway Flags RefCnt Use Metric Mask MTU Window IRTT";
        fake.file("proc/net/route", &format!("{head}\n{line}\n"));
    };
    let expect = |part: &str| {
        let error = fake.host().bind(slot()).unwrap_err();
        assert!(matches!(error, Refusal::Network { .. }) && error.to_string().contains(part), "{error}");
    };
    route("eth0\t00000000\t0202000A\t0003\t0\t0\t0\t00000000\t0\t0\t0");
    expect("eth0 carries the default route");
    route("eth0\t0002000A\t00000000\t0001\t0\t0\t0\t00FFFFFF\t0\t0\t0");
    expect("eth0 is up and has an address");
    route("eth1\t00000000\t0202000A\t0003\t0\t0\t0\t00000000\t0\t0\t0");
    assert!(fake.obstacles().is_empty(), "another interface's route");
    fake.folder("sys/devices/virtual/net/br0");
    fake.link("sys/class/net/br0", "sys/devices/virtual/net/br0");
    fake.link(&format!("{interface}/master"), "sys/devices/virtual/net/br0");
    route("br0\t0002000A\t00000000\t0001\t0\t0\t0\t00FFFFFF\t0\t0\t0");
    expect("eth0 (through br0) is up and has an address");
    route("");
    fake.file("proc/net/if_inet6", "fe800000000000000000000000000001 02 40 20 80 eth0\n");
    assert!(fake.obstacles().is_empty(), "an address of the link alone");
    fake.file("proc/net/if_inet6", "20010db8000000000000000000000001 02 40 00 80 eth0\n");
    expect("is up and has an address");
    fake.file(
        "proc/net/ipv6_route",
        &format!("{z} 00 {z} 00 {z} 00000400 0 0 00000001 eth0\n", z = "0".repeat(32)),
    );
    expect("carries the default route");
}

#[test]
fn one_in_quarantine_is_refused_until_released() {
    let fake = Fake::new();
    fake.nvme();
    let host = fake.host();
    host.bind(slot()).unwrap();
    fake.file("sys/devices/pci0000:00/0000:01:00.0/driver_override", QUARANTINED);
    assert!(matches!(fake.obstacles()[..], [Refusal::Quarantined(_)]));
    assert!(matches!(host.bind(slot()), Err(Refusal::Quarantined(_))));
    host.release(slot()).unwrap();
    assert_eq!(fake.driver("0000:01:00.0").as_deref(), Some("nvme"));
    assert!(fake.obstacles().is_empty());
}

#[cfg(target_os = "linux")]
#[test]
fn what_is_not_bound_is_not_opened() {
    let fake = Fake::new();
    fake.nvme();
    let refused =
        |fake: &Fake| fake.host().open_slot(slot(), crate::vfio::DmaPolicy::Identity).err().unwrap();
    let error = refused(&fake);
    assert!(matches!(&error, Refusal::NotBound { driver, .. } if driver == "nvme"), "{error}");
    assert!(error.to_string().contains("sudo outboard devices bind 0000:01:00`"), "{error}");
    fake.disk();
    fake.mounted("259:0", "/", "/dev/nvme0n1");
    assert!(matches!(refused(&fake), Refusal::Disk { .. }));
}

#[test]
fn files_that_cannot_be_written_say_so() {
    let fake = Fake::new();
    fake.nvme();
    struct Nobody;
    impl SysfsWriter for Nobody {
        fn write(&self, _: &Path, _: &str) -> io::Result<()> {
            Err(io::ErrorKind::PermissionDenied.into())
        }
    }
    let error = Host::at(fake.root.path(), Box::new(Nobody)).bind(slot()).unwrap_err();
    assert!(matches!(error, Refusal::Denied { .. }) && error.to_string().contains("sudo"), "{error}");
}
