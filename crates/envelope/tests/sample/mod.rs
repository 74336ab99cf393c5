//! Keys, contexts, sections and messages that the tests share, and the ways in which an envelope can be
//! opened.

#![allow(dead_code, reason = "each test binary uses a part of it")]

use envelope::{
    DataKey, DataKeyId, EncryptionContext, HeadReader, KeyMaterial, OpenError, Opener, Salt, Sealer,
    WrappedDataKey, WrappedKeys,
};

pub(crate) const SALT: Salt = [0x5a; 24];

/// The head of a compact envelope: fixed header, commitment, and a count of zero.
pub(crate) const COMPACT_HEAD_BYTES: usize = 76;

pub(crate) fn key() -> DataKey {
    DataKey::new(DataKeyId::from_bytes([0xd1; 16]), KeyMaterial::from_slice(&[0x11; 32]).unwrap())
}

pub(crate) fn context() -> EncryptionContext {
    context_of(&[("keyfold:tenant", "acme"), ("keyfold:key", "default"), ("record", "42")])
}

pub(crate) fn context_of(pairs: &[(&str, &str)]) -> EncryptionContext {
    let mut context = EncryptionContext::new();
    for (name, value) in pairs {
        context.insert(*name, *value).unwrap();
    }
    context
}

pub(crate) fn embedded() -> WrappedKeys {
    let kms_context = context_of(&[("keyfold:dek", "d"), ("keyfold:tenant", "acme")]);
    let wrapped = |kek: &str, byte| WrappedDataKey { kek: kek.to_owned(), blob: vec![byte; 12] };
    WrappedKeys::new(&kms_context, &[wrapped("local:a", 1), wrapped("local:b", 2)]).unwrap()
}

/// A message without any repetition, so that every misplaced byte shows.
pub(crate) fn message(bytes: usize) -> Vec<u8> {
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state.to_le_bytes()
    };
    let mut message: Vec<u8> = (0..bytes.div_ceil(8)).flat_map(|_| next()).collect();
    message.truncate(bytes);
    message
}

pub(crate) fn seal(section: &WrappedKeys, message: &[u8]) -> Vec<u8> {
    envelope::seal(&key(), SALT, section, &context(), message).unwrap()
}

pub(crate) fn stream_seal<'a>(section: &WrappedKeys, pieces: impl IntoIterator<Item = &'a [u8]>) -> Vec<u8> {
    let mut sealer = Sealer::new(&key(), SALT, section, &context());
    let mut out = sealer.head().to_vec();
    for piece in pieces {
        sealer.update(piece, &mut out).unwrap();
    }
    sealer.finish(&mut out).unwrap();
    out
}

/// What a streaming opener gave out, and how it ended.
pub(crate) fn stream_open<'a>(
    key: &DataKey,
    context: &EncryptionContext,
    pieces: impl IntoIterator<Item = &'a [u8]>,
) -> (Vec<u8>, Result<(), OpenError>) {
    let mut out = Vec::new();
    let run = || {
        let mut reader = HeadReader::new();
        let mut opener: Option<Opener> = None;
        for piece in pieces {
            if let Some(opener) = &mut opener {
                opener.update(piece, &mut out)?;
            } else if let Some((head, body)) = reader.push(piece)? {
                opener.insert(Opener::new(key, context, &head)?).update(body, &mut out)?;
            }
        }
        opener.ok_or(reader.unfinished())?.finish(&mut out)
    };
    let end = run();
    (out, end)
}

/// Opens one-shot, in place, in place behind a head that was read before and whose section may be known, and streamed
/// in pieces of several sizes; all must agree.
pub(crate) fn open(
    key: &DataKey,
    context: &EncryptionContext,
    envelope: &[u8],
) -> Result<Vec<u8>, OpenError> {
    let opened = envelope::open(key, context, envelope).map(|message| message.to_vec());
    let mut copy = envelope.to_vec();
    let in_place = envelope::open_in_place(key, context, &mut copy).map(|message| message.to_vec());
    assert_eq!(in_place, opened);
    let mut copy = envelope.to_vec();
    let behind_head = envelope::inspect_known(envelope, |_| Some(embedded()))
        .map_err(OpenError::from)
        .and_then(|head| envelope::open_body_in_place(key, context, &head, &mut copy));
    assert_eq!(behind_head.map(|message| message.to_vec()), opened);
    for piece_bytes in [usize::MAX, 65_552, 1000, 7] {
        let pieces = envelope.chunks(piece_bytes.min(envelope.len().max(1)));
        let (out, end) = stream_open(key, context, pieces);
        assert_eq!(end.map(|()| out), opened);
    }
    opened
}
