//! New key material under an old key. What the old material sealed still opens.

use serde::Deserialize;
use serde_json::{Value, json};

use super::Work;
use super::input::{KeyOnly, Paging};
use crate::engine::{Material, Rotation, RotationType, Status, days_long};
use crate::error::KmsError;

/// AWS's limit for each key.
const MAX_ON_DEMAND: usize = 25;

#[derive(Debug, Default, Deserialize)]
#[serde(default, rename_all = "PascalCase")]
pub(super) struct EnableKeyRotation {
    key_id: Option<String>,
    rotation_period_in_days: Option<u32>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default, rename_all = "PascalCase")]
pub(super) struct ListKeyRotations {
    key_id: Option<String>,
    include_key_material: Option<String>,
    #[serde(flatten)]
    paging: Paging,
}

pub(super) fn enable(work: &mut Work<'_>, input: &EnableKeyRotation) -> Result<Value, KmsError> {
    let arn = work.permitted(input.key_id.as_ref(), "EnableKeyRotation")?;
    let period_days = input.rotation_period_in_days.unwrap_or(365);
    if !(90..=2560).contains(&period_days) {
        return Err(KmsError::constraint(
            "rotationPeriodInDays",
            period_days,
            "have value between 90 and 2560",
        ));
    }
    must_be_rotatable(work, &arn)?;
    let next = work.now.plus(days_long(period_days));
    work.family_mut(&arn)?.rotation = Some(Rotation { period_days, next });
    work.changed = true;
    Ok(json!({}))
}

pub(super) fn disable(work: &mut Work<'_>, input: &KeyOnly) -> Result<Value, KmsError> {
    let arn = work.permitted(input.key_id.as_ref(), "DisableKeyRotation")?;
    must_be_rotatable(work, &arn)?;
    work.family_mut(&arn)?.rotation = None;
    work.changed = true;
    Ok(json!({}))
}

/// AWS rotates within seconds; here the new material is current with the answer.
pub(super) fn rotate_on_demand(work: &mut Work<'_>, input: &KeyOnly) -> Result<Value, KmsError> {
    let arn = work.permitted(input.key_id.as_ref(), "RotateKeyOnDemand")?;
    must_be_rotatable(work, &arn)?;
    let now = work.now;
    let family = work.family_mut(&arn)?;
    let on_demand = |material: &&Material| matches!(material.rotated, Some((_, RotationType::OnDemand)));
    if family.materials.iter().filter(on_demand).count() >= MAX_ON_DEMAND {
        return Err(KmsError::limit_exceeded(format!(
            "The on-demand rotations limit of {MAX_ON_DEMAND} has been reached for {arn}."
        )));
    }
    family.materials.push(Material::generate(Some((now, RotationType::OnDemand)))?);
    work.changed = true;
    Ok(json!({"KeyId": arn}))
}

pub(super) fn list(work: &mut Work<'_>, input: &ListKeyRotations) -> Result<Value, KmsError> {
    let arn = work.permitted(input.key_id.as_ref(), "ListKeyRotations")?;
    let all = match input.include_key_material.as_deref() {
        Some("ALL_KEY_MATERIAL") => true,
        Some("ROTATIONS_ONLY") | None => false,
        Some(other) => {
            let constraint = "satisfy enum value set: [ALL_KEY_MATERIAL, ROTATIONS_ONLY]";
            return Err(KmsError::constraint("includeKeyMaterial", other, constraint));
        }
    };
    let (_, family) = work.key(&arn)?;
    must_be_symmetric(&arn, family.is_symmetric())?;
    let current = family.current().map(|material| &material.id);
    let listed = family.materials.iter().filter(|material| all || material.rotated.is_some());
    let items = listed.map(|material| {
        let is_current = current == Some(&material.id);
        let mut item = json!({
            "KeyId": arn,
            "KeyMaterialId": material.id.hex(),
            "KeyMaterialState": if is_current { "CURRENT" } else { "NON_CURRENT" },
        });
        if let Some((at, kind)) = material.rotated {
            item["RotationDate"] = at.seconds().into();
            item["RotationType"] = json!(kind);
        }
        item
    });
    input.paging.answer("Rotations", items.collect(), 100)
}

pub(super) fn status(work: &mut Work<'_>, input: &KeyOnly) -> Result<Value, KmsError> {
    let arn = work.permitted(input.key_id.as_ref(), "GetKeyRotationStatus")?;
    let (key, family) = work.key(&arn)?;
    must_be_symmetric(&arn, family.is_symmetric())?;
    let pending =
        matches!(key.status, Status::PendingDeletion { .. } | Status::PendingReplicaDeletion { .. });
    let rotation = family.rotation.filter(|_| !pending);
    let mut answer = json!({"KeyId": arn, "KeyRotationEnabled": rotation.is_some()});
    if let Some(rotation) = rotation {
        answer["RotationPeriodInDays"] = rotation.period_days.into();
        answer["NextRotationDate"] = rotation.next.seconds().into();
    }
    Ok(answer)
}

/// A multi-Region key is rotated through its primary, and its replicas follow.
fn must_be_rotatable(work: &Work<'_>, arn: &str) -> Result<(), KmsError> {
    let (key, family) = work.key(arn)?;
    must_be_symmetric(arn, family.is_symmetric())?;
    if key.region != family.primary_region {
        return Err(KmsError::unsupported(format!(
            "{arn} is a replica: rotation is set on its primary key."
        )));
    }
    work.must_be_enabled(arn)
}

fn must_be_symmetric(arn: &str, symmetric: bool) -> Result<(), KmsError> {
    if symmetric {
        return Ok(());
    }
    Err(KmsError::unsupported(format!("{arn} does not support rotation.")))
}
