//! JSON in: borrowed from the body where that is possible, and strict. JSON out: written straight into the body.
//!
//! A parser's message may quote what it met, and that may be a secret: what is told to the caller is where it
//! stands and what was expected there.

use std::borrow::Cow;
use std::fmt;

use envelope::EncryptionContext;
use serde::de::{Deserialize, Deserializer, Error as _, MapAccess, Visitor};
use serde::forward_to_deserialize_any;

use super::problem::{Code, Problem};
use crate::operations::{OperationError, Plaintext};

/// Standard base64 (RFC 4648, section 4) with padding; the canonical form only.
pub(super) const BASE64: base64_turbo::Engine = base64_turbo::STANDARD;

/// Parses a body, which is an object.
pub(super) fn parse<'a, T: Deserialize<'a>>(body: &'a [u8]) -> Result<T, Problem> {
    let mut deserializer = serde_json::Deserializer::from_slice(body);
    let parsed = T::deserialize(ObjectOnly(&mut deserializer));
    let parsed = parsed.and_then(|parsed| deserializer.end().map(|()| parsed));
    parsed.map_err(|error| Problem::new(Code::MalformedRequest, explain(&error)))
}

/// Takes a struct from a JSON object only. Derived code would take an array too, its items by position: a form that
/// is not documented, and in which a `null` more or less moves every value to another field.
pub(super) struct ObjectOnly<D>(pub(super) D);

impl<'de, D: Deserializer<'de>> Deserializer<'de> for ObjectOnly<D> {
    type Error = D::Error;

    fn deserialize_any<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, D::Error> {
        self.0.deserialize_map(visitor)
    }

    forward_to_deserialize_any! {
        bool i8 i16 i32 i64 i128 u8 u16 u32 u64 u128 f32 f64 char str string bytes byte_buf option unit unit_struct
        newtype_struct seq tuple tuple_struct map struct enum identifier ignored_any
    }
}

fn explain(error: &serde_json::Error) -> String {
    let text = error.to_string();
    // What quotes only names of fields is told whole; of the rest only what stands after ", expected".
    let told = ["unknown field", "unknown variant", "missing field", "duplicate field", "the context"];
    if told.iter().any(|beginning| text.starts_with(beginning)) {
        return text.chars().take(300).collect();
    }
    let place = format!("at line {} column {}", error.line(), error.column());
    match text.split_once(", expected ") {
        Some((_, expected)) if error.is_data() => {
            let expected = expected.split(" at line ").next().unwrap_or("another value");
            format!("expected {expected} {place}")
        }
        _ if error.is_data() => format!("a value is not valid {place}"),
        _ => format!("the body is not JSON {place}"),
    }
}

/// Text that is borrowed from the body, unless an escape in it makes that impossible.
#[derive(Default)]
pub(super) struct Text<'a>(pub(super) Cow<'a, str>);

impl<'de: 'a, 'a> Deserialize<'de> for Text<'a> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct TextVisitor;
        impl<'de> Visitor<'de> for TextVisitor {
            type Value = Text<'de>;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a string")
            }

            fn visit_borrowed_str<E>(self, text: &'de str) -> Result<Text<'de>, E> {
                Ok(Text(Cow::Borrowed(text)))
            }

            fn visit_str<E>(self, text: &str) -> Result<Text<'de>, E> {
                Ok(Text(Cow::Owned(text.to_owned())))
            }

            fn visit_string<E>(self, text: String) -> Result<Text<'de>, E> {
                Ok(Text(Cow::Owned(text)))
            }
        }
        deserializer.deserialize_str(TextVisitor)
    }
}

/// Text of a narrow alphabet, as the bytes that it is written in: base64, or an envelope. Whoever decodes it refuses
/// what is not of the alphabet, so that the parser need not look at each of its characters.
#[derive(Default)]
pub(super) struct Encoded<'a>(pub(super) Cow<'a, [u8]>);

impl<'de: 'a, 'a> Deserialize<'de> for Encoded<'a> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct EncodedVisitor;
        impl<'de> Visitor<'de> for EncodedVisitor {
            type Value = Encoded<'de>;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a string")
            }

            fn visit_borrowed_bytes<E>(self, text: &'de [u8]) -> Result<Encoded<'de>, E> {
                Ok(Encoded(Cow::Borrowed(text)))
            }

            fn visit_bytes<E>(self, text: &[u8]) -> Result<Encoded<'de>, E> {
                Ok(Encoded(Cow::Owned(text.to_owned())))
            }
        }
        deserializer.deserialize_bytes(EncodedVisitor)
    }
}

/// A context: a map of strings to strings, no name twice, within the limits.
#[derive(Default)]
pub(super) struct Context(pub(super) EncryptionContext);

impl<'de> Deserialize<'de> for Context {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct ContextVisitor;
        impl<'de> Visitor<'de> for ContextVisitor {
            type Value = Context;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a map of strings to strings")
            }

            // Many clients write what they leave out as null; the interface documents that they may.
            fn visit_unit<E>(self) -> Result<Context, E> {
                Ok(Context::default())
            }

            fn visit_map<A: MapAccess<'de>>(self, mut pairs: A) -> Result<Context, A::Error> {
                let mut context = EncryptionContext::new();
                while let Some((name, value)) = pairs.next_entry::<Text<'_>, Text<'_>>()? {
                    context.insert(name.0, value.0).map_err(|error| {
                        A::Error::custom(format_args!("the context is not valid: {error}"))
                    })?;
                }
                Ok(Context(context))
            }
        }
        deserializer.deserialize_any(ContextVisitor)
    }
}

/// A plaintext in base64 that is decoded where it will be sealed.
pub(super) struct Base64Plaintext<'a> {
    pub(super) text: &'a [u8],
    pub(super) bytes_max: usize,
}

impl Base64Plaintext<'_> {
    fn too_large(&self) -> OperationError {
        OperationError::TooLarge(format!(
            "the plaintext is larger than the {} bytes that this call takes",
            self.bytes_max
        ))
    }
}

impl Plaintext for Base64Plaintext<'_> {
    fn bytes_max(&self) -> usize {
        let padding = self.text.iter().rev().take(2).filter(|byte| **byte == b'=').count();
        (self.text.len() / 4 * 3).saturating_sub(padding)
    }

    fn check(&self) -> Result<(), OperationError> {
        if Plaintext::bytes_max(self) > self.bytes_max { Err(self.too_large()) } else { Ok(()) }
    }

    fn append_to(&self, buffer: &mut Vec<u8>) -> Result<(), OperationError> {
        let at = buffer.len();
        // Room for the estimate, which rounds up: decoding then needs no buffer of its own.
        buffer.resize(at + self.text.len().div_ceil(4) * 3, 0);
        let written = BASE64.decode_slice(self.text, &mut buffer[at..]).map_err(|_| {
            OperationError::Invalid(
                "plaintext is not standard base64 with padding (RFC 4648, section 4)".to_owned(),
            )
        })?;
        buffer.truncate(at + written);
        if written > self.bytes_max { Err(self.too_large()) } else { Ok(()) }
    }
}

#[cfg(test)]
mod tests {
    use base64::Engine as _;
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(512) })]

        #[test]
        fn a_plaintext_is_what_the_base64_crate_takes(
            plaintext in prop::collection::vec(any::<u8>(), 0..300),
            spoilt in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 0..3),
            cut in 0_usize..3,
            behind in "[A=]{0,2}",
        ) {
            let reference = base64::engine::general_purpose::STANDARD;
            let mut text = reference.encode(&plaintext).into_bytes();
            prop_assert_eq!(BASE64.encode(&plaintext).into_bytes(), text.clone());
            text.truncate(text.len().saturating_sub(cut));
            text.extend_from_slice(behind.as_bytes());
            for (place, byte) in spoilt {
                if !text.is_empty() {
                    let at = place.index(text.len());
                    text[at] = byte;
                }
            }
            let mut buffer = b"before".to_vec();
            let taken = Base64Plaintext { text: &text, bytes_max: usize::MAX }.append_to(&mut buffer);
            let taken = taken.ok().map(|()| buffer.split_off(6));
            prop_assert_eq!(taken, reference.decode(&text).ok());
        }
    }

    #[derive(serde::Deserialize)]
    #[serde(deny_unknown_fields)]
    struct Request<'a> {
        #[serde(borrow)]
        plaintext: Encoded<'a>,
        #[serde(default)]
        context: Context,
    }

    fn detail(body: &str) -> String {
        parse::<Request<'_>>(body.as_bytes()).err().unwrap().detail.into_owned()
    }

    #[test]
    fn what_is_told_names_the_place_and_never_the_value() {
        assert!(detail(r#"{"plaintext": 5}"#).contains("expected a string at line 1 column 15"));
        assert!(detail(r#"{"plaintext": "a", "plain": 1}"#).contains("unknown field `plain`"));
        assert!(detail("{}").contains("missing field `plaintext`"));
        assert!(detail(r#"{"plaintext": "a", "plaintext": "b"}"#).contains("duplicate field `plaintext`"));
        assert!(
            detail(r#"{"plaintext": "a", "context": {"a": "1", "a": "2"}}"#)
                .contains("the context is not valid")
        );
        assert!(detail("{").contains("not JSON"));
        for body in [
            r#"{"plaintext": ["canary"]}"#,
            r#"{"plaintext": {"canary": 1}}"#,
            r#"{"plaintext": "canary""#,
            r#"{"plaintext": "a", "context": "canary"}"#,
            r#"{"plaintext": "a", "context": {"a": ["canary"]}}"#,
            r#""canary""#,
        ] {
            assert!(!detail(body).contains("canary"), "{body}: {}", detail(body));
        }
    }

    #[test]
    fn an_object_is_an_object_and_no_list_of_values() {
        for body in [r#"["YQ=="]"#, r#"["YQ==", null]"#, "[]", "null", "5"] {
            assert!(detail(body).contains("expected struct Request at line 1"), "{body}: {}", detail(body));
        }
        assert!(detail(r#"{"plaintext": "YQ=="} {}"#).contains("not JSON"));
    }

    #[test]
    fn text_is_borrowed_unless_an_escape_forbids_it() {
        let request: Request<'_> = parse(br#"{"plaintext": "YQ=="}"#).unwrap();
        assert!(matches!(request.plaintext.0, Cow::Borrowed(b"YQ==")));
        let escaped: Request<'_> = parse(br#"{"plaintext": "a\/b="}"#).unwrap();
        assert_eq!(*escaped.plaintext.0, *b"a/b=");
        let names = |body| parse::<Request<'_>>(body).ok().unwrap().context.0;
        assert_eq!(names(br#"{"plaintext": "", "context": {"a\u002fb": "1"}}"#).get("a/b"), Some("1"));
    }

    #[test]
    fn what_json_forbids_in_a_string_is_no_plaintext_either() {
        // Long ones are decoded by the vector instructions.
        for before in [0, 2, 30, 96, 126] {
            for bad in
                [&b"\x00"[..], b"\n", b"\x1f", b"\x7f", b"\x80", b"\xff", b"\xed\xa0\x80", b"\\ud800", b"\\n"]
            {
                for after in [1, 33, 128] {
                    let text = [&vec![b'A'; before], bad, &vec![b'A'; after]].concat();
                    let body = [br#"{"plaintext": ""#, &text[..], br#""}"#].concat();
                    let request: Request<'_> = parse(&body).ok().unwrap();
                    let plaintext = Base64Plaintext { text: &request.plaintext.0, bytes_max: 999 };
                    let decoded = plaintext.append_to(&mut Vec::new());
                    assert!(matches!(decoded, Err(OperationError::Invalid(_))), "{bad:?} after {before}");
                }
            }
        }
        // Of a text that is used as it is, the parser itself looks at each character.
        for name in [&b"a\x00"[..], b"a\xff"] {
            let body = [br#"{"plaintext": "", "context": {""#, name, br#"": ""}}"#].concat();
            assert_eq!(parse::<Request<'_>>(&body).err().unwrap().code, Code::MalformedRequest);
        }
    }

    #[test]
    fn only_canonical_base64_is_plaintext_and_the_limit_is_exact() {
        let decode = |text: &str, bytes_max: usize| {
            let plaintext = Base64Plaintext { text: text.as_bytes(), bytes_max };
            let mut buffer = b"head".to_vec();
            plaintext.check().and_then(|()| plaintext.append_to(&mut buffer)).map(|()| buffer[4..].to_vec())
        };
        assert_eq!(decode("aGVsbG8=", 5).unwrap(), b"hello");
        assert!(matches!(decode("aGVsbG8=", 4), Err(OperationError::TooLarge(_))));
        assert_eq!(decode("", 0).unwrap(), b"");
        for bad in ["aGVsbG8", "aGVsbG9=", "aGVsbG8 ", "aGVs\nbG8=", "_-8=", "a", "====", "aGVsbG8=="] {
            assert!(matches!(decode(bad, 9), Err(OperationError::Invalid(_))), "{bad:?}");
        }
    }
}
