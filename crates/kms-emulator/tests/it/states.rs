//! Disabled keys, and keys on their way out.

use std::time::Duration;

use aws_sdk_kms::primitives::Blob;
use aws_sdk_kms::types::KeyState;
use kms_emulator::CreateKey;

use crate::world::{IRELAND, blob_of, client, code, data_key, refused, start};

const DAY: Duration = Duration::from_hours(24);

#[tokio::test]
async fn a_disabled_key_does_nothing_until_it_is_enabled() {
    let kms = start().await;
    let key = kms.create_key(IRELAND, CreateKey::new()).unwrap();
    let other = kms.create_key(IRELAND, CreateKey::new()).unwrap();
    let client = client(&kms, IRELAND);
    let made = data_key(&client, &key).await;
    client.disable_key().key_id(&key).send().await.unwrap();

    let (name, message) = refused(client.decrypt().ciphertext_blob(blob_of(&made)).key_id(&key).send().await);
    assert_eq!((name.as_str(), message), ("DisabledException", format!("{key} is disabled.")));
    let again = client.generate_data_key().key_id(&key).number_of_bytes(32).send().await;
    assert_eq!(code(again), "DisabledException");
    let sealed = client.encrypt().key_id(&key).plaintext(Blob::new("x")).send().await;
    assert_eq!(code(sealed), "DisabledException");
    let away = client.re_encrypt().ciphertext_blob(blob_of(&made)).destination_key_id(&other).send().await;
    assert_eq!(code(away), "DisabledException");
    let blob = blob_of(&data_key(&client, &other).await);
    let here = client.re_encrypt().ciphertext_blob(blob).destination_key_id(&key).send().await;
    assert_eq!(code(here), "DisabledException");
    assert_eq!(code(client.rotate_key_on_demand().key_id(&key).send().await), "DisabledException");
    let metadata = client.describe_key().key_id(&key).send().await.unwrap().key_metadata.unwrap();
    assert_eq!((metadata.enabled, metadata.key_state), (false, Some(KeyState::Disabled)));

    kms.enable_key(&key).unwrap();
    let opened = client.decrypt().ciphertext_blob(blob_of(&made)).key_id(&key).send().await.unwrap();
    assert_eq!(opened.plaintext(), made.plaintext());
}

#[tokio::test]
async fn a_key_pending_deletion_is_in_no_state_to_be_used() {
    let kms = start().await;
    let key = kms.create_key(IRELAND, CreateKey::new()).unwrap();
    let client = client(&kms, IRELAND);
    let made = data_key(&client, &key).await;
    let answer = client.schedule_key_deletion().key_id(&key).pending_window_in_days(7).send().await.unwrap();
    assert_eq!(answer.key_state(), Some(&KeyState::PendingDeletion));
    assert!(answer.deletion_date().is_some());

    let open = async || client.decrypt().ciphertext_blob(blob_of(&made)).key_id(&key).send().await;
    let (name, message) = refused(open().await);
    assert_eq!((name.as_str(), message), ("KMSInvalidStateException", format!("{key} is pending deletion.")));
    for code in [
        code(client.generate_data_key().key_id(&key).number_of_bytes(32).send().await),
        code(client.enable_key().key_id(&key).send().await),
        code(client.disable_key().key_id(&key).send().await),
        code(client.enable_key_rotation().key_id(&key).send().await),
        code(client.schedule_key_deletion().key_id(&key).send().await),
        code(client.create_alias().alias_name("alias/x").target_key_id(&key).send().await),
    ] {
        assert_eq!(code, "KMSInvalidStateException");
    }

    // Taken back it is disabled, not enabled.
    client.cancel_key_deletion().key_id(&key).send().await.unwrap();
    assert_eq!(code(open().await), "DisabledException");
    kms.enable_key(&key).unwrap();
    assert!(open().await.is_ok());
    let cancelled = client.cancel_key_deletion().key_id(&key).send().await;
    assert_eq!(code(cancelled), "KMSInvalidStateException");
}

#[tokio::test]
async fn the_clock_deletes_a_key_and_its_aliases() {
    let kms = start().await;
    let key = kms.create_key(IRELAND, CreateKey::new().alias("alias/gone")).unwrap();
    let client = client(&kms, IRELAND);
    let made = data_key(&client, &key).await;
    kms.schedule_deletion(&key, 7).unwrap();
    kms.advance(6 * DAY + Duration::from_hours(23));
    assert_eq!(kms.describe_key(&key).unwrap()["KeyState"], "PendingDeletion");
    kms.advance(Duration::from_hours(1));
    assert_eq!(code(client.describe_key().key_id(&key).send().await), "NotFoundException");
    assert_eq!(code(client.describe_key().key_id("alias/gone").send().await), "NotFoundException");
    let opened = client.decrypt().ciphertext_blob(blob_of(&made)).key_id(&key).send().await;
    assert_eq!(code(opened), "NotFoundException");
    let opened = client.decrypt().ciphertext_blob(blob_of(&made)).send().await;
    assert_eq!(code(opened), "AccessDeniedException");
    assert!(kms.keys().is_empty());
    // The name is free again.
    kms.create_key(IRELAND, CreateKey::new().alias("alias/gone")).unwrap();
}

#[tokio::test]
async fn the_waiting_period_is_seven_to_thirty_days() {
    let kms = start().await;
    let key = kms.create_key(IRELAND, CreateKey::new()).unwrap();
    let client = client(&kms, IRELAND);
    for days in [1, 6, 31] {
        let answer = client.schedule_key_deletion().key_id(&key).pending_window_in_days(days).send().await;
        assert_eq!(code(answer), "ValidationException", "{days}");
    }
    client.schedule_key_deletion().key_id(&key).send().await.unwrap();
    kms.advance(29 * DAY + Duration::from_hours(23));
    assert!(kms.describe_key(&key).is_ok());
    kms.advance(Duration::from_hours(1));
    assert!(kms.describe_key(&key).is_err());
}
