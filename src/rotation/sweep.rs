//! What is to be done to a key's data keys, decided purely: `(tenant, key, data keys, materials, shreds, now) -> steps`.
//!
//! Nothing here asks a clock, a KMS or the registry, and nothing depends on how often it is asked: the same state
//! gives the same steps, and applied steps are not asked for again. Property tests hold it to that, and to what must
//! never happen: a scope without an active data key that had one, a data key destroyed that nobody wants destroyed, a
//! wrapped form dropped before every member of the ring has its own.

use std::collections::HashMap;
use std::time::Duration;

use envelope::DataKeyId;

use crate::clock::Timestamp;
use crate::store::{
    DekRecord, DekScope, DekState, KekMaterial, KeyPolicy, KeyRecord, ShredRecord, Status, StoredDek,
    TenantRecord, WrappedRecord,
};
use crate::tenant::{Kek, KekId};

/// From this share of any limit on, the data key that follows is made, in percent.
const AHEAD_PERCENT: u64 = 80;

/// What is known of the materials of KEKs, by KEK. One that is missing is taken to be unchanged.
pub type Materials = HashMap<KekId, KekMaterial>;

/// One thing to do. Steps on one data key or scope are in order, and one that fails lets those after it wait.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Step {
    /// Make the data key that will follow this scope's active one.
    Next {
        /// Which scope.
        scope: DekScope,
    },
    /// Take a data key that waits out of the row: it is wrapped under a KEK that is no longer in the ring.
    RetireNext {
        /// Which.
        dek: DataKeyId,
    },
    /// End the active data key; the one that waits takes its place.
    Retire {
        /// Of which scope.
        scope: DekScope,
        /// The active one.
        dek: DataKeyId,
    },
    /// Wrap a data key anew under a member of the ring whose material has changed.
    Rewrap {
        /// Which data key.
        dek: DataKeyId,
        /// Which member.
        kek: KekId,
    },
    /// Wrap a data key under a member of the ring that has no form of it.
    Add {
        /// Which data key.
        dek: DataKeyId,
        /// Which member.
        kek: KekId,
    },
    /// Remove the form under a KEK that was in the ring before. Every member has its own by then.
    Drop {
        /// Of which data key.
        dek: DataKeyId,
        /// Under which KEK.
        kek: KekId,
    },
    /// Delete all wrapped forms: what it sealed is lost.
    Destroy {
        /// Which.
        dek: DataKeyId,
    },
}

impl Step {
    /// The data key that this changes; none for one that makes another.
    pub fn dek(&self) -> Option<DataKeyId> {
        match self {
            Self::Next { .. } => None,
            Self::RetireNext { dek }
            | Self::Retire { dek, .. }
            | Self::Rewrap { dek, .. }
            | Self::Add { dek, .. }
            | Self::Drop { dek, .. }
            | Self::Destroy { dek } => Some(*dek),
        }
    }
}

/// What a sweep looks at: a key, and some of its data keys. The active and the waiting one of a scope have to come
/// together; all others may come in any portions.
pub struct View<'a> {
    /// The tenant.
    pub tenant: &'a TenantRecord,
    /// The key, with its policy.
    pub key: &'a KeyRecord,
    /// Data keys of this key.
    pub deks: &'a [StoredDek],
    /// What is known of the KEKs.
    pub materials: &'a Materials,
    /// What the tenant wants destroyed.
    pub shreds: &'a [ShredRecord],
}

/// Decides what is to be done now.
pub fn sweep(view: &View<'_>, now: Timestamp) -> Vec<Step> {
    let mut steps = Vec::new();
    let doomed = |dek: &DekRecord| is_due(view.shreds, dek, now);
    // What is switched off, or waits for its end, gets no new data keys.
    if view.tenant.status == Status::Enabled && view.key.status == Status::Enabled {
        let mut waiting: HashMap<&DekScope, &StoredDek> = HashMap::new();
        for stored in view.deks.iter().filter(|stored| stored.dek.state == DekState::Next) {
            waiting.insert(&stored.dek.scope, stored);
        }
        for active in view.deks.iter().filter(|stored| stored.dek.state == DekState::Active) {
            if !doomed(&active.dek) {
                let next = waiting.get(&active.dek.scope).copied();
                follow(view, active, next, now, &mut steps);
            }
        }
    }
    for stored in view.deks.iter().filter(|stored| stored.dek.state != DekState::Destroyed) {
        if doomed(&stored.dek) {
            steps.push(Step::Destroy { dek: stored.dek.id });
        } else {
            wrap(view, stored, &mut steps);
        }
    }
    steps
}

/// Whether a data key is to be destroyed by now.
pub fn is_due(shreds: &[ShredRecord], dek: &DekRecord, now: Timestamp) -> bool {
    let covered =
        |shred: &ShredRecord| shred.tenant == dek.scope.tenant && shred.target.covers(&dek.scope.key, dek.id);
    dek.state != DekState::Destroyed && shreds.iter().any(|shred| shred.due_at <= now && covered(shred))
}

/// Next, retire: what an active data key's time asks for.
fn follow(
    view: &View<'_>,
    active: &StoredDek,
    next: Option<&StoredDek>,
    now: Timestamp,
    steps: &mut Vec<Step>,
) {
    let (dek, policy) = (&active.dek, &view.key.policy);
    let stranded = |stored: &StoredDek| is_stranded(view.tenant, stored);
    // A changed ring ends it, in use or not: what is sealed from now on must not depend on the former KEK.
    let ends = stranded(active) || (is_used(dek, policy, now) && has_reached(dek, policy, 100, now));
    let prepares = ends || (is_used(dek, policy, now) && has_reached(dek, policy, AHEAD_PERCENT, now));
    let unfit = next.filter(|next| stranded(next));
    if let Some(next) = unfit {
        steps.push(Step::RetireNext { dek: next.dek.id });
    }
    if prepares && (next.is_none() || unfit.is_some()) {
        steps.push(Step::Next { scope: dek.scope.clone() });
    }
    if ends {
        steps.push(Step::Retire { scope: dek.scope.clone(), dek: dek.id });
    }
}

/// Whether a data key is wrapped under a KEK that has left the ring (and is no replica of a member).
fn is_stranded(tenant: &TenantRecord, stored: &StoredDek) -> bool {
    stored.wrapped.iter().any(|form| !tenant.ring.serves(&form.kek))
}

/// Whether it has sealed something lately. An idle key's data key stays where it is, however old: the pool never
/// seals under one that is past its limits, and makes another when somebody comes.
fn is_used(dek: &DekRecord, policy: &KeyPolicy, now: Timestamp) -> bool {
    let lately = Duration::from_secs(policy.dek_age_secs_max / 100 * (100 - AHEAD_PERCENT)).max(FLUSH);
    dek.last_sealed_at.is_some_and(|at| now.since(at) <= lately)
}

/// Times of use are kept to the minute and written every few seconds.
const FLUSH: Duration = Duration::from_mins(2);

/// Whether a data key has reached `percent` of any of its limits.
fn has_reached(dek: &DekRecord, policy: &KeyPolicy, percent: u64, now: Timestamp) -> bool {
    let reached = |used: u128, max: u64| used * 100 >= u128::from(max) * u128::from(percent);
    let age = now.since(dek.activated_at.unwrap_or(dek.created_at));
    reached(age.as_millis(), policy.dek_age_secs_max.saturating_mul(1_000))
        || reached(dek.messages.into(), policy.dek_messages_max)
        || reached(dek.bytes.into(), policy.dek_bytes_max)
}

/// Rewrap, add, drop: what the ring asks of a data key's wrapped forms.
fn wrap(view: &View<'_>, stored: &StoredDek, steps: &mut Vec<Step>) {
    let members = view.tenant.ring.members();
    if stored.wrapped.is_empty() {
        return;
    }
    let dek = stored.dek.id;
    let mut served: Vec<&KekId> = Vec::new();
    for form in stored.wrapped.iter().filter(|form| view.tenant.ring.member(&form.kek).is_some()) {
        served.push(&form.kek);
        if is_outdated(view.materials, form) {
            steps.push(Step::Rewrap { dek, kek: form.kek.clone() });
        }
    }
    for member in members {
        // One wrapped form serves all replicas of a multi-Region key.
        if !served.iter().any(|kek| kek.same_material(&member.id)) {
            steps.push(Step::Add { dek, kek: member.id.clone() });
            served.push(&member.id);
        }
    }
    for form in &stored.wrapped {
        // A KEK that is neither in the ring nor was there is not this view's business: it may be newer than the view.
        let former = |kek: &Kek| kek.id == form.kek;
        if view.tenant.ring.member(&form.kek).is_none() && view.tenant.former_keks.iter().any(former) {
            steps.push(Step::Drop { dek, kek: form.kek.clone() });
        }
    }
}

/// Whether the KEK has had other material since this form was made. Where the KMS did not say which material made the
/// form, its age tells.
fn is_outdated(materials: &Materials, form: &WrappedRecord) -> bool {
    let Some(known) = materials.get(&form.kek) else { return false };
    match &form.material {
        Some(material) => *material != known.material,
        None => form.wrapped_at < known.since,
    }
}

/// The forms that a data key can be rewrapped from, the best first: those of the ring's members, that of `to` itself
/// before all.
pub fn sources<'a>(tenant: &TenantRecord, stored: &'a StoredDek, to: &KekId) -> Vec<&'a WrappedRecord> {
    let mut forms: Vec<&WrappedRecord> = stored.wrapped.iter().collect();
    forms.sort_by_key(|form| {
        if form.kek == *to {
            0
        } else if tenant.ring.member(&form.kek).is_some() {
            1
        } else {
            2
        }
    });
    forms
}

#[cfg(test)]
#[path = "sweep_tests.rs"]
mod tests;
