//! The canonical form of a context: one for each context, and nothing else is accepted.
#![expect(clippy::unwrap_used, reason = "a test fails by panicking, in its helpers too")]

mod sample;

use std::collections::BTreeMap;

use envelope::{CONTEXT_BYTES_MAX, CONTEXT_PAIRS_MAX, ContextError, EncryptionContext};
use proptest::prelude::*;
use sample::context_of;

#[test]
fn the_canonical_form_is_the_specified_one() {
    assert_eq!(EncryptionContext::new().canonical(), [0, 0]);
    let context = context_of(&[("b", ""), ("a", "xy")]);
    assert_eq!(context.canonical(), b"\0\x02\0\x01a\0\x02xy\0\x01b\0\0");
}

#[test]
fn names_sort_by_their_bytes() {
    // By UTF-16 code units U+FFFF would come after U+10000.
    let context = context_of(&[("\u{10000}", "4"), ("\u{ffff}", "3"), ("é", "2"), ("z", "1")]);
    let names: Vec<_> = context.iter().map(|(name, _)| name).collect();
    assert_eq!(names, ["z", "é", "\u{ffff}", "\u{10000}"]);
}

#[test]
fn the_order_of_insertion_means_nothing() {
    let (one, other) = (context_of(&[("a", "1"), ("b", "2")]), context_of(&[("b", "2"), ("a", "1")]));
    assert_eq!(one, other);
    assert_eq!(one.canonical(), other.canonical());
    assert_eq!((one.get("b"), one.get("c"), one.len(), one.is_empty()), (Some("2"), None, 2, false));
}

#[test]
fn pairs_do_not_run_into_each_other() {
    let contexts = [
        context_of(&[("a", "b"), ("c", "d")]),
        context_of(&[("a", "bc"), ("d", "")]),
        context_of(&[("ab", "cd")]),
        context_of(&[("a", "b\0\x01c\0\x01d")]),
        context_of(&[("a", "bcd")]),
    ];
    for (at, one) in contexts.iter().enumerate() {
        for other in &contexts[at + 1..] {
            assert_ne!(one.canonical(), other.canonical());
        }
    }
}

#[test]
fn a_pair_that_is_refused_changes_nothing() {
    let mut context = context_of(&[("a", "1")]);
    assert_eq!(context.insert("a", "2"), Err(ContextError::DuplicateName));
    assert_eq!(context.insert("", "2"), Err(ContextError::EmptyName));
    assert_eq!(context.insert("b", "x".repeat(CONTEXT_BYTES_MAX)), Err(ContextError::TooLong));
    assert_eq!(context.insert("x".repeat(70_000), ""), Err(ContextError::TooLong));
    assert_eq!(context, context_of(&[("a", "1")]));
}

#[test]
fn a_change_after_the_first_use_counts() {
    let mut grown = context_of(&[("a", "1")]);
    let seal = |context: &EncryptionContext| {
        envelope::seal(&sample::key(), sample::SALT, &envelope::WrappedKeys::compact(), context, b"message")
            .unwrap()
    };
    let before = seal(&grown);
    grown.insert("b", "2").unwrap();
    assert_ne!(seal(&grown), before);
    assert_eq!(seal(&grown), seal(&context_of(&[("a", "1"), ("b", "2")])));
}

#[test]
fn at_most_64_pairs() {
    let mut context = EncryptionContext::new();
    for pair in 0..CONTEXT_PAIRS_MAX {
        context.insert(format!("{pair:02}"), "").unwrap();
    }
    assert_eq!(EncryptionContext::from_canonical(&context.canonical()).as_ref(), Ok(&context));
    assert_eq!(context.insert("one more", ""), Err(ContextError::TooManyPairs));

    let mut bytes = vec![0, 65];
    (0..65).for_each(|pair| bytes.extend_from_slice(&[0, 1, pair, 0, 0]));
    assert_eq!(EncryptionContext::from_canonical(&bytes), Err(ContextError::TooManyPairs));
}

#[test]
fn at_most_8192_canonical_bytes() {
    // Pair count, two lengths and a name of one byte make 7.
    let longest = "x".repeat(CONTEXT_BYTES_MAX - 7);
    let context = context_of(&[("a", &longest)]);
    let canonical = context.canonical();
    assert_eq!(canonical.len(), CONTEXT_BYTES_MAX);
    assert_eq!(EncryptionContext::from_canonical(&canonical), Ok(context));
    assert_eq!(EncryptionContext::new().insert("a", longest + "x"), Err(ContextError::TooLong));

    let mut bytes = canonical;
    bytes.push(b'x');
    bytes[5..7].copy_from_slice(&8186_u16.to_be_bytes());
    assert_eq!(EncryptionContext::from_canonical(&bytes), Err(ContextError::TooLong));
}

#[test]
fn every_other_encoding_is_refused() {
    let cases: [(&[u8], ContextError); 14] = [
        (b"", ContextError::Truncated),
        (b"\0", ContextError::Truncated),
        (b"\0\x01", ContextError::Truncated),
        (b"\0\x01\0\x01a", ContextError::Truncated),
        (b"\0\x01\0\x01a\0\x02x", ContextError::Truncated),
        (b"\0\0\0", ContextError::TrailingBytes),
        (b"\0\x01\0\x01a\0\0\0", ContextError::TrailingBytes),
        (b"\0\x01\0\0\0\x01x", ContextError::EmptyName),
        (b"\0\x02\0\x01a\0\0\0\x01a\0\0", ContextError::DuplicateName),
        (b"\0\x02\0\x01b\0\0\0\x01a\0\0", ContextError::Unsorted),
        (b"\0\x02\0\x02ab\0\0\0\x01a\0\0", ContextError::Unsorted),
        (b"\0\x01\0\x01\xff\0\0", ContextError::NotUtf8),
        (b"\0\x01\0\x01a\0\x01\xff", ContextError::NotUtf8),
        (b"\xff\xff", ContextError::TooManyPairs),
    ];
    for (bytes, error) in cases {
        assert_eq!(EncryptionContext::from_canonical(bytes), Err(error), "{bytes:?}");
    }
}

#[test]
fn reserved_names() {
    for name in ["keyfold:tenant", "keyfold:", "aws", "aws:x", "aws-crypto-public-key", "awsome"] {
        assert!(EncryptionContext::is_reserved(name), "{name}");
    }
    for name in ["", "keyfold", "Keyfold:tenant", "my-aws", "record"] {
        assert!(!EncryptionContext::is_reserved(name), "{name}");
    }
}

#[test]
fn debug_shows_names_and_no_values() {
    let shown = format!("{:?}", context_of(&[("patient", "Jane Doe"), ("record", "secret-42")]));
    assert_eq!(shown, r#"{"patient", "record"}"#);
}

fn any_context() -> impl Strategy<Value = EncryptionContext> {
    prop::collection::btree_map("\\PC{1,8}", "\\PC{0,12}", 0..8).prop_map(
        |pairs: BTreeMap<String, String>| {
            let mut context = EncryptionContext::new();
            for (name, value) in pairs {
                context.insert(name, value).unwrap();
            }
            context
        },
    )
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(256) })]

    #[test]
    fn a_canonical_form_reads_back(context in any_context()) {
        prop_assert_eq!(EncryptionContext::from_canonical(&context.canonical()), Ok(context));
    }

    #[test]
    fn different_contexts_have_different_forms(one in any_context(), other in any_context()) {
        prop_assert_eq!(one == other, one.canonical() == other.canonical());
    }

    /// Whatever is accepted is exactly what `canonical` writes.
    #[test]
    fn nothing_but_a_canonical_form_is_read(context in any_context(), at: prop::sample::Index, byte: u8, cut: bool) {
        let mut bytes = context.canonical();
        let at = at.index(bytes.len());
        bytes[at] = byte;
        if cut {
            bytes.truncate(at);
        }
        if let Ok(read) = EncryptionContext::from_canonical(&bytes) {
            prop_assert_eq!(read.canonical(), bytes);
        }
    }
}
