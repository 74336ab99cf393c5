//! Every vector of `data/envelope-v1.json`, which an independent implementation of the specification made, in
//! both directions: one-shot, in place and streamed.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking, in its helpers too")]

use std::collections::BTreeMap;

use envelope::{
    DataKey, DataKeyId, EncryptionContext, HeadReader, KeyMaterial, OpenError, Opener, Salt, Sealer,
    WrappedDataKey, WrappedKeys, text,
};
use serde::Deserialize;
use sha2::{Digest, Sha256};

#[derive(Deserialize)]
struct Vectors {
    seal_and_open: Vec<Good>,
    must_fail: Vec<Bad>,
}

#[derive(Deserialize)]
struct Good {
    name: String,
    dek: String,
    dek_id: String,
    salt: String,
    context: BTreeMap<String, String>,
    plaintext: Option<String>,
    plaintext_repeat: Option<Repeat>,
    envelope: Option<String>,
    envelope_sha256: Option<String>,
    header: Option<String>,
    kms_context: Option<BTreeMap<String, String>>,
    #[serde(default)]
    wrapped: Vec<Wrapped>,
}

#[derive(Deserialize)]
struct Repeat {
    byte: u8,
    length: usize,
}

#[derive(Deserialize)]
struct Wrapped {
    kek: String,
    blob: String,
}

#[derive(Deserialize)]
struct Bad {
    name: String,
    error: String,
    dek: String,
    context: BTreeMap<String, String>,
    envelope: String,
}

#[test]
fn every_good_vector_seals_and_opens() {
    for vector in vectors().seal_and_open {
        let name = &vector.name;
        let key = key(&vector.dek_id, &vector.dek);
        let salt: Salt = hex(&vector.salt).try_into().unwrap();
        let context = context(&vector.context);
        let section = section(&vector);
        let plaintext = match (&vector.plaintext, &vector.plaintext_repeat) {
            (Some(plaintext), None) => hex(plaintext),
            (None, Some(repeat)) => vec![repeat.byte; repeat.length],
            _ => panic!("{name}: one kind of plaintext"),
        };

        let sealed = envelope::seal(&key, salt, &section, &context, &plaintext).unwrap();
        match (&vector.envelope, &vector.envelope_sha256, &vector.header) {
            (Some(envelope), None, None) => {
                assert_eq!(&text::encode(&sealed), envelope, "{name}");
                assert_eq!(text::decode(envelope).unwrap(), sealed, "{name}");
            }
            (None, Some(digest), Some(header)) => {
                assert_eq!(sealed[..header.len() / 2], hex(header), "{name}");
                assert_eq!(Sha256::digest(&sealed).to_vec(), hex(digest), "{name}");
            }
            _ => panic!("{name}: one kind of envelope"),
        }
        assert_eq!(sealed.len(), envelope::sealed_bytes(&section, plaintext.len()), "{name}");

        let mut in_place = vec![0xee; envelope::head_bytes(&section)];
        in_place.extend_from_slice(&plaintext);
        envelope::seal_in_place(&key, salt, &section, &context, &mut in_place).unwrap();
        assert!(in_place == sealed, "{name}: sealed in place");
        let streaming = Sealer::new(&key, salt, &section, &context);
        assert!(stream_seal(streaming, &plaintext, 1000) == sealed, "{name}: sealed in a stream");

        let head = envelope::inspect(&sealed).unwrap();
        assert_eq!(head.dek_id(), key.id(), "{name}");
        assert_eq!(head.salt(), salt, "{name}");
        assert_eq!(head.wrapped(), &section, "{name}");
        assert_eq!(head.body_offset(), envelope::head_bytes(&section), "{name}");
        assert!(envelope::matches_commitment(&key, &context, &head), "{name}");
        for opened in open_in_every_way(&key, &context, &sealed) {
            assert!(opened.unwrap() == plaintext, "{name}");
        }
    }
}

#[test]
fn every_bad_vector_fails_in_its_class() {
    for vector in vectors().must_fail {
        let envelope = text::decode(&vector.envelope).unwrap();
        let key = key("00000000000000000000000000000000", &vector.dek);
        let context = context(&vector.context);
        for opened in open_in_every_way(&key, &context, &envelope) {
            assert_eq!(opened.expect_err(&vector.name).code(), vector.error, "{}", vector.name);
        }
    }
}

/// Behind a head that was read before, one-shot, in place, streamed in one piece and byte by byte.
fn open_in_every_way(
    key: &DataKey,
    context: &EncryptionContext,
    envelope: &[u8],
) -> Vec<Result<Vec<u8>, OpenError>> {
    let (mut copy, mut another) = (envelope.to_vec(), envelope.to_vec());
    let behind_head = envelope::inspect(envelope)
        .map_err(OpenError::from)
        .and_then(|head| envelope::open_body_in_place(key, context, &head, &mut another));
    vec![
        behind_head.map(|plaintext| plaintext.to_vec()),
        envelope::open(key, context, envelope).map(|plaintext| plaintext.to_vec()),
        envelope::open_in_place(key, context, &mut copy).map(|plaintext| plaintext.to_vec()),
        stream_open(key, context, envelope, usize::MAX),
        stream_open(key, context, envelope, 1),
    ]
}

fn stream_seal(mut sealer: Sealer, plaintext: &[u8], piece_bytes: usize) -> Vec<u8> {
    let mut out = sealer.head().to_vec();
    for piece in plaintext.chunks(piece_bytes) {
        sealer.update(piece, &mut out).unwrap();
    }
    sealer.finish(&mut out).unwrap();
    out
}

fn stream_open(
    key: &DataKey,
    context: &EncryptionContext,
    envelope: &[u8],
    piece_bytes: usize,
) -> Result<Vec<u8>, OpenError> {
    let mut reader = HeadReader::new();
    let mut opener = None;
    let mut out = Vec::new();
    for mut piece in envelope.chunks(piece_bytes.min(envelope.len())) {
        if opener.is_none() {
            let Some((head, rest)) = reader.push(piece)? else { continue };
            opener = Some(Opener::new(key, context, &head)?);
            piece = rest;
        }
        opener.as_mut().unwrap().update(piece, &mut out)?;
    }
    opener.ok_or(reader.unfinished())?.finish(&mut out)?;
    Ok(out)
}

fn vectors() -> Vectors {
    serde_json::from_str(include_str!("data/envelope-v1.json")).unwrap()
}

fn section(vector: &Good) -> WrappedKeys {
    let Some(kms_context) = &vector.kms_context else { return WrappedKeys::compact() };
    let keys: Vec<_> = vector
        .wrapped
        .iter()
        .map(|wrapped| WrappedDataKey { kek: wrapped.kek.clone(), blob: hex(&wrapped.blob) })
        .collect();
    WrappedKeys::new(&context(kms_context), &keys).unwrap()
}

fn key(id: &str, raw: &str) -> DataKey {
    let id = DataKeyId::from_bytes(hex(id).try_into().unwrap());
    DataKey::new(id, KeyMaterial::from_mut(&mut hex(raw)).unwrap())
}

fn context(pairs: &BTreeMap<String, String>) -> EncryptionContext {
    let mut context = EncryptionContext::new();
    for (name, value) in pairs {
        context.insert(name, value).unwrap();
    }
    context
}

fn hex(text: &str) -> Vec<u8> {
    assert_eq!(text.len() % 2, 0);
    (0..text.len()).step_by(2).map(|at| u8::from_str_radix(&text[at..at + 2], 16).unwrap()).collect()
}
