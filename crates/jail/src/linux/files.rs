//! Landlock: which places can still be opened.

use crate::{Access, Error, Policy};
use landlock::{
    ABI, Access as _, AccessFs, AccessNet, BitFlags, CompatLevel, Compatible, PathBeneath, PathFd, Ruleset,
    RulesetAttr, RulesetCreated, RulesetCreatedAttr, Scope,
};
use std::path::{Path, PathBuf};

/// The newest ABI whose rights are named here. An older kernel restricts what it knows.
const NEWEST: ABI = ABI::V6;
/// `LANDLOCK_CREATE_RULESET_VERSION` of landlock_create_ruleset(2).
const ASK_VERSION: libc::c_uint = 1;

/// The kernel's ABI; `None` if it has no Landlock or it is not switched on.
pub(super) fn abi() -> Option<u32> {
    // SAFETY: asked for the version, the call takes no attributes.
    let abi = unsafe {
        libc::syscall(
            libc::SYS_landlock_create_ruleset,
            std::ptr::null::<libc::c_void>(),
            0usize,
            ASK_VERSION,
        )
    };
    u32::try_from(abi).ok().filter(|abi| *abi > 0)
}

/// Nothing but `files`, and TCP connections only with `network`. Nobody is bound by it yet.
pub(super) fn ruleset(files: &[(PathBuf, Access)], network: bool) -> Result<RulesetCreated, Error> {
    let failed = |error| Error::new("making Landlock rules", error);
    let mut ruleset = Ruleset::default().set_compatibility(CompatLevel::BestEffort);
    ruleset = ruleset.handle_access(AccessFs::from_all(NEWEST)).map_err(failed)?;
    // Forwards listen already. Where connections go is the network's own business (docs/running.md).
    let net = if network { AccessNet::BindTcp.into() } else { AccessNet::from_all(NEWEST) };
    ruleset = ruleset.handle_access(net).map_err(failed)?;
    ruleset = ruleset.scope(Scope::from_all(NEWEST)).map_err(failed)?;
    let mut created = ruleset.create().map_err(failed)?;
    for (path, access) in files {
        let Ok(place) = PathFd::new(path) else {
            tracing::debug!("{} is not there and stays out of reach", path.display());
            continue;
        };
        let rights = rights(*access, path.is_dir());
        created = created.add_rule(PathBeneath::new(place, rights)).map_err(failed)?;
    }
    Ok(created)
}

/// All places of `policy` that the process itself opens.
pub(super) fn of_process(policy: &Policy) -> Result<RulesetCreated, Error> {
    ruleset(&policy.files, policy.network)
}

fn rights(access: Access, folder: bool) -> BitFlags<AccessFs> {
    let rights = match access {
        Access::Read => AccessFs::ReadFile.into(),
        Access::ReadBelow => AccessFs::ReadFile | AccessFs::ReadDir,
        Access::Write => AccessFs::WriteFile.into(),
        Access::Device => AccessFs::ReadFile | AccessFs::WriteFile | AccessFs::IoctlDev | AccessFs::ReadDir,
        Access::Rotate => {
            AccessFs::ReadFile
                | AccessFs::WriteFile
                | AccessFs::Truncate
                | AccessFs::MakeReg
                | AccessFs::RemoveFile
        }
    };
    // The kernel takes no right to a folder's content for a file.
    if folder { rights } else { rights & AccessFs::from_file(NEWEST) }
}

/// The folders in which a file of this name can be replaced: its own, and that of what it is a link to.
pub(super) fn folders_of(path: &Path) -> Vec<PathBuf> {
    let target = std::fs::canonicalize(path).ok();
    let folder =
        |path: &Path| path.parent().filter(|p| !p.as_os_str().is_empty()).map_or(".".into(), Path::to_owned);
    let mut folders = vec![folder(path)];
    folders.extend(target.as_deref().map(folder));
    folders.dedup();
    folders
}
