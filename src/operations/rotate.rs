//! Data keys one by one, and their rotation by hand: list, rotate, revoke, restore.

use envelope::DataKeyId;

use super::{OperationError, Operations, Page};
use crate::access::{AdminOf, Permit};
use crate::audit::{Asked, Subject};
use crate::pool::PoolError;
use crate::store::{DekScope, DekState, Status, StoreError, StoredDek, Target};
use crate::tenant::KeyName;

/// How many scopes are rotated at a time.
const SCOPES_PAGE: u32 = 100;

/// A data key that was ended, and the one that has its place.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Rotated {
    /// What both serve.
    pub scope: DekScope,
    /// The one that only opens from now on.
    pub from: DataKeyId,
    /// The one that seals from now on.
    pub to: DataKeyId,
}

impl Operations {
    /// The data keys of a key of the permit's tenant, in the order of their making.
    pub async fn list_deks(
        &self,
        permit: &Permit<AdminOf>,
        key: &KeyName,
        page: Page<DataKeyId>,
    ) -> Result<Vec<StoredDek>, OperationError> {
        self.key(permit, key).await?;
        Ok(self.store.deks(permit.tenant(), key, page.after, page.limit).await?)
    }

    /// Ends the active data keys of a key now. The next ones are made first, so nobody waits. A key that was not used
    /// yet has none: then nothing happens.
    pub async fn rotate_key(
        &self,
        permit: &Permit<AdminOf>,
        key: &KeyName,
    ) -> Result<Vec<Rotated>, OperationError> {
        let attempt = self
            .audit
            .begin_change("key.rotate", permit.who().changing(Subject::Key(key)), Asked::NOTHING)
            .await?;
        let rotated = async {
            self.key(permit, key).await?;
            let (mut rotated, mut after) = (Vec::new(), None);
            loop {
                let page = self.store.active_deks(permit.tenant(), key, after.as_ref(), SCOPES_PAGE).await?;
                let Some(last) = page.last() else { return Ok(rotated) };
                after = Some(last.dek.scope.bound.clone());
                for active in page {
                    let (scope, from) = (active.dek.scope, active.dek.id);
                    let to = self.pool.rotate(&scope, from).await?;
                    rotated.push(Rotated { scope, from, to });
                }
            }
        };
        self.finish(attempt, rotated.await).await
    }

    /// Revokes a data key of the permit's tenant: it opens nothing until it is restored. Revoking twice is revoking
    /// once.
    pub async fn revoke_dek(
        &self,
        permit: &Permit<AdminOf>,
        id: DataKeyId,
    ) -> Result<StoredDek, OperationError> {
        let attempt = self
            .audit
            .begin_change("dek.revoke", permit.who().changing(Subject::Dek(id)), Asked::NOTHING)
            .await?;
        self.finish(attempt, self.move_dek(permit, id, DekState::Revoked).await).await
    }

    /// Restores a revoked data key of the permit's tenant: it opens again what it sealed, and seals nothing more. One
    /// that is not revoked stays as it is.
    pub async fn restore_dek(
        &self,
        permit: &Permit<AdminOf>,
        id: DataKeyId,
    ) -> Result<StoredDek, OperationError> {
        let attempt = self
            .audit
            .begin_change("dek.restore", permit.who().changing(Subject::Dek(id)), Asked::NOTHING)
            .await?;
        let restored = async {
            if self.store.shred(permit.tenant(), &Target::Dek(id)).await?.is_some() {
                self.dek(permit, id).await?;
                return Err(OperationError::Conflict(format!(
                    "the data key {id} is to be shredded: cancel that first"
                )));
            }
            self.move_dek(permit, id, DekState::Retired).await
        };
        self.finish(attempt, restored.await).await
    }

    /// A data key of the permit's tenant that is not destroyed.
    pub(super) async fn dek(
        &self,
        permit: &Permit<AdminOf>,
        id: DataKeyId,
    ) -> Result<StoredDek, OperationError> {
        let stored = self.store.dek(id).await?;
        let stored = stored.filter(|stored| stored.dek.scope.tenant == *permit.tenant());
        let missing = || OperationError::NotFound(format!("data key {id} in tenant '{}'", permit.tenant()));
        let stored = stored.ok_or_else(missing)?;
        match stored.dek.state {
            DekState::Destroyed => Err(PoolError::Destroyed.into()),
            _ => Ok(stored),
        }
    }

    async fn move_dek(
        &self,
        permit: &Permit<AdminOf>,
        id: DataKeyId,
        to: DekState,
    ) -> Result<StoredDek, OperationError> {
        // Again where rotation moved it in between: it moves a data key twice at most.
        for _ in 0..4 {
            let stored = self.dek(permit, id).await?;
            let from = stored.dek.state;
            let stays = from == to || (to == DekState::Retired && from != DekState::Revoked);
            if stays {
                return Ok(stored);
            }
            match self.store.set_dek_state(id, from, to, self.clock.now()).await {
                Err(StoreError::Conflict(_)) => {}
                other => {
                    other?;
                    return self.dek(permit, id).await;
                }
            }
        }
        Err(OperationError::Conflict(format!("the data key {id} is being changed: repeat the call")))
    }

    /// What was shredded, or is to be, is not switched on again.
    pub(super) async fn may_enable(
        &self,
        permit: &Permit<AdminOf>,
        status: Option<Status>,
        target: &Target,
    ) -> Result<(), OperationError> {
        if status != Some(Status::Enabled) {
            return Ok(());
        }
        match self.store.shred(permit.tenant(), target).await? {
            None => Ok(()),
            Some(shred) if shred.done_at.is_some() => Err(OperationError::Conflict(
                "it was shredded and stays switched off: make another one".to_owned(),
            )),
            Some(_) => Err(OperationError::Conflict("it is to be shredded: cancel that first".to_owned())),
        }
    }
}
