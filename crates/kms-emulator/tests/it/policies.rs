//! Key policies and identity policies.

use aws_sdk_kms::primitives::Blob;
use aws_sdk_kms::types::DataKeySpec;
use kms_emulator::{CreateKey, Emulator, Principal};
use serde_json::{Value, json};

use crate::world::{ACCOUNT, IRELAND, client, client_as, code, refused};

const ALICE: &str = "arn:aws:iam::111122223333:user/alice";
const BOB: &str = "arn:aws:iam::111122223333:user/bob";

fn policy(statements: &Value) -> String {
    json!({"Version": "2012-10-17", "Statement": statements}).to_string()
}

/// What AWS gives a key without a policy of its own, as one statement.
fn of_account() -> Value {
    let root = format!("arn:aws:iam::{ACCOUNT}:root");
    json!({"Effect": "Allow", "Principal": {"AWS": root}, "Action": "kms:*", "Resource": "*"})
}

async fn world() -> Emulator {
    Emulator::builder()
        .region(IRELAND)
        .principal("ALICE", Principal::new(ALICE))
        .principal("BOB", Principal::new(BOB))
        .start()
        .await
        .unwrap()
}

#[tokio::test]
async fn a_policy_allows_principals_and_actions() {
    let kms = world().await;
    let allow = json!([{
        "Effect": "Allow",
        "Principal": {"AWS": [ALICE]},
        "Action": ["kms:Encrypt", "kms:GenerateDataKey*"],
        "Resource": "*",
    }]);
    let key = kms.create_key(IRELAND, CreateKey::new().policy(policy(&allow))).unwrap();
    let (alice, bob) = (client_as(&kms, IRELAND, "ALICE"), client_as(&kms, IRELAND, "BOB"));
    let sealed = alice.encrypt().key_id(&key).plaintext(Blob::new("x")).send().await.unwrap();
    assert!(
        alice.generate_data_key_without_plaintext().key_id(&key).number_of_bytes(32).send().await.is_ok()
    );
    let opened = alice.decrypt().ciphertext_blob(sealed.ciphertext_blob.unwrap()).key_id(&key).send().await;
    let (name, message) = refused(opened);
    assert_eq!(name, "AccessDeniedException");
    assert_eq!(
        message,
        format!(
            "User: {ALICE} is not authorized to perform: kms:Decrypt on resource: {key} \
             because no resource-based policy allows the kms:Decrypt action"
        )
    );
    let sealed = bob.encrypt().key_id(&key).plaintext(Blob::new("x")).send().await;
    assert_eq!(code(sealed), "AccessDeniedException");
}

#[tokio::test]
async fn a_denial_wins() {
    let kms = world().await;
    let key = kms.create_key(IRELAND, CreateKey::new()).unwrap();
    let alice = client_as(&kms, IRELAND, "ALICE");
    let seal = async || alice.encrypt().key_id(&key).plaintext(Blob::new("x")).send().await;
    assert!(seal().await.is_ok());
    let deny =
        json!({"Effect": "Deny", "Principal": {"AWS": ALICE}, "Action": "kms:Encrypt", "Resource": "*"});
    kms.set_policy(&key, &policy(&json!([of_account(), deny]))).unwrap();
    let (name, message) = refused(seal().await);
    assert_eq!(name, "AccessDeniedException");
    assert!(message.ends_with("with an explicit deny in a resource-based policy"), "{message}");
    assert!(alice.describe_key().key_id(&key).send().await.is_ok());
    kms.set_policy(&key, &policy(&json!([of_account()]))).unwrap();
    assert!(seal().await.is_ok());
}

#[tokio::test]
async fn a_condition_binds_a_tenant_by_the_encryption_context() {
    let kms = world().await;
    let allow = json!([{
        "Effect": "Allow",
        "Principal": "*",
        "Action": ["kms:GenerateDataKey", "kms:Decrypt", "kms:ReEncrypt*"],
        "Resource": "*",
        "Condition": {"StringEquals": {"kms:EncryptionContext:keyfold:tenant": "acme"}},
    }]);
    let key = kms.create_key(IRELAND, CreateKey::new().policy(policy(&allow))).unwrap();
    let alice = client_as(&kms, IRELAND, "ALICE");
    let generate = async |tenant: &str| {
        let request = alice.generate_data_key().key_id(&key).key_spec(DataKeySpec::Aes256);
        request.encryption_context("keyfold:tenant", tenant).encryption_context("x", "y").send().await
    };
    let made = generate("acme").await.unwrap();
    assert_eq!(code(generate("globex").await), "AccessDeniedException");
    let without = alice.generate_data_key().key_id(&key).key_spec(DataKeySpec::Aes256).send().await;
    assert_eq!(code(without), "AccessDeniedException");
    let blob = made.ciphertext_blob.unwrap();
    let move_to = async |tenant: &str| {
        let request = alice.re_encrypt().ciphertext_blob(blob.clone()).destination_key_id(&key);
        let request = request.source_encryption_context("keyfold:tenant", "acme");
        let request = request.source_encryption_context("x", "y");
        request.destination_encryption_context("keyfold:tenant", tenant).send().await
    };
    assert!(move_to("acme").await.is_ok());
    let (_, message) = refused(move_to("globex").await);
    assert!(message.contains("kms:ReEncryptTo"), "{message}");
}

#[tokio::test]
async fn an_identity_policy_decides_where_the_key_leaves_it_to_the_account() {
    let kms = world().await;
    let key = kms.create_key(IRELAND, CreateKey::new()).unwrap();
    let other = kms.create_key(IRELAND, CreateKey::new()).unwrap();
    let own = policy(&json!({"Effect": "Allow", "Action": "kms:Encrypt", "Resource": key}));
    kms.add_principal("ALICE", Principal::new(ALICE).identity_policy(own)).unwrap();
    let alice = client_as(&kms, IRELAND, "ALICE");
    let sealed = alice.encrypt().key_id(&key).plaintext(Blob::new("x")).send().await.unwrap();
    let opened = alice.decrypt().ciphertext_blob(sealed.ciphertext_blob.unwrap()).key_id(&key).send().await;
    let (name, message) = refused(opened);
    assert_eq!(name, "AccessDeniedException");
    assert!(message.ends_with("because no identity-based policy allows the kms:Decrypt action"), "{message}");
    let sealed = alice.encrypt().key_id(&other).plaintext(Blob::new("x")).send().await;
    assert_eq!(code(sealed), "AccessDeniedException");
    let (_, message) = refused(alice.create_key().send().await);
    assert!(message.contains("kms:CreateKey"), "{message}");

    // A key policy that names her needs no policy of hers, within the account.
    let allow = json!({"Effect": "Allow", "Principal": {"AWS": ALICE}, "Action": "kms:*", "Resource": "*"});
    kms.set_policy(&other, &policy(&json!([allow]))).unwrap();
    assert!(alice.encrypt().key_id(&other).plaintext(Blob::new("x")).send().await.is_ok());
}

#[tokio::test]
async fn policies_are_read_back_and_checked() {
    let kms = world().await;
    let client = client(&kms, IRELAND);
    let key = client.create_key().send().await.unwrap().key_metadata.unwrap().key_id;
    let text = client.get_key_policy().key_id(&key).send().await.unwrap().policy.unwrap();
    assert!(text.contains("Enable IAM User Permissions"), "{text}");
    let put = async |text: String| client.put_key_policy().key_id(&key).policy(text).send().await;
    let good = policy(&json!([of_account()]));
    put(good.clone()).await.unwrap();
    assert_eq!(client.get_key_policy().key_id(&key).send().await.unwrap().policy, Some(good));

    let (name, message) = refused(
        put(policy(&json!([{"Effect": "Allow", "Principal": {"AWS": ALICE}, "Action": "kms:*"}]))).await,
    );
    assert_eq!(name, "MalformedPolicyDocumentException");
    assert!(message.contains("will not allow you to update the key policy"), "{message}");
    for bad in [
        "no json".to_owned(),
        "{}".to_owned(),
        policy(&json!([{"Effect": "Maybe"}])),
        policy(&json!([of_account(), {"Effect": "Allow", "Principal": {"AWS": "alice"}, "Action": "kms:*"}])),
        policy(&json!([of_account(), {"Effect": "Deny", "Principal": "*", "Action": "*", "Conditions": {}}])),
        policy(&json!([of_account(), {"Effect": "Deny", "Principal": "*", "Action": "kms:${x}"}])),
    ] {
        assert_eq!(code(put(bad.clone()).await), "MalformedPolicyDocumentException", "{bad}");
    }
}
