//! What the operating system is asked to do for the secrets in memory: no dump of it, and no swapping out.
//!
//! Each is a switch; what the system refuses is said at start-up.

use anyhow::bail;
use rustix::mm::{MlockAllFlags, mlockall};
use rustix::process::{DumpableBehavior, Resource, Rlimit, getrlimit, set_dumpable_behavior, setrlimit};
use rustix::thread::{CapabilitySet, capabilities};

use crate::config::{LockMemory, MemorySettings};

/// Which kinds of memory a core of this process holds, as bits: none, with 0. For the whole process, so that no page of
/// a key can be forgotten.
const COREDUMP_FILTER: &str = "/proc/self/coredump_filter";

/// What came of locking memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Locking {
    /// All of the process's memory is locked, or nothing is to be.
    Settled,
    /// The system lets this process lock a part of its memory only: the pages with data keys.
    PagesOfKeys,
}

/// Asks the system. Fails only where the configuration requires what it refuses.
pub fn harden(settings: &MemorySettings) -> anyhow::Result<Locking> {
    if !cfg!(feature = "zeroizing-allocator") {
        tracing::warn!(
            "this program was built without the feature zeroizing-allocator: freed memory is not wiped, and may hold \
             plaintext or what keys were read from"
        );
    }
    // Before the next: of who is not dumpable this file is the administrator's.
    if settings.dont_dump
        && let Err(refused) = std::fs::write(COREDUMP_FILTER, "0")
    {
        tracing::warn!(%refused, "the system does not leave this process's memory out of a core");
    }
    if settings.not_dumpable
        && let Err(refused) = set_dumpable_behavior(DumpableBehavior::NotDumpable)
    {
        tracing::warn!(%refused, "the system does not make this process undumpable: others of its user can read its memory");
    }
    if settings.no_core
        && let Err(refused) = setrlimit(Resource::Core, Rlimit { current: Some(0), maximum: Some(0) })
    {
        tracing::warn!(%refused, "the system does not forbid core dumps of this process");
    }
    match settings.lock {
        LockMemory::Off => Ok(Locking::Settled),
        LockMemory::Try | LockMemory::Require => lock(settings.lock == LockMemory::Require),
    }
}

/// All memory, where there is no limit: with one, the process would die of the first allocation beyond it.
fn lock(required: bool) -> anyhow::Result<Locking> {
    let limit = getrlimit(Resource::Memlock).current.filter(|_| !is_above_the_limit());
    let Some(limit) = limit else {
        let all = MlockAllFlags::CURRENT | MlockAllFlags::FUTURE | MlockAllFlags::ONFAULT;
        return match mlockall(all) {
            Ok(()) => Ok(Locking::Settled),
            Err(refused) if required => {
                bail!("memory.lock = \"require\", and the system does not lock memory: {refused}")
            }
            Err(refused) => {
                tracing::warn!(%refused, "the system does not lock this process's memory: keys may reach the swap");
                Ok(Locking::Settled)
            }
        };
    };
    if required {
        bail!(
            "memory.lock = \"require\", and the limit of locked memory is {limit} bytes: raise it to unlimited \
             (LimitMEMLOCK=infinity for systemd, --ulimit memlock=-1 for Docker), or set memory.lock = \"try\""
        );
    }
    if limit == 0 {
        tracing::warn!(
            "the system lets this process lock no memory: raise the limit (LimitMEMLOCK, ulimit -l), or keys may reach the swap"
        );
        return Ok(Locking::Settled);
    }
    tracing::info!(
        limit_bytes = limit,
        "only the pages that data keys lie on are locked: the system limits how much memory this process may lock"
    );
    Ok(Locking::PagesOfKeys)
}

/// Who has CAP_IPC_LOCK has no limit, whatever it says.
fn is_above_the_limit() -> bool {
    capabilities(None).is_ok_and(|own| own.effective.contains(CapabilitySet::IPC_LOCK))
}
