//! A sink: a bounded queue and a thread that chains, writes and seals what is in it.
//!
//! A place in the queue is taken before the work begins, so that there is room for its record whatever happens. What
//! cannot be written stays in the queue and is tried again; meanwhile a sink that refuses lets no new work begin.

use std::io;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

use serde::Deserialize;
use tokio::sync::{Semaphore, SemaphorePermit, oneshot};

use super::chain::{Keys, Link, write_event};
use super::output::Output;
use super::queue::{Patience, Queue, Taken};
use super::record::{Member, member};
use crate::clock::Clock;
use crate::spread::{self, Apart, here};

/// How long the thread gathers before it writes: under load one wake-up serves many records.
const GATHER: Duration = Duration::from_millis(5);
/// How long after a failed write the next try comes.
const RETRY: Duration = Duration::from_millis(250);
/// How often what was written is made durable.
const SYNC_EVERY: Duration = Duration::from_secs(1);
/// How many places a thread takes at once where there are plenty: taking each by itself, threads would wait for each
/// other.
const AT_ONCE: u32 = 32;
/// From how many places on: what threads have taken and not used is then a small part of them.
const AT_ONCE_PLACES_MIN: usize = 4_096;
/// From how many bytes of lines on they are written before more are chained.
const WRITE_BYTES: usize = 1 << 20;

/// What happens to work whose record has no room.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum OnFull {
    /// It waits for room.
    Block,
    /// It is refused, and so is all work while the sink cannot write.
    #[default]
    Refuse,
    /// It is done without a record; how many there were is recorded later.
    DropAndCount,
}

/// What all sinks share.
#[derive(Clone)]
pub(super) struct Settings {
    pub(super) queue_records_max: usize,
    pub(super) seal_records: u64,
    pub(super) seal_every: Duration,
}

/// The side of a sink on which work goes on.
pub(super) struct Sink {
    name: &'static str,
    on_full: OnFull,
    /// How many records may wait.
    places: usize,
    shared: Arc<Shared>,
    thread: Mutex<Option<JoinHandle<()>>>,
}

/// What both sides know.
struct Shared {
    slots: Apart<Semaphore>,
    /// What threads that run at once have taken of them, each for records to come.
    in_stock: Box<[Apart<AtomicUsize>]>,
    failing: AtomicBool,
    dropped: AtomicU64,
    queue: Queue,
}

impl Sink {
    pub(super) fn start(
        name: &'static str,
        on_full: OnFull,
        settings: &Settings,
        clock: Clock,
        keys: Keys,
        start: Start,
    ) -> io::Result<Self> {
        let places = settings.queue_records_max;
        let shared = Arc::new(Shared {
            slots: Semaphore::new(places).into(),
            in_stock: (0..spread::places()).map(|_| Apart::default()).collect(),
            failing: AtomicBool::new(false),
            dropped: AtomicU64::new(0),
            queue: Queue::new(),
        });
        let writer = Writer {
            name,
            shared: Arc::clone(&shared),
            settings: settings.clone(),
            synced_at: clock.monotonic(),
            sealed_at: clock.monotonic(),
            clock,
            keys,
            link: start.link,
            output: start.output,
            taken: Taken::new(),
            waiting: vec![],
            lines: vec![],
            done_bytes: 0,
            records: 0,
            unsealed: 0,
            unsynced: false,
            unnoted: None,
        };
        let (is_new, torn_bytes) = (start.is_new, start.torn_bytes);
        let thread = std::thread::Builder::new()
            .name(format!("audit-{name}"))
            .spawn(move || writer.run(is_new, torn_bytes))?;
        Ok(Self { name, on_full, places, shared, thread: Mutex::new(Some(thread)) })
    }

    pub(super) fn name(&self) -> &'static str {
        self.name
    }

    /// Takes a place for one record. `Ok(false)` where the work goes on without one.
    pub(super) async fn reserve(&self) -> Result<bool, Full> {
        if self.on_full == OnFull::Refuse && self.shared.failing.load(Ordering::Acquire) {
            return Err(Full(self.name));
        }
        if self.take_slot() {
            return Ok(true);
        }
        match self.on_full {
            OnFull::Refuse => Err(Full(self.name)),
            OnFull::DropAndCount => {
                self.shared.dropped.fetch_add(1, Ordering::Relaxed);
                Ok(false)
            }
            OnFull::Block => match self.shared.slots.acquire().await {
                Ok(slot) => {
                    slot.forget();
                    Ok(true)
                }
                Err(_) => Err(Full(self.name)),
            },
        }
    }

    fn take_slot(&self) -> bool {
        let Shared { slots, in_stock, .. } = &*self.shared;
        // What is in stock would still be given when nobody writes records any more.
        if slots.is_closed() {
            return false;
        }
        let stock = &in_stock[here()];
        if stock.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |left| left.checked_sub(1)).is_ok() {
            return true;
        }
        let plenty = self.places >= AT_ONCE_PLACES_MIN && self.is_half_free();
        if plenty && let Ok(taken) = slots.try_acquire_many(AT_ONCE) {
            taken.forget();
            stock.fetch_add(AT_ONCE as usize - 1, Ordering::Relaxed);
            return true;
        }
        slots.try_acquire().map(SemaphorePermit::forget).is_ok()
    }

    /// Takes a place for one record where more than half of the queue is free.
    pub(super) fn try_reserve(&self) -> bool {
        self.is_half_free() && self.take_slot()
    }

    fn is_half_free(&self) -> bool {
        self.shared.slots.available_permits() * 2 > self.places
    }

    /// Gives back a place that was taken.
    pub(super) fn release(&self) {
        self.shared.slots.add_permits(1);
    }

    /// Sends the record that this writes, for which a place was taken.
    pub(super) fn send(&self, write: impl FnOnce(&mut Vec<u8>)) {
        if !self.shared.queue.push(write) {
            tracing::error!(target: "keyfold::audit", sink = self.name, "a record came after the sink was closed");
        }
    }

    /// Waits until all that was sent is durable. False where the sink cannot write; always true where it may drop.
    pub(super) async fn durable(&self) -> bool {
        self.shared.queue.ask().await.unwrap_or(false) || self.on_full == OnFull::DropAndCount
    }

    /// Writes what is there, seals it and ends the thread. Blocks.
    pub(super) fn close(&self) {
        self.shared.queue.ask_to_close();
        let thread = self.thread.lock().unwrap_or_else(PoisonError::into_inner).take();
        if let Some(thread) = thread {
            let _ = thread.join();
        }
    }
}

/// A sink has no room, or cannot write.
#[derive(Debug)]
pub(super) struct Full(pub(super) &'static str);

/// Where a sink begins.
pub(super) struct Start {
    pub(super) output: Box<dyn Output>,
    pub(super) link: Link,
    pub(super) is_new: bool,
    pub(super) torn_bytes: u64,
}

/// The thread's side.
struct Writer {
    name: &'static str,
    shared: Arc<Shared>,
    settings: Settings,
    clock: Clock,
    keys: Keys,
    link: Link,
    output: Box<dyn Output>,
    /// Records that are to be chained.
    taken: Taken,
    /// Who waits until these are durable.
    waiting: Vec<oneshot::Sender<bool>>,
    /// Lines that are chained; the first `done_bytes` of them are written.
    lines: Vec<u8>,
    done_bytes: usize,
    /// How many places these lines hold.
    records: usize,
    unsealed: u64,
    sealed_at: Duration,
    synced_at: Duration,
    unsynced: bool,
    /// The last seal, where it is not noted yet.
    unnoted: Option<Link>,
}

impl Writer {
    fn run(mut self, is_new: bool, torn_bytes: u64) {
        if is_new {
            self.event("open", None);
        }
        if torn_bytes > 0 {
            self.event("recovered", Some((member!("torn_bytes"), torn_bytes)));
        }
        let mut closed = false;
        while !closed {
            let closing = self.gather();
            self.count_dropped();
            let outcome = self.write().and_then(|()| self.keep(closing));
            self.tell(&outcome);
            for answer in self.waiting.drain(..) {
                let _ = answer.send(outcome.is_ok());
            }
            closed = closing;
            if outcome.is_err() && closing {
                let lost = self.records + self.taken.left();
                tracing::error!(target: "keyfold::audit", sink = self.name, lost, "records could not be written before the end");
            }
        }
    }

    /// Waits for something to do, and takes all that has come. True at the end.
    fn gather(&mut self) -> bool {
        let patience = if self.shared.failing.load(Ordering::Acquire) {
            Patience::Retry(RETRY)
        } else {
            Patience::Records { first: SYNC_EVERY, more: GATHER }
        };
        self.shared.queue.gather(patience, &mut self.taken, &mut self.waiting)
    }

    fn event(&mut self, event: &str, number: Option<(Member, u64)>) {
        write_event(&mut self.link, &self.keys, &mut self.lines, event, self.clock.now(), number);
    }

    fn count_dropped(&mut self) {
        let dropped = self.shared.dropped.swap(0, Ordering::Relaxed);
        if dropped > 0 {
            self.event("dropped", Some((member!("records"), dropped)));
            self.unsealed += 1;
        }
    }

    /// Chains and writes what was taken, as far as that goes.
    fn write(&mut self) -> io::Result<()> {
        loop {
            self.write_lines()?;
            while self.lines.len() < WRITE_BYTES
                && let Some(body) = self.taken.take_one()
            {
                self.link.add(&self.keys, &mut self.lines, body);
                self.records += 1;
                self.unsealed += 1;
            }
            if self.records == 0 {
                return Ok(());
            }
        }
    }

    /// Writes the lines, as far as that goes. What was written is never written again.
    fn write_lines(&mut self) -> io::Result<()> {
        while self.done_bytes < self.lines.len() {
            match self.output.write(&self.lines[self.done_bytes..]) {
                Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
                Ok(written) => self.done_bytes += written,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
            self.unsynced = true;
        }
        self.lines.clear();
        self.done_bytes = 0;
        self.shared.slots.add_permits(std::mem::take(&mut self.records));
        Ok(())
    }

    /// Seals, syncs and rotates as it is due.
    fn keep(&mut self, closing: bool) -> io::Result<()> {
        let now = self.clock.monotonic();
        let durable = !self.waiting.is_empty();
        let seal_due = self.unsealed >= self.settings.seal_records
            || now.saturating_sub(self.sealed_at) >= self.settings.seal_every
            || closing
            || self.output.is_full();
        if self.unsealed > 0 && seal_due {
            self.seal()?;
        } else if self.unsynced && (durable || now.saturating_sub(self.synced_at) >= SYNC_EVERY) {
            self.sync()?;
        }
        self.note()?;
        // Not at the end, which is to be a seal.
        if self.output.is_full() && !closing {
            self.output.rotate()?;
            self.event("open", None);
            self.write_lines()?;
            self.output.settle()?;
        }
        Ok(())
    }

    fn seal(&mut self) -> io::Result<()> {
        let records = self.unsealed;
        self.unsealed = 0;
        self.sealed_at = self.clock.monotonic();
        self.event("seal", Some((member!("records"), records)));
        self.write_lines()?;
        self.sync()?;
        // The log goes elsewhere: what it keeps shows a trail that was cut or replaced.
        let anchor = self.output.anchor(&self.link);
        tracing::info!(target: "keyfold::audit", sink = self.name, anchor, records, "sealed");
        self.unnoted = Some(self.link);
        self.note()
    }

    /// Notes the last seal, where it is not noted yet.
    fn note(&mut self) -> io::Result<()> {
        if let Some(link) = &self.unnoted {
            self.output.note(link)?;
            self.unnoted = None;
        }
        Ok(())
    }

    fn sync(&mut self) -> io::Result<()> {
        self.output.sync()?;
        self.unsynced = false;
        self.synced_at = self.clock.monotonic();
        Ok(())
    }

    fn tell(&self, outcome: &io::Result<()>) {
        let failed_before = self.shared.failing.swap(outcome.is_err(), Ordering::AcqRel);
        match outcome {
            Err(error) if !failed_before => {
                tracing::error!(target: "keyfold::audit", sink = self.name, %error, "records cannot be written");
            }
            Ok(()) if failed_before => {
                tracing::info!(target: "keyfold::audit", sink = self.name, "records are written again");
            }
            _ => {}
        }
    }
}

impl Drop for Writer {
    /// However the thread ends, nobody is left to wait for it, and no place is given any more.
    fn drop(&mut self) {
        self.shared.slots.close();
        let lost = self.shared.queue.close();
        if lost > 0 {
            tracing::error!(target: "keyfold::audit", sink = self.name, lost, "records could not be written before the end");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::audit::{Attempt, Audit, Trail, Verifier, Who};
    use crate::clock::Timestamp;
    use crate::tenant::Verb;

    /// An output with room for so many bytes, which then is full until it gets more.
    #[derive(Clone, Default)]
    struct Bounded(Arc<Mutex<(Vec<u8>, usize)>>);

    impl Bounded {
        fn give(&self, room: usize) {
            self.0.lock().unwrap().1 = room;
        }

        fn text(&self) -> String {
            String::from_utf8(self.0.lock().unwrap().0.clone()).unwrap()
        }
    }

    impl Output for Bounded {
        fn write(&mut self, lines: &[u8]) -> io::Result<usize> {
            let (written, room) = &mut *self.0.lock().unwrap();
            let taken = lines.len().min(*room);
            if taken == 0 {
                return Err(io::ErrorKind::StorageFull.into());
            }
            written.extend_from_slice(&lines[..taken]);
            *room -= taken;
            Ok(taken)
        }

        fn sync(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    fn keys() -> Keys {
        Keys::new(&[3; 32], vec![]).unwrap()
    }

    fn audit(output: &Bounded, on_full: OnFull, queue_records_max: usize) -> Audit {
        let clock = Clock::manual(Timestamp::from_unix_ms(0));
        let settings =
            Settings { queue_records_max, seal_records: 1_000, seal_every: Duration::from_mins(1) };
        let output = Box::new(output.clone());
        let start = Start { output, link: Link::START, is_new: true, torn_bytes: 0 };
        let sink = Sink::start("test", on_full, &settings, clock.clone(), keys(), start).unwrap();
        let trail = Arc::new(Trail { keys: keys(), sinks: vec![sink] });
        Audit { clock, trail: Some(trail), strangers: Arc::default() }
    }

    async fn begin<'a>(audit: &'a Audit, who: &'a crate::tenant::PrincipalId) -> Option<Attempt<'a>> {
        audit.begin(Verb::Encrypt, Who::local(who, None)).await.ok()
    }

    /// Every record of an output, after it was verified.
    fn outcomes(output: &Bounded) -> Vec<(String, String)> {
        let (text, keys) = (output.text(), keys());
        let mut verifier = Verifier::new(&keys, vec![]);
        let read = text.split_inclusive('\n').map(|line| {
            verifier.line(line.as_bytes()).unwrap();
            let record: serde_json::Value = serde_json::from_str(line).unwrap();
            let word = |name: &str| record[name].as_str().unwrap_or_default().to_owned();
            let number = record["records"].to_string();
            (word("event"), if word("outcome").is_empty() { number } else { word("outcome") })
        });
        read.collect()
    }

    #[tokio::test]
    async fn what_could_not_be_written_is_written_once_when_there_is_room_again() {
        let (output, who) = (Bounded::default(), "api-key:x".parse().unwrap());
        output.give(500);
        let audit = audit(&output, OnFull::Refuse, 100);
        for _ in 0..5 {
            begin(&audit, &who).await.unwrap().done();
        }
        assert!(!audit.flush().await, "five records need more than 500 bytes");
        assert!(begin(&audit, &who).await.is_none(), "nothing begins while the disk is full");
        output.give(usize::MAX);
        assert!(audit.flush().await);
        begin(&audit, &who).await.unwrap().failed("forbidden", &"no");
        drop(begin(&audit, &who).await.unwrap());
        audit.close();
        let told: Vec<String> =
            outcomes(&output).into_iter().filter(|(event, _)| event == "call").map(|(_, o)| o).collect();
        assert_eq!(told, ["done", "done", "done", "done", "done", "failed", "abandoned"]);
    }

    #[tokio::test]
    async fn what_came_while_nothing_could_be_written_is_written_before_anybody_is_told_so() {
        for closed in [false, true] {
            let (output, who) = (Bounded::default(), "api-key:x".parse().unwrap());
            output.give(500);
            let audit = audit(&output, OnFull::Block, 100);
            // The first ones fail as lines, the next one before it is one.
            for sent in [5, 1] {
                for _ in 0..sent {
                    begin(&audit, &who).await.unwrap().done();
                }
                assert!(!audit.flush().await, "there is no room");
            }
            begin(&audit, &who).await.unwrap().failed("forbidden", &"the last one");
            output.give(usize::MAX);
            if closed {
                audit.close();
            } else {
                assert!(audit.flush().await);
            }
            let calls = outcomes(&output).into_iter().filter(|(event, _)| event == "call");
            assert_eq!(
                calls.map(|(_, outcome)| outcome).collect::<Vec<_>>(),
                [vec!["done"; 6], vec!["failed"]].concat()
            );
            audit.close();
        }
    }

    #[test]
    fn a_large_queue_gives_all_of_its_places_and_no_more() {
        let audit = || audit(&Bounded::default(), OnFull::Refuse, AT_ONCE_PLACES_MIN);
        let alone = audit();
        assert_eq!((0..usize::MAX).take_while(|_| alone.sinks()[0].take_slot()).count(), AT_ONCE_PLACES_MIN);
        alone.close();

        let ended = audit();
        assert!(ended.sinks()[0].take_slot());
        ended.close();
        assert!(
            !ended.sinks()[0].take_slot(),
            "places that were taken with it are left, and nobody writes records"
        );

        let shared = audit();
        let sink = &shared.sinks()[0];
        let given = |limit: usize| (0..limit).take_while(|_| sink.take_slot()).count();
        // Some of these threads then keep places for themselves.
        let elsewhere: usize = std::thread::scope(|scope| {
            let threads: Vec<_> = (0..20).map(|_| scope.spawn(|| given(3))).collect();
            threads.into_iter().map(|thread| thread.join().unwrap()).sum()
        });
        // Each of them has taken as much once, at most.
        let kept = 20 * (AT_ONCE as usize - 1);
        let all = elsewhere + given(usize::MAX);
        assert!(all <= AT_ONCE_PLACES_MIN && all >= AT_ONCE_PLACES_MIN - kept, "{all}");
        assert!(!sink.take_slot());
        shared.close();
    }

    #[tokio::test]
    async fn a_full_queue_refuses_waits_or_counts_exactly_at_its_limit() {
        let who = "api-key:x".parse().unwrap();
        let output = Bounded::default();
        output.give(usize::MAX);
        let refusing = audit(&output, OnFull::Refuse, 2);
        let (one, two) = (begin(&refusing, &who).await.unwrap(), begin(&refusing, &who).await.unwrap());
        assert!(begin(&refusing, &who).await.is_none());
        one.done();
        assert!(refusing.flush().await);
        let three = begin(&refusing, &who).await.unwrap();
        drop((two, three));

        let output = Bounded::default();
        output.give(usize::MAX);
        let counting = audit(&output, OnFull::DropAndCount, 1);
        let kept = begin(&counting, &who).await.unwrap();
        for _ in 0..3 {
            begin(&counting, &who).await.unwrap().done();
        }
        kept.done();
        counting.close();
        let dropped: u64 = outcomes(&output)
            .iter()
            .filter(|(event, _)| event == "dropped")
            .map(|(_, records)| records.parse::<u64>().unwrap())
            .sum();
        assert_eq!(dropped, 3);

        let output = Bounded::default();
        output.give(usize::MAX);
        let waiting = audit(&output, OnFull::Block, 1);
        let first = begin(&waiting, &who).await.unwrap();
        let mut second = Box::pin(begin(&waiting, &who));
        assert!(futures_poll(second.as_mut()).is_none(), "it waits");
        first.done();
        second.await.unwrap().done();
        waiting.close();
        assert_eq!(outcomes(&output).iter().filter(|(event, _)| event == "call").count(), 2);
    }

    fn futures_poll<T>(future: std::pin::Pin<&mut impl Future<Output = T>>) -> Option<T> {
        let mut context = std::task::Context::from_waker(std::task::Waker::noop());
        match future.poll(&mut context) {
            std::task::Poll::Ready(value) => Some(value),
            std::task::Poll::Pending => None,
        }
    }
}
