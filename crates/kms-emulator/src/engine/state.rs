//! What the emulator knows of keys, as it is kept in the state file.

use std::collections::BTreeMap;
use std::time::Duration;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use serde::{Deserialize, Deserializer, Serialize, Serializer};

use crate::arn::key_arn;
use crate::clock::Timestamp;
use crate::policy::Policy;

#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct State {
    /// The file's layout; others are refused.
    pub(crate) version: u32,
    /// By key id. A family is a key and its replicas: what they share.
    pub(crate) families: BTreeMap<String, Family>,
    /// By key ARN.
    pub(crate) keys: BTreeMap<String, Key>,
    /// By alias ARN.
    pub(crate) aliases: BTreeMap<String, Alias>,
    /// By access key id: credentials that AssumeRole gave out.
    pub(crate) sessions: BTreeMap<String, Session>,
}

pub(crate) const VERSION: u32 = 1;

impl Default for State {
    fn default() -> Self {
        Self {
            version: VERSION,
            families: BTreeMap::new(),
            keys: BTreeMap::new(),
            aliases: BTreeMap::new(),
            sessions: BTreeMap::new(),
        }
    }
}

/// Shared by a multi-Region key's replicas; a single-Region key is a family of one.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Family {
    pub(crate) account: String,
    pub(crate) multi_region: bool,
    pub(crate) primary_region: String,
    pub(crate) usage: String,
    pub(crate) spec: String,
    /// Oldest first; the last is current. Empty for keys that cannot encrypt.
    pub(crate) materials: Vec<Material>,
    pub(crate) rotation: Option<Rotation>,
}

#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Material {
    pub(crate) id: Bytes32,
    pub(crate) secret: Bytes32,
    /// When and why this material became current; the first one did with the key.
    pub(crate) rotated: Option<(Timestamp, RotationType)>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "SCREAMING_SNAKE_CASE")]
pub(crate) enum RotationType {
    Automatic,
    OnDemand,
}

#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
pub(crate) struct Rotation {
    pub(crate) period_days: u32,
    pub(crate) next: Timestamp,
}

#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Key {
    pub(crate) id: String,
    pub(crate) region: String,
    pub(crate) account: String,
    pub(crate) created: Timestamp,
    pub(crate) description: String,
    pub(crate) status: Status,
    pub(crate) policy: Policy,
    pub(crate) tags: BTreeMap<String, String>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum Status {
    Enabled,
    Disabled,
    PendingDeletion {
        at: Timestamp,
        days: u32,
    },
    /// A multi-Region primary waits for its replicas to be gone before its own waiting period begins.
    PendingReplicaDeletion {
        days: u32,
    },
}

impl Status {
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Enabled => "Enabled",
            Self::Disabled => "Disabled",
            Self::PendingDeletion { .. } => "PendingDeletion",
            Self::PendingReplicaDeletion { .. } => "PendingReplicaDeletion",
        }
    }
}

#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Alias {
    pub(crate) target_key_id: String,
    pub(crate) created: Timestamp,
    pub(crate) updated: Timestamp,
}

#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct Session {
    pub(crate) token: String,
    pub(crate) role_arn: String,
    pub(crate) name: String,
    pub(crate) expires: Timestamp,
}

impl Key {
    pub(crate) fn arn(&self) -> String {
        key_arn(&self.region, &self.account, &self.id)
    }
}

impl Family {
    pub(crate) fn current(&self) -> Option<&Material> {
        self.materials.last()
    }

    pub(crate) fn is_symmetric(&self) -> bool {
        self.spec == "SYMMETRIC_DEFAULT"
    }
}

impl State {
    /// The replicas of a family that exist, the primary among them.
    pub(crate) fn members<'a>(&'a self, key_id: &'a str) -> impl Iterator<Item = &'a Key> {
        self.keys.values().filter(move |key| key.id == key_id)
    }

    /// Brings the state up to `now`: deletes what is due and rotates what is due. True if anything changed.
    pub(crate) fn catch_up(&mut self, now: Timestamp) -> Result<bool, crate::error::KmsError> {
        let mut changed = false;
        // A primary's waiting period can begin, and end, only after its last replica is gone.
        while self.delete_due(now) || self.start_waiting(now) {
            changed = true;
        }
        changed |= self.rotate_due(now)?;
        let sessions = self.sessions.len();
        // Kept for a day, so that their holders hear "expired" and not "unknown".
        self.sessions.retain(|_, session| session.expires.plus(crate::clock::DAY) > now);
        Ok(changed || sessions != self.sessions.len())
    }

    fn delete_due(&mut self, now: Timestamp) -> bool {
        let due = |key: &Key| matches!(key.status, Status::PendingDeletion { at, .. } if at <= now);
        let gone: Vec<(String, String)> = self
            .keys
            .iter()
            .filter(|(_, key)| due(key))
            .map(|(arn, key)| (arn.clone(), key.id.clone()))
            .collect();
        for (arn, id) in &gone {
            if let Some(key) = self.keys.remove(arn) {
                let of_region = format!(":kms:{}:{}:", key.region, key.account);
                self.aliases.retain(|alias, to| to.target_key_id != *id || !alias.contains(&of_region));
            }
            if self.members(id).next().is_none() {
                self.families.remove(id);
            }
        }
        !gone.is_empty()
    }

    fn start_waiting(&mut self, now: Timestamp) -> bool {
        let waiting: Vec<(String, u32)> = self
            .keys
            .iter()
            .filter_map(|(arn, key)| match key.status {
                Status::PendingReplicaDeletion { days } if self.members(&key.id).count() == 1 => {
                    Some((arn.clone(), days))
                }
                _ => None,
            })
            .collect();
        for (arn, days) in &waiting {
            if let Some(key) = self.keys.get_mut(arn) {
                key.status = Status::PendingDeletion { at: now.plus(days_long(*days)), days: *days };
            }
        }
        !waiting.is_empty()
    }

    fn rotate_due(&mut self, now: Timestamp) -> Result<bool, crate::error::KmsError> {
        let mut changed = false;
        for (id, family) in &mut self.families {
            let Some(mut rotation) = family.rotation.filter(|rotation| rotation.next <= now) else {
                continue;
            };
            let primary = key_arn(&family.primary_region, &family.account, id);
            // AWS does not rotate a key that is disabled or on its way out.
            if self.keys.get(&primary).is_none_or(|key| key.status != Status::Enabled) {
                continue;
            }
            // However much time has passed, AWS makes up for it with one rotation.
            family.materials.push(Material::generate(Some((now, RotationType::Automatic)))?);
            while rotation.next <= now {
                rotation.next = rotation.next.plus(days_long(rotation.period_days.max(1)));
            }
            family.rotation = Some(rotation);
            changed = true;
        }
        Ok(changed)
    }
}

impl Material {
    pub(crate) fn generate(
        rotated: Option<(Timestamp, RotationType)>,
    ) -> Result<Self, crate::error::KmsError> {
        let (mut id, mut secret) = ([0; 32], [0; 32]);
        crate::blob::random(&mut id)?;
        crate::blob::random(&mut secret)?;
        Ok(Self { id: Bytes32(id), secret: Bytes32(secret), rotated })
    }
}

pub(crate) fn days_long(days: u32) -> Duration {
    crate::clock::DAY * days
}

/// 32 bytes, as base64 in the file. Not shown in debug output: some are secrets.
#[derive(Clone, PartialEq, Eq)]
pub(crate) struct Bytes32(pub(crate) [u8; 32]);

impl Bytes32 {
    pub(crate) fn hex(&self) -> String {
        use std::fmt::Write as _;
        self.0.iter().fold(String::with_capacity(64), |mut hex, byte| {
            // Writing to a String cannot fail.
            let _ = write!(hex, "{byte:02x}");
            hex
        })
    }
}

impl std::fmt::Debug for Bytes32 {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Bytes32(..)")
    }
}

impl Serialize for Bytes32 {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(&STANDARD.encode(self.0))
    }
}

impl<'de> Deserialize<'de> for Bytes32 {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        let bytes = STANDARD.decode(text).map_err(serde::de::Error::custom)?;
        bytes.try_into().map(Self).map_err(|_| serde::de::Error::custom("not 32 bytes"))
    }
}
