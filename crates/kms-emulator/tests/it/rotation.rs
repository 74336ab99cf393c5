//! New material under an old key.

use std::time::Duration;

use aws_sdk_kms::types::{IncludeKeyMaterial, KeyMaterialState, RotationType};
use kms_emulator::CreateKey;

use crate::world::{FRANKFURT, IRELAND, blob_of, client, code, data_key, start};

const DAY: Duration = Duration::from_hours(24);

#[tokio::test]
async fn old_blobs_open_after_a_rotation_and_new_ones_tell_their_material() {
    let kms = start().await;
    let key = kms.create_key(IRELAND, CreateKey::new()).unwrap();
    let client = client(&kms, IRELAND);
    let old = data_key(&client, &key).await;
    client.rotate_key_on_demand().key_id(&key).send().await.unwrap();
    let new = data_key(&client, &key).await;
    assert_ne!(old.key_material_id(), new.key_material_id());
    let metadata = client.describe_key().key_id(&key).send().await.unwrap().key_metadata.unwrap();
    assert_eq!(metadata.current_key_material_id(), new.key_material_id());
    for made in [&old, &new] {
        let opened = client.decrypt().ciphertext_blob(blob_of(made)).key_id(&key).send().await.unwrap();
        assert_eq!(opened.plaintext(), made.plaintext());
        assert_eq!(opened.key_material_id(), made.key_material_id());
    }
    // ReEncrypt under the same key is how a blob gets to the new material.
    let moved =
        client.re_encrypt().ciphertext_blob(blob_of(&old)).destination_key_id(&key).send().await.unwrap();
    assert_eq!(moved.source_key_material_id(), old.key_material_id());
    assert_eq!(moved.destination_key_material_id(), new.key_material_id());
    let opened = client.decrypt().ciphertext_blob(moved.ciphertext_blob.unwrap()).send().await.unwrap();
    assert_eq!(opened.key_material_id(), new.key_material_id());
}

#[tokio::test]
async fn rotations_are_listed() {
    let kms = start().await;
    let key = kms.create_key(IRELAND, CreateKey::new()).unwrap();
    let client = client(&kms, IRELAND);
    let first = data_key(&client, &key).await;
    assert!(client.list_key_rotations().key_id(&key).send().await.unwrap().rotations().is_empty());
    kms.rotate_key(&key).unwrap();
    kms.rotate_key(&key).unwrap();
    let rotations = client.list_key_rotations().key_id(&key).send().await.unwrap().rotations.unwrap();
    assert_eq!(rotations.len(), 2);
    assert!(rotations.iter().all(|r| r.rotation_type() == Some(&RotationType::OnDemand)));
    assert!(rotations.iter().all(|r| r.rotation_date().is_some()));
    assert_eq!(rotations[1].key_material_state(), Some(&KeyMaterialState::Current));
    let all =
        client.list_key_rotations().key_id(&key).include_key_material(IncludeKeyMaterial::AllKeyMaterial);
    let all = all.send().await.unwrap().rotations.unwrap();
    assert_eq!(all.len(), 3);
    assert_eq!(all[0].key_material_id(), first.key_material_id());
    assert_eq!(all[0].key_material_state(), Some(&KeyMaterialState::NonCurrent));
    let page = client.list_key_rotations().key_id(&key).limit(1).send().await.unwrap();
    assert!(page.truncated);
    let rest = client.list_key_rotations().key_id(&key).limit(1).set_marker(page.next_marker);
    assert_eq!(rest.send().await.unwrap().rotations(), &rotations[1..]);
}

#[tokio::test]
async fn the_clock_rotates_a_key_that_is_enabled() {
    let kms = start().await;
    let key = kms.create_key(IRELAND, CreateKey::new()).unwrap();
    let client = client(&kms, IRELAND);
    let status = async || client.get_key_rotation_status().key_id(&key).send().await.unwrap();
    assert!(!status().await.key_rotation_enabled);
    client.enable_key_rotation().key_id(&key).rotation_period_in_days(90).send().await.unwrap();
    assert_eq!(status().await.rotation_period_in_days, Some(90));
    let due = status().await.next_rotation_date.unwrap();

    kms.advance(89 * DAY);
    let rotations =
        async || client.list_key_rotations().key_id(&key).send().await.unwrap().rotations.unwrap();
    assert!(rotations().await.is_empty());
    kms.advance(DAY);
    assert_eq!(rotations().await.len(), 1);
    assert_eq!(rotations().await[0].rotation_type(), Some(&RotationType::Automatic));
    assert!(status().await.next_rotation_date.unwrap().secs() > due.secs());

    // Not while it is disabled; but then at once.
    kms.disable_key(&key).unwrap();
    kms.advance(365 * DAY);
    assert_eq!(rotations().await.len(), 1);
    kms.enable_key(&key).unwrap();
    assert_eq!(rotations().await.len(), 2);

    client.disable_key_rotation().key_id(&key).send().await.unwrap();
    kms.advance(365 * DAY);
    assert_eq!(rotations().await.len(), 2);
}

#[tokio::test]
async fn twenty_five_rotations_on_demand_are_the_limit() {
    let kms = start().await;
    let key = kms.create_key(IRELAND, CreateKey::new()).unwrap();
    let client = client(&kms, IRELAND);
    let first = data_key(&client, &key).await;
    for _ in 0..25 {
        kms.rotate_key(&key).unwrap();
    }
    assert_eq!(code(client.rotate_key_on_demand().key_id(&key).send().await), "LimitExceededException");
    let opened = client.decrypt().ciphertext_blob(blob_of(&first)).send().await.unwrap();
    assert_eq!(opened.plaintext(), first.plaintext());
}

#[tokio::test]
async fn a_replica_is_rotated_through_its_primary() {
    let kms = start().await;
    let primary = kms.create_key(IRELAND, CreateKey::new().multi_region()).unwrap();
    let replica = kms.replicate_key(&primary, FRANKFURT).unwrap();
    let (ireland, frankfurt) = (client(&kms, IRELAND), client(&kms, FRANKFURT));
    let refused = frankfurt.rotate_key_on_demand().key_id(&replica).send().await;
    assert_eq!(code(refused), "UnsupportedOperationException");
    let old = data_key(&frankfurt, &replica).await;
    kms.rotate_key(&primary).unwrap();
    let new = data_key(&frankfurt, &replica).await;
    assert_ne!(old.key_material_id(), new.key_material_id());
    assert_eq!(data_key(&ireland, &primary).await.key_material_id(), new.key_material_id());
    for made in [old, new] {
        let opened = ireland.decrypt().ciphertext_blob(blob_of(&made)).send().await.unwrap();
        assert_eq!(opened.plaintext(), made.plaintext());
    }
}
