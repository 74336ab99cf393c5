//! Multi-Region keys.

use std::time::Duration;

use aws_sdk_kms::types::{KeyState, MultiRegionKeyType};
use kms_emulator::CreateKey;

use crate::world::{FRANKFURT, IRELAND, blob_of, client, code, data_key, start};

const DAY: Duration = Duration::from_hours(24);

#[tokio::test]
async fn a_blob_made_in_one_region_opens_in_the_other() {
    let kms = start().await;
    let (ireland, frankfurt) = (client(&kms, IRELAND), client(&kms, FRANKFURT));
    let made = ireland.create_key().multi_region(true).send().await.unwrap().key_metadata.unwrap();
    assert!(made.key_id().starts_with("mrk-"));
    let primary = made.arn().unwrap();
    let replica = ireland.replicate_key().key_id(primary).replica_region(FRANKFURT).send().await.unwrap();
    let metadata = replica.replica_key_metadata.unwrap();
    assert_eq!(metadata.key_id(), made.key_id());
    let configuration = metadata.multi_region_configuration().unwrap();
    assert_eq!(configuration.multi_region_key_type(), Some(&MultiRegionKeyType::Replica));
    assert_eq!(configuration.primary_key().unwrap().arn(), Some(primary));
    assert_eq!(configuration.replica_keys().len(), 1);
    let replica = metadata.arn().unwrap();

    let one = data_key(&ireland, primary).await;
    let opened = frankfurt.decrypt().ciphertext_blob(blob_of(&one)).key_id(replica).send().await.unwrap();
    assert_eq!(opened.plaintext(), one.plaintext());
    assert_eq!(opened.key_id(), Some(replica));
    let two = data_key(&frankfurt, replica).await;
    let opened = ireland.decrypt().ciphertext_blob(blob_of(&two)).send().await.unwrap();
    assert_eq!(opened.plaintext(), two.plaintext());
    assert_eq!(opened.key_id(), Some(primary));
}

#[tokio::test]
async fn replicas_have_states_of_their_own() {
    let kms = start().await;
    let primary = kms.create_key(IRELAND, CreateKey::new().multi_region()).unwrap();
    let replica = kms.replicate_key(&primary, FRANKFURT).unwrap();
    let (ireland, frankfurt) = (client(&kms, IRELAND), client(&kms, FRANKFURT));
    let blob = blob_of(&data_key(&ireland, &primary).await);
    kms.disable_key(&primary).unwrap();
    let here = ireland.decrypt().ciphertext_blob(blob.clone()).send().await;
    assert_eq!(code(here), "DisabledException");
    assert!(frankfurt.decrypt().ciphertext_blob(blob).key_id(&replica).send().await.is_ok());
}

#[tokio::test]
async fn only_a_primary_is_replicated_and_once_in_a_region() {
    let kms = start().await;
    let single = kms.create_key(IRELAND, CreateKey::new()).unwrap();
    let primary = kms.create_key(IRELAND, CreateKey::new().multi_region()).unwrap();
    let replica = kms.replicate_key(&primary, FRANKFURT).unwrap();
    let (ireland, frankfurt) = (client(&kms, IRELAND), client(&kms, FRANKFURT));
    let again = ireland.replicate_key().key_id(&primary).replica_region(FRANKFURT).send().await;
    assert_eq!(code(again), "AlreadyExistsException");
    let onward = frankfurt.replicate_key().key_id(&replica).replica_region(IRELAND).send().await;
    assert_eq!(code(onward), "UnsupportedOperationException");
    let of_single = ireland.replicate_key().key_id(&single).replica_region(FRANKFURT).send().await;
    assert_eq!(code(of_single), "UnsupportedOperationException");
}

#[tokio::test]
async fn a_primary_waits_for_its_replicas_to_be_gone() {
    let kms = start().await;
    let primary = kms.create_key(IRELAND, CreateKey::new().multi_region()).unwrap();
    let replica = kms.replicate_key(&primary, FRANKFURT).unwrap();
    let client = client(&kms, IRELAND);
    let blob = blob_of(&data_key(&client, &primary).await);
    let answer =
        client.schedule_key_deletion().key_id(&primary).pending_window_in_days(7).send().await.unwrap();
    assert_eq!(answer.key_state(), Some(&KeyState::PendingReplicaDeletion));
    assert!(answer.deletion_date().is_none());
    let opened = client.decrypt().ciphertext_blob(blob).send().await;
    assert_eq!(code(opened), "KMSInvalidStateException");
    kms.advance(100 * DAY);
    assert_eq!(kms.describe_key(&primary).unwrap()["KeyState"], "PendingReplicaDeletion");
    kms.schedule_deletion(&replica, 7).unwrap();
    kms.advance(7 * DAY);
    assert_eq!(kms.describe_key(&primary).unwrap()["KeyState"], "PendingDeletion");
    assert!(kms.describe_key(&replica).is_err());
    kms.advance(7 * DAY);
    assert!(kms.describe_key(&primary).is_err());
}
