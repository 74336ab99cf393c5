//! Room in a record: what callers name may be long and many, and a line has a length that every sink takes.

use std::collections::BTreeSet;
use std::io::{self, Write};

/// How many bytes of callers' names for items a record holds, as they stand in it; of the rest it tells how many there
/// are.
pub const REFS_BYTES_MAX: usize = 32 << 10;
/// How many bytes of keys, data keys and context names a batch's record tells of, each.
pub(super) const DISTINCT_BYTES_MAX: usize = 8 << 10;
/// How many bytes of what a change asks for are recorded.
pub(super) const ASKED_BYTES_MAX: usize = 32 << 10;
/// More than the longest line: names of items twice, a context of 8 KiB of which each byte is escaped to six, three
/// lists, a reason and what has a fixed length. Unix datagrams are that long by Linux's default (`wmem_default`), and
/// collectors take more.
pub(super) const LINE_BYTES_MAX: usize = 160 << 10;

/// How many bytes a text has in a list in JSON, with its comma.
pub(super) fn listed_bytes(text: &str) -> usize {
    let mut counted = Counted(1);
    // Counting does not fail.
    let _ = serde_json::to_writer(&mut counted, text);
    counted.0
}

struct Counted(usize);

impl Write for Counted {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0 += bytes.len();
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Callers' names for items, as many as there is room for.
#[derive(Debug, Default)]
pub(super) struct Refs {
    pub(super) names: Vec<Box<str>>,
    bytes: usize,
    /// How many more there are.
    pub(super) more: u64,
}

impl Refs {
    pub(super) fn push(&mut self, name: Box<str>) {
        let bytes = listed_bytes(&name);
        if self.bytes + bytes > REFS_BYTES_MAX {
            self.more += 1;
            return;
        }
        self.bytes += bytes;
        self.names.push(name);
    }

    pub(super) fn absorb(&mut self, other: Self) {
        self.more += other.more;
        other.names.into_iter().for_each(|name| self.push(name));
    }
}

/// Different things, as many as there is room for.
#[derive(Debug)]
pub(super) struct Distinct<T> {
    pub(super) items: BTreeSet<T>,
    bytes: usize,
    /// Whether there are more. How many is not known: those that are left out may be the same one.
    pub(super) more: bool,
}

impl<T> Default for Distinct<T> {
    fn default() -> Self {
        Self { items: BTreeSet::new(), bytes: 0, more: false }
    }
}

impl<T: Ord> Distinct<T> {
    /// Takes in one that has so many bytes in the record.
    pub(super) fn insert(&mut self, item: T, bytes: usize) {
        if self.items.contains(&item) {
            return;
        }
        if self.bytes + bytes > DISTINCT_BYTES_MAX {
            self.more = true;
            return;
        }
        self.bytes += bytes;
        self.items.insert(item);
    }
}
