//! The keys, and one door to them: every operation, whether it came over HTTP or from the library, runs
//! here, one at a time.

mod file;
mod state;

use std::path::PathBuf;
use std::sync::{Mutex, MutexGuard, PoisonError};

use http::HeaderMap;
use serde_json::Value;

pub(crate) use state::{
    Alias, Family, Key, Material, Rotation, RotationType, Session, State, Status, days_long,
};

use crate::calls::Arrival;
use crate::clock::Clock;
use crate::directory::{Caller, Directory};
use crate::error::KmsError;
use crate::ops::{self, Work};

#[derive(Debug)]
pub(crate) struct Engine {
    pub(crate) clock: Clock,
    pub(crate) regions: Vec<String>,
    state: Mutex<State>,
    directory: Mutex<Directory>,
    file: Option<file::StateFile>,
    /// The plaintext data keys given out, if a test asked to know them.
    data_keys: Option<Mutex<Vec<Vec<u8>>>>,
}

impl Engine {
    pub(crate) fn open(
        clock: Clock,
        regions: Vec<String>,
        directory: Directory,
        path: Option<PathBuf>,
        remember_data_keys: bool,
    ) -> std::io::Result<Self> {
        let file = path.map(file::StateFile::new);
        let state = file.as_ref().map(file::StateFile::load).transpose()?.unwrap_or_default();
        Ok(Self {
            clock,
            regions,
            state: Mutex::new(state),
            directory: Mutex::new(directory),
            file,
            data_keys: remember_data_keys.then(Mutex::default),
        })
    }

    pub(crate) fn identify(&self, headers: &HeaderMap, service: &str) -> Result<Caller, KmsError> {
        let state = lock(&self.state);
        let caller = lock(&self.directory).identify(headers, service, &state, self.clock.now())?;
        if self.regions.contains(&caller.region) {
            return Ok(caller);
        }
        Err(KmsError::invalid_signature(format!(
            "Credential should be scoped to a valid region. {} is not one of this emulator's.",
            caller.region
        )))
    }

    /// What a request is about, as far as it says so itself.
    pub(crate) fn arrival(&self, caller: &Caller, operation: &str, body: &Value) -> Arrival {
        ops::arrival(&lock(&self.state), caller, operation, body)
    }

    /// Runs one operation. What it changed is in the state file before the answer is given.
    pub(crate) fn execute(&self, caller: &Caller, operation: &str, body: Value) -> Result<Value, KmsError> {
        let now = self.clock.now();
        let mut state = lock(&self.state);
        let caught_up = state.catch_up(now)?;
        let mut work = Work {
            state: &mut state,
            caller,
            now,
            regions: &self.regions,
            data_keys: Vec::new(),
            changed: caught_up,
        };
        let answer = ops::run(&mut work, operation, body);
        let Work { data_keys, changed, .. } = work;
        if changed {
            self.save(&state)?;
        }
        if let Some(known) = &self.data_keys {
            lock(known).extend(data_keys);
        }
        answer
    }

    /// Gives out credentials for a role, and keeps them.
    pub(crate) fn assume_role<T>(
        &self,
        assume: impl FnOnce(&Directory, &mut State) -> Result<T, KmsError>,
    ) -> Result<T, KmsError> {
        let mut state = lock(&self.state);
        let answer = assume(&lock(&self.directory), &mut state)?;
        self.save(&state)?;
        Ok(answer)
    }

    pub(crate) fn directory(&self) -> MutexGuard<'_, Directory> {
        lock(&self.directory)
    }

    /// The plaintext data keys given out, oldest first; none unless the emulator was asked to keep them.
    pub(crate) fn data_keys(&self) -> Option<Vec<Vec<u8>>> {
        self.data_keys.as_ref().map(|known| lock(known).clone())
    }

    /// The ARNs of all keys, in all accounts and regions.
    pub(crate) fn key_arns(&self) -> Vec<String> {
        lock(&self.state).keys.keys().cloned().collect()
    }

    /// Written with the lock held: changes are rare, and the file must have them in their order.
    fn save(&self, state: &State) -> Result<(), KmsError> {
        let Some(file) = &self.file else { return Ok(()) };
        file.save(state).map_err(|error| {
            tracing::error!(%error, "the state file could not be written");
            KmsError::internal("The state file could not be written.")
        })
    }
}

/// A panic elsewhere does not make a lock unusable: every change is made whole or not at all.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
