//! How many requests are in flight at once, and how many bodies are streamed: past the limit they are told so at once,
//! instead of waiting in memory.
//!
//! And whose they are: once the service fills up, a tenant that already holds more than its share of the places gets no
//! further ones, so that a flood of one tenant leaves room for all others (stochastic fairness, as in SFQ and BLUE: the
//! tenants' counts are kept in two rows of slots and the lower of the two is believed, so that nobody waits on a lock
//! and no number of tenants takes more memory). Administration's places are shared by principals in the same way.

use std::hash::{BuildHasher, Hash, RandomState};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};

use crate::http::problem::{Code, Problem};
use crate::spread::{Apart, Near, Spread};

/// Counts the requests in flight.
pub(in crate::http) struct Admission(Spread<Counters>);

struct Counters {
    in_flight: Arc<Apart<AtomicUsize>>,
    in_flight_max: usize,
    /// With more than these in flight, shares are enforced.
    fair_from: usize,
    shares: Shares,
    /// What is told where there is no place.
    full: &'static str,
}

impl Admission {
    /// `fair_from_percent` of the places are given to whoever comes first; with 100, all of them.
    pub(in crate::http) fn new(in_flight_max: usize, fair_from_percent: usize, full: &'static str) -> Self {
        let fair_from = in_flight_max.saturating_mul(fair_from_percent) / 100;
        let (in_flight, shares) = (Arc::default(), Shares::new());
        Self(Spread::new(Counters { in_flight, in_flight_max, fair_from, shares, full }))
    }

    /// How many are in flight.
    pub(in crate::http) fn gauge(&self) -> Arc<Apart<AtomicUsize>> {
        Arc::clone(&self.0.in_flight)
    }

    /// A place for one request, where there is one.
    pub(in crate::http) fn enter(&self) -> Result<Place, Problem> {
        let counters = self.0.near();
        let before = counters.in_flight.fetch_add(1, Ordering::AcqRel);
        let (room, full) = (before < counters.in_flight_max, counters.full);
        let place = Place { counters, holder: AtomicU64::new(NOBODY) };
        if room { Ok(place) } else { Err(Problem::new(Code::Overloaded, full)) }
    }
}

/// Is free again when the request ends, however it ends.
pub(in crate::http) struct Place {
    counters: Near<Counters>,
    /// Whose it is: the holder's hash, which says in which slots he is counted; or nobody's yet.
    holder: AtomicU64,
}

impl Place {
    /// The place is this tenant's or principal's, unless the service is filling up and he holds his share already.
    pub(in crate::http) fn belongs_to(&self, holder: &impl Hash) -> Result<(), Problem> {
        let Counters { in_flight, fair_from, in_flight_max, shares, .. } = &**self.counters;
        let hash = shares.hash(holder);
        if self.holder.compare_exchange(NOBODY, hash, Ordering::Relaxed, Ordering::Relaxed).is_err() {
            return Ok(());
        }
        let held = shares.take(slots(hash));
        if in_flight.load(Ordering::Acquire) <= *fair_from {
            return Ok(());
        }
        // One share is kept free for somebody who is yet to come.
        let share = in_flight_max / (shares.holders.load(Ordering::Acquire) + 1);
        if held <= share.max(1) {
            return Ok(());
        }
        Err(Problem::new(
            Code::Overloaded,
            "the service is nearly full, and this caller or tenant has its share of it in flight: send fewer at once",
        ))
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let holder = *self.holder.get_mut();
        if holder != NOBODY {
            self.counters.shares.give_back(slots(holder));
        }
        self.counters.in_flight.fetch_sub(1, Ordering::AcqRel);
    }
}

/// A holder's slot in either row.
type Slots = [usize; 2];

/// No holder's hash.
const NOBODY: u64 = u64::MAX;

fn slots(hash: u64) -> Slots {
    // The remainder fits.
    [hash, hash >> 32].map(|part| usize::try_from(part % SLOTS as u64).unwrap_or(0))
}

const SLOTS: usize = 4_096;

/// How many places each tenant or principal holds. Two of them are taken for one only where they meet in both rows: once
/// in 16 million pairs, and in other pairs with every start.
struct Shares {
    rows: [Box<[AtomicUsize]>; 2],
    hasher: RandomState,
    /// How many hold any: the slots of the first row that are not empty.
    holders: Apart<AtomicUsize>,
}

impl Shares {
    fn new() -> Self {
        let row = || (0..SLOTS).map(|_| AtomicUsize::new(0)).collect();
        Self { rows: [row(), row()], hasher: RandomState::new(), holders: Apart::default() }
    }

    fn hash(&self, holder: &impl Hash) -> u64 {
        self.hasher.hash_one(holder).min(NOBODY - 1)
    }

    /// How many the holder has with this one.
    fn take(&self, slots: Slots) -> usize {
        let first = self.rows[0][slots[0]].fetch_add(1, Ordering::AcqRel);
        if first == 0 {
            self.holders.fetch_add(1, Ordering::AcqRel);
        }
        first.min(self.rows[1][slots[1]].fetch_add(1, Ordering::AcqRel)) + 1
    }

    fn give_back(&self, slots: Slots) {
        if self.rows[0][slots[0]].fetch_sub(1, Ordering::AcqRel) == 1 {
            self.holders.fetch_sub(1, Ordering::AcqRel);
        }
        self.rows[1][slots[1]].fetch_sub(1, Ordering::AcqRel);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tenant::TenantId;

    fn admission(in_flight_max: usize, fair_from_percent: usize) -> Arc<Admission> {
        Arc::new(Admission::new(in_flight_max, fair_from_percent, Code::Overloaded.example()))
    }

    /// As many places as one tenant gets.
    fn flood(admission: &Arc<Admission>, tenant: &str) -> Vec<Place> {
        let tenant: TenantId = tenant.parse().unwrap();
        std::iter::repeat_with(|| {
            admission.enter().and_then(|place| place.belongs_to(&tenant).map(|()| place))
        })
        .map_while(Result::ok)
        .collect()
    }

    #[test]
    fn a_tenant_alone_gets_three_quarters_and_the_others_their_shares() {
        let admission = admission(100, 75);
        let first = flood(&admission, "first");
        assert_eq!(first.len(), 75);
        let second = flood(&admission, "second");
        assert_eq!(second.len(), 25, "up to 33, and 25 are left");
        assert!(flood(&admission, "third").is_empty());
        drop(first);
        // 25 are in flight: of the 75, 50 come before shares are enforced, and a share of a third is less.
        let third = flood(&admission, "third");
        assert_eq!(third.len(), 50);
        assert_eq!(flood(&admission, "fourth").len(), 25, "a share of 25");
        drop((second, third));
        assert_eq!(admission.gauge().load(Ordering::Acquire), 0);
        assert_eq!(admission.0.shares.holders.load(Ordering::Acquire), 0);
        assert!(admission.0.shares.rows.iter().flatten().all(|slot| slot.load(Ordering::Acquire) == 0));
    }

    #[test]
    fn a_place_is_the_first_ones_who_asks_and_is_given_back_once() {
        let admission = admission(4, 75);
        let (first, second): (TenantId, TenantId) = ("first".parse().unwrap(), "second".parse().unwrap());
        let place = admission.enter().ok().unwrap();
        for holder in [&first, &first, &second] {
            assert!(place.belongs_to(holder).is_ok());
        }
        assert_eq!(admission.0.shares.holders.load(Ordering::Acquire), 1);
        drop(place);
        drop(admission.enter());
        assert_eq!(admission.gauge().load(Ordering::Acquire), 0);
        assert!(admission.0.shares.rows.iter().flatten().all(|slot| slot.load(Ordering::Acquire) == 0));
    }

    #[test]
    fn where_shares_are_off_the_first_gets_all_and_a_service_of_one_place_has_one() {
        assert_eq!(flood(&admission(10, 100), "first").len(), 10);
        assert_eq!(flood(&admission(1, 75), "first").len(), 1);
    }

    #[test]
    fn every_one_of_many_tenants_gets_a_place_beside_a_flood() {
        let admission = admission(1_024, 75);
        let flood_of_one = flood(&admission, "flood");
        assert_eq!(flood_of_one.len(), 768);
        let others: Vec<Place> = (0..256)
            .map(|number| {
                let place = admission.enter().ok().unwrap();
                let tenant: TenantId = format!("tenant-{number}").parse().unwrap();
                place.belongs_to(&tenant).ok().unwrap();
                place
            })
            .collect();
        assert!(admission.enter().is_err());
        drop(others);
    }
}
