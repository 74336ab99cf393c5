//! Policies: the documents, and what they say of one request.

mod authorize;
mod condition;
mod document;

pub(crate) use authorize::{Request, authorize, authorize_without_key, elsewhere, explicitly_denied};
pub(crate) use condition::Facts;
pub(crate) use document::Policy;

/// AWS's wildcards: `*` for any run of characters, `?` for any one.
pub(crate) fn matches_pattern(pattern: &str, text: &str) -> bool {
    let (pattern, text): (Vec<char>, Vec<char>) = (pattern.chars().collect(), text.chars().collect());
    let (mut p, mut t) = (0, 0);
    // Where the last `*` stands, and where in the text its run ends so far.
    let mut star: Option<(usize, usize)> = None;
    while t < text.len() {
        match pattern.get(p) {
            Some('*') => {
                star = Some((p, t));
                p += 1;
            }
            Some(&c) if c == '?' || c == text[t] => {
                p += 1;
                t += 1;
            }
            _ => {
                let Some((at, run)) = star else { return false };
                star = Some((at, run + 1));
                p = at + 1;
                t = run + 1;
            }
        }
    }
    pattern[p..].iter().all(|c| *c == '*')
}

#[cfg(test)]
mod tests {
    use super::matches_pattern;

    #[test]
    fn wildcards() {
        for (pattern, text, expected) in [
            ("*", "", true),
            ("kms:*", "kms:Decrypt", true),
            ("kms:ReEncrypt*", "kms:ReEncryptFrom", true),
            ("kms:Describe?ey", "kms:DescribeKey", true),
            ("kms:Decrypt", "kms:DecryptX", false),
            ("*Key*", "kms:GenerateDataKeyWithoutPlaintext", true),
            ("a*b*c", "aXbXbXc", true),
            ("a*b*c", "aXbXbX", false),
            ("?", "", false),
        ] {
            assert_eq!(matches_pattern(pattern, text), expected, "{pattern} {text}");
        }
    }
}
