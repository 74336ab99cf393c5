//! The head: parsed whole or in pieces, limited, and replaced without touching the message.
#![expect(clippy::unwrap_used, reason = "a test fails by panicking, in its helpers too")]

mod sample;

use envelope::{
    CONTEXT_BYTES_MAX, DataKeyId, FIXED_HEADER_BYTES, FormatError, HEAD_BYTES_MAX, HeadReader,
    InvalidDataKeyId, OpenError, WRAPPED_KEYS_MAX, WrappedDataKey, WrappedKeys,
};
use proptest::prelude::*;
use sample::{context, context_of, embedded, key, message, open, seal};

#[test]
fn inspect_reads_what_seal_wrote() {
    let sealed = seal(&embedded(), b"message");
    let head = envelope::inspect(&sealed).unwrap();
    assert_eq!((head.dek_id(), head.salt()), (key().id(), sample::SALT));
    assert_eq!(head.commitment()[..], sealed[FIXED_HEADER_BYTES..FIXED_HEADER_BYTES + 32]);
    assert_eq!(head.body_offset(), envelope::head_bytes(&embedded()));
    let wrapped = head.wrapped();
    assert_eq!(wrapped, &embedded());
    assert!(!wrapped.is_compact());
    assert_eq!(wrapped.kms_context(), embedded().kms_context());
    assert_eq!(wrapped.keys()[1], WrappedDataKey { kek: "local:b".to_owned(), blob: vec![2; 12] });
    assert_eq!(envelope::inspect(&sealed[..head.body_offset()]), Ok(head), "the body does not matter");
}

#[test]
fn a_head_says_what_it_says_whatever_section_is_known() {
    let blob = |byte| WrappedDataKey { kek: "local:b".to_owned(), blob: vec![byte; 12] };
    let known = [1, 2].map(|byte| WrappedKeys::new(&context(), &[blob(byte)]).unwrap());
    let sections = [WrappedKeys::compact(), embedded(), known[0].clone(), known[1].clone()];
    for section in &sections {
        let sealed = seal(section, b"message");
        let expected = envelope::inspect(&sealed).unwrap();
        assert_eq!(expected.wrapped().keys(), section.keys());
        for known in &sections {
            let mut asked = None;
            let head = envelope::inspect_known(&sealed, |id| {
                asked = Some(id);
                Some(known.clone())
            });
            let head = head.unwrap();
            assert_eq!(asked, Some(key().id()));
            assert_eq!(head, expected);
            assert_eq!(head.wrapped().keys(), section.keys());
            assert_eq!(head.wrapped().kms_context(), section.kms_context());
        }
        // One that is not well formed is none, whatever is known.
        let cut = &sealed[..envelope::head_bytes(section) - 1];
        let cut = envelope::inspect_known(cut, |_| Some(section.clone()));
        assert_eq!(cut, Err(FormatError::Truncated));
    }
}

#[test]
fn nothing_opens_behind_another_envelopes_head() {
    let salted = |salt| envelope::seal(&key(), salt, &embedded(), &context(), b"message").unwrap();
    let (mut one, other) = (salted([1; 24]), salted([2; 24]));
    let head = envelope::inspect(&other).unwrap();
    let before = one.clone();
    let opened = envelope::open_body_in_place(&key(), &context(), &head, &mut one);
    assert_eq!(opened, Err(OpenError::Damaged));
    assert!(one == before, "and nothing was decrypted");
    let opened = envelope::open_body_in_place(&key(), &context(), &head, &mut one[..head.body_offset() - 1]);
    assert_eq!(opened, Err(FormatError::Truncated.into()));
}

#[test]
fn a_reader_gives_the_same_head_for_any_pieces() {
    for section in [WrappedKeys::compact(), embedded()] {
        let sealed = seal(&section, b"message");
        let expected = envelope::inspect(&sealed).unwrap();
        for piece_bytes in 1..=sealed.len() {
            let mut reader = HeadReader::new();
            let mut body = Vec::new();
            let mut found = None;
            for piece in sealed.chunks(piece_bytes) {
                if found.is_some() {
                    body.extend_from_slice(piece);
                } else if let Some((head, rest)) = reader.push(piece).unwrap() {
                    body.extend_from_slice(rest);
                    found = Some(head);
                }
            }
            assert_eq!(found.as_ref(), Some(&expected));
            assert_eq!(body, sealed[expected.body_offset()..]);
        }
    }
}

#[test]
fn a_reader_refuses_as_soon_as_it_can() {
    let sealed = seal(&embedded(), b"");
    let refused_after = |bytes: &[u8]| {
        let mut reader = HeadReader::new();
        bytes
            .iter()
            .enumerate()
            .find_map(|(at, byte)| reader.push(&[*byte]).err().map(|error| (at + 1, error)))
    };
    let changed = |at: usize, byte| {
        let mut changed = sealed.clone();
        changed[at] = byte;
        refused_after(&changed)
    };
    assert_eq!(changed(0, b'J'), Some((1, FormatError::NotAnEnvelope)));
    assert_eq!(changed(1, b'G'), Some((2, FormatError::NotAnEnvelope)));
    assert_eq!(changed(2, 2), Some((3, FormatError::UnknownVersion(2))));
    assert_eq!(changed(75, 9), Some((76, FormatError::TooManyWrappedKeys(9))));
    assert!(matches!(changed(76, 0x20), Some((78, FormatError::KmsContext(_)))), "over 8,192 bytes");
    assert_eq!(refused_after(&sealed[..envelope::head_bytes(&embedded())]), None);
    assert_eq!(HeadReader::new().unfinished().code(), "malformed_envelope");
}

#[test]
fn the_longest_head_is_read() {
    let kms_context = context_of(&[("a", &"x".repeat(CONTEXT_BYTES_MAX - 7))]);
    let longest = WrappedDataKey { kek: "k".repeat(65_535), blob: vec![1; 65_535] };
    let section = WrappedKeys::new(&kms_context, &vec![longest; WRAPPED_KEYS_MAX]).unwrap();
    assert_eq!(envelope::head_bytes(&section), HEAD_BYTES_MAX);
    let sealed = seal(&section, b"message");
    assert_eq!(open(&key(), &context(), &sealed).unwrap(), b"message");
}

#[test]
fn sections_over_the_limits_are_refused() {
    let kms_context = context_of(&[]);
    let wrapped =
        |kek_bytes, blob_bytes| WrappedDataKey { kek: "k".repeat(kek_bytes), blob: vec![1; blob_bytes] };
    let section = |keys: &[_]| WrappedKeys::new(&kms_context, keys);
    assert_eq!(section(&[]), Err(FormatError::NoWrappedKeys));
    assert_eq!(section(&vec![wrapped(1, 1); 9]), Err(FormatError::TooManyWrappedKeys(9)));
    assert_eq!(section(&vec![wrapped(1, 1); 265]), Err(FormatError::TooManyWrappedKeys(265)));
    assert_eq!(section(&[wrapped(65_536, 1)]), Err(FormatError::FieldTooLong));
    assert_eq!(section(&[wrapped(1, 65_536)]), Err(FormatError::FieldTooLong));
}

#[test]
fn a_section_that_is_not_canonical_is_refused() {
    let sealed = seal(&embedded(), b"message");
    // The KMS context's first name starts at 76 + 2 + 2 + 2; the first KEK's id follows the context.
    let name_at = 82;
    let kek_at = 76 + 2 + embedded().kms_context().unwrap().canonical().len() + 2;
    let mut not_sorted = sealed.clone();
    not_sorted[name_at] = b'z';
    let mut not_utf8 = sealed;
    not_utf8[kek_at] = 0xff;
    for (envelope, is_context) in [(not_sorted, true), (not_utf8, false)] {
        let error = envelope::inspect(&envelope).unwrap_err();
        assert_eq!(matches!(error, FormatError::KmsContext(_)), is_context, "{error}");
        assert_eq!(
            open(&key(), &context(), &envelope),
            Err(error.into()),
            "without keeping anything, the same"
        );
    }
}

#[test]
fn rewrapping_leaves_the_message() {
    for (old, new) in [(WrappedKeys::compact(), embedded()), (embedded(), WrappedKeys::compact())] {
        let message = message(100_000);
        let sealed = seal(&old, &message);
        let rewrapped = envelope::with_wrapped_keys(&sealed, &new).unwrap();
        assert!(rewrapped == seal(&new, &message), "as if it had been sealed so");
        assert!(envelope::with_wrapped_keys(&rewrapped, &old).unwrap() == sealed);

        let (head, replaced) = envelope::replace_head(&sealed[..envelope::head_bytes(&old)], &new).unwrap();
        assert!([&head[..], &sealed[replaced..]].concat() == rewrapped);
        assert_eq!(envelope::replace_head(&sealed[..replaced - 1], &new), Err(FormatError::Truncated));
    }
}

#[test]
fn ids_are_hyphenated_lower_case_uuids() {
    let text = "0190a5b0-0000-7000-8000-0000000000ab";
    let id: DataKeyId = text.parse().unwrap();
    assert_eq!((id.to_string(), format!("{id:?}")), (text.to_owned(), text.to_owned()));
    assert_eq!(DataKeyId::from_bytes(*id.as_bytes()), id);
    for other in [
        "",
        "0190a5b0000070008000000000000000ab",
        "0190A5B0-0000-7000-8000-0000000000AB",
        "{0190a5b0-0000-7000-8000-0000000000ab}",
    ] {
        assert_eq!(other.parse::<DataKeyId>(), Err(InvalidDataKeyId), "{other}");
    }
}

#[test]
fn debug_shows_no_wrapped_key() {
    let shown = format!("{:?}", embedded());
    assert_eq!(
        shown,
        r#"WrappedKeys { kms_context: Some({"keyfold:dek", "keyfold:tenant"}), keys: [WrappedDataKey { kek: "local:a", blob_bytes: 12 }, WrappedDataKey { kek: "local:b", blob_bytes: 12 }] }"#
    );
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(512) })]

    /// Of any input, the reader and `inspect` say the same, and what they accept has only one encoding.
    #[test]
    fn any_input_is_read_the_same_way(tail in prop::collection::vec(0..4_u8, 0..60), pieces in 1..9_usize) {
        let mut input = seal(&WrappedKeys::compact(), b"")[..75].to_vec();
        input.extend_from_slice(&tail);
        let whole = envelope::inspect(&input);
        let mut reader = HeadReader::new();
        let mut read = Ok(None);
        for piece in input.chunks(input.len().div_ceil(pieces)) {
            read = reader.push(piece);
            if read != Ok(None) {
                break;
            }
        }
        match read {
            Ok(None) => prop_assert_eq!(whole, Err(reader.unfinished())),
            Ok(Some((head, _))) => prop_assert_eq!(whole, Ok(head)),
            Err(error) => prop_assert_eq!(whole, Err(error)),
        }
        if let Ok(head) = envelope::inspect(&input) {
            prop_assert_eq!(head.wrapped().as_bytes(), &input[75..head.body_offset()]);
            if let Some(kms_context) = head.wrapped().kms_context() {
                let again = WrappedKeys::new(kms_context, head.wrapped().keys()).unwrap();
                prop_assert_eq!(again.as_bytes(), head.wrapped().as_bytes());
            }
        }
    }
}
