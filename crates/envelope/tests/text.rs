//! The text form: exactly one for each envelope.

use base64::Engine;
use base64::engine::general_purpose::{STANDARD, URL_SAFE_NO_PAD};
use envelope::{FormatError, text};
use proptest::prelude::*;

#[test]
fn other_spellings_are_refused() {
    assert_eq!(text::decode("kf1.S0YB"), Ok(b"KF\x01".to_vec()));
    assert_eq!(text::decode("kf1.-_8"), Ok(vec![0xfb, 0xff]));
    for prefix in ["", "kf1", "KF1.S0YB", "kf2.S0YB", " kf1.S0YB", "S0YB"] {
        assert_eq!(text::decode(prefix), Err(FormatError::TextPrefix), "{prefix}");
    }
    let spellings = [
        "kf1.-_8=",
        "kf1.+/8",
        "kf1.-_9",
        "kf1.S0YB\n",
        "kf1. S0YB",
        "kf1.S0 YB",
        "kf1.S0YBA",
        "kf1.é",
        "kf1.=",
    ];
    for spelling in spellings {
        assert_eq!(text::decode(spelling), Err(FormatError::TextEncoding), "{spelling}");
    }
}

#[test]
fn a_long_text_is_checked_in_every_place() {
    // Long enough for the vector instructions.
    let text = text::encode(&[0x69; 300]);
    for at in text::PREFIX.len()..text.len() {
        // The last ones are no text: a parser may leave it to this to refuse them.
        for wrong in *b"+/= \n\0.\x7f\x80\xc3\xff" {
            let mut spoiled = text.clone().into_bytes();
            spoiled[at] = wrong;
            assert_eq!(text::decode(&spoiled), Err(FormatError::TextEncoding), "{wrong:#x} at {at}");
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(512) })]

    #[test]
    fn one_text_for_each_envelope(envelope in prop::collection::vec(any::<u8>(), 0..400)) {
        let text = text::encode(&envelope);
        prop_assert_eq!(&text, &format!("kf1.{}", URL_SAFE_NO_PAD.encode(&envelope)));
        prop_assert_eq!(text.len(), text::encoded_bytes(envelope.len()));
        let mut appended = b"before".to_vec();
        text::encode_to(&envelope, &mut appended);
        prop_assert_eq!(appended, format!("before{text}").into_bytes());
        prop_assert_eq!(text::decode(&text).unwrap(), envelope);
    }

    /// Of all lengths around those of vector instructions, and spoilt in none or some places. `scripts/test` runs it for the
    /// instructions of other processors too.
    #[test]
    fn what_is_taken_is_what_the_base64_crate_takes(
        envelope in prop::collection::vec(any::<u8>(), 0..300),
        spoilt in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 0..3),
        cut in 0_usize..3,
        behind in "[A=]{0,2}",
    ) {
        let mut encoded = URL_SAFE_NO_PAD.encode(&envelope).into_bytes();
        encoded.truncate(encoded.len().saturating_sub(cut));
        encoded.extend_from_slice(behind.as_bytes());
        for (place, byte) in spoilt {
            if !encoded.is_empty() {
                let at = place.index(encoded.len());
                encoded[at] = byte;
            }
        }
        let taken = text::decode([b"kf1.", encoded.as_slice()].concat());
        prop_assert_eq!(taken.ok(), URL_SAFE_NO_PAD.decode(&encoded).ok());
        // The service's other texts.
        prop_assert_eq!(base64_turbo::STANDARD.encode(&envelope), STANDARD.encode(&envelope));
        prop_assert_eq!(base64_turbo::STANDARD.decode(&encoded).ok(), STANDARD.decode(&encoded).ok());
    }

    #[test]
    fn what_decodes_encodes_to_the_same(text in "kf1\\.[A-Za-z0-9_-]{0,12}") {
        if let Ok(envelope) = text::decode(&text) {
            prop_assert_eq!(text::encode(&envelope), text);
        }
    }
}
