//! Several accounts in one emulator.

use aws_sdk_kms::primitives::Blob;
use kms_emulator::{CreateKey, Principal};
use serde_json::json;

use crate::world::{
    ACCOUNT, IRELAND, OTHER_ACCOUNT, blob_of, client, client_as, code, data_key, refused, start,
};

#[tokio::test]
async fn accounts_do_not_see_each_others_keys() {
    let kms = start().await;
    let key = kms.create_key(IRELAND, CreateKey::new().alias("alias/app")).unwrap();
    let theirs = kms.create_key(IRELAND, CreateKey::new().account(OTHER_ACCOUNT).alias("alias/app")).unwrap();
    let (us, them) = (client(&kms, IRELAND), client_as(&kms, IRELAND, OTHER_ACCOUNT));
    assert_eq!(data_key(&us, "alias/app").await.key_id(), Some(key.as_str()));
    assert_eq!(data_key(&them, "alias/app").await.key_id(), Some(theirs.as_str()));
    let listed = them.list_keys().send().await.unwrap().keys.unwrap();
    assert_eq!(listed.iter().filter_map(|key| key.key_arn()).collect::<Vec<_>>(), [theirs]);

    let (name, message) = refused(them.encrypt().key_id(&key).plaintext(Blob::new("x")).send().await);
    assert_eq!(name, "AccessDeniedException");
    assert!(
        message.contains("on this resource because the resource does not exist in this Region"),
        "{message}"
    );
    let missing = key.replace(key.rsplit('/').next().unwrap(), "00000000-0000-4000-8000-000000000000");
    let (_, other) = refused(them.encrypt().key_id(&missing).plaintext(Blob::new("x")).send().await);
    assert_eq!(message, other, "nobody learns whether a key of another account exists");
    let id = key.rsplit('/').next().unwrap();
    let by_id = them.encrypt().key_id(id).plaintext(Blob::new("x")).send().await;
    assert_eq!(code(by_id), "NotFoundException");
}

#[tokio::test]
async fn a_key_policy_lets_another_account_in() {
    let kms = start().await;
    let allow = |who: &str, action: &str| {
        let principal = json!({"AWS": format!("arn:aws:iam::{who}:root")});
        json!({"Effect": "Allow", "Principal": principal, "Action": action, "Resource": "*"})
    };
    let policy = json!({"Statement": [allow(ACCOUNT, "kms:*"), allow(OTHER_ACCOUNT, "kms:*")]});
    let key =
        kms.create_key(IRELAND, CreateKey::new().policy(policy.to_string()).alias("alias/shared")).unwrap();
    let (us, them) = (client(&kms, IRELAND), client_as(&kms, IRELAND, OTHER_ACCOUNT));
    let made = data_key(&them, &key).await;
    let by_alias = format!("arn:aws:kms:{IRELAND}:{ACCOUNT}:alias/shared");
    assert_eq!(data_key(&them, &by_alias).await.key_id(), Some(key.as_str()));
    let opened = us.decrypt().ciphertext_blob(blob_of(&made)).send().await.unwrap();
    assert_eq!(opened.plaintext(), made.plaintext());
    // A blob names its key whatever the account; so does its bare id.
    let id = key.rsplit('/').next().unwrap();
    for key_id in [None, Some(id.to_owned())] {
        let request = them.decrypt().ciphertext_blob(blob_of(&made)).set_key_id(key_id);
        assert!(request.send().await.is_ok());
    }
    // But AWS lets nobody manage another account's key.
    assert_eq!(code(them.disable_key().key_id(&key).send().await), "AccessDeniedException");

    // And the caller's own account has a say.
    let alice = "arn:aws:iam::444455556666:user/alice";
    let nothing = json!({"Statement": []}).to_string();
    kms.add_principal("ALICE", Principal::new(alice).identity_policy(nothing)).unwrap();
    let made =
        client_as(&kms, IRELAND, "ALICE").generate_data_key().key_id(&key).number_of_bytes(32).send().await;
    let (_, message) = refused(made);
    assert!(message.contains("no identity-based policy allows"), "{message}");
}
