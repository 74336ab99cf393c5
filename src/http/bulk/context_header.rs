//! `Keyfold-Context`: an encryption context in a header, for calls whose body is the message itself.
//!
//! A dictionary of strings (RFC 9651): `record="42", tenant-name=%"caf%c3%a9"`. What its rules do not let a name be
//! (upper case, a colon) goes as one byte sequence that holds the JSON object: `:eyJSZWNvcmQiOiI0MiJ9:`.

use std::cell::Cell;
use std::convert::Infallible;

use envelope::{ContextError, EncryptionContext};
use http::HeaderMap;
use sfv::visitor::{
    DictionaryVisitor, EntryVisitor, Ignored, InnerListVisitor, ItemVisitor, ParameterVisitor,
};
use sfv::{BareItem, BareItemFromInput, GenericBareItem, Item, KeyRef, Parser};

use crate::http::json::{Context, parse};
use crate::http::problem::{Code, Problem};

pub(super) const NAME: &str = "keyfold-context";
const RULE: &str = "Keyfold-Context is a dictionary of strings (RFC 9651), such as record=\"42\", or one byte sequence \
                    that holds the JSON object";

/// The context that the request names; the empty one where it names none.
pub(super) fn context(headers: &HeaderMap) -> Result<EncryptionContext, Problem> {
    let malformed = || Problem::new(Code::MalformedRequest, RULE);
    let mut joined = Vec::new();
    // RFC 9651, section 4.2: several lines are one field.
    for line in headers.get_all(NAME) {
        if !joined.is_empty() {
            joined.extend_from_slice(b", ");
        }
        joined.extend_from_slice(line.as_bytes());
    }
    if joined.first() == Some(&b':') {
        let item: Item = Parser::new(&joined).parse().map_err(|_| malformed())?;
        let BareItem::ByteSequence(json) = item.bare_item else { return Err(malformed()) };
        return Ok(parse::<Context>(&json)?.0);
    }
    let refused = Cell::new(None);
    let pairs = Pairs { context: EncryptionContext::new(), refused: &refused };
    match (Parser::new(&joined).parse_dictionary_with_visitor(pairs), refused.into_inner()) {
        (Ok(context), _) => Ok(context),
        (Err(_), Some(cause)) => {
            Err(Problem::new(Code::MalformedRequest, format!("the context is not valid: {cause}")))
        }
        (Err(_), None) => Err(malformed()),
    }
}

struct Pairs<'a> {
    context: EncryptionContext,
    /// The parser's own error does not keep it.
    refused: &'a Cell<Option<ContextError>>,
}

#[derive(Debug, thiserror::Error)]
#[error("the value is refused")]
struct Refused;

impl<'de> DictionaryVisitor<'de> for Pairs<'_> {
    type Out = EncryptionContext;
    type Error = Infallible;

    #[expect(refining_impl_trait, reason = "an opaque type here does not name the visitor's own lifetime")]
    fn entry(&mut self, key: &'de KeyRef) -> Result<Pair<'_>, Infallible> {
        Ok(Pair { context: &mut self.context, refused: self.refused, name: key.as_str().to_owned() })
    }

    fn finish(self) -> Result<EncryptionContext, Infallible> {
        Ok(self.context)
    }
}

struct Pair<'a> {
    context: &'a mut EncryptionContext,
    refused: &'a Cell<Option<ContextError>>,
    name: String,
}

impl<'de> EntryVisitor<'de> for Pair<'_> {
    type Error = Refused;

    fn item(self) -> Result<impl ItemVisitor<'de>, Refused> {
        Ok(self)
    }

    fn inner_list(self) -> Result<impl InnerListVisitor<'de>, Refused> {
        Err::<Ignored, _>(Refused)
    }
}

impl<'de> ItemVisitor<'de> for Pair<'_> {
    type Out = ();
    type Error = Refused;

    fn bare_item(
        self,
        value: BareItemFromInput<'de>,
    ) -> Result<impl ParameterVisitor<'de, Out = ()>, Refused> {
        let value = match value {
            GenericBareItem::String(value) => value.as_str().to_owned(),
            GenericBareItem::DisplayString(value) => value.into_owned(),
            _ => return Err(Refused),
        };
        // The RFC lets the last of two equal names win. A context has none twice: which of them counts is what two
        // implementations would disagree on.
        match self.context.insert(self.name, value) {
            Ok(()) => Ok(Ignored),
            Err(cause) => {
                self.refused.set(Some(cause));
                Err(Refused)
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use envelope::{CONTEXT_BYTES_MAX, CONTEXT_PAIRS_MAX};

    use super::*;
    use crate::http::json::BASE64;

    fn read(lines: &[&str]) -> Result<Vec<(String, String)>, String> {
        let mut headers = HeaderMap::new();
        for line in lines {
            headers.append(NAME, line.parse().unwrap());
        }
        let context = context(&headers).map_err(|problem| problem.detail.into_owned())?;
        Ok(context.iter().map(|(name, value)| (name.to_owned(), value.to_owned())).collect())
    }

    fn pairs(pairs: &[(&str, &str)]) -> Vec<(String, String)> {
        pairs.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect()
    }

    #[test]
    fn a_dictionary_of_strings_is_a_context() {
        assert_eq!(read(&[]).unwrap(), []);
        assert_eq!(read(&["b=\"2\", a=\"1\""]).unwrap(), pairs(&[("a", "1"), ("b", "2")]));
        assert_eq!(read(&["a=\"1\"", "b=\"x\\\"y\""]).unwrap(), pairs(&[("a", "1"), ("b", "x\"y")]));
        assert_eq!(read(&["a=%\"caf%c3%a9\""]).unwrap(), pairs(&[("a", "café")]));
    }

    #[test]
    fn other_names_travel_as_json_in_a_byte_sequence() {
        // {"Record:Id":"42"}
        assert_eq!(read(&[":eyJSZWNvcmQ6SWQiOiI0MiJ9:"]).unwrap(), pairs(&[("Record:Id", "42")]));
        assert!(read(&[":e30=:"]).unwrap().is_empty());
        assert!(read(&[":!!:"]).is_err());
        assert!(read(&[":eyJSZWNvcmQ6SWQiOiI0MiJ9:, a=\"1\""]).is_err());
    }

    #[test]
    fn the_limits_of_a_context_are_those_of_json_to_the_last_pair_and_byte() {
        let dictionary = |pairs: usize| {
            let pairs: Vec<String> = (0..pairs).map(|n| format!("p{n}=\"\"")).collect();
            pairs.join(", ")
        };
        assert_eq!(read(&[&dictionary(CONTEXT_PAIRS_MAX)]).unwrap().len(), CONTEXT_PAIRS_MAX);
        let told = read(&[&dictionary(CONTEXT_PAIRS_MAX + 1)]).unwrap_err();
        assert!(told.contains("64"), "{told}");
        let fits = |bytes: &usize| EncryptionContext::new().insert("a", "x".repeat(*bytes)).is_ok();
        let most = (0..=CONTEXT_BYTES_MAX).rev().find(fits).unwrap();
        let value = |bytes: usize| format!("a=\"{}\"", "x".repeat(bytes));
        assert_eq!(read(&[&value(most)]).unwrap()[0].1.len(), most);
        let told = read(&[&value(most + 1)]).unwrap_err();
        assert!(told.contains("8,192"), "{told}");
        // Spread over lines, and as one byte sequence.
        let half = dictionary(CONTEXT_PAIRS_MAX / 2);
        assert!(read(&[&half, &half.replace('p', "q")]).is_ok());
        assert!(read(&[&half, &half.replace('p', "q"), "r=\"\""]).is_err());
        let json =
            |bytes: usize| format!(":{}:", BASE64.encode(format!("{{\"a\": \"{}\"}}", "x".repeat(bytes))));
        assert!(read(&[&json(most)]).is_ok() && read(&[&json(most + 1)]).is_err());
    }

    #[test]
    fn what_is_no_string_or_there_twice_is_refused_and_not_quoted() {
        for bad in ["a", "a=1", "a=token", "a=(\"x\")", "A=\"1\"", "a=\"canary", "=\"canary\"", "a=?1"] {
            let told = read(&[bad]).unwrap_err();
            assert!(told.contains("RFC 9651") && !told.contains("canary"), "{bad}: {told}");
        }
        assert!(read(&["a=\"1\", a=\"2\""]).unwrap_err().contains("there twice"));
        assert!(read(&["a=\"1\"", "a=\"1\""]).unwrap_err().contains("there twice"));
    }
}
