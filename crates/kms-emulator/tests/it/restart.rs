//! What survives a restart.

use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;

use kms_emulator::{CreateKey, Emulator, StartError};

use crate::world::{FRANKFURT, IRELAND, blob_of, client, code, data_key};

async fn start(state: &Path) -> Emulator {
    Emulator::builder().region(IRELAND).region(FRANKFURT).state_file(state).start().await.unwrap()
}

#[tokio::test]
async fn keys_aliases_policies_and_material_survive() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("state.json");
    let kms = start(&file).await;
    let key = kms.create_key(IRELAND, CreateKey::new().alias("alias/app").multi_region()).unwrap();
    let replica = kms.replicate_key(&key, FRANKFURT).unwrap();
    let disabled = kms.create_key(IRELAND, CreateKey::new()).unwrap();
    kms.disable_key(&disabled).unwrap();
    let old = data_key(&client(&kms, IRELAND), &key).await;
    kms.rotate_key(&key).unwrap();
    let new = data_key(&client(&kms, IRELAND), &key).await;
    let policy = r#"{"Statement": [{"Effect": "Deny", "Principal": "*", "Action": "kms:Encrypt", "Resource": "*"},
        {"Effect": "Allow", "Principal": "*", "Action": "kms:*", "Resource": "*"}]}"#;
    kms.set_policy(&replica, policy).unwrap();
    let before: Vec<_> = kms.keys().iter().map(|arn| kms.describe_key(arn).unwrap()).collect();
    kms.shutdown().await;

    let kms = start(&file).await;
    let after: Vec<_> = kms.keys().iter().map(|arn| kms.describe_key(arn).unwrap()).collect();
    assert_eq!(before, after);
    let (ireland, frankfurt) = (client(&kms, IRELAND), client(&kms, FRANKFURT));
    for made in [old, new] {
        for client in [&ireland, &frankfurt] {
            let opened = client.decrypt().ciphertext_blob(blob_of(&made)).send().await.unwrap();
            assert_eq!(opened.plaintext(), made.plaintext());
            assert_eq!(opened.key_material_id(), made.key_material_id());
        }
    }
    assert_eq!(data_key(&ireland, "alias/app").await.key_id(), Some(key.as_str()));
    let denied = frankfurt.encrypt().key_id(&replica).plaintext(aws_sdk_kms::primitives::Blob::new("x"));
    assert_eq!(code(denied.send().await), "AccessDeniedException");
    let made = ireland.generate_data_key().key_id(&disabled).number_of_bytes(32).send().await;
    assert_eq!(code(made), "DisabledException");
}

#[tokio::test]
async fn the_state_file_is_its_owners_and_always_whole() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("state.json");
    let kms = start(&file).await;
    for _ in 0..20 {
        kms.create_key(IRELAND, CreateKey::new()).unwrap();
        let mode = std::fs::metadata(&file).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o600);
        serde_json::from_slice::<serde_json::Value>(&std::fs::read(&file).unwrap()).unwrap();
    }
    // Nothing is left lying about.
    assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 1);
    // What a crash left behind, readable by all, does not lend its mode to the next file.
    let left = folder.path().join("state.json.new");
    std::fs::write(&left, "{").unwrap();
    std::fs::set_permissions(&left, std::fs::Permissions::from_mode(0o666)).unwrap();
    kms.create_key(IRELAND, CreateKey::new()).unwrap();
    assert_eq!(std::fs::metadata(&file).unwrap().permissions().mode() & 0o777, 0o600);
}

#[tokio::test]
async fn a_state_file_that_is_not_understood_is_left_alone() {
    let folder = tempfile::tempdir().unwrap();
    for text in ["{", r#"{"version": 99, "families": {}, "keys": {}, "aliases": {}, "sessions": {}}"#] {
        let file = folder.path().join("state.json");
        std::fs::write(&file, text).unwrap();
        let started = Emulator::builder().state_file(&file).start().await;
        assert!(matches!(started, Err(StartError::State(..))), "{text}");
        assert_eq!(std::fs::read_to_string(&file).unwrap(), text);
    }
}

#[tokio::test]
async fn a_change_that_cannot_be_kept_is_not_answered_with_success() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("state.json");
    let kms = start(&file).await;
    let client = client(&kms, IRELAND);
    client.create_key().send().await.unwrap();
    std::fs::remove_dir_all(folder.path()).unwrap();
    assert_eq!(code(client.create_key().send().await), "KMSInternalException");
}
