//! Seccomp filters out of the allow-list.

use super::calls::{self, Call, Test, When, Who};
use crate::{Error, Mode, ThreadKind};
use seccompiler::{
    BackendError, BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter,
    SeccompRule, TargetArch,
};
use std::collections::BTreeMap;

#[cfg(target_arch = "aarch64")]
const ARCHITECTURE: TargetArch = TargetArch::aarch64;
#[cfg(target_arch = "x86_64")]
const ARCHITECTURE: TargetArch = TargetArch::x86_64;

/// The filter of one thread, that of the calling thread where `who` names it.
pub(super) fn of_thread(kind: ThreadKind, who: Who, mode: Mode) -> Result<BpfProgram, Error> {
    compile(&calls::of(kind, who), mode)
}

/// The filters that hold for every thread of the process, in the order in which they are installed.
pub(super) fn of_process(who: Who, mode: Mode) -> Result<[BpfProgram; 2], Error> {
    // glibc then uses clone(2), whose flags a filter can look at.
    let refused = BTreeMap::from([(libc::SYS_clone3, Vec::new())]);
    let refusal = SeccompAction::Errno(libc::ENOSYS.cast_unsigned());
    let refuses = SeccompFilter::new(refused, SeccompAction::Allow, refusal, ARCHITECTURE);
    let refuses = refuses.and_then(TryInto::try_into).map_err(failed)?;
    Ok([refuses, compile(&calls::of_process(who), mode)?])
}

/// A program that allows `calls`.
pub(super) fn compile(calls: &[Call], mode: Mode) -> Result<BpfProgram, Error> {
    let otherwise = match mode {
        Mode::On | Mode::Off => SeccompAction::Trap,
        Mode::Log => SeccompAction::Log,
    };
    let mut rules = BTreeMap::new();
    for call in calls {
        let when = conditions(&call.when).map_err(failed)?;
        // Twice the same call with conditions: either will do. Without conditions (an empty list) all of it is allowed.
        match rules.entry(call.number) {
            std::collections::btree_map::Entry::Vacant(entry) => drop(entry.insert(when)),
            std::collections::btree_map::Entry::Occupied(mut entry) => {
                let there: &mut Vec<SeccompRule> = entry.get_mut();
                if when.is_empty() {
                    there.clear();
                } else if !there.is_empty() {
                    there.extend(when);
                }
            }
        }
    }
    let filter = SeccompFilter::new(rules, otherwise, SeccompAction::Allow, ARCHITECTURE).map_err(failed)?;
    filter.try_into().map_err(failed)
}

fn failed(error: BackendError) -> Error {
    Error::new("making a seccomp filter", error)
}

fn conditions(when: &When) -> Result<Vec<SeccompRule>, BackendError> {
    match when {
        When::Always => Ok(Vec::new()),
        When::Any(rows) => rows
            .iter()
            .map(|row| SeccompRule::new(row.iter().map(condition).collect::<Result<_, _>>()?))
            .collect(),
        When::Among(argument, groups) => {
            let requests = groups.iter().flat_map(|group| group.iter());
            let equal = |value: u64| {
                SeccompCondition::new(*argument, SeccompCmpArgLen::Dword, SeccompCmpOp::Eq, value)
            };
            requests.map(|(value, _)| SeccompRule::new(vec![equal(*value)?])).collect()
        }
    }
}

fn condition(test: &Test) -> Result<SeccompCondition, BackendError> {
    let comparison = SeccompCmpOp::MaskedEq(test.mask);
    let len = if test.mask > u32::MAX.into() { SeccompCmpArgLen::Qword } else { SeccompCmpArgLen::Dword };
    SeccompCondition::new(test.argument, len, comparison, test.value)
}
