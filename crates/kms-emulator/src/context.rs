//! Encryption contexts, and the one form of them that a ciphertext is bound to.

use std::collections::BTreeMap;

use crate::error::KmsError;

/// An encryption context: what AWS KMS calls the pairs that a ciphertext is bound to.
pub type EncryptionContext = BTreeMap<String, String>;

/// AWS refuses contexts whose keys and values together are longer.
const MAX_BYTES: usize = 8192;

pub(crate) fn check(context: &EncryptionContext) -> Result<(), KmsError> {
    let bytes: usize = context.iter().map(|(key, value)| key.len() + value.len()).sum();
    if bytes > MAX_BYTES {
        return Err(KmsError::validation(format!(
            "1 validation error detected: Value at 'encryptionContext' failed to satisfy constraint: \
             Member must have length less than or equal to {MAX_BYTES}"
        )));
    }
    Ok(())
}

/// Appends the canonical form: the count, then every key and value with its length, in the order of the
/// keys. No two contexts have the same form, so none can stand in for another.
pub(crate) fn append_canonical(context: &EncryptionContext, out: &mut Vec<u8>) {
    append_len(context.len(), out);
    for part in context.iter().flat_map(|(key, value)| [key, value]) {
        append_len(part.len(), out);
        out.extend_from_slice(part.as_bytes());
    }
}

fn append_len(len: usize, out: &mut Vec<u8>) {
    out.extend_from_slice(&(len as u64).to_be_bytes());
}

#[cfg(test)]
mod tests {
    use super::*;

    fn canonical(pairs: &[(&str, &str)]) -> Vec<u8> {
        let context = pairs.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())).collect();
        let mut out = Vec::new();
        append_canonical(&context, &mut out);
        out
    }

    #[test]
    fn no_two_contexts_share_a_form() {
        let contexts: &[&[(&str, &str)]] = &[
            &[],
            &[("", "")],
            &[("a", "b")],
            &[("ab", "")],
            &[("", "ab")],
            &[("a", "b"), ("c", "d")],
            &[("ab", "cd")],
            &[("a", "bc"), ("d", "")],
            &[("a", "b, c:d")],
        ];
        for (i, one) in contexts.iter().enumerate() {
            for other in &contexts[i + 1..] {
                assert_ne!(canonical(one), canonical(other), "{one:?} and {other:?}");
            }
        }
    }

    #[test]
    fn order_does_not_matter() {
        assert_eq!(canonical(&[("a", "1"), ("b", "2")]), canonical(&[("b", "2"), ("a", "1")]));
    }
}
