//! The allow-list: which system calls each kind of thread makes, as data.

use crate::ThreadKind;

/// A system call that is allowed, and with which arguments.
#[derive(Clone, Debug)]
pub(super) struct Call {
    pub(super) number: i64,
    pub(super) name: &'static str,
    pub(super) when: When,
}

/// Arguments with which a call is allowed.
#[derive(Clone, Debug)]
pub(super) enum When {
    /// Any.
    Always,
    /// Those for which every one of the tests of some row holds.
    Any(Vec<Vec<Test>>),
    /// Argument `.0` is one of `.1`; for ioctl(2), with names.
    Among(u8, Vec<Requests>),
}

/// The bits of `mask` in argument `argument` are those of `value`. With a mask of 32 bits only the low half is looked at, which is all that the
/// kernel takes of most arguments.
#[derive(Clone, Copy, Debug)]
pub(super) struct Test {
    pub(super) argument: u8,
    pub(super) mask: u64,
    pub(super) value: u64,
}

const ALL_BITS: u64 = u32::MAX as u64;

const fn is(argument: u8, value: u64) -> Test {
    Test { argument, mask: ALL_BITS, value }
}

const fn bits(argument: u8, mask: u64, value: u64) -> Test {
    Test { argument, mask, value }
}

/// A call that is allowed with any arguments, by its name in libc.
macro_rules! call {
    ($name:ident) => {
        Call { number: libc::$name, name: stringify!($name), when: When::Always }
    };
}

/// Several of them.
macro_rules! calls {
    ($($(#[$attribute:meta])* $name:ident),* $(,)?) => {
        [$($(#[$attribute])* call!($name)),*]
    };
}

/// The pointer is null.
const fn null(argument: u8) -> Test {
    Test { argument, mask: u64::MAX, value: 0 }
}

/// Which process and thread a filter is for: a thread may signal itself and no other process.
#[derive(Clone, Copy, Debug)]
pub(super) struct Who {
    pub(super) process: u32,
    /// `None` for the filter of the whole process.
    pub(super) thread: Option<u32>,
}

/// What threads of `kind` may call.
pub(super) fn of(kind: ThreadKind, who: Who) -> Vec<Call> {
    let mut calls = everyone(who);
    let mut ioctls = vec![TERMINAL];
    match kind {
        ThreadKind::Main => {
            calls.extend(files());
            // flock(2): the machine's name is given up at the end.
            calls.extend(calls![SYS_newfstatat, SYS_statx, SYS_flock]);
            calls.extend(waiting());
            calls.extend(streams());
            ioctls.extend([KVM_MACHINE, KVM_MEMORY, KVM_VCPU, KVM_EVENTS, VFIO_DEVICE, VFIO_DOMAIN]);
        }
        ThreadKind::Signals => calls.extend(streams()),
        ThreadKind::Control => {
            calls.extend(waiting());
            calls.extend(streams());
            calls.extend(looking());
            calls.extend(files());
            calls.extend(calls![SYS_accept4]);
            // An added device presses the attention button of its slot, which is an interrupt.
            ioctls.extend([SOCKETS, VFIO_OPEN, VFIO_DEVICE, VFIO_DOMAIN, KVM_EVENTS]);
        }
        ThreadKind::Vcpu => {
            calls.extend(files());
            calls.extend(waiting());
            calls.extend(streams());
            // Before it first runs, with --high-priority.
            calls.push(Call { when: itself(who), ..call!(SYS_sched_setscheduler) });
            ioctls = vec![KVM_VCPU, KVM_EVENTS, KVM_MEMORY, VFIO_DEVICE, VFIO_DOMAIN, TERMINAL];
        }
        ThreadKind::Block => {
            calls.extend(files());
            ioctls.extend([KVM_EVENTS, BLOCK]);
        }
        ThreadKind::Net => {
            calls.extend(waiting());
            calls.extend(streams());
            calls.extend(connections());
            calls.push(Call { when: internet_sockets(), ..socket() });
            // lseek(2): files about the host's network that are read anew.
            calls.extend(calls![SYS_newfstatat, SYS_statx, SYS_lseek]);
            ioctls.extend([KVM_EVENTS, SOCKETS]);
        }
        ThreadKind::Vsock => {
            calls.extend(waiting());
            calls.extend(streams());
            calls.extend(connections());
            calls.push(Call {
                when: When::Any(vec![vec![is(0, libc::AF_UNIX as u64), stream(1)]]),
                ..socket()
            });
            ioctls.extend([KVM_EVENTS, SOCKETS]);
        }
        ThreadKind::Console => {
            calls.extend(streams());
            calls.extend(calls![SYS_accept4, SYS_newfstatat, SYS_statx]);
            calls.extend(rotation());
            ioctls.extend([KVM_EVENTS, SOCKETS]);
        }
        ThreadKind::Entropy => ioctls.push(KVM_EVENTS),
        ThreadKind::Pci | ThreadKind::Dma => {
            calls.extend(files());
            ioctls.extend([KVM_EVENTS, KVM_MEMORY, VFIO_DEVICE, VFIO_DOMAIN]);
        }
        ThreadKind::Log => calls.extend(rotation()),
    }
    calls.push(Call { number: libc::SYS_ioctl, name: "SYS_ioctl", when: When::Among(1, ioctls) });
    calls
}

/// What the whole process may call: what any of its threads may, and what it takes to start and confine them.
pub(super) fn of_process(who: Who) -> Vec<Call> {
    let who = Who { thread: None, ..who };
    let mut all: Vec<Call> = Vec::new();
    for kind in ThreadKind::ALL {
        for call in of(kind, who) {
            // Its requests are looked at by kind. Allowed as a whole it is not looked at twice: KVM_RUN comes with every exit.
            let call =
                if call.number == libc::SYS_ioctl { Call { when: When::Always, ..call } } else { call };
            add(&mut all, call);
        }
    }
    let threads = libc::CLONE_VM | libc::CLONE_THREAD | libc::CLONE_SIGHAND;
    let spaces = libc::CLONE_NEWNS
        | libc::CLONE_NEWUSER
        | libc::CLONE_NEWPID
        | libc::CLONE_NEWNET
        | libc::CLONE_NEWIPC
        | libc::CLONE_NEWUTS
        | libc::CLONE_NEWCGROUP;
    let new_thread = bits(0, (threads | spaces) as u64, threads as u64);
    let one_of =
        |argument, values: &[u64]| When::Any(values.iter().map(|value| vec![is(argument, *value)]).collect());
    for call in [
        Call { when: When::Any(vec![vec![new_thread]]), ..call!(SYS_clone) },
        // Answered with ENOSYS by a filter of its own: what it may do is behind a pointer.
        call!(SYS_clone3),
        Call {
            when: one_of(0, &[libc::PR_SET_NAME as u64, libc::PR_SET_NO_NEW_PRIVS as u64]),
            ..call!(SYS_prctl)
        },
        call!(SYS_set_robust_list),
        call!(SYS_rseq),
        // glibc's pthread_getattr_np, by which std finds a new thread's guard page.
        call!(SYS_sched_getaffinity),
        // Both can only take away.
        Call { when: one_of(0, &[libc::SECCOMP_SET_MODE_FILTER.into()]), ..call!(SYS_seccomp) },
        call!(SYS_landlock_restrict_self),
    ] {
        add(&mut all, call);
    }
    all
}

/// Adds `call`, or allows it with its arguments also.
fn add(calls: &mut Vec<Call>, call: Call) {
    let Some(there) = calls.iter_mut().find(|there| there.number == call.number) else {
        return calls.push(call);
    };
    match (&mut there.when, call.when) {
        (When::Any(rows), When::Any(more)) => rows.extend(more),
        (When::Any(_), _) => there.when = When::Always,
        (When::Always | When::Among(..), _) => {}
    }
}

/// What the keeper calls: see keeper.rs.
pub(super) fn keeper_calls() -> Vec<Call> {
    let reading = bits(2, (libc::O_ACCMODE | libc::O_CREAT | libc::O_TRUNC) as u64, libc::O_RDONLY as u64);
    let mut calls = Vec::from(calls![
        SYS_recvfrom,
        SYS_sendto,
        SYS_read,
        SYS_close,
        SYS_unlinkat,
        SYS_exit_group,
        SYS_rt_sigreturn,
        SYS_restart_syscall,
        SYS_fcntl,
        #[cfg(target_arch = "x86_64")]
        SYS_unlink,
    ]);
    calls.push(Call { when: When::Any(vec![vec![reading]]), ..call!(SYS_openat) });
    #[cfg(target_arch = "x86_64")]
    calls.push(Call { when: When::Any(vec![vec![Test { argument: 1, ..reading }]]), ..call!(SYS_open) });
    calls
}

/// Memory, locks, time, signals to itself, descriptors that are open: no thread goes without.
fn everyone(who: Who) -> Vec<Call> {
    let mut calls = Vec::from(calls![
        SYS_read,
        SYS_write,
        SYS_readv,
        SYS_writev,
        SYS_close,
        SYS_futex,
        SYS_munmap,
        SYS_mremap,
        SYS_madvise,
        SYS_brk,
        SYS_clock_gettime,
        SYS_clock_nanosleep,
        SYS_nanosleep,
        SYS_sched_yield,
        SYS_gettid,
        SYS_getpid,
        SYS_rt_sigprocmask,
        SYS_rt_sigreturn,
        SYS_rt_sigaction,
        SYS_sigaltstack,
        SYS_restart_syscall,
        SYS_exit,
        SYS_exit_group,
        SYS_ppoll,
        SYS_getrandom,
        SYS_eventfd2,
        SYS_fstat,
        // To the keeper and back.
        SYS_sendto,
        SYS_recvfrom,
        #[cfg(target_arch = "x86_64")]
        SYS_poll,
        #[cfg(target_arch = "x86_64")]
        SYS_epoll_wait,
    ]);
    let no_code =
        |name: Call| Call { when: When::Any(vec![vec![bits(2, libc::PROT_EXEC as u64, 0)]]), ..name };
    calls.push(no_code(call!(SYS_mmap)));
    calls.push(no_code(call!(SYS_mprotect)));
    calls.push(Call { when: When::Any(vec![vec![is(0, who.process.into())]]), ..call!(SYS_tgkill) });
    // musl's abort(3) uses it.
    calls.push(Call { when: itself(who), ..call!(SYS_tkill) });
    let commands = [libc::F_GETFD, libc::F_SETFD, libc::F_GETFL, libc::F_SETFL, libc::F_DUPFD_CLOEXEC];
    let when = When::Any(commands.iter().map(|command| vec![is(1, *command as u64)]).collect());
    calls.push(Call { when, ..call!(SYS_fcntl) });
    calls
}

/// The first argument is the calling thread.
fn itself(who: Who) -> When {
    who.thread.map_or(When::Always, |thread| When::Any(vec![vec![is(0, thread.into())]]))
}

/// Reading and writing disks, kernels and a device's registers.
fn files() -> Vec<Call> {
    Vec::from(calls![
        SYS_pread64,
        SYS_pwrite64,
        SYS_preadv,
        SYS_pwritev,
        SYS_lseek,
        SYS_fsync,
        SYS_fdatasync,
        SYS_fallocate,
        SYS_ftruncate,
        SYS_fstatfs,
    ])
}

/// Waiting for many descriptors.
fn waiting() -> Vec<Call> {
    Vec::from(calls![SYS_epoll_create1, SYS_epoll_ctl, SYS_epoll_pwait])
}

/// What is done with a stream socket that is open.
fn streams() -> Vec<Call> {
    Vec::from(calls![SYS_shutdown, SYS_setsockopt, SYS_getsockopt])
}

/// Connections to others.
fn connections() -> Vec<Call> {
    Vec::from(calls![
        SYS_connect,
        SYS_accept4,
        SYS_bind,
        SYS_getsockname,
        SYS_getpeername,
        SYS_sendmsg,
        SYS_recvmsg,
    ])
}

/// Opening a device of the host, and looking it up before. Landlock says where.
fn looking() -> Vec<Call> {
    let mut calls = Vec::from(calls![
        SYS_openat,
        SYS_newfstatat,
        SYS_statx,
        SYS_readlinkat,
        SYS_getdents64,
        SYS_faccessat,
        SYS_getcwd,
        SYS_geteuid,
    ]);
    // Limits are looked at, not changed.
    calls.push(Call { when: When::Any(vec![vec![null(2)]]), ..call!(SYS_prlimit64) });
    calls
}

/// A full log file makes way for a new one. Landlock says where.
fn rotation() -> Vec<Call> {
    Vec::from(calls![
        SYS_openat,
        SYS_renameat,
        SYS_renameat2,
        SYS_unlinkat,
        SYS_ftruncate,
        SYS_lseek,
        SYS_newfstatat,
        SYS_statx,
        #[cfg(target_arch = "x86_64")]
        SYS_rename,
        #[cfg(target_arch = "x86_64")]
        SYS_unlink,
    ])
}

const fn socket() -> Call {
    call!(SYS_socket)
}

/// SOCK_CLOEXEC and SOCK_NONBLOCK are bits beside the type.
const SOCKET_TYPE: u64 = 0xf;

const fn stream(argument: u8) -> Test {
    bits(argument, SOCKET_TYPE, libc::SOCK_STREAM as u64)
}

/// TCP, UDP and ping (which Linux gives to ordinary users as a kind of datagram); nothing raw.
fn internet_sockets() -> When {
    let mut rows = Vec::new();
    for family in [libc::AF_INET, libc::AF_INET6] {
        for (kind, protocols) in [
            (libc::SOCK_STREAM, &[0, libc::IPPROTO_TCP][..]),
            (libc::SOCK_DGRAM, &[0, libc::IPPROTO_UDP, libc::IPPROTO_ICMP, libc::IPPROTO_ICMPV6][..]),
        ] {
            for protocol in protocols {
                rows.push(vec![
                    is(0, family as u64),
                    bits(1, SOCKET_TYPE, kind as u64),
                    is(2, *protocol as u64),
                ]);
            }
        }
    }
    When::Any(rows)
}

/// Requests of ioctl(2) with their names.
pub(super) type Requests = &'static [(u64, &'static str)];

/// `asm-generic/ioctls.h`: settings and size of a terminal. Every way out of the process gives the user's terminal back.
const TERMINAL: Requests = &[(0x5401, "TCGETS"), (0x5402, "TCSETS"), (0x5413, "TIOCGWINSZ")];
/// The same.
const SOCKETS: Requests = &[(0x5421, "FIONBIO"), (0x5451, "FIOCLEX")];
/// `linux/fs.h`.
const BLOCK: Requests = &[
    (0x8008_1272, "BLKGETSIZE64"),
    (0x1268, "BLKSSZGET"),
    (0x127b, "BLKPBSZGET"),
    (0x1277, "BLKDISCARD"),
    (0x127f, "BLKZEROOUT"),
];
/// `linux/kvm.h`, like the other groups of KVM. The most frequent first.
const KVM_VCPU: Requests = &[
    (0xae80, "KVM_RUN"),
    (0x4010_aeab, "KVM_GET_ONE_REG"),
    (0x4010_aeac, "KVM_SET_ONE_REG"),
    (0x4020_aeae, "KVM_ARM_VCPU_INIT"),
    (0x8040_ae9f, "KVM_GET_VCPU_EVENTS"),
    (0x4040_aea0, "KVM_SET_VCPU_EVENTS"),
    (0x4004_ae99, "KVM_SET_MP_STATE"),
    (0x8004_ae98, "KVM_GET_MP_STATE"),
];
const KVM_EVENTS: Requests = &[
    (0x4008_ae61, "KVM_IRQ_LINE"),
    (0x4020_aea5, "KVM_SIGNAL_MSI"),
    (0x4020_ae76, "KVM_IRQFD"),
    (0x4040_ae79, "KVM_IOEVENTFD"),
];
/// RAM, and BARs that the guest moves.
const KVM_MEMORY: Requests = &[(0x4020_ae46, "KVM_SET_USER_MEMORY_REGION")];
const KVM_MACHINE: Requests = &[
    (0xae01, "KVM_CREATE_VM"),
    (0xae03, "KVM_CHECK_EXTENSION"),
    (0xae04, "KVM_GET_VCPU_MMAP_SIZE"),
    (0xae41, "KVM_CREATE_VCPU"),
    (0x4068_aea3, "KVM_ENABLE_CAP"),
    (0x8020_aeaf, "KVM_ARM_PREFERRED_TARGET"),
    (0xc00c_aee0, "KVM_CREATE_DEVICE"),
    (0x4018_aee1, "KVM_SET_DEVICE_ATTR"),
    (0x4018_aee2, "KVM_GET_DEVICE_ATTR"),
    (0x4018_aee3, "KVM_HAS_DEVICE_ATTR"),
    (0x4008_ae6a, "KVM_SET_GSI_ROUTING"),
];
/// `linux/vfio.h`, like the other groups of VFIO.
const VFIO_DEVICE: Requests = &[
    (0x3b6e, "VFIO_DEVICE_SET_IRQS"),
    (0x3b6f, "VFIO_DEVICE_RESET"),
    (0x3b71, "VFIO_IOMMU_MAP_DMA, VFIO_DEVICE_PCI_HOT_RESET"),
    (0x3b70, "VFIO_IOMMU_GET_INFO, VFIO_DEVICE_GET_PCI_HOT_RESET_INFO"),
];
const VFIO_DOMAIN: Requests = &[(0x3b72, "VFIO_IOMMU_UNMAP_DMA"), (0x3b67, "VFIO_GROUP_GET_STATUS")];
const VFIO_OPEN: Requests = &[
    (0x3b64, "VFIO_GET_API_VERSION"),
    (0x3b65, "VFIO_CHECK_EXTENSION"),
    (0x3b66, "VFIO_SET_IOMMU"),
    (0x3b68, "VFIO_GROUP_SET_CONTAINER"),
    (0x3b69, "VFIO_GROUP_UNSET_CONTAINER"),
    (0x3b6a, "VFIO_GROUP_GET_DEVICE_FD"),
    (0x3b6b, "VFIO_DEVICE_GET_INFO"),
    (0x3b6c, "VFIO_DEVICE_GET_REGION_INFO"),
    (0x3b6d, "VFIO_DEVICE_GET_IRQ_INFO"),
];
