//! How an emulator is set up.

use std::net::{Ipv4Addr, SocketAddr};
use std::path::PathBuf;
use std::sync::Arc;

use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use crate::calls::CallLog;
use crate::clock::Clock;
use crate::directory::{Directory, Principal, Role};
use crate::emulator::Emulator;
use crate::engine::Engine;
use crate::error::KmsError;
use crate::faults::Faults;
use crate::server::{self, Shared};

/// The region of an emulator that was given none.
const DEFAULT_REGION: &str = "us-east-1";

/// The account in the examples of AWS's documentation.
const DEFAULT_ACCOUNT: &str = "111122223333";

/// Sets up an [`Emulator`].
#[derive(Clone, Debug)]
pub struct Builder {
    listen: SocketAddr,
    regions: Vec<String>,
    account: String,
    principals: Vec<(String, Principal)>,
    roles: Vec<Role>,
    strict_credentials: bool,
    state_file: Option<PathBuf>,
    frozen_clock: bool,
    remember_data_keys: bool,
}

/// Why an emulator did not start.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum StartError {
    /// The address could not be bound.
    #[error("cannot listen on {0}")]
    Listen(SocketAddr, #[source] std::io::Error),
    /// The state file could not be read.
    #[error("cannot use the state file {0}")]
    State(PathBuf, #[source] std::io::Error),
    /// A principal, a role or a policy is not valid.
    #[error(transparent)]
    Invalid(#[from] KmsError),
}

impl Default for Builder {
    fn default() -> Self {
        Self {
            listen: SocketAddr::from((Ipv4Addr::LOCALHOST, 0)),
            regions: Vec::new(),
            account: DEFAULT_ACCOUNT.to_owned(),
            principals: Vec::new(),
            roles: Vec::new(),
            strict_credentials: false,
            state_file: None,
            frozen_clock: false,
            remember_data_keys: false,
        }
    }
}

impl Builder {
    /// Listens here; by default on a free port of 127.0.0.1.
    pub fn listen(mut self, address: SocketAddr) -> Self {
        self.listen = address;
        self
    }

    /// Serves this region too. The first is that of requests that name none. Without any it is us-east-1.
    pub fn region(mut self, region: impl Into<String>) -> Self {
        let region = region.into();
        if !self.regions.contains(&region) {
            self.regions.push(region);
        }
        self
    }

    /// The account of access keys that are not registered; by default 111122223333. An access key id of
    /// twelve digits is the root of the account that it spells.
    pub fn account(mut self, account: impl Into<String>) -> Self {
        self.account = account.into();
        self
    }

    /// Registers an access key id.
    pub fn principal(mut self, access_key: impl Into<String>, principal: Principal) -> Self {
        self.principals.push((access_key.into(), principal));
        self
    }

    /// Adds a role that can be assumed.
    pub fn role(mut self, role: Role) -> Self {
        self.roles.push(role);
        self
    }

    /// Refuses access keys that are not registered (`UnrecognizedClientException`).
    pub fn strict_credentials(mut self) -> Self {
        self.strict_credentials = true;
        self
    }

    /// Keeps keys and aliases in this file, in the clear.
    pub fn state_file(mut self, path: impl Into<PathBuf>) -> Self {
        self.state_file = Some(path.into());
        self
    }

    /// Lets time pass by [`Emulator::advance`] only.
    pub fn frozen_clock(mut self) -> Self {
        self.frozen_clock = true;
        self
    }

    /// Remembers the plaintext data keys that the emulator generates, for [`Emulator::data_keys`].
    pub fn remember_data_keys(mut self) -> Self {
        self.remember_data_keys = true;
        self
    }

    /// Starts the emulator on the current Tokio runtime.
    pub async fn start(mut self) -> Result<Emulator, StartError> {
        if self.regions.is_empty() {
            self.regions.push(DEFAULT_REGION.to_owned());
        }
        let mut directory =
            Directory::new(self.account.clone(), self.regions[0].clone(), self.strict_credentials);
        for (access_key, principal) in self.principals {
            directory.add_principal(&access_key, principal)?;
        }
        for role in self.roles {
            directory.add_role(role)?;
        }
        let clock = Clock::new(self.frozen_clock);
        let engine =
            Engine::open(clock, self.regions, directory, self.state_file.clone(), self.remember_data_keys)
                .map_err(|error| StartError::State(self.state_file.unwrap_or_default(), error))?;
        let (faults, calls, stop) = (Faults::default(), CallLog::default(), CancellationToken::new());
        let shared = Arc::new(Shared { engine, faults, calls, stop });
        let tracker = TaskTracker::new();
        let address = server::start(shared.clone(), self.listen, &tracker)
            .await
            .map_err(|error| StartError::Listen(self.listen, error))?;
        tracker.close();
        Ok(Emulator::new(shared, address, tracker, self.account))
    }
}
