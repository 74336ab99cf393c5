//! One data key, several master keys: a tenant's KEK ring.
//!
//! A data key is made by the first member that answers and wrapped under every other, so that any one of them can
//! open it. Replicas of one multi-Region key share a wrapped form.

use envelope::{EncryptionContext, KeyMaterial};

use super::{Kms, KmsError, Urgency, Wrapped};
use crate::tenant::{Kek, KekId, KekRing};

/// A new data key under a whole ring.
pub struct RingGenerated {
    /// The key itself.
    pub plaintext: KeyMaterial,
    /// The member that made it.
    pub by: KekId,
    /// Its wrapped forms, in the ring's order; members that could not be asked are missing.
    pub wrapped: Vec<Wrapped>,
    /// Why members are missing.
    pub missing: Vec<KmsError>,
}

/// A data key that a ring has opened.
pub struct RingUnwrapped {
    /// The key itself.
    pub plaintext: KeyMaterial,
    /// The member that opened it.
    pub by: KekId,
    /// Members that were asked before, and said no.
    pub denials: Vec<KmsError>,
}

/// Makes a data key by the first member that answers, and wraps it under the others.
pub async fn generate(
    kms: &dyn Kms,
    ring: &KekRing,
    context: &EncryptionContext,
    urgency: Urgency,
) -> Result<RingGenerated, KmsError> {
    let mut failures: Vec<KmsError> = Vec::new();
    for (at, member) in ring.members().iter().enumerate() {
        if denied_already(&failures, &member.id) {
            continue;
        }
        let generated = match kms.generate(member, context, urgency).await {
            Ok(generated) => generated,
            Err(failure) => {
                failures.push(failure);
                continue;
            }
        };
        let mut wrapped = vec![(at, generated.wrapped)];
        for (other_at, other) in ring.members().iter().enumerate() {
            let served = wrapped.iter().any(|(_, form)| form.kek.same_material(&other.id));
            let failed = failures.iter().any(|failure| *failure.kek() == other.id);
            if served || failed || denied_already(&failures, &other.id) {
                continue;
            }
            match kms.wrap(other, context, &generated.plaintext, urgency).await {
                Ok(form) => wrapped.push((other_at, form)),
                Err(failure) => failures.push(failure),
            }
        }
        wrapped.sort_by_key(|(at, _)| *at);
        let wrapped = wrapped.into_iter().map(|(_, form)| form).collect();
        let by = member.id.clone();
        return Ok(RingGenerated { plaintext: generated.plaintext, by, wrapped, missing: failures });
    }
    Err(worst(failures, ring))
}

/// Opens a data key by the first of its wrapped forms whose KEK answers. `keks` are the KEKs that are believed, in
/// the order in which they are to be asked.
pub async fn unwrap(
    kms: &dyn Kms,
    keks: &[Kek],
    forms: &[(KekId, &[u8])],
    context: &EncryptionContext,
    urgency: Urgency,
) -> Result<RingUnwrapped, UnwrapFailure> {
    let mut failures: Vec<KmsError> = Vec::new();
    for member in keks {
        let Some((_, blob)) = forms.iter().find(|(kek, _)| kek.same_material(&member.id)) else { continue };
        if denied_already(&failures, &member.id) {
            continue;
        }
        match kms.unwrap(member, context, blob, urgency).await {
            Ok(plaintext) => {
                failures.retain(|failure| matches!(failure, KmsError::Denied { .. }));
                return Ok(RingUnwrapped { plaintext, by: member.id.clone(), denials: failures });
            }
            Err(failure) => failures.push(failure),
        }
    }
    Err(UnwrapFailure { failures })
}

/// Why no member of a ring opened a data key.
pub struct UnwrapFailure {
    /// Each member's answer, in the order in which they were asked. Empty where no wrapped form is of a KEK that is
    /// believed.
    pub failures: Vec<KmsError>,
}

impl UnwrapFailure {
    /// The answer that decides: a denial before an outage (what the owner has cut off must not look like something
    /// that will pass), and an outage before damage (the form that could have opened it was not tried).
    pub fn deciding(self) -> Option<KmsError> {
        decide(self.failures)
    }
}

/// A replica of a KEK that has said no is not asked: it would be a way round its owner's decision.
fn denied_already(failures: &[KmsError], kek: &KekId) -> bool {
    failures
        .iter()
        .any(|failure| matches!(failure, KmsError::Denied { .. }) && failure.kek().same_material(kek))
}

fn worst(failures: Vec<KmsError>, ring: &KekRing) -> KmsError {
    let primary = &ring.members()[0].id;
    decide(failures).unwrap_or_else(|| KmsError::outage(primary, "no member of the KEK ring was asked"))
}

fn decide(failures: Vec<KmsError>) -> Option<KmsError> {
    failures.into_iter().min_by_key(|failure| match failure {
        KmsError::Denied { .. } => 0,
        KmsError::Outage { .. } => 1,
        KmsError::Damaged { .. } => 2,
    })
}
