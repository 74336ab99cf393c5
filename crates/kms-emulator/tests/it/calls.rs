//! The log of calls, and the data keys that a test may know.

use std::time::Duration;

use aws_sdk_kms::primitives::Blob;
use kms_emulator::{CreateKey, Emulator, Outcome};

use crate::world::{ACCOUNT, FRANKFURT, IRELAND, blob_of, client, code, control, data_key, start};

#[tokio::test]
async fn calls_are_logged_and_counted() {
    let kms = start().await;
    let key = kms.create_key(IRELAND, CreateKey::new().alias("alias/app")).unwrap();
    assert!(kms.calls().is_empty(), "what the library does is no call");
    let client = client(&kms, IRELAND);
    let made =
        client.generate_data_key().key_id("alias/app").number_of_bytes(32).encryption_context("a", "b");
    let made = made.send().await.unwrap();
    let mark = kms.mark();
    let opened = client.decrypt().ciphertext_blob(blob_of(&made)).send().await;
    assert_eq!(code(opened), "InvalidCiphertextException");

    let calls = kms.calls();
    assert_eq!(calls.len(), 2);
    assert_eq!(calls[0].operation, "GenerateDataKey");
    assert_eq!((calls[0].region.as_str(), calls[0].account.as_str()), (IRELAND, ACCOUNT));
    assert_eq!(calls[0].principal, "arn:aws:iam::111122223333:root");
    assert_eq!(calls[0].key.as_ref(), Some(&key));
    assert_eq!(calls[0].encryption_context["a"], "b");
    assert!(calls[0].is_ok());
    let since = kms.calls_since(mark);
    assert_eq!(since.len(), 1);
    assert_eq!(since[0].key.as_ref(), Some(&key), "a blob tells its key");
    let refused = Outcome::Error { code: "InvalidCiphertextException".to_owned(), injected: false };
    assert_eq!(since[0].outcome, refused);
    assert_eq!((kms.count("Decrypt"), kms.count("Encrypt")), (1, 0));
    assert_eq!(kms.count_where(|call| call.region == FRANKFURT), 0);
    kms.clear_calls();
    assert!(kms.calls().is_empty());
    assert!(kms.mark() > mark);
}

#[tokio::test]
async fn a_re_encryption_is_logged_with_both_keys() {
    let kms = start().await;
    let from = kms.create_key(IRELAND, CreateKey::new()).unwrap();
    let to = kms.create_key(IRELAND, CreateKey::new()).unwrap();
    let client = client(&kms, IRELAND);
    let blob = blob_of(&data_key(&client, &from).await);
    let moved = client.re_encrypt().ciphertext_blob(blob).destination_key_id(&to);
    moved.destination_encryption_context("c", "d").send().await.unwrap();
    let call = kms.calls().pop().unwrap();
    assert_eq!((call.source_key, call.key), (Some(from), Some(to)));
    assert!(call.source_encryption_context.is_empty());
    assert_eq!(call.encryption_context["c"], "d");
}

#[tokio::test]
async fn the_log_and_the_clock_are_read_over_http() {
    let kms = start().await;
    let key = kms.create_key(IRELAND, CreateKey::new()).unwrap();
    let client = client(&kms, IRELAND);
    data_key(&client, &key).await;
    client.list_keys().send().await.unwrap();
    let calls = control(&kms, "GET", "calls", "").await;
    assert_eq!((calls["count"].as_u64(), calls["next"].as_u64()), (Some(2), Some(2)));
    assert_eq!(calls["calls"][0]["outcome"]["kind"], "ok");
    let some = control(&kms, "GET", "calls?operation=ListKeys&since=1", "").await;
    assert_eq!(some["count"], 1);
    control(&kms, "DELETE", "calls", "").await;
    assert!(kms.calls().is_empty());

    control(&kms, "POST", "clock", r#"{"advance_seconds": 604800}"#).await;
    assert_eq!(control(&kms, "GET", "clock", "").await["advanced_seconds"], 604_800);
    kms.schedule_deletion(&key, 7).unwrap();
    control(&kms, "POST", "clock", r#"{"advance_seconds": 604800}"#).await;
    assert!(kms.describe_key(&key).is_err());
}

#[tokio::test]
async fn data_keys_are_known_only_to_a_test_that_asks() {
    let kms = start().await;
    let key = kms.create_key(IRELAND, CreateKey::new()).unwrap();
    data_key(&client(&kms, IRELAND), &key).await;
    assert!(kms.data_keys().is_empty());

    let kms = Emulator::builder().region(IRELAND).remember_data_keys().start().await.unwrap();
    let key = kms.create_key(IRELAND, CreateKey::new()).unwrap();
    let client = client(&kms, IRELAND);
    let made = data_key(&client, &key).await;
    client.generate_data_key_without_plaintext().key_id(&key).number_of_bytes(16).send().await.unwrap();
    client.encrypt().key_id(&key).plaintext(Blob::new("not a data key")).send().await.unwrap();
    let known = kms.data_keys();
    assert_eq!(known.iter().map(Vec::len).collect::<Vec<_>>(), [32, 16]);
    assert_eq!(known[0], made.plaintext().unwrap().as_ref());
    // The log is of no help in finding one.
    let log = serde_json::to_string(&kms.calls()).unwrap();
    assert!(!log.contains("laintext\":"), "{log}");
}

#[tokio::test]
async fn a_thousand_calls_at_once_are_all_counted() {
    let kms = start().await;
    let key = kms.create_key(IRELAND, CreateKey::new()).unwrap();
    let client = client(&kms, IRELAND);
    let mut calls = tokio::task::JoinSet::new();
    for _ in 0..1000 {
        let request = client.generate_data_key().key_id(&key).number_of_bytes(32);
        calls.spawn(async move { request.send().await.is_ok() });
    }
    let all = tokio::time::timeout(Duration::from_mins(1), calls.join_all()).await.unwrap();
    assert!(all.into_iter().all(|ok| ok));
    assert_eq!(kms.count("GenerateDataKey"), 1000);
}
