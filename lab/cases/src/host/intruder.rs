//! An intruder in a thread of a running process: makes it call the kernel with whatever arguments, in the thread's own state and under its own
//! filters, by ptrace(2). So the program under test is the one that people run, without a hook for tests in it.
#![allow(unsafe_code, reason = "ptrace and wait4 with structures of the kernel's")]

use anyhow::{Context, Result, bail, ensure};
use nix::libc;
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::PathBuf;

/// The instruction `svc #0`.
const SVC: u32 = 0xd400_0001;
/// PTRACE_O_TRACESYSGOOD marks a stop at a system call so.
const AT_CALL: i32 = libc::SIGTRAP | 0x80;
/// NT_PRSTATUS (linux/elf.h): the general registers.
const REGISTERS: usize = 1;
/// x8 has the number of the call (Linux, arm64).
const NUMBER: usize = 8;
/// Below the stack of a thread that stands in a system call nothing is in use; the signal handler's frame would be, but comes later.
const SCRATCH_BELOW: u64 = 16 << 10;

/// What became of a call.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Answer {
    /// The kernel made it, and returned this.
    Returned(i64),
    /// The filter does not allow it: SIGSYS with this call's number is about to be delivered.
    Forbidden(i64),
}

/// `struct user_pt_regs` (arm64's asm/ptrace.h).
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
struct Registers {
    x: [u64; 31],
    sp: u64,
    pc: u64,
    pstate: u64,
}

/// A thread that is held. Dropping it lets it go on as if nothing had been.
pub struct Intruder {
    thread: libc::pid_t,
    memory: File,
    before: Registers,
    /// Places of [`SVC`] in the program.
    calls: [u64; 2],
}

impl Intruder {
    /// Holds thread `thread` of process `process`. For one's own children and as root.
    pub fn enter(process: u32, thread: u32) -> Result<Self> {
        let memory = File::options().read(true).write(true).open(format!("/proc/{process}/mem"))?;
        let calls = find_calls(process, &memory)?;
        let thread = libc::pid_t::try_from(thread)?;
        ptrace(libc::PTRACE_SEIZE, thread, 0, libc::PTRACE_O_TRACESYSGOOD as usize)
            .context("PTRACE_SEIZE")?;
        let mut intruder = Self { thread, memory, before: Registers::default(), calls };
        ptrace(libc::PTRACE_INTERRUPT, thread, 0, 0).context("PTRACE_INTERRUPT")?;
        intruder.wait()?;
        intruder.before = intruder.registers()?;
        Ok(intruder)
    }

    /// Puts `bytes` where a call can point to; at most 4 KiB, `slot` keeps several apart.
    pub fn put(&self, slot: u64, bytes: &[u8]) -> Result<i64> {
        let at = self.before.sp - SCRATCH_BELOW + (slot << 12);
        self.memory.write_all_at(bytes, at).context("writing to the thread's stack")?;
        Ok(i64::try_from(at)?)
    }

    /// Has the thread make system call `number`. A call that is forbidden leaves no trace: the signal is taken away.
    pub fn call(&mut self, number: i64, arguments: &[i64]) -> Result<Answer> {
        let answer = self.make(number, arguments)?;
        if let Answer::Forbidden(_) = answer {
            // To where the signal would be delivered; then it goes on without.
            ptrace(libc::PTRACE_CONT, self.thread, 0, 0)?;
            let status = self.wait()?;
            ensure!(stopped_by(status) == Some(libc::SIGSYS), "stopped by {status:#x} and not by SIGSYS");
        }
        self.set_registers(&self.before)?;
        Ok(answer)
    }

    /// The same, and what comes of it comes: the thread is let go at once.
    pub fn call_and_leave(mut self, number: i64, arguments: &[i64]) -> Result<Answer> {
        let answer = self.make(number, arguments)?;
        ensure!(matches!(answer, Answer::Forbidden(_)), "call {number} was made: {answer:?}");
        ptrace(libc::PTRACE_CONT, self.thread, 0, 0)?;
        let status = self.wait()?;
        let signal = stopped_by(status).with_context(|| format!("it is not stopped but {status:#x}"))?;
        ptrace(libc::PTRACE_DETACH, self.thread, 0, usize::try_from(signal)?)?;
        // Nothing to undo.
        self.thread = 0;
        Ok(answer)
    }

    fn make(&mut self, number: i64, arguments: &[i64]) -> Result<Answer> {
        let mut registers = self.before;
        for (register, argument) in
            registers.x.iter_mut().zip(arguments.iter().chain(std::iter::repeat(&0)).take(6))
        {
            *register = argument.cast_unsigned();
        }
        registers.x[NUMBER] = number.cast_unsigned();
        // Not the one at which it stands: the kernel takes that for the call to be begun again.
        registers.pc = *self.calls.iter().find(|at| **at != self.before.pc).context("no other svc")?;
        self.set_registers(&registers)?;
        for _ in ["to the call", "out of it"] {
            ptrace(libc::PTRACE_SYSCALL, self.thread, 0, 0)?;
            let status = self.wait()?;
            ensure!(stopped_by(status) == Some(AT_CALL), "stopped by {status:#x} and not at the call");
        }
        if self.has_sigsys()? {
            return Ok(Answer::Forbidden(number));
        }
        Ok(Answer::Returned(self.registers()?.x[0].cast_signed()))
    }

    fn has_sigsys(&self) -> Result<bool> {
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.thread))?;
        let pending = status.lines().find_map(|line| line.strip_prefix("SigPnd:")).context("no SigPnd")?;
        Ok(u64::from_str_radix(pending.trim(), 16)? >> (libc::SIGSYS - 1) & 1 == 1)
    }

    fn registers(&self) -> Result<Registers> {
        let mut registers = Registers::default();
        let mut part = libc::iovec {
            iov_base: std::ptr::from_mut(&mut registers).cast(),
            iov_len: size_of::<Registers>(),
        };
        ptrace(libc::PTRACE_GETREGSET, self.thread, REGISTERS, std::ptr::from_mut(&mut part) as usize)?;
        Ok(registers)
    }

    fn set_registers(&self, registers: &Registers) -> Result<()> {
        let mut registers = *registers;
        let mut part = libc::iovec {
            iov_base: std::ptr::from_mut(&mut registers).cast(),
            iov_len: size_of::<Registers>(),
        };
        ptrace(libc::PTRACE_SETREGSET, self.thread, REGISTERS, std::ptr::from_mut(&mut part) as usize)
    }

    /// The thread's next stop.
    fn wait(&self) -> Result<i32> {
        let mut status = 0;
        // SAFETY: `status` is writable. __WALL waits for threads of children also.
        let waited = unsafe { libc::waitpid(self.thread, &mut status, libc::__WALL) };
        ensure!(waited == self.thread, "waiting for thread {}: {}", self.thread, io::Error::last_os_error());
        ensure!(libc::WIFSTOPPED(status), "thread {} has ended: {status:#x}", self.thread);
        Ok(status)
    }
}

impl Drop for Intruder {
    fn drop(&mut self) {
        if self.thread != 0 {
            // It may be gone.
            let _ = self.set_registers(&self.before);
            let _ = ptrace(libc::PTRACE_DETACH, self.thread, 0, 0);
        }
    }
}

fn stopped_by(status: i32) -> Option<i32> {
    libc::WIFSTOPPED(status).then(|| libc::WSTOPSIG(status))
}

fn ptrace(request: impl Into<i64>, thread: libc::pid_t, address: usize, data: usize) -> Result<()> {
    let request = request.into();
    // SAFETY: the callers point `data` at structures that live as long as the call, or give numbers.
    let result = unsafe { libc::syscall(libc::SYS_ptrace, request, thread, address, data) };
    if result < 0 {
        bail!("ptrace request {request:#x} of thread {thread}: {}", io::Error::last_os_error());
    }
    Ok(())
}

/// Two places in the program's code at which there is a system call.
fn find_calls(process: u32, memory: &File) -> Result<[u64; 2]> {
    let maps = std::fs::read_to_string(format!("/proc/{process}/maps"))?;
    let program = std::fs::read_link(format!("/proc/{process}/exe")).unwrap_or_else(|_| PathBuf::new());
    let code =
        maps.lines().find(|line| line.contains(" r-xp ") && line.ends_with(&*program.to_string_lossy()));
    let (range, _) =
        code.context("the program has no code")?.split_once(' ').context("a mapping has a range")?;
    let (from, to) = range.split_once('-').context("a range has two ends")?;
    let (from, to) = (u64::from_str_radix(from, 16)?, u64::from_str_radix(to, 16)?);
    let mut bytes = vec![0; usize::try_from(to - from)?];
    memory.read_exact_at(&mut bytes, from).context("reading the program's code")?;
    let words = bytes.chunks_exact(4).map(|word| u32::from_le_bytes([word[0], word[1], word[2], word[3]]));
    let mut found = (from..).step_by(4).zip(words).filter(|(_, word)| *word == SVC).map(|(at, _)| at);
    Ok([found.next().context("no svc in the program")?, found.next().context("only one svc in the program")?])
}
