//! What became of the items of a batch, gathered for its one record.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use envelope::{DataKeyId, EncryptionContext};

use super::record::Details;
use super::room::{Distinct, Refs, listed_bytes};
use crate::tenant::KeyName;

/// The items of a batch that were tried so far. Clones are the same tally, so that the parts of a batch that are
/// worked on at once come together in one record.
#[derive(Clone, Debug, Default)]
pub struct Tally(Arc<Mutex<Items>>);

impl Tally {
    /// Takes in a part.
    pub(super) fn absorb(&self, part: Items) {
        self.lock().absorb(part);
    }

    /// All that has come together.
    pub(super) fn take(&self) -> Items {
        std::mem::take(&mut *self.lock())
    }

    fn lock(&self) -> MutexGuard<'_, Items> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Counts the items of one part of a batch, and hands them over when it is dropped, so that those of a part that was
/// broken off are there too.
#[derive(Debug)]
pub struct PartTally {
    tally: Option<Tally>,
    items: Items,
    reference: Option<Box<str>>,
}

impl PartTally {
    /// A part of this tally; none where nothing is recorded.
    pub fn new(tally: Option<&Tally>) -> Self {
        Self { tally: tally.cloned(), items: Items::default(), reference: None }
    }

    /// How many items were tried.
    pub fn tried(&self) -> u64 {
        self.items.tried
    }

    /// What the caller calls the next item.
    pub fn name(&mut self, reference: Option<&str>) {
        self.reference = reference.filter(|_| self.tally.is_some()).map(Into::into);
    }

    /// Nothing is known yet of the item that is about to be tried.
    pub fn details(&self) -> Details {
        Details::new(self.tally.is_some())
    }

    /// The next item was tried; where it failed, with which code and why.
    pub fn note(&mut self, details: Details, failure: Option<(&'static str, &dyn std::fmt::Display)>) {
        let reference = self.reference.take();
        self.items.tried += 1;
        if self.tally.is_some() {
            self.items.note(reference, details, failure);
        }
    }
}

impl Drop for PartTally {
    fn drop(&mut self) {
        if let Some(tally) = &self.tally {
            tally.absorb(std::mem::take(&mut self.items));
        }
    }
}

/// What is known of the items of a batch together.
#[derive(Debug, Default)]
pub(super) struct Items {
    pub(super) tried: u64,
    /// How many failed with which code.
    pub(super) codes: BTreeMap<&'static str, u64>,
    /// Why the first of them did.
    pub(super) reason: Option<(&'static str, String)>,
    pub(super) bytes_in: u64,
    pub(super) bytes_out: u64,
    pub(super) keys: Distinct<KeyName>,
    pub(super) deks: Distinct<DataKeyId>,
    pub(super) refs: Refs,
    /// The names of those that failed.
    pub(super) failed_refs: Refs,
    /// The pairs that all items share.
    pub(super) context: Option<EncryptionContext>,
    /// The names of pairs that not all items have, or have with the same value.
    pub(super) varying: Distinct<Box<str>>,
}

impl Items {
    pub(super) fn failed(&self) -> u64 {
        self.codes.values().sum()
    }

    fn note(
        &mut self,
        reference: Option<Box<str>>,
        details: Details,
        failure: Option<(&'static str, &dyn std::fmt::Display)>,
    ) {
        if let Some((code, reason)) = failure {
            *self.codes.entry(code).or_default() += 1;
            if let Some(reference) = &reference {
                self.failed_refs.push(reference.clone());
            }
            if self.reason.is_none() {
                self.reason = Some((code, reason.to_string()));
            }
        }
        if let Some(reference) = reference {
            self.refs.push(reference);
        }
        self.bytes_in += details.bytes_in;
        self.bytes_out += details.bytes_out;
        if let Some(key) = details.key {
            insert_key(&mut self.keys, key);
        }
        if let Some(dek) = details.dek {
            self.deks.insert(dek, DEK_BYTES);
        }
        if let Some(context) = details.context {
            self.share(context);
        }
    }

    fn absorb(&mut self, part: Self) {
        self.tried += part.tried;
        self.bytes_in += part.bytes_in;
        self.bytes_out += part.bytes_out;
        for (code, count) in part.codes {
            *self.codes.entry(code).or_default() += count;
        }
        if self.reason.is_none() {
            self.reason = part.reason;
        }
        part.keys.items.into_iter().for_each(|key| insert_key(&mut self.keys, key));
        part.deks.items.into_iter().for_each(|dek| self.deks.insert(dek, DEK_BYTES));
        self.refs.absorb(part.refs);
        self.failed_refs.absorb(part.failed_refs);
        part.varying.items.into_iter().for_each(|name| insert_name(&mut self.varying, &name));
        self.keys.more |= part.keys.more;
        self.deks.more |= part.deks.more;
        self.varying.more |= part.varying.more;
        if let Some(context) = part.context {
            self.share(context);
        }
    }

    /// Keeps of the shared pairs those that this context has too; of the others only the names.
    fn share(&mut self, context: EncryptionContext) {
        match &mut self.context {
            None => self.context = Some(context),
            Some(shared) if shared.iter().eq(context.iter()) => {}
            Some(shared) => {
                let mut both = EncryptionContext::new();
                for (name, value) in shared.iter() {
                    if context.get(name) == Some(value) {
                        // It was within the limits before.
                        let _ = both.insert(name, value);
                    } else {
                        insert_name(&mut self.varying, name);
                    }
                }
                for (name, _) in context.iter().filter(|(name, _)| both.get(name).is_none()) {
                    insert_name(&mut self.varying, name);
                }
                *shared = both;
            }
        }
    }
}

/// A UUID in quotes, and a comma.
const DEK_BYTES: usize = 39;

fn insert_key(keys: &mut Distinct<KeyName>, key: KeyName) {
    let bytes = listed_bytes(key.as_str());
    keys.insert(key, bytes);
}

fn insert_name(names: &mut Distinct<Box<str>>, name: &str) {
    names.insert(name.into(), listed_bytes(name));
}

#[cfg(test)]
mod tests {
    use super::super::room::{DISTINCT_BYTES_MAX, REFS_BYTES_MAX};
    use super::*;

    fn context(pairs: &[(&str, &str)]) -> EncryptionContext {
        let mut context = EncryptionContext::new();
        for (name, value) in pairs {
            context.insert(*name, *value).unwrap();
        }
        context
    }

    fn names(refs: &Refs) -> Vec<&str> {
        refs.names.iter().map(|name| &**name).collect()
    }

    fn tried(part: &mut PartTally, name: &str, pairs: &[(&str, &str)], failure: Option<&'static str>) {
        part.name(Some(name));
        let mut details = part.details();
        details.with_context(context(pairs));
        details.with_bytes(2, 3);
        part.note(details, failure.map(|code| (code, &"why" as &dyn std::fmt::Display)));
    }

    #[test]
    fn parts_come_together_in_counts_names_and_the_pairs_that_all_share() {
        let tally = Tally::default();
        let (mut one, mut two) = (PartTally::new(Some(&tally)), PartTally::new(Some(&tally)));
        tried(&mut one, "a", &[("same", "1"), ("row", "a")], None);
        tried(&mut one, "b", &[("same", "1"), ("row", "b")], Some("context_mismatch"));
        tried(&mut two, "c", &[("same", "1"), ("other", "c")], Some("context_mismatch"));
        drop((one, two));
        let items = tally.take();
        assert_eq!((items.tried, items.failed(), items.bytes_in, items.bytes_out), (3, 2, 6, 9));
        assert_eq!(items.codes, [("context_mismatch", 2)].into());
        assert_eq!(names(&items.refs), ["a", "b", "c"]);
        assert_eq!(names(&items.failed_refs), ["b", "c"]);
        assert_eq!(items.context.unwrap().iter().collect::<Vec<_>>(), [("same", "1")]);
        assert_eq!(items.varying.items, ["other".into(), "row".into()].into());
        assert!(!items.varying.more);
    }

    #[test]
    fn names_are_kept_exactly_as_far_as_there_is_room() {
        let tally = Tally::default();
        let mut part = PartTally::new(Some(&tally));
        let name = "x".repeat(61);
        for _ in 0..=REFS_BYTES_MAX / 64 {
            tried(&mut part, &name, &[], None);
        }
        drop(part);
        let refs = tally.take().refs;
        assert_eq!((refs.names.len(), refs.more), (REFS_BYTES_MAX / 64, 1));
        let mut unrecorded = PartTally::new(None);
        tried(&mut unrecorded, "a", &[], None);
        assert_eq!((unrecorded.tried(), unrecorded.items.refs.names.len()), (1, 0));
    }

    #[test]
    fn context_names_are_kept_as_far_as_there_is_room_as_they_stand_in_the_record() {
        let tally = Tally::default();
        let mut part = PartTally::new(Some(&tally));
        // Each of its bytes is six in JSON.
        let name = |n: usize| format!("{}{n:02}", "\u{1}".repeat(169));
        let kept = DISTINCT_BYTES_MAX / listed_bytes(&name(0));
        assert_eq!(kept, 8);
        tried(&mut part, "first", &[], None);
        for n in 0..kept {
            tried(&mut part, "one", &[(&name(n), "x")], None);
            tried(&mut part, "again", &[(&name(n), "x")], None);
        }
        drop(part);
        let items = std::mem::take(&mut *tally.lock());
        assert_eq!((items.varying.items.len(), items.varying.more), (kept, false));
        tally.absorb(items);
        let mut part = PartTally::new(Some(&tally));
        tried(&mut part, "more", &[(&name(kept), "x")], None);
        drop(part);
        let items = tally.take();
        assert_eq!((items.varying.items.len(), items.varying.more), (kept, true));
    }
}
