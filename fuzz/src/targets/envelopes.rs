//! Envelopes: what opens is byte for byte what sealing the same message again gives.

use envelope::{
    DataKey, DataKeyId, EncryptionContext, HeadReader, KeyMaterial, OpenError, Opener, SEGMENT_BYTES,
    WrappedDataKey, WrappedKeys,
};

fn key() -> DataKey {
    DataKey::new(DataKeyId::from_bytes([1; 16]), KeyMaterial::from_mut(&mut [7; 32]).unwrap())
}

fn context() -> EncryptionContext {
    let mut context = EncryptionContext::new();
    context.insert("record", "42").unwrap();
    context
}

/// One-shot reading, and what replaces a head.
pub fn open(bytes: &[u8]) {
    let (key, context) = (key(), context());
    let opened = envelope::open(&key, &context, bytes);
    let mut buffer = bytes.to_vec();
    let in_place = envelope::open_in_place(&key, &context, &mut buffer);
    assert_eq!(opened.as_ref().ok().map(|plain| plain.as_slice()), in_place.ok().map(|plain| &*plain));
    let Ok(head) = envelope::inspect(bytes) else {
        assert!(opened.is_err(), "opened without a head");
        return;
    };
    assert_eq!(head.to_bytes(), bytes[..head.body_offset()], "a head has one form");
    assert_eq!(envelope::with_wrapped_keys(bytes, head.wrapped()).unwrap(), bytes);
    let compact = envelope::with_wrapped_keys(bytes, &WrappedKeys::compact()).unwrap();
    let compacted = envelope::open(&key, &context, &compact);
    assert_eq!(opened.as_deref().ok(), compacted.as_deref().ok(), "the section is bound to nothing");
    if let Ok(plaintext) = opened {
        let again = envelope::seal(&key, head.salt(), head.wrapped(), &context, &plaintext).unwrap();
        assert_eq!(again, bytes, "opened what was not sealed");
    }
}

/// The streaming reader, fed in pieces of as many bytes as the first byte says: it says what the one-shot one says.
pub fn open_in_pieces(bytes: &[u8]) {
    let Some((&size, bytes)) = bytes.split_first() else { return };
    let whole = envelope::open(&key(), &context(), bytes);
    match (whole, streamed(bytes, usize::from(size) + 1)) {
        (Ok(whole), Ok(streamed)) => assert_eq!(*whole, streamed),
        (Err(whole), Err(streamed)) => assert_eq!(whole.code(), streamed.code()),
        (whole, streamed) => panic!("at once {:?}, in pieces {:?}", whole.is_ok(), streamed.is_ok()),
    }
}

fn streamed(bytes: &[u8], piece_bytes: usize) -> Result<Vec<u8>, OpenError> {
    let (mut reader, mut opener, mut plaintext) = (Some(HeadReader::new()), None::<Opener>, Vec::new());
    for piece in bytes.chunks(piece_bytes) {
        if let Some(opener) = &mut opener {
            opener.update(piece, &mut plaintext)?;
        } else if let Some((head, rest)) = reader.as_mut().unwrap().push(piece)? {
            let mut started = Opener::new(&key(), &context(), &head)?;
            started.update(rest, &mut plaintext)?;
            opener = Some(started);
        }
    }
    match opener {
        Some(opener) => opener.finish(&mut plaintext)?,
        None => return Err(reader.take().unwrap().unfinished().into()),
    }
    Ok(plaintext)
}

/// The text form: it has one spelling.
pub fn text(bytes: &[u8]) {
    let Ok(text) = std::str::from_utf8(bytes) else { return };
    if let Ok(envelope) = envelope::text::decode(text) {
        assert_eq!(envelope::text::encode(&envelope), text);
    }
}

/// A context's canonical form: it has one too.
pub fn canonical_context(bytes: &[u8]) {
    if let Ok(context) = EncryptionContext::from_canonical(bytes) {
        assert_eq!(context.canonical(), bytes);
    }
}

/// Envelopes compact and embedded, of none, one and two segments.
pub fn seeds() -> Vec<Vec<u8>> {
    let wrapped = |kek: &str| WrappedDataKey { kek: kek.to_owned(), blob: vec![5; 40] };
    let keys = [wrapped("local:one"), wrapped("arn:aws:kms:eu-west-1:111122223333:key/a")];
    let sections = [WrappedKeys::compact(), WrappedKeys::new(&context(), &keys).unwrap()];
    let messages = [vec![], b"hello".to_vec(), vec![3; SEGMENT_BYTES + 1]];
    let mut seeds = Vec::new();
    for section in &sections {
        for message in &messages {
            seeds.push(envelope::seal(&key(), [9; 24], section, &context(), message).unwrap());
        }
    }
    seeds
}

pub fn stream_seeds() -> Vec<Vec<u8>> {
    let sized = |(size, seed): (u8, Vec<u8>)| [&[size][..], &seed].concat();
    (0..).step_by(51).map(|n| (n % 256) as u8).zip(seeds()).map(sized).collect()
}

pub fn text_seeds() -> Vec<Vec<u8>> {
    seeds().iter().take(5).map(|seed| envelope::text::encode(seed).into_bytes()).collect()
}

pub fn context_seeds() -> Vec<Vec<u8>> {
    let mut two = context();
    two.insert("keyfold:tenant", "acme").unwrap();
    vec![EncryptionContext::new().canonical(), context().canonical(), two.canonical()]
}
