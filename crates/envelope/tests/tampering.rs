//! Whatever is done to an envelope, it is refused, and in the right failure class.
#![expect(clippy::unwrap_used, reason = "a test fails by panicking, in its helpers too")]

mod sample;

use envelope::{OpenError, SEGMENT_BYTES, WrappedKeys};

use sample::{COMPACT_HEAD_BYTES, context, embedded, key, message, open, seal, stream_open};

const SEALED_SEGMENT_BYTES: usize = SEGMENT_BYTES + 16;

/// The wrapped-key section is bound to nothing, so that it can be replaced. A flip there is therefore either
/// refused or leaves the message as it was; in the second case the parsed section differs from the original,
/// and the service, which believes a section only as far as it agrees with what it knows, never gets as far
/// as this crate's `open`.
#[test]
fn every_flipped_bit_is_refused_in_its_class() {
    for section in [WrappedKeys::compact(), embedded()] {
        let head = envelope::head_bytes(&section);
        for bytes in [0, 1, 40] {
            let sealed = seal(&section, &message(bytes));
            for bit in 0..sealed.len() * 8 {
                let mut flipped = sealed.clone();
                flipped[bit / 8] ^= 1 << (bit % 8);
                let opened = open(&key(), &context(), &flipped);
                match bit / 8 {
                    0..3 => assert_eq!(class(&opened), "malformed_envelope", "magic, bit {bit}"),
                    3..75 => assert_eq!(class(&opened), "context_mismatch", "bound to the key, bit {bit}"),
                    at if at >= head => assert_eq!(class(&opened), "ciphertext_damaged", "body, bit {bit}"),
                    _ => match envelope::inspect(&flipped) {
                        Err(_) => assert_eq!(class(&opened), "malformed_envelope", "section, bit {bit}"),
                        Ok(parsed) => {
                            assert_ne!(parsed.wrapped(), &section, "section, bit {bit}");
                            // A length that changed moves the body's start.
                            let same_start = parsed.body_offset() == head;
                            let expected = if same_start { "opened" } else { "ciphertext_damaged" };
                            assert_eq!(class(&opened), expected, "section, bit {bit}");
                            assert!(!same_start || opened == Ok(message(bytes)), "section, bit {bit}");
                        }
                    },
                }
            }
        }
    }
}

#[test]
fn every_truncation_is_refused_in_its_class() {
    for section in [WrappedKeys::compact(), embedded()] {
        let sealed = seal(&section, &message(40));
        for length in 0..sealed.len() {
            let expected = if length < envelope::head_bytes(&section) {
                "malformed_envelope"
            } else {
                "ciphertext_damaged"
            };
            assert_eq!(class(&open(&key(), &context(), &sealed[..length])), expected, "{length} bytes");
        }
    }
}

#[test]
fn long_envelopes_cut_anywhere_near_a_boundary_are_refused() {
    let sealed = seal(&WrappedKeys::compact(), &message(2 * SEGMENT_BYTES + 500));
    let boundaries = [0, SEGMENT_BYTES, SEALED_SEGMENT_BYTES, 2 * SEGMENT_BYTES, 2 * SEALED_SEGMENT_BYTES];
    for boundary in boundaries {
        for beyond in [0, 1, 15, 16, 17, 32] {
            let length = COMPACT_HEAD_BYTES + boundary + beyond;
            assert_damaged(&sealed[..length], &format!("{length} bytes"));
        }
    }
    assert_damaged(&sealed[..sealed.len() - 1], "all but the last byte");
}

#[test]
fn nothing_may_follow_the_last_segment() {
    for bytes in [0, 1, 40, SEGMENT_BYTES - 1, SEGMENT_BYTES, SEGMENT_BYTES + 1] {
        let sealed = seal(&WrappedKeys::compact(), &message(bytes));
        for extra in [1, 15, 16, 17, SEALED_SEGMENT_BYTES] {
            let mut extended = sealed.clone();
            extended.resize(sealed.len() + extra, 0);
            assert_damaged(&extended, &format!("{bytes} bytes and {extra} more"));
        }
        let mut twice = sealed.clone();
        twice.extend_from_slice(&sealed[COMPACT_HEAD_BYTES..]);
        assert_damaged(&twice, &format!("{bytes} bytes, body twice"));
    }
}

#[test]
fn every_other_sequence_of_the_segments_is_refused() {
    let sealed = seal(&WrappedKeys::compact(), &message(3 * SEGMENT_BYTES));
    let segments: Vec<&[u8]> = sealed[COMPACT_HEAD_BYTES..].chunks(SEALED_SEGMENT_BYTES).collect();
    let mut sequences: Vec<Vec<usize>> =
        vec![vec![0, 0, 1, 2], vec![0, 1, 1, 2], vec![0, 1, 2, 2], vec![0, 1, 2, 0]];
    let mut longest = vec![vec![]];
    for _ in 0..segments.len() {
        longest = longest
            .iter()
            .flat_map(|sequence| (0..3).map(|next| [&sequence[..], &[next]].concat()))
            .collect();
        sequences.extend_from_slice(&longest);
    }
    assert_eq!(sequences.len(), 4 + 3 + 9 + 27, "all of one to three, and those of four that repeat one");
    for sequence in sequences {
        let mut envelope = sealed[..COMPACT_HEAD_BYTES].to_vec();
        for &segment in &sequence {
            envelope.extend_from_slice(segments[segment]);
        }
        if sequence == [0, 1, 2] {
            assert!(open(&key(), &context(), &envelope).is_ok());
        } else {
            assert_damaged(&envelope, &format!("{sequence:?}"));
        }
    }
}

#[test]
fn segments_of_another_message_are_refused() {
    let message = message(3 * SEGMENT_BYTES);
    let one = seal(&WrappedKeys::compact(), &message);
    let other = envelope::seal(&key(), [1; 24], &WrappedKeys::compact(), &context(), &message).unwrap();
    let start = COMPACT_HEAD_BYTES + SEALED_SEGMENT_BYTES;
    let mut mixed = one;
    mixed[start..start + SEALED_SEGMENT_BYTES].copy_from_slice(&other[start..start + SEALED_SEGMENT_BYTES]);
    assert_damaged(&mixed, "second segment from another message");
}

#[test]
fn an_opener_that_failed_goes_on_failing() {
    let mut damaged = seal(&WrappedKeys::compact(), &message(3 * SEGMENT_BYTES));
    damaged[COMPACT_HEAD_BYTES + SEALED_SEGMENT_BYTES] ^= 1;
    let head = envelope::inspect(&damaged).unwrap();
    let body = &damaged[COMPACT_HEAD_BYTES..];
    let mut opener = envelope::Opener::new(&key(), &context(), &head).unwrap();
    let mut out = Vec::new();
    assert_eq!(opener.update(body, &mut out), Err(OpenError::Damaged));
    assert_eq!(out.len(), SEGMENT_BYTES, "the first segment had verified");
    assert_eq!(opener.update(&[], &mut out), Err(OpenError::Damaged));
    assert_eq!(opener.update(body, &mut out), Err(OpenError::Damaged));
    assert_eq!(opener.finish(&mut out), Err(OpenError::Damaged));
    assert_eq!(out.len(), SEGMENT_BYTES);
}

/// Refused as damaged in every way of opening, and what a stream gave out before that is the message's
/// beginning.
fn assert_damaged(envelope: &[u8], what: &str) {
    assert_eq!(class(&open(&key(), &context(), envelope)), "ciphertext_damaged", "{what}");
    for piece_bytes in [1000, usize::MAX] {
        let pieces = envelope.chunks(piece_bytes.min(envelope.len()));
        let (given, end) = stream_open(&key(), &context(), pieces);
        assert!(end.is_err(), "{what}");
        assert!(message(given.len()) == given, "{what}");
    }
}

fn class(opened: &Result<Vec<u8>, OpenError>) -> &'static str {
    opened.as_ref().map_or_else(OpenError::code, |_| "opened")
}
