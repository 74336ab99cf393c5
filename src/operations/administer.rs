//! Administration: tenants, keys, API keys. Every change is audited, and no request of this process that comes
//! after it sees what was before.

use super::{OperationError, Operations};
use crate::access::{AdminOf, NewApiKey, Operate, Permit, Principal, is_api_key_id};
use crate::audit::{Asked, Attempt, Subject};
use crate::clock::Timestamp;
use crate::store::{ApiKeyRecord, KeyPolicy, KeyRecord, Status, StoreError, Target, TenantRecord};
use crate::tenant::{Kek, KekRing, KeyName, TenantId, Verb};

/// How many data keys' worth of time a policy may ask for: a data key of more than ten years is a mistake.
const DEK_AGE_SECS_MAX: u64 = 10 * 365 * 24 * 60 * 60;
/// The shortest life of a data key: shorter ones would make a KMS call for almost every request.
const DEK_AGE_SECS_MIN: u64 = 60;
const API_KEY_NAME_BYTES_MAX: usize = 100;
const API_KEY_TENANTS_MAX: usize = 100;

/// Which part of a list: what comes after `after`, at most `limit`.
#[derive(Clone, Debug)]
pub struct Page<C> {
    /// The last one of the page before.
    pub after: Option<C>,
    /// At most so many.
    pub limit: u32,
}

/// What to change of a tenant.
#[derive(Clone, Debug, Default)]
pub struct TenantChange {
    /// Its new ring. Former members stay believed for opening.
    pub ring: Option<KekRing>,
    /// Whether it is served.
    pub status: Option<Status>,
    /// The version that the change is based on; none for whatever is there.
    pub version: Option<u64>,
}

/// What to change of a key.
#[derive(Clone, Debug, Default)]
pub struct KeyChange {
    /// Its new policy.
    pub policy: Option<KeyPolicy>,
    /// Whether it is served.
    pub status: Option<Status>,
    /// The version that the change is based on; none for whatever is there.
    pub version: Option<u64>,
}

/// What a new API key is to hold.
#[derive(Clone, Debug)]
pub struct ApiKeyGrant {
    /// What people call it.
    pub name: String,
    /// The tenants.
    pub tenants: Vec<TenantId>,
    /// The verbs.
    pub verbs: Vec<Verb>,
    /// From when on it is refused.
    pub expires_at: Option<Timestamp>,
}

impl Operations {
    /// Makes a tenant with this ring, and its key `default`.
    pub async fn create_tenant(
        &self,
        permit: &Operate,
        id: TenantId,
        ring: KekRing,
    ) -> Result<TenantRecord, OperationError> {
        let asked = asked_ring(Asked::NOTHING, &ring);
        let attempt = self.audit.begin_change("tenant.create", permit.who().in_tenant(&id), asked).await?;
        let made = async {
            self.check_ring(&ring).await?;
            let now = self.clock.now();
            let record = TenantRecord {
                id: id.clone(),
                status: Status::Enabled,
                ring,
                former_keks: vec![],
                created_at: now,
                updated_at: now,
                version: 1,
            };
            let key = new_key(id.clone(), KeyName::default(), KeyPolicy::default(), now);
            let inserted = self.store.insert_tenant_with_key(&record, &key).await;
            inserted.map_err(|error| taken(error, "tenant", id.as_str()))?;
            Ok(record)
        };
        self.finish(attempt, made.await).await
    }

    /// The tenants of the service.
    pub async fn list_tenants(
        &self,
        _permit: &Operate,
        page: Page<TenantId>,
    ) -> Result<Vec<TenantRecord>, OperationError> {
        Ok(self.store.tenants(page.after.as_ref(), page.limit).await?)
    }

    /// The permit's tenant.
    pub async fn tenant(&self, permit: &Permit<AdminOf>) -> Result<TenantRecord, OperationError> {
        let record = self.store.tenant(permit.tenant()).await?;
        record.ok_or_else(|| OperationError::NotFound(format!("tenant '{}'", permit.tenant())))
    }

    /// Changes the permit's tenant. Its ring and its status are the operator's business: hence both permits.
    pub async fn update_tenant(
        &self,
        permit: &Permit<AdminOf>,
        _operate: &Operate,
        change: TenantChange,
    ) -> Result<TenantRecord, OperationError> {
        let asked = Asked::NOTHING.some_text("status", change.status.map(Status::name).as_ref());
        let asked = change.ring.iter().fold(asked, asked_ring);
        let attempt = self.audit.begin_change("tenant.update", permit.who(), asked).await?;
        let changed = async {
            let mut record = self.tenant(permit).await?;
            expect_version(change.version, record.version, "tenant")?;
            self.may_enable(permit, change.status, &Target::Tenant).await?;
            let ring_changes = change.ring.as_ref().is_some_and(|ring| *ring != record.ring);
            if let Some(ring) = change.ring {
                self.check_ring(&ring).await?;
                record.former_keks = former_keks(&record, &ring);
                record.ring = ring;
            }
            record.status = change.status.unwrap_or(record.status);
            record.updated_at = self.clock.now();
            self.store.update_tenant(&record).await.map_err(|error| outrun(error, "tenant"))?;
            record.version += 1;
            if ring_changes {
                self.open_rewrap_job(permit).await?;
            }
            Ok(record)
        };
        self.finish(attempt, changed.await).await
    }

    async fn check_ring(&self, ring: &KekRing) -> Result<(), OperationError> {
        for kek in ring.members() {
            self.keks.check(kek).await?;
        }
        Ok(())
    }

    /// Makes a key of the permit's tenant.
    pub async fn create_key(
        &self,
        permit: &Permit<AdminOf>,
        name: KeyName,
        policy: KeyPolicy,
    ) -> Result<KeyRecord, OperationError> {
        let subject = name.clone();
        let who = permit.who().changing(Subject::Key(&subject));
        let attempt =
            self.audit.begin_change("key.create", who, asked_policy(Asked::NOTHING, &policy)).await?;
        let made = async {
            check_policy(&policy)?;
            self.tenant(permit).await?;
            let (max, count) = (self.tenant_keys_max, self.store.count_keys(permit.tenant()).await?);
            if count >= max {
                return Err(OperationError::Conflict(format!(
                    "the tenant has {count} keys, and registry.tenant_keys_max allows {max}: use one that is there; \
                     the encryption context tells records apart"
                )));
            }
            let record = new_key(permit.tenant().clone(), name, policy, self.clock.now());
            let inserted = self.store.insert_key(&record).await;
            inserted.map_err(|error| taken(error, "key", record.name.as_str()))?;
            Ok(record)
        };
        self.finish(attempt, made.await).await
    }

    /// The keys of the permit's tenant.
    pub async fn list_keys(
        &self,
        permit: &Permit<AdminOf>,
        page: Page<KeyName>,
    ) -> Result<Vec<KeyRecord>, OperationError> {
        self.tenant(permit).await?;
        Ok(self.store.keys(permit.tenant(), page.after.as_ref(), page.limit).await?)
    }

    /// A key of the permit's tenant.
    pub async fn key(&self, permit: &Permit<AdminOf>, name: &KeyName) -> Result<KeyRecord, OperationError> {
        let record = self.store.key(permit.tenant(), name).await?;
        record
            .ok_or_else(|| OperationError::NotFound(format!("key '{name}' in tenant '{}'", permit.tenant())))
    }

    /// Changes a key of the permit's tenant.
    pub async fn update_key(
        &self,
        permit: &Permit<AdminOf>,
        name: &KeyName,
        change: KeyChange,
    ) -> Result<KeyRecord, OperationError> {
        let asked = Asked::NOTHING.some_text("status", change.status.map(Status::name).as_ref());
        let asked = change.policy.iter().fold(asked, asked_policy);
        let who = permit.who().changing(Subject::Key(name));
        let attempt = self.audit.begin_change("key.update", who, asked).await?;
        let changed = async {
            let mut record = self.key(permit, name).await?;
            expect_version(change.version, record.version, "key")?;
            self.may_enable(permit, change.status, &Target::Key(name.clone())).await?;
            if let Some(policy) = change.policy {
                check_policy(&policy)?;
                record.policy = policy;
            }
            record.status = change.status.unwrap_or(record.status);
            record.updated_at = self.clock.now();
            self.store.update_key(&record).await.map_err(|error| outrun(error, "key"))?;
            record.version += 1;
            Ok(record)
        };
        self.finish(attempt, changed.await).await
    }

    /// Makes an API key for the permit's tenant, and others that the caller holds too.
    pub async fn create_api_key(
        &self,
        permit: &Permit<AdminOf>,
        caller: &Principal,
        grant: ApiKeyGrant,
    ) -> Result<NewApiKey, OperationError> {
        let asked = Asked::NOTHING
            .text("name", &grant.name)
            .list("tenants", &grant.tenants)
            .list("verbs", &grant.verbs)
            .some_text("expires_at", grant.expires_at.as_ref());
        let mut attempt = self.audit.begin_change("api-key.create", permit.who(), asked).await?;
        let made = async {
            check_grant(&grant, self.clock.now())?;
            let mut tenants = grant.tenants;
            if !tenants.contains(permit.tenant()) {
                tenants.push(permit.tenant().clone());
            }
            if tenants.len() > API_KEY_TENANTS_MAX {
                return Err(OperationError::Invalid(format!(
                    "an API key holds at most {API_KEY_TENANTS_MAX} tenants"
                )));
            }
            caller.may_grant(&tenants, &grant.verbs)?;
            let now = self.clock.now();
            self.check_api_keys(&tenants, now).await?;
            let new = self.access.new_api_key(&grant.name, tenants, grant.verbs, grant.expires_at, now);
            self.store.insert_api_key(&new.record).await.map_err(|error| match error {
                StoreError::Missing(what) => OperationError::NotFound(what.to_string()),
                other => other.into(),
            })?;
            Ok(new)
        };
        let made = made.await;
        if let Ok(new) = &made {
            attempt.made(Subject::ApiKey(&new.record.id));
        }
        self.finish(attempt, made).await
    }

    async fn check_api_keys(&self, tenants: &[TenantId], now: Timestamp) -> Result<(), OperationError> {
        let max = self.access.tenant_api_keys_max();
        for tenant in tenants {
            let count = self.store.count_api_keys(tenant, now).await?;
            if count >= max {
                return Err(OperationError::Conflict(format!(
                    "the tenant '{tenant}' has {count} API keys that are neither revoked nor expired, and \
                     access.tenant_api_keys_max allows {max}: revoke some, or let them expire"
                )));
            }
        }
        Ok(())
    }

    /// The API keys that hold the permit's tenant; of their other tenants those that the caller administers too.
    pub async fn list_api_keys(
        &self,
        permit: &Permit<AdminOf>,
        page: Page<String>,
    ) -> Result<Vec<ApiKeyRecord>, OperationError> {
        self.tenant(permit).await?;
        let mut records =
            self.store.api_keys(Some(permit.tenant()), page.after.as_deref(), page.limit).await?;
        for record in &mut records {
            record.tenants.retain(|tenant| permit.administers(tenant));
        }
        Ok(records)
    }

    /// Revokes an API key that holds the permit's tenant. One that holds tenants which the caller does not administer
    /// goes on for them, and no longer holds this one: to him it is revoked.
    pub async fn revoke_api_key(
        &self,
        permit: &Permit<AdminOf>,
        id: &str,
    ) -> Result<ApiKeyRecord, OperationError> {
        // What does not look like an id may be anything, such as a token: it is not recorded.
        let head = if is_api_key_id(id) { id } else { "" };
        let who = permit.who().changing(Subject::ApiKey(head));
        let attempt = self.audit.begin_change("api-key.revoke", who, Asked::NOTHING).await?;
        let revoked = async {
            if !is_api_key_id(id) {
                return Err(OperationError::Invalid(
                    "this is not an API key's id: name the 16 characters that follow kf_ in its token"
                        .to_owned(),
                ));
            }
            let missing =
                || OperationError::NotFound(format!("API key '{id}' in tenant '{}'", permit.tenant()));
            let record = self.store.api_key(id).await?;
            let mut record =
                record.filter(|record| record.tenants.contains(permit.tenant())).ok_or_else(missing)?;
            let now = self.clock.now();
            if record.tenants.iter().all(|tenant| permit.administers(tenant)) {
                self.store.revoke_api_key(id, now).await?;
            } else if record.revoked_at.is_none() {
                self.store.release_api_key(id, permit.tenant()).await?;
                record.tenants.retain(|tenant| tenant == permit.tenant());
            }
            record.tenants.retain(|tenant| permit.administers(tenant));
            record.revoked_at = record.revoked_at.or(Some(now));
            Ok(record)
        };
        self.finish(attempt, revoked.await).await
    }

    /// Records the outcome of a change, and has this process see it at once.
    pub(super) async fn finish<T>(
        &self,
        attempt: Attempt<'_>,
        outcome: Result<T, OperationError>,
    ) -> Result<T, OperationError> {
        if let Err(error) = self.watch.poll().await {
            tracing::warn!(%error, "a change of administration is seen by this process only at the next poll");
        }
        match &outcome {
            Ok(_) => attempt.done(),
            Err(error) => attempt.failed(error.code(), error),
        }
        outcome
    }
}

fn asked_ring(asked: Asked, ring: &KekRing) -> Asked {
    asked.list("keks", ring.members().iter().map(|kek| &kek.id))
}

fn asked_policy(asked: Asked, policy: &KeyPolicy) -> Asked {
    asked
        .number("dek_age_secs_max", policy.dek_age_secs_max)
        .number("dek_messages_max", policy.dek_messages_max)
        .number("dek_bytes_max", policy.dek_bytes_max)
        .text("envelope", &policy.envelope.name())
}

fn new_key(tenant: TenantId, name: KeyName, policy: KeyPolicy, now: Timestamp) -> KeyRecord {
    KeyRecord { tenant, name, status: Status::Enabled, policy, created_at: now, updated_at: now, version: 1 }
}

/// Every KEK that is or was in the ring and is not in the new one: what was wrapped under it is still believed.
fn former_keks(record: &TenantRecord, ring: &KekRing) -> Vec<Kek> {
    let mut former: Vec<Kek> = Vec::new();
    for kek in record.ring.members().iter().chain(&record.former_keks) {
        if ring.member(&kek.id).is_none() && !former.iter().any(|other| other.id == kek.id) {
            former.push(kek.clone());
        }
    }
    former
}

fn expect_version(expected: Option<u64>, found: u64, what: &str) -> Result<(), OperationError> {
    match expected {
        Some(expected) if expected != found => Err(OperationError::Conflict(format!(
            "the {what} is at version {found} and not {expected}: read it again and repeat the change"
        ))),
        _ => Ok(()),
    }
}

fn taken(error: StoreError, what: &str, name: &str) -> OperationError {
    match error {
        StoreError::Conflict(_) => OperationError::Conflict(format!("there is a {what} '{name}' already")),
        other => other.into(),
    }
}

fn outrun(error: StoreError, what: &str) -> OperationError {
    match error {
        StoreError::Conflict(_) => OperationError::Conflict(format!(
            "the {what} was changed by somebody else at the same time: read it again and repeat the change"
        )),
        other => other.into(),
    }
}

fn check_policy(policy: &KeyPolicy) -> Result<(), OperationError> {
    let within = |name: &str, value: u64, min: u64, max: u64| {
        if (min..=max).contains(&value) {
            Ok(())
        } else {
            Err(OperationError::Invalid(format!("{name} is {value}: use {min} to {max}")))
        }
    };
    within("dek_age_secs_max", policy.dek_age_secs_max, DEK_AGE_SECS_MIN, DEK_AGE_SECS_MAX)?;
    within("dek_messages_max", policy.dek_messages_max, 1, 1 << 48)?;
    within("dek_bytes_max", policy.dek_bytes_max, 1, 1 << 60)
}

fn check_grant(grant: &ApiKeyGrant, now: Timestamp) -> Result<(), OperationError> {
    if grant.name.is_empty()
        || grant.name.len() > API_KEY_NAME_BYTES_MAX
        || grant.name.chars().any(char::is_control)
    {
        return Err(OperationError::Invalid(format!(
            "an API key's name has 1 to {API_KEY_NAME_BYTES_MAX} bytes and no control characters"
        )));
    }
    if grant.verbs.is_empty() {
        return Err(OperationError::Invalid(
            "an API key without verbs can do nothing: name at least one".to_owned(),
        ));
    }
    if grant.expires_at.is_some_and(|at| at <= now) {
        return Err(OperationError::Invalid("expires_at is in the past".to_owned()));
    }
    Ok(())
}
