//! Envelopes that are cut, changed, somebody else's, or made by an attacker: none opens as what it is not.

use std::ops::Range;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use envelope::{
    DataKey, DataKeyId, EncryptionContext, WrappedDataKey, WrappedKeys, inspect, seal, text as envelope_text,
    with_wrapped_keys,
};
use keyfold::kms::{Kms as _, Urgency, kms_context};
use keyfold::tenant::Kek;
use serde_json::{Value, json};

use crate::caller::text;
use crate::lanes::post_all;
use crate::service::{KEK, Service, World};

const PLAINTEXT: &[u8] = b"hello, forger";

fn context(pairs: &[(&str, &str)]) -> EncryptionContext {
    let mut context = EncryptionContext::new();
    for (name, value) in pairs {
        context.insert(*name, *value).unwrap();
    }
    context
}

/// An embedded envelope and a compact one of the same tenant, as bytes.
async fn envelopes(service: &Service, tenant: &str) -> (String, [Vec<u8>; 2]) {
    let caller = service.tenant_and_caller(tenant).await;
    let mut envelopes = [vec![], vec![]];
    for (weight, envelope) in ["embedded", "compact"].into_iter().zip(&mut envelopes) {
        let body = json!({"plaintext": STANDARD.encode(PLAINTEXT), "envelope": weight});
        let ciphertext = text(&caller.post("/v1/encrypt", &body).await.ok(200)["ciphertext"]);
        *envelope = envelope_text::decode(&ciphertext).unwrap();
    }
    (caller.token().to_owned(), envelopes)
}

async fn decrypt_all(service: &Service, token: &str, envelopes: &[Vec<u8>]) -> Vec<(u16, Value)> {
    let body = |envelope: &Vec<u8>| json!({"ciphertext": envelope_text::encode(envelope)}).to_string();
    post_all(service.address, token, "/v1/decrypt", envelopes.iter().map(body).collect()).await
}

/// What became of an envelope, in a word.
fn verdict((status, answer): &(u16, Value)) -> String {
    if *status == 200 {
        assert_eq!(answer["plaintext"], STANDARD.encode(PLAINTEXT));
        return if answer["rewrap_advised"] == true { "opens, rewrap advised" } else { "opens" }.to_owned();
    }
    assert!((400..500).contains(status), "{answer}");
    assert!(answer.get("plaintext").is_none());
    text(&answer["code"])
}

#[tokio::test(flavor = "multi_thread")]
async fn an_envelope_cut_at_any_byte_is_malformed_in_its_head_and_damaged_in_its_body() {
    let world = World::new().await;
    let service = world.start().await;
    let (token, envelopes) = envelopes(&service, "acme").await;
    for envelope in envelopes {
        let body_offset = inspect(&envelope).unwrap().body_offset();
        let cuts: Vec<_> = (0..=envelope.len()).map(|at| envelope[..at].to_vec()).collect();
        for (at, answer) in decrypt_all(&service, &token, &cuts).await.iter().enumerate() {
            let expected = match at {
                at if at < body_offset => "malformed_envelope",
                at if at < envelope.len() => "ciphertext_damaged",
                _ => "opens",
            };
            assert!(verdict(answer).starts_with(expected), "cut at {at}: {answer:?}");
        }
        let longer = [&envelope[..], &[0]].concat();
        assert_eq!(verdict(&decrypt_all(&service, &token, &[longer]).await[0]), "ciphertext_damaged");
    }
    service.stop().await;
}

fn flips(envelope: &[u8], within: Range<usize>) -> Vec<Vec<u8>> {
    let flip = |bit: usize| {
        let mut flipped = envelope.to_vec();
        flipped[bit / 8] ^= 1 << (bit % 8);
        flipped
    };
    (within.start * 8..within.end * 8).map(flip).collect()
}

/// Where the KEK's id and the wrapped key stand: what is not bound to the message.
fn unbound(envelope: &[u8]) -> [Range<usize>; 2] {
    let head = inspect(envelope).unwrap();
    let key = &head.wrapped().keys()[0];
    let (kek, blob) = (key.kek.len(), key.blob.len());
    let end = head.body_offset();
    [end - blob - 2 - kek..end - blob - 2, end - blob..end]
}

#[tokio::test(flavor = "multi_thread")]
async fn with_any_one_bit_flipped_an_envelope_is_refused_or_opens_to_exactly_what_was_sealed() {
    let world = World::new().await;
    let service = world.start().await;
    let (token, [embedded, compact]) = envelopes(&service, "acme").await;
    let section = inspect(&embedded).unwrap().wrapped().clone();
    let unbound = unbound(&embedded);
    let flipped = flips(&embedded, 0..embedded.len());
    let mut opened = 0;
    for (index, (flipped, answer)) in
        flipped.iter().zip(decrypt_all(&service, &token, &flipped).await).enumerate()
    {
        let at = index / 8;
        let expected = match at {
            // Magic and version.
            0..3 => "malformed_envelope",
            // Data key id, salt, commitment.
            3..75 => "context_mismatch",
            _ => match inspect(flipped) {
                Err(_) => "malformed_envelope",
                Ok(head)
                    if !head.wrapped().is_compact()
                        && head.wrapped().kms_context() != section.kms_context() =>
                {
                    "context_mismatch"
                }
                Ok(_) if unbound.iter().any(|range| range.contains(&at)) => "opens, rewrap advised",
                // A length was changed, so that the body begins elsewhere; or the body itself was.
                Ok(_) => "ciphertext_damaged",
            },
        };
        assert_eq!(verdict(&answer), expected, "bit {} of byte {at}: {answer:?}", index % 8);
        opened += usize::from(expected.starts_with("opens"));
    }
    // Every bit of the wrapped key, and those of the KEK's id that leave it UTF-8.
    assert_eq!(opened, 8 * unbound[1].len() + 7 * unbound[0].len());

    for (index, answer) in
        decrypt_all(&service, &token, &flips(&compact, 0..compact.len())).await.iter().enumerate()
    {
        let expected: &[&str] = match index / 8 {
            0..3 => &["malformed_envelope"],
            3..19 => &["not_found"],
            19..75 => &["context_mismatch"],
            // The count: the message is then read as wrapped keys.
            75 => &["malformed_envelope"],
            _ => &["ciphertext_damaged"],
        };
        assert!(expected.contains(&verdict(answer).as_str()), "bit {index}: {answer:?}");
    }
    service.stop().await;
}

/// The registry is lost: then all that is believed is what the envelope brings, and every bit of it counts.
#[tokio::test(flavor = "multi_thread")]
async fn where_only_the_envelope_brings_the_data_key_no_bit_of_its_section_may_be_wrong() {
    let world = World::new().await;
    let service = world.start().await;
    let (_, [embedded, _]) = envelopes(&service, "acme").await;
    service.stop().await;
    std::fs::remove_file(world.path("registry.sqlite")).unwrap();
    let service = world.start().await;
    let token = service.tenant_and_caller("acme").await.token().to_owned();
    let end = inspect(&embedded).unwrap().body_offset();
    for (index, answer) in decrypt_all(&service, &token, &flips(&embedded, 75..end)).await.iter().enumerate()
    {
        let verdict = verdict(answer);
        // With the count at nothing it is a compact envelope, of a data key that nobody knows.
        let allowed = ["malformed_envelope", "context_mismatch", "not_found"];
        assert!(allowed.contains(&verdict.as_str()), "bit {index} of the section: {answer:?}");
    }
    assert_eq!(verdict(&decrypt_all(&service, &token, &[embedded]).await[0]), "opens, rewrap advised");
    service.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn another_tenants_envelope_does_not_open_and_its_existence_is_nobodys_business() {
    let world = World::new().await;
    let service = world.start().await;
    let (_, [embedded, compact]) = envelopes(&service, "acme").await;
    let evil = service.tenant_and_caller("evil").await.token().to_owned();
    for mode in ["/v1/decrypt", "/v1/rewrap"] {
        let bodies = [&embedded, &compact]
            .map(|envelope| json!({"ciphertext": envelope_text::encode(envelope)}).to_string())
            .to_vec();
        let answers = post_all(service.address, &evil, mode, bodies).await;
        assert_eq!(verdict(&answers[0]), "context_mismatch");
        assert_eq!(verdict(&answers[1]), "not_found");
    }
    // A compact one of a data key that exists nowhere looks the same.
    let mut unknown = compact.clone();
    unknown[18] ^= 1;
    let answers = decrypt_all(&service, &evil, &[compact, unknown]).await;
    assert_eq!(answers[0].1["detail"], answers[1].1["detail"]);
    assert_eq!(world.kms.unwraps(), 0, "the KMS was not even asked");
    service.stop().await;
}

/// A data key of the forger's own, wrapped in the tenant's name under a KEK that he may use.
async fn forge(world: &World, kek: &str, labelled: &str) -> Vec<u8> {
    let id = DataKeyId::from_bytes(
        uuid::Builder::from_unix_timestamp_millis(1, &[9; 10]).into_uuid().into_bytes(),
    );
    let (tenant, key) = ("acme".parse().unwrap(), "default".parse().unwrap());
    let kms_context = kms_context(&tenant, &key, id, &EncryptionContext::new()).unwrap();
    let own = Kek::direct(kek.parse().unwrap());
    let made = world.keyring.generate(&own, &kms_context, Urgency::Foreground).await.unwrap();
    let wrapped = WrappedDataKey { kek: labelled.to_owned(), blob: made.wrapped.blob };
    let section = WrappedKeys::new(&kms_context, &[wrapped]).unwrap();
    let message = context(&[("keyfold:tenant", "acme"), ("keyfold:key", "default")]);
    seal(&DataKey::new(id, made.plaintext), [7; 24], &section, &message, PLAINTEXT).unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_forgery_under_a_kek_that_is_not_in_the_tenants_ring_is_refused_without_asking_the_kms() {
    let world = World::new().await;
    world.keyring.add("forger").await.unwrap();
    let service = world.start().await;
    let caller = service.tenant_and_caller("acme").await;
    let token = caller.token().to_owned();
    let forged = forge(&world, "local:forger", "local:forger").await;
    let calls = world.kms.calls();
    for path in ["/v1/decrypt", "/v1/rewrap"] {
        let body = json!({"ciphertext": envelope_text::encode(&forged)}).to_string();
        assert_eq!(
            verdict(&post_all(service.address, &token, path, vec![body]).await[0]),
            "context_mismatch"
        );
    }
    assert_eq!(world.kms.calls(), calls);
    // With the label of the tenant's own KEK on it, the KMS says no.
    let labelled = forge(&world, "local:forger", KEK).await;
    assert_eq!(verdict(&decrypt_all(&service, &token, &[labelled]).await[0]), "context_mismatch");
    // It was the ring alone that stood in its way: with that KEK in the ring it opens.
    caller.put("/v1/tenants/acme", &json!({"keks": [{"kek": KEK}, {"kek": "local:forger"}]})).await.ok(200);
    assert_eq!(verdict(&decrypt_all(&service, &token, &[forged]).await[0]), "opens, rewrap advised");
    service.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_kms_context_that_names_another_tenant_key_or_data_key_is_not_believed() {
    let world = World::new().await;
    let service = world.start().await;
    let (token, [embedded, _]) = envelopes(&service, "acme").await;
    let head = inspect(&embedded).unwrap();
    let dek = head.dek_id().to_string();
    let own = [("keyfold:tenant", "acme"), ("keyfold:key", "default"), ("keyfold:dek", dek.as_str())];
    let other_dek = "01957c3a-8c1e-7c3a-9d7e-0123456789ab";
    let mut others = vec![context(&own[..2]), context(&own[1..]), context(&[])];
    for (at, value) in [(0, "evil"), (1, "other"), (1, "DEFAULT"), (2, other_dek), (2, &dek.to_uppercase())] {
        let mut pairs = own;
        pairs[at].1 = value;
        others.push(context(&pairs));
    }
    others.push(context(&[own[0], own[1], own[2], ("more", "x")]));
    let with = |context: &EncryptionContext| {
        with_wrapped_keys(&embedded, &WrappedKeys::new(context, head.wrapped().keys()).unwrap()).unwrap()
    };
    let forged: Vec<_> = others.iter().map(with).collect();
    for (context, answer) in others.iter().zip(decrypt_all(&service, &token, &forged).await) {
        assert_eq!(verdict(&answer), "context_mismatch", "{context:?}");
    }
    let rewraps =
        forged.iter().map(|forged| json!({"ciphertext": envelope_text::encode(forged)}).to_string());
    for (context, answer) in
        others.iter().zip(post_all(service.address, &token, "/v1/rewrap", rewraps.collect()).await)
    {
        assert_eq!(verdict(&answer), "context_mismatch", "{context:?}");
    }
    assert_eq!(verdict(&decrypt_all(&service, &token, &[with(&context(&own))]).await[0]), "opens");
    // The same where the registry does not know the data key and the section is all there is.
    service.stop().await;
    std::fs::remove_file(world.path("registry.sqlite")).unwrap();
    let service = world.start().await;
    let caller = service.tenant_and_caller("acme").await;
    caller.post("/v1/tenants/acme/keys", &json!({"key": "other"})).await.ok(201);
    for (context, answer) in others.iter().zip(decrypt_all(&service, caller.token(), &forged).await) {
        assert_eq!(verdict(&answer), "context_mismatch", "{context:?}");
    }
    service.stop().await;
}

/// The section may be anybody's: what rewrapping gives back is the service's own.
#[tokio::test(flavor = "multi_thread")]
async fn rewrapping_replaces_a_section_that_somebody_has_filled_with_his_own() {
    let world = World::new().await;
    let service = world.start().await;
    let (token, [embedded, _]) = envelopes(&service, "acme").await;
    let head = inspect(&embedded).unwrap();
    let mut keys = head.wrapped().keys().to_vec();
    for n in 0..7 {
        keys.push(WrappedDataKey { kek: format!("local:junk{n}"), blob: vec![n; 500] });
    }
    let kms_context = head.wrapped().kms_context().unwrap();
    let stuffed = with_wrapped_keys(&embedded, &WrappedKeys::new(kms_context, &keys).unwrap()).unwrap();
    for mode in ["auto", "wrapped_key"] {
        let body = json!({"ciphertext": envelope_text::encode(&stuffed), "mode": mode}).to_string();
        let (status, answer) = &post_all(service.address, &token, "/v1/rewrap", vec![body]).await[0];
        assert_eq!((*status, &answer["changed"]), (200, &json!(true)), "{answer}");
        assert_eq!(answer["ciphertext"], envelope_text::encode(&embedded));
    }
    service.stop().await;
}

/// Rewrapping need not look at the message: but what it gives out opens to what was sealed, or does not open.
#[tokio::test(flavor = "multi_thread")]
async fn rewrapping_a_cut_or_changed_envelope_gives_nothing_that_opens_to_anything_else() {
    let world = World::new().await;
    let service = world.start().await;
    let (token, envelopes) = envelopes(&service, "acme").await;
    for envelope in envelopes {
        let mut changed = flips(&envelope, 0..envelope.len());
        changed.extend((0..envelope.len()).map(|at| envelope[..at].to_vec()));
        for mode in ["auto", "wrapped_key"] {
            let body = |changed: &Vec<u8>| {
                json!({"ciphertext": envelope_text::encode(changed), "mode": mode}).to_string()
            };
            let bodies = changed.iter().map(body).collect();
            let mut rewrapped = Vec::new();
            for (status, answer) in post_all(service.address, &token, "/v1/rewrap", bodies).await {
                if status == 200 {
                    rewrapped.push(envelope_text::decode(text(&answer["ciphertext"])).unwrap());
                } else {
                    assert!(
                        (400..500).contains(&status) && answer.get("ciphertext").is_none(),
                        "{status}: {answer}"
                    );
                }
            }
            assert!(!rewrapped.is_empty() && rewrapped.len() < changed.len());
            for answer in decrypt_all(&service, &token, &rewrapped).await {
                // Without a context to check, rewrapping does not notice a change in what the commitment is over.
                let allowed = ["opens", "ciphertext_damaged", "context_mismatch"];
                assert!(allowed.contains(&verdict(&answer).as_str()), "{answer:?}");
            }
        }
    }
    service.stop().await;
}
