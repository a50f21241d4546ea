//! Block devices of the host: which cannot be written, and who has them.

#![allow(unsafe_code)] // UNSAFETY: ioctl(2) has no wrapper in std.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::MetadataExt;

/// The device takes no writes, whatever the mode of its file.
#[cfg(target_os = "linux")]
pub fn is_read_only(file: &File) -> io::Result<bool> {
    /// include/uapi/linux/fs.h: `_IO(0x12, 94)`, an int.
    const BLKROGET: libc::c_ulong = 0x125e;
    let mut read_only: libc::c_int = 0;
    // SAFETY: the descriptor is open; the command writes an int to where it is told to.
    if unsafe { libc::ioctl(file.as_raw_fd(), BLKROGET as _, &mut read_only) } == 0 {
        return Ok(read_only != 0);
    }
    Err(io::Error::last_os_error())
}

#[cfg(target_os = "macos")]
pub fn is_read_only(file: &File) -> io::Result<bool> {
    /// sys/disk.h: `DKIOCISWRITABLE`, `_IOR('d', 29, uint32_t)`.
    const DKIOCISWRITABLE: libc::c_ulong = 0x4004_641d;
    let mut writable: u32 = 0;
    // SAFETY: the descriptor is open; the command writes 32 bits to where it is told to.
    if unsafe { libc::ioctl(file.as_raw_fd(), DKIOCISWRITABLE, &mut writable) } == 0 {
        return Ok(writable == 0);
    }
    Err(io::Error::last_os_error())
}

#[cfg(not(any(target_os = "linux", target_os = "macos")))]
pub fn is_read_only(_: &File) -> io::Result<bool> {
    Ok(false)
}

/// Who has the block device that `file` names, or a part of it, or the whole that it is a part of, with what to do about it:
/// for the message, after the kernel has said that it is taken.
pub fn users(metadata: &std::fs::Metadata) -> String {
    let mut users = mounts(metadata.rdev());
    users.extend(holders(metadata.rdev()));
    if users.is_empty() {
        return "something of the host or another program has it, its whole disk or one of its partitions to itself".into();
    }
    format!("{}: give it free first (`umount`, `swapoff`, …)", users.join(", "))
}

/// Mount points of the device, its whole disk and its partitions.
#[cfg(target_os = "linux")]
fn mounts(device: u64) -> Vec<String> {
    let mut related = vec![number(device)];
    let folder = std::path::PathBuf::from(format!("/sys/dev/block/{}", number(device)));
    related.extend(parts(&folder));
    if folder.join("partition").exists() {
        // A partition's folder lies within that of its disk.
        related.extend(read_number(&folder.join("../dev")));
    }
    let table = std::fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
    let mut found = Vec::new();
    for line in table.lines() {
        // proc_pid_mountinfo(5): ID, parent, major:minor, root, mount point, ….
        let mut fields = line.split(' ').skip(2);
        if let (Some(number), Some(place)) = (fields.next(), fields.nth(1))
            && related.iter().any(|one| one == number)
        {
            found.push(format!("mounted on {place}"));
        }
    }
    found
}

/// Device mapper, RAID and the like that are made of the device.
#[cfg(target_os = "linux")]
fn holders(device: u64) -> Vec<String> {
    let Ok(entries) = std::fs::read_dir(format!("/sys/dev/block/{}/holders", number(device))) else {
        return Vec::new();
    };
    entries.flatten().map(|entry| format!("a part of {}", entry.file_name().to_string_lossy())).collect()
}

/// Numbers of the partitions of the disk whose folder this is.
#[cfg(target_os = "linux")]
fn parts(folder: &std::path::Path) -> Vec<String> {
    let Ok(entries) = std::fs::read_dir(folder) else { return Vec::new() };
    let partitions =
        entries.flatten().map(|entry| entry.path()).filter(|path| path.join("partition").exists());
    partitions.filter_map(|path| read_number(&path.join("dev"))).collect()
}

#[cfg(target_os = "linux")]
fn read_number(path: &std::path::Path) -> Option<String> {
    Some(std::fs::read_to_string(path).ok()?.trim().to_owned())
}

#[cfg(target_os = "linux")]
fn number(device: u64) -> String {
    format!("{}:{}", libc::major(device), libc::minor(device))
}

#[cfg(not(target_os = "linux"))]
fn mounts(_: u64) -> Vec<String> {
    Vec::new()
}

#[cfg(not(target_os = "linux"))]
fn holders(_: u64) -> Vec<String> {
    Vec::new()
}
