//! A circuit breaker: who does not answer is left alone for a while. Pure: the time is an argument.

use std::time::Duration;

/// When a breaker opens, and for how long.
#[derive(Clone, Copy, Debug)]
pub(super) struct Limits {
    /// Outages in a row, without an answer between them, that open it.
    pub(super) failures: u32,
    /// How long it stays open at first. Each probe that fails doubles it.
    pub(super) open: Duration,
    /// The longest that it stays open.
    pub(super) open_max: Duration,
    /// After how long a probe of which nothing was heard is given up.
    pub(super) probe: Duration,
}

/// The state of one circuit.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Circuit {
    /// Calls pass.
    Closed,
    /// No call passes.
    Open,
    /// One call has passed, to see whether the KMS is back.
    HalfOpen,
}

/// One circuit.
#[derive(Debug)]
pub(super) struct Breaker {
    limits: Limits,
    state: State,
}

#[derive(Clone, Copy, Debug)]
enum State {
    Closed { failures: u32 },
    Open { since: Duration, until: Duration, waits: Duration },
    HalfOpen { since: Duration, until: Duration, waits: Duration },
}

/// What came of a report.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Change {
    None,
    Opened,
    Closed,
}

impl Breaker {
    pub(super) fn new(limits: Limits) -> Self {
        Self { limits, state: State::Closed { failures: 0 } }
    }

    /// Whether a call may pass; if not, when the next one may.
    pub(super) fn admit(&mut self, now: Duration) -> Result<(), Duration> {
        match self.state {
            State::Closed { .. } => Ok(()),
            State::Open { since, until, waits } | State::HalfOpen { since, until, waits } if now >= until => {
                self.state = State::HalfOpen { since, until: now + self.limits.probe, waits };
                Ok(())
            }
            State::Open { until, .. } | State::HalfOpen { until, .. } => Err(until),
        }
    }

    /// Until when no call passes, where none does now.
    pub(super) fn blocked_until(&self, now: Duration) -> Option<Duration> {
        match self.state {
            State::Closed { .. } => None,
            State::Open { until, .. } | State::HalfOpen { until, .. } => (now < until).then_some(until),
        }
    }

    /// Lets the probe of an open circuit come before its time.
    pub(super) fn probe_early(&mut self, now: Duration) {
        if let State::Open { since, waits, .. } = self.state {
            self.state = State::Open { since, until: now, waits };
        }
    }

    /// The KMS has answered, whatever it said.
    pub(super) fn answered(&mut self) -> Change {
        let was_closed = matches!(self.state, State::Closed { .. });
        self.state = State::Closed { failures: 0 };
        if was_closed { Change::None } else { Change::Closed }
    }

    /// The KMS could not be asked.
    pub(super) fn failed(&mut self, now: Duration) -> Change {
        match self.state {
            State::Closed { failures } if failures + 1 < self.limits.failures => {
                self.state = State::Closed { failures: failures + 1 };
                Change::None
            }
            State::Closed { .. } => {
                let waits = self.limits.open;
                self.state = State::Open { since: now, until: now + waits, waits };
                Change::Opened
            }
            // A call that had passed before the circuit opened.
            State::Open { .. } => Change::None,
            State::HalfOpen { since, waits, .. } => {
                let waits = (waits * 2).min(self.limits.open_max);
                self.state = State::Open { since, until: now + waits, waits };
                Change::None
            }
        }
    }

    /// Whether calls do not pass, or would not have until less than `lately` ago. After that nobody knows: nobody has
    /// called.
    pub(super) fn was_out_lately(&self, now: Duration, lately: Duration) -> bool {
        match self.state {
            State::Closed { .. } => false,
            State::Open { until, .. } | State::HalfOpen { until, .. } => now < until + lately,
        }
    }

    /// The state, and since when the circuit has not been closed.
    pub(super) fn state(&self) -> (Circuit, Option<Duration>) {
        match self.state {
            State::Closed { .. } => (Circuit::Closed, None),
            State::Open { since, .. } => (Circuit::Open, Some(since)),
            State::HalfOpen { since, .. } => (Circuit::HalfOpen, Some(since)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LIMITS: Limits = Limits {
        failures: 3,
        open: Duration::from_secs(5),
        open_max: Duration::from_secs(12),
        probe: Duration::from_secs(2),
    };

    fn at(secs: u64) -> Duration {
        Duration::from_secs(secs)
    }

    fn opened_at(secs: u64) -> Breaker {
        let mut breaker = Breaker::new(LIMITS);
        for _ in 0..LIMITS.failures {
            breaker.failed(at(secs));
        }
        breaker
    }

    #[test]
    fn it_opens_at_the_third_outage_in_a_row_and_an_answer_starts_the_count_anew() {
        let mut breaker = Breaker::new(LIMITS);
        assert_eq!([breaker.failed(at(1)), breaker.failed(at(1))], [Change::None, Change::None]);
        assert_eq!(breaker.answered(), Change::None);
        assert_eq!([breaker.failed(at(2)), breaker.failed(at(2))], [Change::None, Change::None]);
        assert_eq!(breaker.admit(at(2)), Ok(()));
        assert_eq!(breaker.failed(at(3)), Change::Opened);
        assert_eq!(breaker.admit(at(3)), Err(at(8)));
        assert_eq!(breaker.state(), (Circuit::Open, Some(at(3))));
    }

    #[test]
    fn one_probe_passes_and_its_answer_closes_the_circuit() {
        let mut breaker = opened_at(0);
        assert!(breaker.admit(Duration::from_millis(4_999)).is_err());
        assert_eq!(breaker.admit(at(5)), Ok(()));
        assert_eq!(breaker.state(), (Circuit::HalfOpen, Some(at(0))));
        assert_eq!(breaker.admit(at(6)), Err(at(7)));
        assert_eq!(breaker.answered(), Change::Closed);
        assert_eq!(breaker.admit(at(6)), Ok(()));
    }

    #[test]
    fn a_probe_that_fails_doubles_the_wait_up_to_its_limit() {
        let mut breaker = opened_at(0);
        breaker.admit(at(5)).unwrap();
        breaker.failed(at(6));
        assert_eq!(breaker.admit(at(7)), Err(at(16)));
        breaker.admit(at(16)).unwrap();
        breaker.failed(at(16));
        assert_eq!(breaker.admit(at(20)), Err(at(28)));
        assert_eq!(breaker.state().1, Some(at(0)), "it has been out all the time");
    }

    #[test]
    fn a_probe_can_come_early_but_not_beside_another() {
        let mut breaker = opened_at(0);
        assert_eq!(breaker.blocked_until(at(1)), Some(at(5)));
        breaker.probe_early(at(1));
        assert_eq!(breaker.admit(at(1)), Ok(()));
        breaker.probe_early(at(1));
        assert_eq!(breaker.blocked_until(at(1)), Some(at(3)));
    }

    #[test]
    fn whether_it_is_still_out_is_known_for_a_while_after_the_next_call_may_pass() {
        let (mut breaker, lately) = (opened_at(0), Duration::from_mins(1));
        assert!(breaker.was_out_lately(at(64), lately));
        assert!(!breaker.was_out_lately(at(65), lately), "nobody has called for a minute");
        breaker.admit(at(65)).unwrap();
        breaker.failed(at(65));
        assert!(breaker.was_out_lately(at(65), lately));
        breaker.answered();
        assert!(!breaker.was_out_lately(at(65), lately));
    }

    #[test]
    fn a_probe_of_which_nothing_is_heard_makes_way_for_another() {
        let mut breaker = opened_at(0);
        breaker.admit(at(5)).unwrap();
        assert_eq!(breaker.admit(at(6)), Err(at(7)));
        assert_eq!(breaker.admit(at(7)), Ok(()));
    }
}
