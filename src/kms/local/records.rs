//! What a key ring holds: KEKs, their versions and states; the rules by which they change; their bytes.
//!
//! Pure: the time and the new key material are arguments.

use std::collections::BTreeMap;
use std::time::Duration;

use envelope::{DataKeyId, KeyMaterial};
use zeroize::Zeroizing;

use super::error::{KeyRingError, PAYLOAD_MIB_MAX};
use crate::clock::Timestamp;
use crate::kms::KekState;
use crate::tenant::KekId;

/// A deletion waits at least as long, so that whoever still needs the KEK can notice.
const WAITING_TIME_MIN: Duration = Duration::from_hours(7 * 24);
const WAITING_TIME_MAX: Duration = Duration::from_hours(30 * 24);

/// What the operator is told of a KEK. No key material.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct KekInfo {
    /// The KEK.
    pub id: KekId,
    /// Whether it can be used.
    pub state: KekState,
    /// When its material is deleted for good, where that is scheduled.
    pub deletion_at: Option<Timestamp>,
    /// When it was added.
    pub created_at: Timestamp,
    /// Its versions, the oldest first; the last one wraps new keys.
    pub versions: Vec<KekVersionInfo>,
}

/// What the operator is told of one version of a KEK.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct KekVersionInfo {
    /// The version's id: the `material` of what it wraps.
    pub material: String,
    /// When it was made.
    pub created_at: Timestamp,
}

/// A KEK as the file keeps it.
pub(super) struct KekRecord {
    pub(super) created_at: Timestamp,
    pub(super) state: RecordState,
    /// The oldest first; never empty.
    pub(super) versions: Vec<VersionRecord>,
}

/// A version of a KEK as the file keeps it.
pub(super) struct VersionRecord {
    pub(super) id: DataKeyId,
    pub(super) created_at: Timestamp,
    pub(super) material: KeyMaterial,
}

/// A KEK's state, with the time that belongs to it.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum RecordState {
    Enabled,
    Disabled,
    PendingDeletion { at: Timestamp },
}

impl RecordState {
    pub(super) fn shown(self) -> KekState {
        match self {
            Self::Enabled => KekState::Enabled,
            Self::Disabled => KekState::Disabled,
            Self::PendingDeletion { .. } => KekState::PendingDeletion,
        }
    }

    pub(super) fn deletion_at(self) -> Option<Timestamp> {
        match self {
            Self::PendingDeletion { at } => Some(at),
            Self::Enabled | Self::Disabled => None,
        }
    }
}

/// Everything in a key ring.
#[derive(Default)]
pub(super) struct Records(pub(super) BTreeMap<KekId, KekRecord>);

impl Records {
    /// Adds a KEK with this first version.
    pub(super) fn add(&mut self, id: &KekId, first: VersionRecord) -> Result<KekInfo, KeyRingError> {
        if self.0.contains_key(id) {
            return Err(KeyRingError::KekExists(id.clone()));
        }
        let record =
            KekRecord { created_at: first.created_at, state: RecordState::Enabled, versions: vec![first] };
        let info = record.info(id);
        self.0.insert(id.clone(), record);
        Ok(info)
    }

    /// Gives a KEK a new version, which wraps from now on; the older ones go on unwrapping.
    pub(super) fn rotate(&mut self, id: &KekId, next: VersionRecord) -> Result<KekInfo, KeyRingError> {
        let kek = self.not_pending(id)?;
        if kek.state == RecordState::Disabled {
            return Err(KeyRingError::KekDisabled(id.clone()));
        }
        if kek.versions.len() >= usize::from(u16::MAX) {
            return Err(KeyRingError::Full);
        }
        kek.versions.push(next);
        Ok(kek.info(id))
    }

    /// Enables or disables a KEK; where it is so already, nothing changes.
    pub(super) fn switch(&mut self, id: &KekId, to: RecordState) -> Result<KekInfo, KeyRingError> {
        let kek = self.not_pending(id)?;
        kek.state = to;
        Ok(kek.info(id))
    }

    /// Lets a KEK be deleted after a waiting time, in which it cannot be used.
    pub(super) fn schedule_deletion(
        &mut self,
        id: &KekId,
        after: Duration,
        now: Timestamp,
    ) -> Result<KekInfo, KeyRingError> {
        if !(WAITING_TIME_MIN..=WAITING_TIME_MAX).contains(&after) {
            return Err(KeyRingError::WaitingTime);
        }
        let kek = self.not_pending(id)?;
        kek.state = RecordState::PendingDeletion { at: now.plus(after) };
        Ok(kek.info(id))
    }

    /// Takes a scheduled deletion back. The KEK is then disabled, as in AWS KMS: using it again is a decision
    /// of its own.
    pub(super) fn cancel_deletion(&mut self, id: &KekId) -> Result<KekInfo, KeyRingError> {
        let kek = self.0.get_mut(id).ok_or_else(|| KeyRingError::UnknownKek(id.clone()))?;
        if kek.state.deletion_at().is_none() {
            return Err(KeyRingError::KekNotPending(id.clone()));
        }
        kek.state = RecordState::Disabled;
        Ok(kek.info(id))
    }

    /// Forgets the KEKs whose waiting time is over, and says how many they were.
    pub(super) fn delete_due(&mut self, now: Timestamp) -> usize {
        let before = self.0.len();
        self.0.retain(|_, kek| kek.state.deletion_at().is_none_or(|at| now < at));
        before - self.0.len()
    }

    fn not_pending(&mut self, id: &KekId) -> Result<&mut KekRecord, KeyRingError> {
        let kek = self.0.get_mut(id).ok_or_else(|| KeyRingError::UnknownKek(id.clone()))?;
        match kek.state.deletion_at() {
            Some(at) => Err(KeyRingError::KekPendingDeletion(id.clone(), at)),
            None => Ok(kek),
        }
    }

    /// The bytes of all records: a 4-byte number of KEKs, then for each, sorted by id, a 1-byte length and
    /// the id, 8 bytes creation time, a byte for the state (2 is followed by 8 bytes: when it is deleted), a
    /// 2-byte number of versions, and for each version 16 bytes id, 8 bytes creation time, 32 bytes key.
    pub(super) fn encode(&self) -> Result<Zeroizing<Vec<u8>>, KeyRingError> {
        let bytes_max = 4 + self.0.values().map(KekRecord::encoded_bytes_max).sum::<usize>();
        // With room for everything, no growing buffer leaves a copy of the keys behind.
        let mut out = Zeroizing::new(Vec::with_capacity(bytes_max));
        out.extend_from_slice(&u32::try_from(self.0.len()).map_err(|_| KeyRingError::Full)?.to_be_bytes());
        for (id, kek) in &self.0 {
            let id = id.as_str().as_bytes();
            out.push(u8::try_from(id.len()).map_err(|_| KeyRingError::Full)?);
            out.extend_from_slice(id);
            out.extend_from_slice(&kek.created_at.unix_ms().to_be_bytes());
            match kek.state {
                RecordState::Enabled => out.push(0),
                RecordState::Disabled => out.push(1),
                RecordState::PendingDeletion { at } => {
                    out.push(2);
                    out.extend_from_slice(&at.unix_ms().to_be_bytes());
                }
            }
            let versions = u16::try_from(kek.versions.len()).map_err(|_| KeyRingError::Full)?;
            out.extend_from_slice(&versions.to_be_bytes());
            for version in &kek.versions {
                out.extend_from_slice(version.id.as_bytes());
                out.extend_from_slice(&version.created_at.unix_ms().to_be_bytes());
                out.extend_from_slice(version.material.expose());
            }
        }
        if out.len() > PAYLOAD_MIB_MAX << 20 { Err(KeyRingError::Full) } else { Ok(out) }
    }

    /// Reads what [`Records::encode`] wrote and nothing else; otherwise says what is wrong.
    pub(super) fn decode(bytes: &[u8]) -> Result<Self, &'static str> {
        const SHORT: &str = "its list of KEKs ends too early";
        let mut rest = Reader(bytes);
        let mut keks = BTreeMap::new();
        for _ in 0..u32::from_be_bytes(rest.array().ok_or(SHORT)?) {
            let [id_bytes] = rest.array().ok_or(SHORT)?;
            let id = std::str::from_utf8(rest.take(id_bytes.into()).ok_or(SHORT)?);
            let id: KekId = id.ok().and_then(|id| id.parse().ok()).ok_or("a KEK's name is not valid")?;
            if keks.last_key_value().is_some_and(|(before, _)| *before >= id) {
                return Err("its KEKs are not in order");
            }
            keks.insert(id, KekRecord::decode(&mut rest)?);
        }
        if rest.0.is_empty() { Ok(Self(keks)) } else { Err("bytes follow its last KEK") }
    }
}

impl KekRecord {
    /// What the operator is told of it.
    pub(super) fn info(&self, id: &KekId) -> KekInfo {
        let version = |version: &VersionRecord| KekVersionInfo {
            material: version.id.to_string(),
            created_at: version.created_at,
        };
        KekInfo {
            id: id.clone(),
            state: self.state.shown(),
            deletion_at: self.state.deletion_at(),
            created_at: self.created_at,
            versions: self.versions.iter().map(version).collect(),
        }
    }

    fn encoded_bytes_max(&self) -> usize {
        1 + usize::from(u8::MAX) + 8 + 1 + 8 + 2 + (16 + 8 + 32) * self.versions.len()
    }

    fn decode(rest: &mut Reader<'_>) -> Result<Self, &'static str> {
        const SHORT: &str = "a KEK ends too early";
        let created_at = rest.time().ok_or(SHORT)?;
        let state = match rest.array().ok_or(SHORT)? {
            [0] => RecordState::Enabled,
            [1] => RecordState::Disabled,
            [2] => RecordState::PendingDeletion { at: rest.time().ok_or(SHORT)? },
            _ => return Err("a KEK's state is not known"),
        };
        let count = u16::from_be_bytes(rest.array().ok_or(SHORT)?);
        if count == 0 {
            return Err("a KEK has no version");
        }
        let versions = (0..count).map(|_| VersionRecord::decode(rest)).collect::<Option<_>>().ok_or(SHORT)?;
        Ok(Self { created_at, state, versions })
    }
}

impl VersionRecord {
    fn decode(rest: &mut Reader<'_>) -> Option<Self> {
        let (id, created_at) = (DataKeyId::from_bytes(rest.array()?), rest.time()?);
        Some(Self { id, created_at, material: KeyMaterial::from_slice(rest.take(32)?).ok()? })
    }
}

struct Reader<'a>(&'a [u8]);

impl<'a> Reader<'a> {
    fn take(&mut self, count: usize) -> Option<&'a [u8]> {
        let (taken, rest) = self.0.split_at_checked(count)?;
        self.0 = rest;
        Some(taken)
    }

    fn array<const N: usize>(&mut self) -> Option<[u8; N]> {
        self.take(N)?.try_into().ok()
    }

    fn time(&mut self) -> Option<Timestamp> {
        self.array().map(|bytes| Timestamp::from_unix_ms(i64::from_be_bytes(bytes)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn version(n: u8) -> VersionRecord {
        VersionRecord {
            id: DataKeyId::from_bytes([n; 16]),
            created_at: Timestamp::from_unix_ms(n.into()),
            material: KeyMaterial::from_slice(&[n; 32]).unwrap(),
        }
    }

    fn id(name: &str) -> KekId {
        format!("local:{name}").parse().unwrap()
    }

    fn now() -> Timestamp {
        Timestamp::from_unix_ms(1_000)
    }

    const WEEK: Duration = WAITING_TIME_MIN;

    fn three() -> Records {
        let mut records = Records::default();
        for (n, name) in (1..).zip(["b", "a", "c"]) {
            records.add(&id(name), version(n)).unwrap();
        }
        records.rotate(&id("a"), version(9)).unwrap();
        records.switch(&id("b"), RecordState::Disabled).unwrap();
        records.schedule_deletion(&id("c"), WEEK, now()).unwrap();
        records
    }

    fn infos(records: &Records) -> Vec<KekInfo> {
        records.0.iter().map(|(id, kek)| kek.info(id)).collect()
    }

    #[test]
    fn records_read_back_as_they_were_written() {
        let records = three();
        let read = Records::decode(&records.encode().unwrap()).unwrap();
        assert_eq!(infos(&read), infos(&records));
        for (kek, again) in records.0.values().zip(read.0.values()) {
            for (version, again) in kek.versions.iter().zip(&again.versions) {
                assert_eq!(version.material.expose(), again.material.expose());
            }
        }
    }

    #[test]
    fn records_are_refused_when_cut_anywhere_or_added_to() {
        let mut bytes = three().encode().unwrap();
        for length in 0..bytes.len() {
            assert!(Records::decode(&bytes[..length]).is_err(), "cut at {length}");
        }
        bytes.push(0);
        assert!(Records::decode(&bytes).is_err());
        assert!(Records::decode(&u32::MAX.to_be_bytes()).is_err());
    }

    #[test]
    fn a_state_allows_what_aws_kms_allows_in_it() {
        let mut records = three();
        let (enabled, disabled, pending) = (id("a"), id("b"), id("c"));
        assert!(matches!(records.rotate(&disabled, version(5)), Err(KeyRingError::KekDisabled(_))));
        assert!(matches!(records.rotate(&pending, version(5)), Err(KeyRingError::KekPendingDeletion(..))));
        for to in [RecordState::Enabled, RecordState::Disabled] {
            assert!(matches!(records.switch(&pending, to), Err(KeyRingError::KekPendingDeletion(..))));
            records.switch(&disabled, to).unwrap();
            records.switch(&disabled, to).unwrap();
        }
        assert!(matches!(records.cancel_deletion(&enabled), Err(KeyRingError::KekNotPending(_))));
        assert_eq!(records.cancel_deletion(&pending).unwrap().state, KekState::Disabled);
        assert!(matches!(records.add(&enabled, version(5)), Err(KeyRingError::KekExists(_))));
        assert!(matches!(records.rotate(&id("d"), version(5)), Err(KeyRingError::UnknownKek(_))));
    }

    #[test]
    fn a_deletion_waits_its_time_and_not_longer() {
        for (days, allowed) in [(0, false), (6, false), (7, true), (30, true), (31, false)] {
            let outcome = three().schedule_deletion(&id("a"), Duration::from_hours(24 * days), now());
            assert_eq!(outcome.is_ok(), allowed, "{days} days");
        }
        let mut records = three();
        let due = now().plus(WEEK);
        assert_eq!(records.delete_due(Timestamp::from_unix_ms(due.unix_ms() - 1)), 0);
        assert_eq!(records.delete_due(due), 1);
        assert_eq!(infos(&records).len(), 2);
    }

    fn kek_with(versions: usize) -> KekRecord {
        let versions = (0..versions).map(|n| version(u8::try_from(n % 251).unwrap())).collect();
        KekRecord { created_at: now(), state: RecordState::Enabled, versions }
    }

    #[test]
    fn a_kek_takes_65535_versions_and_not_one_more() {
        let mut records = Records::default();
        records.0.insert(id("a"), kek_with(65_534));
        records.rotate(&id("a"), version(1)).unwrap();
        assert!(matches!(records.rotate(&id("a"), version(2)), Err(KeyRingError::Full)));
        let read = Records::decode(&records.encode().unwrap()).unwrap();
        assert_eq!(read.0[&id("a")].versions.len(), 65_535);
        // However it came there: a number that the file cannot hold is never cut short.
        records.0.insert(id("a"), kek_with(65_536));
        assert!(matches!(records.encode(), Err(KeyRingError::Full)));
    }

    #[test]
    fn a_key_ring_takes_its_16_mib_to_the_last_byte_and_not_one_more() {
        let mut records = Records::default();
        for name in ["a", "b", "c", "d"] {
            records.0.insert(id(name), kek_with(65_535));
        }
        let limit = PAYLOAD_MIB_MAX << 20;
        // A KEK takes 12 bytes and its id, and 56 for each version.
        let left = limit - records.encode().unwrap().len();
        let versions = (left - 12 - "local:e".len()) / 56;
        let spare = (left - 12 - "local:e".len()) % 56;
        let exact = "e".repeat(1 + spare);
        records.0.insert(id(&exact), kek_with(versions));
        assert_eq!(records.encode().unwrap().len(), limit);
        let kek = records.0.remove(&id(&exact)).unwrap();
        records.0.insert(id(&"e".repeat(2 + spare)), kek);
        assert!(matches!(records.encode(), Err(KeyRingError::Full)));
    }
}
