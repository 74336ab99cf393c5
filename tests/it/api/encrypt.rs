//! `POST /v1/encrypt`

use serde_json::json;

use crate::caller::text;
use crate::service::World;

#[tokio::test(flavor = "multi_thread")]
async fn what_is_encrypted_is_decrypted_byte_for_byte_and_the_default_key_is_used() {
    let world = World::new().await;
    let service = world.start().await;
    let caller = service.tenant_and_caller("acme").await;
    let all_bytes: Vec<u8> = (0..=255).collect();
    for plaintext in [&b""[..], b"a", &all_bytes, &vec![7; 65_536], &vec![8; 65_537], &vec![9; 200_000]] {
        let answer = caller.try_encrypt(plaintext, &json!({"record": "42"})).await.ok(200);
        assert_eq!(answer["key"], "default");
        let ciphertext = text(&answer["ciphertext"]);
        assert!(ciphertext.starts_with("kf1."), "{ciphertext}");
        assert_eq!(caller.decrypt(&ciphertext, &json!({"record": "42"})).await, plaintext);
    }
    service.stop().await;
}
