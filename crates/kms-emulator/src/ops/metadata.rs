//! How AWS describes a key.

use serde_json::{Value, json};

use crate::arn::key_arn;
use crate::engine::{Family, Key, State, Status};

pub(super) fn of_key(state: &State, key: &Key, family: &Family) -> Value {
    let mut metadata = json!({
        "AWSAccountId": key.account,
        "Arn": key.arn(),
        "CreationDate": key.created.seconds(),
        "CustomerMasterKeySpec": family.spec,
        "Description": key.description,
        "Enabled": key.status == Status::Enabled,
        "KeyId": key.id,
        "KeyManager": "CUSTOMER",
        "KeySpec": family.spec,
        "KeyState": key.status.name(),
        "KeyUsage": family.usage,
        "MultiRegion": family.multi_region,
        "Origin": "AWS_KMS",
    });
    if family.usage == "ENCRYPT_DECRYPT" {
        let algorithms: &[&str] = match family.spec.as_str() {
            "SYMMETRIC_DEFAULT" => &["SYMMETRIC_DEFAULT"],
            _ => &["RSAES_OAEP_SHA_1", "RSAES_OAEP_SHA_256"],
        };
        metadata["EncryptionAlgorithms"] = json!(algorithms);
    }
    if let Some(material) = family.current() {
        metadata["CurrentKeyMaterialId"] = material.id.hex().into();
    }
    match key.status {
        Status::PendingDeletion { at, .. } => metadata["DeletionDate"] = at.seconds().into(),
        Status::PendingReplicaDeletion { days } => metadata["PendingDeletionWindowInDays"] = days.into(),
        Status::Enabled | Status::Disabled => {}
    }
    if family.multi_region {
        metadata["MultiRegionConfiguration"] = multi_region(state, key, family);
    }
    metadata
}

fn multi_region(state: &State, key: &Key, family: &Family) -> Value {
    let primary = &family.primary_region;
    let member = |region: &str| json!({"Arn": key_arn(region, &family.account, &key.id), "Region": region});
    let replicas = state.members(&key.id).filter(|member| member.region != *primary);
    json!({
        "MultiRegionKeyType": if key.region == *primary { "PRIMARY" } else { "REPLICA" },
        "PrimaryKey": member(primary),
        "ReplicaKeys": replicas.map(|replica| member(&replica.region)).collect::<Vec<_>>(),
    })
}
