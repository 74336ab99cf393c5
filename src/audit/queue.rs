//! The queue of a sink: records wait in it until the sink's thread takes them.
//!
//! Threads that run at once have a lane each, in which a record is written where it will lie: nothing is allocated for
//! it, and threads that end calls at the same time do not wait for each other. A number that is drawn when a record is
//! whole brings the lanes together again: of two calls of which one began when the other had ended, the records stand in
//! that order.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::sync::oneshot;

use crate::spread::{Apart, here, places};

/// How large an empty lane is kept for the records to come.
const KEPT_BYTES_MAX: usize = 256 << 10;

/// Where senders put records, and the thread takes them from.
pub(super) struct Queue {
    lanes: Box<[Apart<Mutex<Lane>>]>,
    /// How many records have come.
    drawn: Apart<AtomicU64>,
    /// The thread wants to be woken by a record.
    idle: AtomicBool,
    asked: Mutex<Asked>,
    came: Condvar,
}

/// What the thread is asked for.
#[derive(Default)]
struct Asked {
    /// Who waits until all that came before is durable.
    waiting: Vec<oneshot::Sender<bool>>,
    /// A record has come while it was idle.
    woken: bool,
    closing: bool,
    /// The thread has ended.
    closed: bool,
}

impl Asked {
    fn is_urgent(&self) -> bool {
        self.closing || !self.waiting.is_empty()
    }
}

#[derive(Default)]
struct Lane {
    records: Records,
    /// Nobody takes from it any more.
    closed: bool,
}

/// Records one after another, each with its number and where it ends, and how many of them were taken out.
#[derive(Default)]
struct Records {
    bodies: Vec<u8>,
    ends: Vec<(u64, usize)>,
    taken: usize,
}

impl Records {
    fn push(&mut self, drawn: &AtomicU64, write: impl FnOnce(&mut Vec<u8>)) {
        self.drop_half();
        write(&mut self.bodies);
        // Not before it is whole: the thread waits for a number that was drawn.
        let number = drawn.fetch_add(1, Ordering::Relaxed);
        self.ends.push((number, self.bodies.len()));
    }

    /// Drops what somebody has left who died of writing it.
    fn drop_half(&mut self) {
        self.bodies.truncate(self.ends.last().map_or(0, |(_, end)| *end));
    }

    fn left(&self) -> usize {
        self.ends.len() - self.taken
    }

    /// Where the first begins that was not taken out.
    fn begin(&self) -> usize {
        self.taken.checked_sub(1).map_or(0, |before| self.ends[before].1)
    }

    /// The number of the first that was not taken out.
    fn number(&self) -> Option<u64> {
        self.ends.get(self.taken).map(|(number, _)| *number)
    }

    fn take_one(&mut self) -> Option<&[u8]> {
        let (begin, (_, end)) = (self.begin(), *self.ends.get(self.taken)?);
        self.taken += 1;
        Some(&self.bodies[begin..end])
    }

    /// Takes all of the others behind its own, and lets go what was taken out.
    fn append(&mut self, others: &mut Self) {
        others.drop_half();
        if self.left() == 0 {
            self.clear();
            std::mem::swap(self, others);
            return;
        }
        let begin = self.begin();
        self.bodies.drain(..begin);
        self.ends.drain(..self.taken);
        self.ends.iter_mut().for_each(|(_, end)| *end -= begin);
        self.taken = 0;
        let base = self.bodies.len();
        self.bodies.append(&mut others.bodies);
        self.ends.extend(others.ends.drain(..).map(|(number, end)| (number, end + base)));
    }

    /// Makes room for others, where all were taken out.
    fn clear(&mut self) {
        if self.bodies.capacity() > KEPT_BYTES_MAX {
            *self = Self::default();
        }
        self.bodies.clear();
        self.ends.clear();
        self.taken = 0;
    }
}

/// How long the thread waits for something to do.
#[derive(Clone, Copy)]
pub(super) enum Patience {
    /// For the first record, and then for more that come with it, each so long at most.
    Records { first: Duration, more: Duration },
    /// So long, whatever comes.
    Retry(Duration),
}

impl Queue {
    pub(super) fn new() -> Self {
        Self {
            lanes: (0..places()).map(|_| Apart::default()).collect(),
            drawn: Apart::default(),
            idle: AtomicBool::new(false),
            asked: Mutex::default(),
            came: Condvar::new(),
        }
    }

    /// Puts in the record that this writes. False where nobody takes it any more.
    pub(super) fn push(&self, write: impl FnOnce(&mut Vec<u8>)) -> bool {
        self.push_into(here(), write)
    }

    fn push_into(&self, place: usize, write: impl FnOnce(&mut Vec<u8>)) -> bool {
        {
            let mut lane = lock(&self.lanes[place]);
            if lane.closed {
                return false;
            }
            lane.records.push(&self.drawn, write);
        }
        // The thread says that it is idle before it looks into the lanes for the last time: either it has seen this
        // record, or the lock of the lane has let this see what it says.
        if self.idle.load(Ordering::Relaxed) && self.idle.swap(false, Ordering::Relaxed) {
            lock(&self.asked).woken = true;
            self.came.notify_one();
        }
        true
    }

    /// Asks to be told when all that came before is durable, and whether it is. Dropped where the thread has ended.
    pub(super) fn ask(&self) -> oneshot::Receiver<bool> {
        let (answer, told) = oneshot::channel();
        let mut asked = lock(&self.asked);
        if !asked.closed {
            asked.waiting.push(answer);
        }
        drop(asked);
        self.came.notify_one();
        told
    }

    /// Asks the thread to end.
    pub(super) fn ask_to_close(&self) {
        lock(&self.asked).closing = true;
        self.came.notify_one();
    }

    /// Waits for something to do, and takes all that has come, and who waits: all that he sent before is taken with him.
    /// True at the end, when nothing can come any more.
    pub(super) fn gather(
        &self,
        patience: Patience,
        taken: &mut Taken,
        waiting: &mut Vec<oneshot::Sender<bool>>,
    ) -> bool {
        let mut asked = lock(&self.asked);
        match patience {
            Patience::Retry(time) => asked = self.wait(asked, time, |asked| !asked.is_urgent()),
            Patience::Records { first, more } => {
                asked.woken = false;
                self.idle.store(true, Ordering::Relaxed);
                if self.is_empty() {
                    asked = self.wait(asked, first, |asked| !asked.is_urgent() && !asked.woken);
                }
                self.idle.store(false, Ordering::Relaxed);
                if !self.is_empty() {
                    asked = self.wait(asked, more, |asked| !asked.is_urgent());
                }
            }
        }
        // Before the lanes are looked into.
        waiting.append(&mut asked.waiting);
        let closing = asked.closing;
        drop(asked);
        for (lane, taken) in self.lanes.iter().zip(&mut taken.lanes) {
            let mut lane = lock(lane);
            taken.append(&mut lane.records);
            lane.closed = closing;
        }
        closing
    }

    /// Takes no more, and says how many nobody has taken.
    pub(super) fn close(&self) -> usize {
        {
            let mut asked = lock(&self.asked);
            asked.closed = true;
            asked.waiting.clear();
        }
        let left = self.lanes.iter().map(|lane| {
            let mut lane = lock(lane);
            lane.closed = true;
            lane.records.left()
        });
        left.sum()
    }

    fn is_empty(&self) -> bool {
        self.lanes.iter().all(|lane| lock(lane).records.left() == 0)
    }

    /// Waits for as long as that holds, and no longer than `time_max`.
    fn wait<'a>(
        &self,
        asked: MutexGuard<'a, Asked>,
        time_max: Duration,
        holds: impl Fn(&Asked) -> bool,
    ) -> MutexGuard<'a, Asked> {
        let waited = self.came.wait_timeout_while(asked, time_max, |asked| holds(asked));
        waited.unwrap_or_else(PoisonError::into_inner).0
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// What the thread has taken, lane by lane.
pub(super) struct Taken {
    lanes: Box<[Records]>,
    /// The number of the next record.
    next: u64,
    /// In which lane the last one stood.
    at: usize,
}

impl Taken {
    pub(super) fn new() -> Self {
        Self { lanes: (0..places()).map(|_| Records::default()).collect(), next: 0, at: 0 }
    }

    /// How many there are.
    pub(super) fn left(&self) -> usize {
        self.lanes.iter().map(Records::left).sum()
    }

    /// The next record. None where it was not taken yet, though ones may have been that came after it: its lane was
    /// looked into before it was there.
    pub(super) fn take_one(&mut self) -> Option<&[u8]> {
        let is_next = |records: &Records| records.number() == Some(self.next);
        if !is_next(&self.lanes[self.at]) {
            self.at = self.lanes.iter().position(is_next)?;
        }
        self.next += 1;
        self.lanes[self.at].take_one()
    }
}

#[cfg(test)]
mod tests {
    use std::panic::{AssertUnwindSafe, catch_unwind};
    use std::sync::Barrier;

    use proptest::prelude::*;

    use super::*;

    const AT_ONCE: Patience = Patience::Records { first: Duration::ZERO, more: Duration::ZERO };
    const FOR_EVER: Patience = Patience::Records { first: Duration::MAX, more: Duration::ZERO };

    /// From the thread of this place, or of one that shares its lane.
    fn put(queue: &Queue, place: u64, record: u64) -> bool {
        let lane = usize::try_from(place % places() as u64).unwrap();
        // Of different lengths.
        queue.push_into(lane, |line| line.extend_from_slice(record.to_string().as_bytes()))
    }

    fn take_all(taken: &mut Taken) -> Vec<u64> {
        std::iter::from_fn(|| number(taken.take_one()?)).collect()
    }

    fn number(record: &[u8]) -> Option<u64> {
        std::str::from_utf8(record).ok()?.parse().ok()
    }

    proptest! {
        #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(256) })]

        #[test]
        fn records_are_taken_out_in_the_order_in_which_they_came(
            rounds in prop::collection::vec((prop::collection::vec(any::<u64>(), 0..12), 0..9_usize), 0..9),
        ) {
            let (queue, mut taken, mut out, mut sent) = (Queue::new(), Taken::new(), vec![], 0);
            for (round, some) in rounds {
                for place in round {
                    prop_assert!(put(&queue, place, sent));
                    sent += 1;
                }
                prop_assert!(!queue.gather(AT_ONCE, &mut taken, &mut vec![]));
                // Some are left over for the next rounds.
                out.extend((0..some).map_while(|_| number(taken.take_one()?)));
                prop_assert_eq!(taken.left() as u64, sent - out.len() as u64);
            }
            out.extend(take_all(&mut taken));
            prop_assert_eq!(out, (0..sent).collect::<Vec<_>>());
            prop_assert_eq!(taken.left(), 0);
        }
    }

    #[test]
    fn a_record_waits_for_one_that_came_before_into_a_lane_that_was_looked_into_already() {
        let (queue, mut taken) = (Queue::new(), Taken::new());
        put(&queue, 0, 10);
        put(&queue, 1, 11);
        taken.lanes[1].append(&mut lock(&queue.lanes[1]).records);
        assert_eq!(taken.take_one(), None);
        assert_eq!(taken.left(), 1);
        put(&queue, 1, 12);
        queue.gather(AT_ONCE, &mut taken, &mut vec![]);
        assert_eq!(take_all(&mut taken), [10, 11, 12]);
    }

    #[test]
    fn what_follows_on_another_thread_stands_behind_it() {
        const THREADS: u64 = 4;
        const EACH: u64 = 5_000;
        let (queue, turn) = (Queue::new(), Mutex::new(0));
        let (mut taken, mut out) = (Taken::new(), vec![]);
        std::thread::scope(|scope| {
            for place in 0..THREADS {
                let (queue, turn) = (&queue, &turn);
                scope.spawn(move || {
                    for _ in 0..EACH {
                        let mut turn = lock(turn);
                        put(queue, place, *turn);
                        *turn += 1;
                    }
                });
            }
            while out.len() as u64 != THREADS * EACH {
                queue.gather(FOR_EVER, &mut taken, &mut vec![]);
                out.extend(take_all(&mut taken));
            }
        });
        assert_eq!(out, (0..THREADS * EACH).collect::<Vec<_>>());
    }

    #[test]
    fn who_waits_for_a_record_is_woken_by_each_that_comes() {
        let (queue, answers) = (Queue::new(), Mutex::new(std::sync::mpsc::channel()));
        std::thread::scope(|scope| {
            let answer = lock(&answers).0.clone();
            let gathering = &queue;
            scope.spawn(move || {
                let mut taken = Taken::new();
                while !gathering.gather(FOR_EVER, &mut taken, &mut vec![]) {
                    for record in take_all(&mut taken) {
                        answer.send(record).unwrap();
                    }
                }
            });
            for record in 0..5_000 {
                // So that it comes at every moment of the other's going to sleep.
                (0..record * 17 % 1_000).for_each(|_| std::hint::spin_loop());
                put(&queue, record, record);
                while lock(&answers).1.try_recv() != Ok(record) {
                    std::thread::yield_now();
                }
            }
            queue.ask_to_close();
        });
    }

    #[test]
    fn who_asks_wakes_it_too_and_is_told_of_all_that_he_sent_before() {
        const THREADS: u64 = 4;
        const EACH: u64 = 500;
        for patience in [FOR_EVER, Patience::Retry(Duration::MAX)] {
            let (queue, written) = (Queue::new(), Mutex::new(vec![]));
            std::thread::scope(|scope| {
                let senders: Vec<_> = (0..THREADS)
                    .map(|place| {
                        let (queue, written) = (&queue, &written);
                        scope.spawn(move || {
                            for record in place * EACH..(place + 1) * EACH {
                                put(queue, place, record);
                                assert_eq!(queue.ask().blocking_recv(), Ok(true));
                                assert!(lock(written).contains(&record));
                            }
                        })
                    })
                    .collect();
                scope.spawn(|| {
                    let (mut taken, mut waiting, mut closing) = (Taken::new(), vec![], false);
                    while !closing {
                        closing = queue.gather(patience, &mut taken, &mut waiting);
                        lock(&written).extend(take_all(&mut taken));
                        for answer in waiting.drain(..) {
                            assert!(answer.send(true).is_ok());
                        }
                    }
                });
                let ended: Vec<_> = senders.into_iter().map(|sender| sender.join().is_ok()).collect();
                queue.ask_to_close();
                assert_eq!(ended, [true; 4]);
            });
            let mut all = written.into_inner().unwrap();
            all.sort_unstable();
            assert_eq!(all, (0..THREADS * EACH).collect::<Vec<_>>(), "each of them once");
            queue.close();
            assert!(queue.ask().blocking_recv().is_err(), "the thread has ended");
        }
    }

    #[test]
    fn who_asks_while_the_lanes_are_looked_into_is_told_the_next_time() {
        let queue = Queue::new();
        put(&queue, 0, 1);
        std::thread::scope(|scope| {
            let last = lock(&queue.lanes[places() - 1]);
            let gathering = scope.spawn(|| {
                let (mut taken, mut waiting) = (Taken::new(), vec![]);
                queue.gather(Patience::Retry(Duration::ZERO), &mut taken, &mut waiting);
                (take_all(&mut taken), waiting.len())
            });
            while lock(&queue.lanes[0]).records.left() > 0 {
                std::thread::yield_now();
            }
            // Behind the thread's back.
            put(&queue, 0, 2);
            let _told = queue.ask();
            drop(last);
            assert_eq!(gathering.join().unwrap(), (vec![1], 0));
        });
    }

    #[test]
    fn half_a_record_is_none() {
        let (queue, mut taken) = (Queue::new(), Taken::new());
        let die = || {
            let died = catch_unwind(AssertUnwindSafe(|| {
                queue.push_into(0, |line| {
                    line.extend_from_slice(b"999");
                    std::panic::resume_unwind(Box::new(()));
                })
            }));
            assert!(died.is_err());
        };
        die();
        put(&queue, 0, 1);
        die();
        queue.gather(AT_ONCE, &mut taken, &mut vec![]);
        die();
        put(&queue, 0, 2);
        // The first one is there still: this comes behind it.
        queue.gather(AT_ONCE, &mut taken, &mut vec![]);
        assert_eq!(take_all(&mut taken), [1, 2]);
    }

    #[test]
    fn what_is_not_refused_at_the_end_is_taken() {
        const THREADS: u64 = 4;
        let (queue, mut taken, begun) = (Queue::new(), Taken::new(), Barrier::new(5));
        let mut sent: Vec<u64> = std::thread::scope(|scope| {
            let senders: Vec<_> = (0..THREADS)
                .map(|place| {
                    let (queue, begun) = (&queue, &begun);
                    scope.spawn(move || {
                        let mut sent = vec![];
                        for record in (place..).step_by(4) {
                            if !put(queue, place, record) {
                                break;
                            }
                            sent.push(record);
                            if sent.len() == 100 {
                                begun.wait();
                            }
                        }
                        sent
                    })
                })
                .collect();
            begun.wait();
            queue.ask_to_close();
            assert!(queue.gather(FOR_EVER, &mut taken, &mut vec![]));
            senders.into_iter().flat_map(|sender| sender.join().unwrap()).collect()
        });
        let mut all = take_all(&mut taken);
        all.sort_unstable();
        sent.sort_unstable();
        assert_eq!(all, sent);
        assert_eq!((taken.left(), queue.close()), (0, 0));
    }
}
