//! Words that are parsed once: what is taken is taken again as it is printed, and means the same.

use std::fmt::{Debug, Display};
use std::str::FromStr;

use keyfold::access::claims::ClaimPath;
use keyfold::audit::Link;
use keyfold::clock::Timestamp;
use keyfold::tenant::{KekId, KeyName, PrincipalId, TenantId, Verb};

pub fn names(bytes: &[u8]) {
    let Ok(text) = std::str::from_utf8(bytes) else { return };
    printed_and_read_again::<TenantId>(text);
    printed_and_read_again::<KeyName>(text);
    printed_and_read_again::<PrincipalId>(text);
    printed_and_read_again::<KekId>(text);
    let _ = (text.parse::<Verb>(), ClaimPath::parse(text), Timestamp::parse_rfc3339(text));
    if let Ok(kek) = text.parse::<KekId>() {
        let _ = (kek.home(), kek.region());
        assert!(kek.same_material(&kek));
    }
    if let Some(link) = Link::from_anchor(text) {
        assert_eq!(Link::from_anchor(&link.anchor()), Some(link));
    }
}

fn printed_and_read_again<T: FromStr + Display + PartialEq + Debug>(text: &str) {
    let Ok(word) = text.parse::<T>() else { return };
    assert_eq!(word.to_string().parse::<T>().ok(), Some(word));
}

pub fn seeds() -> Vec<Vec<u8>> {
    let anchor = format!("17:{}", "0a".repeat(32));
    [
        "acme",
        "local:one",
        "arn:aws:kms:eu-west-1:111122223333:key/mrk-1234abcd12ab34cd56ef1234567890ab",
        "arn:aws:kms:us-east-1:111122223333:alias/master",
        "2026-11-23T12:00:00Z",
        "user:alice@example.com",
        "realm.roles",
        &anchor,
    ]
    .map(|seed| seed.as_bytes().to_vec())
    .into()
}
