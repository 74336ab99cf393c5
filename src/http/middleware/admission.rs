//! How many requests are in flight at once: past the limit they are told so at once, instead of waiting in memory.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use crate::http::problem::{Code, Problem};

/// Counts the requests in flight.
pub(in crate::http) struct Admission {
    in_flight: AtomicUsize,
    in_flight_max: usize,
}

impl Admission {
    pub(in crate::http) fn new(in_flight_max: usize) -> Self {
        Self { in_flight: AtomicUsize::new(0), in_flight_max }
    }

    /// A place for one request, where there is one.
    pub(in crate::http) fn enter(self: &Arc<Self>) -> Result<Place, Problem> {
        let before = self.in_flight.fetch_add(1, Ordering::AcqRel);
        let place = Place(Arc::clone(self));
        if before < self.in_flight_max {
            Ok(place)
        } else {
            Err(Problem::new(Code::Overloaded, Code::Overloaded.example()))
        }
    }
}

/// Is free again when the request ends, however it ends.
pub(in crate::http) struct Place(Arc<Admission>);

impl Drop for Place {
    fn drop(&mut self) {
        self.0.in_flight.fetch_sub(1, Ordering::AcqRel);
    }
}
