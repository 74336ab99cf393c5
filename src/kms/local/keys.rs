//! The KEKs ready for use: they wrap and unwrap data keys.
//!
//! A version of a KEK is an [`envelope::DataKey`], and a wrapped data key is a compact envelope of its 32
//! bytes under the KMS context. So the format's own guarantees hold for wrapped keys: every byte is
//! authenticated, the context is bound in a form that no other context has, and no wrapped key opens under
//! two versions. The envelope names the version, and a version belongs to one KEK, so the KEK's name needs no
//! binding of its own.

use std::collections::BTreeMap;

use envelope::{DataKey, EncryptionContext, KeyMaterial, Salt, WrappedKeys};

use super::records::{KekRecord, Records};
use crate::clock::Timestamp;
use crate::kms::{KekDescription, KekState, KmsError, Wrapped};
use crate::tenant::KekId;

/// The KEKs of a key ring as one reading of its file gave them.
pub(super) struct Keys {
    keks: BTreeMap<KekId, Kek>,
    next_deletion: Option<Timestamp>,
}

/// A KEK that can wrap and unwrap; only [`Keys::enabled`] gives one out.
pub(super) struct Kek {
    id: KekId,
    state: KekState,
    older: Vec<DataKey>,
    current: DataKey,
}

impl Keys {
    pub(super) fn new(records: Records) -> Self {
        let next_deletion = records.0.values().filter_map(|kek| kek.state.deletion_at()).min();
        let keks = records.0.into_iter().filter_map(|(id, kek)| Some((id.clone(), Kek::new(id, kek)?)));
        Self { keks: keks.collect(), next_deletion }
    }

    /// Whether a KEK's waiting time has ended since the file was read.
    pub(super) fn deletion_is_due(&self, now: Timestamp) -> bool {
        self.next_deletion.is_some_and(|at| at <= now)
    }

    /// The KEK, if it may be used.
    pub(super) fn enabled(&self, id: &KekId) -> Result<&Kek, KmsError> {
        let kek = self.known(id)?;
        match kek.state {
            KekState::Enabled => Ok(kek),
            KekState::Disabled => Err(KmsError::denied(id, "it is disabled in the key ring")),
            KekState::PendingDeletion => Err(KmsError::denied(id, "it is pending deletion in the key ring")),
            KekState::Unusable => Err(KmsError::denied(id, "it cannot be used")),
        }
    }

    /// What is known of the KEK.
    pub(super) fn describe(&self, id: &KekId) -> Result<KekDescription, KmsError> {
        let kek = self.known(id)?;
        let material = Some(kek.current.id().to_string());
        Ok(KekDescription { kek: id.clone(), state: kek.state, material })
    }

    fn known(&self, id: &KekId) -> Result<&Kek, KmsError> {
        self.keks.get(id).ok_or_else(|| KmsError::denied(id, "the key ring has no such KEK"))
    }
}

impl Kek {
    fn new(id: KekId, record: KekRecord) -> Option<Self> {
        let mut versions: Vec<_> =
            record.versions.into_iter().map(|version| DataKey::new(version.id, version.material)).collect();
        let current = versions.pop()?;
        Some(Self { id, state: record.state.shown(), older: versions, current })
    }

    /// Wraps a data key under the current version. `salt` is fresh random bytes.
    pub(super) fn wrap(
        &self,
        context: &EncryptionContext,
        plaintext: &KeyMaterial,
        salt: Salt,
    ) -> Result<Wrapped, KmsError> {
        let blob = envelope::seal(&self.current, salt, &WrappedKeys::compact(), context, plaintext.expose())
            .map_err(|error| KmsError::outage(&self.id, error.to_string()))?;
        Ok(Wrapped { kek: self.id.clone(), blob, material: Some(self.current.id().to_string()) })
    }

    /// Unwraps what [`Kek::wrap`] made under any version.
    pub(super) fn unwrap(&self, context: &EncryptionContext, blob: &[u8]) -> Result<KeyMaterial, KmsError> {
        let damaged = |detail: String| KmsError::damaged(&self.id, detail);
        let head = envelope::inspect(blob).map_err(|error| damaged(error.to_string()))?;
        // An envelope's wrapped-key section is bound to nothing: with one, the same key would have many
        // blobs.
        if !head.wrapped().is_compact() {
            return Err(damaged("it is not a wrapped key of a key ring".to_owned()));
        }
        let version = std::iter::once(&self.current)
            .chain(&self.older)
            .find(|version| version.id() == head.dek_id())
            .ok_or_else(|| damaged(format!("the KEK has no version {}", head.dek_id())))?;
        let plaintext = envelope::open(version, context, blob).map_err(|error| damaged(error.to_string()))?;
        KeyMaterial::from_slice(&plaintext).map_err(|error| damaged(error.to_string()))
    }
}
