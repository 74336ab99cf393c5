//! Grants of the registry: what an administrator gives principals in his tenant while the service runs.

use super::administer::Page;
use super::{OperationError, Operations};
use crate::access::granted::check_grant;
use crate::access::{AdminOf, Permit, Principal};
use crate::audit::{Asked, Subject};
use crate::store::{GrantRecord, GrantScope, StoreError};
use crate::tenant::Verb;

/// What a new grant gives.
#[derive(Clone, Debug)]
pub struct NewGrant {
    /// To whom: a principal, or with a `*` at the end all that begin so.
    pub principal: String,
    /// What.
    pub verbs: Vec<Verb>,
    /// With what.
    pub scope: GrantScope,
}

impl Operations {
    /// Makes a grant in the permit's tenant.
    pub async fn create_grant(
        &self,
        permit: &Permit<AdminOf>,
        caller: &Principal,
        new: NewGrant,
    ) -> Result<GrantRecord, OperationError> {
        let asked = Asked::NOTHING
            .text("principal", &new.principal)
            .list("verbs", &new.verbs)
            .list("keys", new.scope.keys.iter().flatten())
            .conditions(&new.scope.context);
        let mut attempt = self.audit.begin_change("grant.create", permit.who(), asked).await?;
        let made = async {
            check_grant(&new.principal, &new.verbs, &new.scope).map_err(OperationError::Invalid)?;
            caller.may_grant(std::slice::from_ref(permit.tenant()), &new.verbs)?;
            self.tenant(permit).await?;
            let (max, count) =
                (self.access.tenant_grants_max(), self.store.count_grants(permit.tenant()).await?);
            if count >= max {
                return Err(OperationError::Conflict(format!(
                    "the tenant has {count} grants, and access.tenant_grants_max allows {max}: delete some, or grant \
                     to many at once with a * at the end of the principal"
                )));
            }
            let mut verbs = new.verbs;
            verbs.sort_unstable();
            verbs.dedup();
            let now = self.clock.now();
            let mut random = [0; 10];
            getrandom::fill(&mut random)
                .map_err(|_| OperationError::Internal("the operating system gives no randomness"))?;
            let record = GrantRecord {
                id: GrantRecord::new_id(now, random),
                tenant: permit.tenant().clone(),
                principal: new.principal,
                verbs,
                scope: new.scope,
                created_at: now,
                created_by: permit.principal().clone(),
            };
            self.store.insert_grant(&record).await.map_err(|error| match error {
                StoreError::Missing(what) => OperationError::NotFound(what.to_string()),
                other => other.into(),
            })?;
            Ok(record)
        };
        let made = made.await;
        if let Ok(record) = &made {
            attempt.made(Subject::Grant(&record.id));
        }
        self.finish(attempt, made).await
    }

    /// The grants in the permit's tenant.
    pub async fn list_grants(
        &self,
        permit: &Permit<AdminOf>,
        page: Page<String>,
    ) -> Result<Vec<GrantRecord>, OperationError> {
        self.tenant(permit).await?;
        Ok(self.store.grants(Some(permit.tenant()), page.after.as_deref(), page.limit).await?)
    }

    /// Deletes a grant in the permit's tenant.
    pub async fn delete_grant(&self, permit: &Permit<AdminOf>, id: &str) -> Result<(), OperationError> {
        // What does not look like an id may be anything: it is not recorded.
        let subject = Subject::Grant(if GrantRecord::is_id(id) { id } else { "" });
        let who = permit.who().changing(subject);
        let attempt = self.audit.begin_change("grant.delete", who, Asked::NOTHING).await?;
        let deleted = self.store.delete_grant(permit.tenant(), id).await.map_err(|error| match error {
            StoreError::Missing(_) => {
                OperationError::NotFound(format!("this grant in tenant '{}'", permit.tenant()))
            }
            other => other.into(),
        });
        self.finish(attempt, deleted).await
    }
}
