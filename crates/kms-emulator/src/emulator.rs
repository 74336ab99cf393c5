//! The library's handle on a running emulator.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use serde_json::{Value, json};
use tokio_util::task::TaskTracker;

use crate::builder::Builder;
use crate::calls::{Call, Mark};
use crate::directory::{Caller, Principal, Role};
use crate::error::KmsError;
use crate::faults::Faults;
use crate::server::Shared;

/// How long connections get to end by themselves at shutdown.
const SHUTDOWN_PATIENCE: Duration = Duration::from_secs(5);

/// A running emulator. What its methods do to keys needs no permission and is not in the log of calls.
/// Keys are named by ARN. Dropping it stops it.
#[derive(Debug)]
pub struct Emulator {
    shared: Arc<Shared>,
    address: SocketAddr,
    tracker: TaskTracker,
    account: String,
}

/// What kind of key [`Emulator::create_key`] makes.
#[derive(Clone, Debug, Default)]
pub struct CreateKey {
    account: Option<String>,
    alias: Option<String>,
    policy: Option<String>,
    description: Option<String>,
    multi_region: bool,
    id: Option<String>,
}

impl CreateKey {
    /// A symmetric key of one region, with AWS's default policy.
    pub fn new() -> Self {
        Self::default()
    }

    /// In this account, not in the emulator's default one.
    pub fn account(mut self, account: impl Into<String>) -> Self {
        self.account = Some(account.into());
        self
    }

    /// With an alias (`alias/...`).
    pub fn alias(mut self, name: impl Into<String>) -> Self {
        self.alias = Some(name.into());
        self
    }

    /// With this key policy (JSON).
    pub fn policy(mut self, policy: impl Into<String>) -> Self {
        self.policy = Some(policy.into());
        self
    }

    /// With a description.
    pub fn description(mut self, text: impl Into<String>) -> Self {
        self.description = Some(text.into());
        self
    }

    /// With this id, a UUID, so that its ARN is known beforehand. A multi-Region key's is `mrk-` and the same digits.
    pub fn id(mut self, uuid: impl Into<String>) -> Self {
        self.id = Some(uuid.into());
        self
    }

    /// A multi-Region primary key (`mrk-...`), which [`Emulator::replicate_key`] can copy.
    pub fn multi_region(mut self) -> Self {
        self.multi_region = true;
        self
    }
}

impl Emulator {
    /// Starts to set up an emulator.
    pub fn builder() -> Builder {
        Builder::default()
    }

    pub(crate) fn new(
        shared: Arc<Shared>,
        address: SocketAddr,
        tracker: TaskTracker,
        account: String,
    ) -> Self {
        Self { shared, address, tracker, account }
    }

    /// The endpoint for SDKs, of KMS and STS alike.
    pub fn url(&self) -> String {
        format!("http://{}", self.address)
    }

    /// Where the emulator listens.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// The regions that are served.
    pub fn regions(&self) -> &[String] {
        &self.shared.engine.regions
    }

    /// Makes a key and gives its ARN.
    pub fn create_key(&self, region: &str, options: CreateKey) -> Result<String, KmsError> {
        let CreateKey { account, alias, policy, description, multi_region, id } = options;
        let caller = Caller::owner(region, account.as_ref().unwrap_or(&self.account));
        let mut parameters = json!({"MultiRegion": multi_region});
        if let Some(id) = id {
            parameters["KeyId"] = id.into();
        }
        if let Some(policy) = policy {
            parameters["Policy"] = policy.into();
        }
        if let Some(description) = description {
            parameters["Description"] = description.into();
        }
        let answer = self.shared.engine.execute(&caller, "CreateKey", parameters)?;
        let arn = answer["KeyMetadata"]["Arn"].as_str().unwrap_or_default().to_owned();
        if let Some(name) = alias {
            let parameters = json!({"AliasName": name, "TargetKeyId": arn});
            self.shared.engine.execute(&caller, "CreateAlias", parameters)?;
        }
        Ok(arn)
    }

    /// Makes a replica of a multi-Region primary key in `region` and gives its ARN.
    pub fn replicate_key(&self, primary: &str, region: &str) -> Result<String, KmsError> {
        let answer = self.on_key("ReplicateKey", primary, json!({"ReplicaRegion": region}))?;
        Ok(answer["ReplicaKeyMetadata"]["Arn"].as_str().unwrap_or_default().to_owned())
    }

    /// Makes the key unusable until it is enabled again.
    pub fn disable_key(&self, key: &str) -> Result<(), KmsError> {
        self.on_key("DisableKey", key, json!({})).map(drop)
    }

    /// Makes the key usable again.
    pub fn enable_key(&self, key: &str) -> Result<(), KmsError> {
        self.on_key("EnableKey", key, json!({})).map(drop)
    }

    /// Gives the key (through its primary, if it is a multi-Region one) new material.
    pub fn rotate_key(&self, key: &str) -> Result<(), KmsError> {
        self.on_key("RotateKeyOnDemand", key, json!({})).map(drop)
    }

    /// Schedules the key's deletion in 7 to 30 days of the emulator's clock.
    pub fn schedule_deletion(&self, key: &str, days: u32) -> Result<(), KmsError> {
        self.on_key("ScheduleKeyDeletion", key, json!({"PendingWindowInDays": days})).map(drop)
    }

    /// Takes the key back. It is disabled then, as in AWS.
    pub fn cancel_deletion(&self, key: &str) -> Result<(), KmsError> {
        self.on_key("CancelKeyDeletion", key, json!({})).map(drop)
    }

    /// Sets the key policy (JSON).
    pub fn set_policy(&self, key: &str, policy: &str) -> Result<(), KmsError> {
        self.on_key("PutKeyPolicy", key, json!({"Policy": policy})).map(drop)
    }

    /// Names the key `alias/...` in its region and account, whatever had the name before.
    pub fn set_alias(&self, name: &str, key: &str) -> Result<(), KmsError> {
        let caller = owner_of(key)?;
        let parameters = json!({"AliasName": name, "TargetKeyId": key});
        match self.shared.engine.execute(&caller, "CreateAlias", parameters.clone()) {
            Err(error) if error.code() == "AlreadyExistsException" => {
                self.shared.engine.execute(&caller, "UpdateAlias", parameters).map(drop)
            }
            result => result.map(drop),
        }
    }

    /// The ARN of the key that has the alias in the emulator's default account.
    pub fn key_of_alias(&self, region: &str, alias: &str) -> Option<String> {
        let caller = Caller::owner(region, &self.account);
        let answer = self.shared.engine.execute(&caller, "DescribeKey", json!({"KeyId": alias})).ok()?;
        answer["KeyMetadata"]["Arn"].as_str().map(str::to_owned)
    }

    /// What DescribeKey says of the key: AWS's `KeyMetadata`.
    pub fn describe_key(&self, key: &str) -> Result<Value, KmsError> {
        self.on_key("DescribeKey", key, json!({})).map(|mut answer| answer["KeyMetadata"].take())
    }

    /// The ARNs of all keys.
    pub fn keys(&self) -> Vec<String> {
        self.shared.engine.key_arns()
    }

    /// Registers an access key id, or gives it another principal.
    pub fn add_principal(&self, access_key: &str, principal: Principal) -> Result<(), KmsError> {
        self.shared.engine.directory().add_principal(access_key, principal)
    }

    /// Adds a role that can be assumed, or changes it.
    pub fn add_role(&self, role: Role) -> Result<(), KmsError> {
        self.shared.engine.directory().add_role(role)
    }

    /// The faults on demand.
    pub fn faults(&self) -> &Faults {
        &self.shared.faults
    }

    /// The log of calls, oldest first.
    pub fn calls(&self) -> Vec<Call> {
        self.calls_since(Mark(0))
    }

    /// The present end of the log, for [`Emulator::calls_since`].
    pub fn mark(&self) -> Mark {
        self.shared.calls.mark()
    }

    /// The calls that have come since `mark`.
    pub fn calls_since(&self, mark: Mark) -> Vec<Call> {
        self.shared.calls.since(mark)
    }

    /// How many calls of `operation` are in the log, whatever became of them.
    pub fn count(&self, operation: &str) -> usize {
        self.count_where(|call| call.operation == operation)
    }

    /// How many calls in the log are such.
    pub fn count_where(&self, predicate: impl Fn(&Call) -> bool) -> usize {
        self.shared.calls.count(predicate)
    }

    /// Empties the log of calls.
    pub fn clear_calls(&self) {
        self.shared.calls.clear();
    }

    /// The plaintext data keys that were generated, oldest first. Empty unless
    /// [`Builder::remember_data_keys`] was asked for.
    pub fn data_keys(&self) -> Vec<Vec<u8>> {
        self.shared.engine.data_keys().unwrap_or_default()
    }

    /// Lets time pass: keys are deleted, rotated and sessions expire that are due; throttles refill.
    pub fn advance(&self, by: Duration) {
        self.shared.engine.clock.advance(by);
    }

    /// Stops: no new connections, and requests in the middle (those in a black hole too) are reset.
    pub async fn shutdown(self) {
        self.shared.stop.cancel();
        if tokio::time::timeout(SHUTDOWN_PATIENCE, self.tracker.wait()).await.is_err() {
            tracing::warn!("connections are still open");
        }
    }

    fn on_key(&self, operation: &str, key: &str, mut parameters: Value) -> Result<Value, KmsError> {
        parameters["KeyId"] = key.into();
        self.shared.engine.execute(&owner_of(key)?, operation, parameters)
    }
}

impl Drop for Emulator {
    fn drop(&mut self) {
        self.shared.stop.cancel();
    }
}

fn owner_of(key_arn: &str) -> Result<Caller, KmsError> {
    crate::arn::region_and_account(key_arn)
        .map(|(region, account)| Caller::owner(region, account))
        .ok_or_else(|| KmsError::invalid_arn(format!("Invalid arn {key_arn}")))
}
