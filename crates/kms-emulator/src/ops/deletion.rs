//! The end of a key: scheduled, cancelled, and carried out by the clock (`State::catch_up`).

use serde::Deserialize;
use serde_json::{Value, json};

use super::Work;
use super::input::KeyOnly;
use crate::engine::{Status, days_long};
use crate::error::KmsError;

#[derive(Debug, Default, Deserialize)]
#[serde(default, rename_all = "PascalCase")]
pub(super) struct ScheduleKeyDeletion {
    key_id: Option<String>,
    pending_window_in_days: Option<u32>,
}

pub(super) fn schedule(work: &mut Work<'_>, input: &ScheduleKeyDeletion) -> Result<Value, KmsError> {
    let arn = work.permitted(input.key_id.as_ref(), "ScheduleKeyDeletion")?;
    let days = input.pending_window_in_days.unwrap_or(30);
    if !(7..=30).contains(&days) {
        return Err(KmsError::constraint("pendingWindowInDays", days, "have value between 7 and 30"));
    }
    work.must_not_be_pending_deletion(&arn)?;
    let (key, family) = work.key(&arn)?;
    let is_primary = family.multi_region && key.region == family.primary_region;
    let has_replicas = is_primary && work.state.members(&key.id).count() > 1;
    let mut answer = json!({"KeyId": arn, "PendingWindowInDays": days});
    let status = if has_replicas {
        Status::PendingReplicaDeletion { days }
    } else {
        let at = work.now.plus(days_long(days));
        answer["DeletionDate"] = at.seconds().into();
        Status::PendingDeletion { at, days }
    };
    answer["KeyState"] = status.name().into();
    work.key_mut(&arn)?.status = status;
    work.changed = true;
    Ok(answer)
}

/// The key comes back disabled, as AWS does it.
pub(super) fn cancel(work: &mut Work<'_>, input: &KeyOnly) -> Result<Value, KmsError> {
    let arn = work.permitted(input.key_id.as_ref(), "CancelKeyDeletion")?;
    let key = work.key_mut(&arn)?;
    if matches!(key.status, Status::Enabled | Status::Disabled) {
        return Err(KmsError::invalid_state(format!("{arn} is not pending deletion.")));
    }
    key.status = Status::Disabled;
    work.changed = true;
    Ok(json!({"KeyId": arn}))
}
