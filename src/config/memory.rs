//! The settings of what the operating system is asked to do for secrets in memory.

use serde::Deserialize;

/// Secrets in memory.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct MemorySettings {
    /// Whether the process is made undumpable: no core, no debugger and no /proc/PID/mem of the same user. Default
    /// yes.
    pub not_dumpable: bool,
    /// Whether the limit of core dumps is set to 0. Default yes.
    pub no_core: bool,
    /// Whether the process's memory is left out of a core, where one is written all the same. Default yes.
    pub dont_dump: bool,
    /// Whether memory is kept out of the swap: `off`, `try`, or `require`, with which the service does not start
    /// where the system refuses. Default `try`.
    pub lock: LockMemory,
}

impl Default for MemorySettings {
    fn default() -> Self {
        Self { not_dumpable: true, no_core: true, dont_dump: true, lock: LockMemory::Try }
    }
}

/// Whether memory is kept out of the swap.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum LockMemory {
    /// It is not.
    Off,
    /// All of it where there is no limit, the pages with data keys where there is one, as far as it goes.
    Try,
    /// All of it, or the service does not start.
    Require,
}
