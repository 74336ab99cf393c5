//! Values that all requests share, counted where they are used.
//!
//! A shared value is kept alive by a count of who holds it. Where every request of every processor counts itself in and
//! out of one such count, the processors wait for each other: some 50 ns each time, at a dozen values for a request.
//! [`Spread`] has several counts instead, so that threads that run at the same time seldom share one.

use std::ops::Deref;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, LazyLock, OnceLock};

/// A shared value by a count of one's own. Whoever has it clones it for what he hands on.
pub type Near<T> = Arc<Arc<T>>;

/// One for each place, made by the thread that wants it: what threads allocate lies mostly apart.
pub struct Places<T>(Box<[OnceLock<T>]>);

impl<T> Default for Places<T> {
    fn default() -> Self {
        Self((0..places()).map(|_| OnceLock::new()).collect())
    }
}

impl<T> Places<T> {
    /// That of the thread that asks.
    pub fn near(&self, make: impl FnOnce() -> T) -> &T {
        self.0[here()].get_or_init(make)
    }
}

/// A value whose holders are counted in several places: it lives until the last of them and this are gone.
pub struct Spread<T> {
    value: Arc<T>,
    near: Places<Near<T>>,
}

impl<T> Spread<T> {
    /// Spreads a value.
    pub fn new(value: impl Into<Arc<T>>) -> Self {
        Self { value: value.into(), near: Places::default() }
    }

    /// The value, by the count of the thread that asks.
    pub fn near(&self) -> Near<T> {
        Arc::clone(self.near.near(|| Arc::new(Arc::clone(&self.value))))
    }
}

impl<T> Deref for Spread<T> {
    type Target = T;

    fn deref(&self) -> &T {
        &self.value
    }
}

/// A value on cache lines of its own (two, which processors fetch together), because all requests write to it: what
/// they only read must not lie beside it, and be taken out of the other processors' caches each time.
#[derive(Debug, Default)]
#[repr(align(128))]
pub struct Apart<T>(T);

impl<T> From<T> for Apart<T> {
    fn from(value: T) -> Self {
        Self(value)
    }
}

impl<T> Deref for Apart<T> {
    type Target = T;

    fn deref(&self) -> &T {
        &self.0
    }
}

/// As many as threads can run at once: with fewer they are in one another's way. But at least 8, so that two who are busy
/// seldom meet in one, and at most 16: a data key has three times as many, and a principal that is remembered as many, of
/// 16 bytes where they are not in use.
static PLACES: LazyLock<usize> =
    LazyLock::new(|| std::thread::available_parallelism().map_or(8, usize::from).clamp(8, 16));

/// The place of the thread that asks. Where there are more threads than places, some share one, and lose time by it.
pub fn here() -> usize {
    static THREADS: AtomicUsize = AtomicUsize::new(0);
    thread_local! {
        static HERE: usize = THREADS.fetch_add(1, Ordering::Relaxed) % *PLACES;
    }
    HERE.with(|here| *here)
}

/// How many places there are: [`here`] is less.
pub fn places() -> usize {
    *PLACES
}

#[cfg(test)]
mod tests {
    use std::sync::Weak;

    use super::*;

    #[test]
    fn a_thread_counts_for_itself_and_the_value_lives_until_the_last_is_gone() {
        let spread = Spread::new(7);
        let (mine, mine_again) = (spread.near(), spread.near());
        assert!(Arc::ptr_eq(&mine, &mine_again));
        let values: Vec<Near<i32>> = std::thread::scope(|scope| {
            let threads: Vec<_> = (0..2 * places()).map(|_| scope.spawn(|| spread.near())).collect();
            threads.into_iter().map(|thread| thread.join().unwrap()).collect()
        });
        let different = values.iter().map(Arc::as_ptr).collect::<std::collections::HashSet<_>>();
        // The threads of other tests take places too: at least two of these have one of their own, where there are two.
        assert!(different.len() >= places().min(2) && different.len() <= places());
        let value: Weak<i32> = Arc::downgrade(&mine);
        drop((spread, mine, mine_again));
        assert_eq!(value.upgrade().as_deref(), Some(&7), "others hold it");
        drop(values);
        assert!(value.upgrade().is_none());
    }

    #[test]
    fn what_stands_apart_shares_no_pair_of_cache_lines() {
        let pair = [Apart::from(1_u64), Apart::from(2)];
        assert!(std::ptr::from_ref(&*pair[1]).addr() - std::ptr::from_ref(&*pair[0]).addr() >= 128);
    }
}
