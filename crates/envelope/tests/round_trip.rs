//! What was sealed opens again, whichever way either was done.
#![expect(clippy::unwrap_used, reason = "a test fails by panicking, in its helpers too")]

mod sample;

use envelope::{EncryptionContext, SEGMENT_BYTES, SealError, WrappedKeys};
use proptest::prelude::*;
use sample::{SALT, context, embedded, key, message, seal, stream_open, stream_seal};

const SIZES: [usize; 16] = [
    0,
    1,
    2,
    15,
    16,
    17,
    SEGMENT_BYTES - 17,
    SEGMENT_BYTES - 16,
    SEGMENT_BYTES - 1,
    SEGMENT_BYTES,
    SEGMENT_BYTES + 1,
    SEGMENT_BYTES + 16,
    2 * SEGMENT_BYTES - 1,
    2 * SEGMENT_BYTES,
    2 * SEGMENT_BYTES + 1,
    5 * SEGMENT_BYTES + 4711,
];

#[test]
fn every_size_at_a_boundary() {
    for bytes in SIZES {
        let message = message(bytes);
        for section in [WrappedKeys::compact(), embedded()] {
            let sealed = seal(&section, &message);
            assert_eq!(sealed.len(), envelope::sealed_bytes(&section, bytes));
            assert!(seal_in_place(&section, &message) == sealed, "{bytes} in place");
            assert!(stream_seal(&section, [message.as_slice()]) == sealed, "{bytes} streamed");
            assert!(sample::open(&key(), &context(), &sealed).unwrap() == message, "{bytes}");
        }
    }
}

#[test]
fn a_compact_envelope_of_one_segment_costs_92_bytes() {
    assert_eq!(envelope::sealed_bytes(&WrappedKeys::compact(), 1000), 1092);
}

#[test]
fn sealing_in_place_stays_where_it_is_if_there_is_room() {
    for bytes in SIZES {
        let section = embedded();
        let mut buffer = Vec::with_capacity(envelope::sealed_bytes(&section, bytes));
        buffer.resize(envelope::head_bytes(&section), 0);
        buffer.extend_from_slice(&message(bytes));
        let (place, capacity) = (buffer.as_ptr(), buffer.capacity());
        envelope::seal_in_place(&key(), SALT, &section, &context(), &mut buffer).unwrap();
        assert_eq!((buffer.as_ptr(), buffer.capacity()), (place, capacity));
    }
}

#[test]
fn sealing_in_place_leaves_no_plaintext() {
    for bytes in SIZES.into_iter().filter(|bytes| *bytes >= 16) {
        let message = message(bytes);
        let sealed = seal_in_place(&WrappedKeys::compact(), &message);
        assert_holds_none_of(&sealed, &message);
    }
}

#[test]
fn sealing_in_place_without_room_for_the_head_fails_and_wipes() {
    let section = embedded();
    let mut buffer = vec![7; envelope::head_bytes(&section) - 1];
    let sealed = envelope::seal_in_place(&key(), SALT, &section, &context(), &mut buffer);
    assert_eq!(sealed, Err(SealError::NoRoom));
    assert!(buffer.is_empty());
}

#[test]
fn opening_in_place_returns_one_piece_and_wipes_the_rest() {
    for bytes in SIZES {
        let message = message(bytes);
        let mut sealed = seal(&embedded(), &message);
        let head = envelope::head_bytes(&embedded());
        let opened = envelope::open_in_place(&key(), &context(), &mut sealed).unwrap();
        assert!(opened == message);
        assert!(sealed[head..head + bytes] == message, "directly behind the head");
        assert!(sealed[head + bytes..].iter().all(|byte| *byte == 0), "nothing behind it");
    }
}

#[test]
fn opening_in_place_a_damaged_envelope_leaves_no_plaintext() {
    let message = message(3 * SEGMENT_BYTES + 100);
    let sealed = seal(&WrappedKeys::compact(), &message);
    for damaged_at in [sealed.len() - 1, sealed.len() - 200, sample::COMPACT_HEAD_BYTES] {
        let mut damaged = sealed.clone();
        damaged[damaged_at] ^= 1;
        assert!(envelope::open_in_place(&key(), &context(), &mut damaged).is_err());
        assert_holds_none_of(&damaged, &message);
    }
}

#[test]
fn a_wrong_context_leaves_the_envelope_as_it_was() {
    let mut sealed = seal(&WrappedKeys::compact(), b"message");
    let before = sealed.clone();
    envelope::open_in_place(&key(), &EncryptionContext::new(), &mut sealed).unwrap_err();
    assert_eq!(sealed, before);
}

#[test]
fn another_salt_or_context_gives_another_envelope_throughout() {
    let sealed = seal(&WrappedKeys::compact(), &[0; 64]);
    let compact = WrappedKeys::compact();
    let others = [
        envelope::seal(&key(), [0x5b; 24], &compact, &context(), &[0; 64]).unwrap(),
        envelope::seal(&key(), SALT, &compact, &EncryptionContext::new(), &[0; 64]).unwrap(),
    ];
    for other in others {
        for field in [43..75, 76..92, 140..156] {
            assert_ne!(sealed[field.clone()], other[field], "commitment, ciphertext, tag");
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(64) })]

    #[test]
    fn any_message_round_trips(message in prop::collection::vec(any::<u8>(), 0..2000), compact: bool, salt: [u8; 24]) {
        let section = if compact { WrappedKeys::compact() } else { embedded() };
        let sealed = envelope::seal(&key(), salt, &section, &context(), &message).unwrap();
        prop_assert_eq!(sample::open(&key(), &context(), &sealed).unwrap(), message);
    }

    #[test]
    fn pieces_change_nothing(bytes in 0..4 * SEGMENT_BYTES, cuts in prop::collection::vec(0.0..1.0, 0..12)) {
        let message = message(bytes);
        let sealed = seal(&embedded(), &message);
        prop_assert!(stream_seal(&embedded(), pieces(&message, &cuts)) == sealed);
        let (opened, end) = stream_open(&key(), &context(), pieces(&sealed, &cuts));
        prop_assert_eq!(end, Ok(()));
        prop_assert!(opened == message);
    }
}

/// `bytes` cut at these fractions of its length.
fn pieces<'a>(bytes: &'a [u8], cuts: &[f64]) -> Vec<&'a [u8]> {
    #[expect(
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        clippy::cast_precision_loss,
        reason = "0 to 1"
    )]
    let mut cuts: Vec<usize> = cuts.iter().map(|cut| (cut * bytes.len() as f64) as usize).collect();
    cuts.extend([0, bytes.len()]);
    cuts.sort_unstable();
    cuts.windows(2).map(|ends| &bytes[ends[0]..ends[1]]).collect()
}

fn seal_in_place(section: &WrappedKeys, message: &[u8]) -> Vec<u8> {
    let mut buffer = vec![0xee; envelope::head_bytes(section)];
    buffer.extend_from_slice(message);
    envelope::seal_in_place(&key(), SALT, section, &context(), &mut buffer).unwrap();
    buffer
}

/// No eight bytes of `message` in a row are in `buffer`. The message has no repetition, so a copy of any
/// stretch of at least 15 bytes holds one of the samples.
fn assert_holds_none_of(buffer: &[u8], message: &[u8]) {
    let samples: std::collections::HashSet<&[u8]> = message.chunks_exact(8).collect();
    assert!(!buffer.windows(8).any(|window| samples.contains(window)));
}
