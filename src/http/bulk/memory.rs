//! How much memory all batches together may take. A batch is whole in memory, and so are its answers: without a common
//! limit as many large ones as may be in flight would take as many times the limit of one.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use crate::http::problem::{Code, Problem};

/// What all batches together have.
pub(in crate::http) struct BatchMemory {
    taken: AtomicUsize,
    bytes_max: usize,
}

impl BatchMemory {
    pub(in crate::http) fn new(bytes_max: usize) -> Arc<Self> {
        Arc::new(Self { taken: AtomicUsize::new(0), bytes_max })
    }

    /// Room for a body of so many bytes, before it comes.
    pub(super) fn room(self: &Arc<Self>, bytes: usize) -> Result<Room, Problem> {
        let before = self.taken.fetch_add(bytes, Ordering::AcqRel);
        let room = Room { memory: Arc::clone(self), bytes: AtomicUsize::new(bytes) };
        if bytes <= self.bytes_max.saturating_sub(before) {
            return Ok(room);
        }
        Err(Problem::new(Code::Overloaded, "the batches that are worked on leave no memory for this one"))
    }
}

/// What one batch has of it; free again when the batch ends, however it ends.
pub(super) struct Room {
    memory: Arc<BatchMemory>,
    bytes: AtomicUsize,
}

impl Room {
    /// Takes more, even where there is none: answers. The batch that has begun is finished, and the next one waits.
    pub(super) fn grow(&self, bytes: usize) {
        self.bytes.fetch_add(bytes, Ordering::AcqRel);
        self.memory.taken.fetch_add(bytes, Ordering::AcqRel);
    }

    /// Gives back a part: a body that has been worked off.
    pub(super) fn shrink(&self, bytes: usize) {
        self.bytes.fetch_sub(bytes, Ordering::AcqRel);
        self.memory.taken.fetch_sub(bytes, Ordering::AcqRel);
    }
}

impl Drop for Room {
    fn drop(&mut self) {
        self.memory.taken.fetch_sub(*self.bytes.get_mut(), Ordering::AcqRel);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn room_is_given_up_to_the_last_byte_and_comes_back() {
        let memory = BatchMemory::new(100);
        let (first, second) = (memory.room(60).ok().unwrap(), memory.room(40).ok().unwrap());
        assert_eq!(memory.room(1).err().unwrap().code, Code::Overloaded);
        drop(second);
        assert!(memory.room(41).is_err());
        // Answers come, and the body goes.
        first.grow(200);
        assert!(memory.room(1).is_err());
        first.shrink(60);
        first.shrink(170);
        assert!(memory.room(71).is_err() && memory.room(70).is_ok());
        drop(first);
        assert!(memory.room(100).is_ok());
        assert_eq!(memory.taken.load(Ordering::Acquire), 0);
    }
}
