//! Limits and the environment: what every Unix has.

#![allow(unsafe_code)] // UNSAFETY: setrlimit(2) and the C library's environment have no wrapper in std.

use std::io;

/// No core file, which would hold what the guest's disks and connections hold; no more open files than
/// are possible now; at most `memory` bytes of private memory.
pub(crate) fn lower(memory: u64) -> io::Result<()> {
    set(libc::RLIMIT_CORE, libc::rlimit { rlim_cur: 0, rlim_max: 0 })?;
    let mut files = get(libc::RLIMIT_NOFILE)?;
    files.rlim_max = files.rlim_cur;
    set(libc::RLIMIT_NOFILE, files)?;
    // Elsewhere it counts only what brk(2) gives, which no allocator uses.
    if cfg!(target_os = "linux") {
        let most = get(libc::RLIMIT_DATA)?.rlim_max.min(memory);
        set(libc::RLIMIT_DATA, libc::rlimit { rlim_cur: most, rlim_max: most })?;
    }
    Ok(())
}

#[cfg(all(target_os = "linux", target_env = "gnu"))]
type Resource = libc::__rlimit_resource_t;
#[cfg(not(all(target_os = "linux", target_env = "gnu")))]
type Resource = libc::c_int;

fn get(resource: Resource) -> io::Result<libc::rlimit> {
    let mut limit = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
    // SAFETY: `limit` is writable for the call.
    if unsafe { libc::getrlimit(resource, &mut limit) } < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(limit)
}

fn set(resource: Resource, limit: libc::rlimit) -> io::Result<()> {
    // SAFETY: `limit` is readable for the call.
    if unsafe { libc::setrlimit(resource, &limit) } < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

/// Overwrites the environment, values first of all: they often hold secrets. A name that somebody still looks up is not found.
pub(crate) fn forget_environment() {
    // SAFETY: the list ends in a null pointer and each entry in NUL, by the C library's contract; the strings are this process's own and
    // writable. No other thread of ours reads the environment at this time: what is needed of it was read before.
    unsafe {
        let mut entry = *environment();
        while !entry.is_null() && !(*entry).is_null() {
            let text = *entry;
            text.write_bytes(0, libc::strlen(text));
            entry = entry.add(1);
        }
        *environment() = std::ptr::null_mut();
    }
}

#[cfg(target_os = "macos")]
fn environment() -> *mut *mut *mut libc::c_char {
    // SAFETY: it always is the address of the process's `environ`.
    unsafe { libc::_NSGetEnviron() }
}

#[cfg(not(target_os = "macos"))]
fn environment() -> *mut *mut *mut libc::c_char {
    unsafe extern "C" {
        static mut environ: *mut *mut libc::c_char;
    }
    &raw mut environ
}
