//! The guard before a KMS: its tries, waits, limits and turns, on a clock that the test moves.

use std::sync::{Arc, Mutex};
use std::time::Duration;

use async_trait::async_trait;
use envelope::{EncryptionContext, KeyMaterial};
use keyfold::clock::{Clock, Timestamp};
use keyfold::kms::guarded::{GuardedKms, Options};
use keyfold::kms::{Generated, KekDescription, Kms, KmsError, OutageCause, Urgency, Wrapped};
use keyfold::tenant::Kek;
use tokio::sync::Semaphore;
use tokio::task::JoinSet;

use crate::kms_aws::{FRANKFURT, IRELAND};

/// What the KMS does.
#[derive(Clone, Copy, Debug)]
enum Mood {
    Serves,
    Silent,
    Out(OutageCause),
    Denies,
    Damaged,
}

/// A KMS that makes data keys, or does not, and remembers who asked when.
struct Kept {
    clock: Clock,
    mood: Mutex<Mood>,
    asked: Mutex<Vec<(Duration, Urgency)>>,
    /// One permit lets one call end.
    ends: Semaphore,
}

#[async_trait]
impl Kms for Kept {
    async fn generate(
        &self,
        kek: &Kek,
        _context: &EncryptionContext,
        urgency: Urgency,
    ) -> Result<Generated, KmsError> {
        self.asked.lock().unwrap().push((self.clock.monotonic(), urgency));
        let mood = *self.mood.lock().unwrap();
        match mood {
            Mood::Serves => self.ends.acquire().await.unwrap().forget(),
            Mood::Silent => std::future::pending().await,
            Mood::Out(cause) => return Err(KmsError::outage_by(&kek.id, cause, "told to be out")),
            Mood::Denies => return Err(KmsError::denied(&kek.id, "told to deny")),
            Mood::Damaged => return Err(KmsError::damaged(&kek.id, "told to be damaged")),
        }
        let wrapped = Wrapped { kek: kek.id.clone(), blob: vec![0; 8], material: None };
        Ok(Generated { plaintext: KeyMaterial::from_slice(&[1; 32]).unwrap(), wrapped })
    }

    async fn wrap(
        &self,
        _kek: &Kek,
        _context: &EncryptionContext,
        _plaintext: &KeyMaterial,
        _urgency: Urgency,
    ) -> Result<Wrapped, KmsError> {
        unreachable!("no test asks for it")
    }

    async fn unwrap(
        &self,
        _kek: &Kek,
        _context: &EncryptionContext,
        _blob: &[u8],
        _urgency: Urgency,
    ) -> Result<KeyMaterial, KmsError> {
        unreachable!("no test asks for it")
    }

    async fn rewrap(
        &self,
        _from: &Kek,
        _to: &Kek,
        _context: &EncryptionContext,
        _blob: &[u8],
        _urgency: Urgency,
    ) -> Result<Wrapped, KmsError> {
        unreachable!("no test asks for it")
    }

    async fn describe(&self, _kek: &Kek, _urgency: Urgency) -> Result<KekDescription, KmsError> {
        unreachable!("no test asks for it")
    }
}

struct Guarded {
    clock: Clock,
    kms: Arc<Kept>,
    guard: GuardedKms,
}

impl Guarded {
    /// A guard whose random numbers are all this one.
    fn new(options: Options, random: u64) -> Self {
        let clock = Clock::manual(Timestamp::from_unix_ms(0));
        let (mood, ends) = (Mutex::new(Mood::Serves), Semaphore::new(0));
        let kms = Arc::new(Kept { clock: clock.clone(), mood, asked: Mutex::default(), ends });
        let guard =
            GuardedKms::with_random(Arc::clone(&kms) as _, clock.clone(), options, Arc::new(move || random));
        Self { clock, kms, guard }
    }

    fn is(&self, mood: Mood) {
        *self.kms.mood.lock().unwrap() = mood;
    }

    /// When the KMS was asked, in milliseconds.
    fn asked_ms(&self) -> Vec<u128> {
        self.kms.asked.lock().unwrap().iter().map(|(at, _)| at.as_millis()).collect()
    }

    fn asked_by(&self) -> Vec<Urgency> {
        self.kms.asked.lock().unwrap().iter().map(|(_, urgency)| *urgency).collect()
    }

    async fn call(&self, region: &str, urgency: Urgency) -> Result<(), KmsError> {
        let kek = kek_in(region);
        self.guard.generate(&kek, &EncryptionContext::new(), urgency).await.map(drop)
    }

    /// What a call comes to while the time runs, and how long it took.
    async fn outcome(&self) -> (Result<(), KmsError>, Duration) {
        let began = self.clock.monotonic();
        let call = self.call(IRELAND, Urgency::Foreground);
        tokio::pin!(call);
        loop {
            tokio::select! {
                biased;
                outcome = &mut call => {
                    return (outcome, self.clock.monotonic().checked_sub(began).unwrap());
                }
                () = settle() => self.clock.advance(Duration::from_millis(10)),
            }
        }
    }

    /// Calls that wait, with nobody to wait for them but this set.
    async fn start(
        self: &Arc<Self>,
        calls: &mut JoinSet<Result<(), KmsError>>,
        count: usize,
        urgency: Urgency,
    ) {
        for _ in 0..count {
            let guarded = Arc::clone(self);
            calls.spawn(async move { guarded.call(IRELAND, urgency).await });
        }
        settle().await;
    }

    async fn pass(&self, ms: u64) {
        for _ in 0..ms / 10 {
            self.clock.advance(Duration::from_millis(10));
            settle().await;
        }
    }
}

fn kek_in(region: &str) -> Kek {
    let arn = format!("arn:aws:kms:{region}:111122223333:key/1234abcd-12ab-34cd-56ef-1234567890ab");
    Kek::direct(arn.parse().unwrap())
}

/// Lets every task of this test's single thread do what it can.
async fn settle() {
    for _ in 0..200 {
        tokio::task::yield_now().await;
    }
}

/// Gives the longest wait for each of the limits 50, 100 and 200.
const LONGEST: u64 = 51 * 101 * 67 - 1;

#[tokio::test]
async fn an_outage_is_tried_again_after_random_waits_that_double() {
    for (random, expected) in [(LONGEST, [0, 50, 150, 350]), (0, [0, 0, 0, 0])] {
        let guarded = Guarded::new(Options::default(), random);
        guarded.is(Mood::Out(OutageCause::KeyUnavailable));
        let (outcome, _) = guarded.outcome().await;
        assert!(matches!(outcome, Err(KmsError::Outage { .. })), "{outcome:?}");
        assert_eq!(guarded.asked_ms(), expected);
    }
}

#[tokio::test]
async fn no_wait_is_longer_than_its_limit_and_no_call_tries_more_often() {
    let options = Options { backoff_ms_max: 100, tries_max: 6, breaker_failures: 100, ..Options::default() };
    let guarded = Guarded::new(options, LONGEST);
    guarded.is(Mood::Out(OutageCause::Unreachable));
    assert!(guarded.outcome().await.0.is_err());
    assert_eq!(guarded.asked_ms(), [0, 50, 150, 250, 350, 450]);
}

#[tokio::test]
async fn an_answer_is_an_answer_and_not_asked_for_again() {
    for mood in [Mood::Denies, Mood::Damaged, Mood::Out(OutageCause::Credentials)] {
        let guarded = Guarded::new(Options::default(), 0);
        guarded.is(mood);
        assert!(guarded.outcome().await.0.is_err());
        assert_eq!(guarded.asked_ms(), [0], "{mood:?}");
    }
}

#[tokio::test]
async fn a_kms_that_keeps_silent_costs_the_calls_time_and_no_more() {
    let guarded = Guarded::new(Options::default(), 0);
    guarded.is(Mood::Silent);
    let (outcome, took) = guarded.outcome().await;
    assert!(matches!(&outcome, Err(KmsError::Outage { cause: OutageCause::Unreachable, .. })), "{outcome:?}");
    assert_eq!(guarded.asked_ms(), [0, 2_000, 4_000]);
    assert_eq!(took, Duration::from_secs(5));
}

#[tokio::test]
async fn no_more_calls_are_in_flight_than_allowed_and_half_of_them_in_the_background() {
    let guarded = Arc::new(Guarded::new(Options { in_flight_max: 6, ..Options::default() }, 0));
    let mut calls = JoinSet::new();
    guarded.start(&mut calls, 10, Urgency::Background).await;
    assert_eq!(guarded.asked_by().len(), 3, "half of the places are not the background's");
    guarded.start(&mut calls, 10, Urgency::Foreground).await;
    assert_eq!(guarded.asked_by().len(), 6);
    guarded.kms.ends.add_permits(1);
    settle().await;
    assert_eq!(guarded.asked_by().len(), 7, "the place of one that has ended goes to the next");
    // The last ones are in the background: they look every 20 ms whether the foreground has passed.
    guarded.kms.ends.add_permits(100);
    guarded.pass(100).await;
    assert!(calls.join_all().await.into_iter().all(|outcome| outcome.is_ok()));
    assert_eq!(guarded.asked_by().len(), 20);
}

/// The background holds no place while it waits: clients, who go first, may need that very one.
#[tokio::test]
async fn where_there_is_one_place_clients_go_first_too() {
    let options = Options { in_flight_max: 1, calls_per_sec_max: 1, ..Options::default() };
    let guarded = Arc::new(Guarded::new(options, 0));
    guarded.kms.ends.add_permits(10);
    guarded.call(IRELAND, Urgency::Foreground).await.unwrap();
    let mut calls = JoinSet::new();
    guarded.start(&mut calls, 1, Urgency::Background).await;
    guarded.start(&mut calls, 1, Urgency::Foreground).await;
    assert_eq!(guarded.asked_by().len(), 1, "the second's one call has been sent");
    guarded.pass(1_100).await;
    assert_eq!(guarded.asked_by()[1..], [Urgency::Foreground]);
    guarded.pass(1_100).await;
    assert_eq!(guarded.asked_by()[2..], [Urgency::Background]);
    assert!(calls.join_all().await.into_iter().all(|outcome| outcome.is_ok()));
}

#[tokio::test]
async fn no_more_calls_a_second_are_sent_than_allowed_and_clients_go_first() {
    let guarded = Arc::new(Guarded::new(Options { calls_per_sec_max: 10, ..Options::default() }, 0));
    guarded.kms.ends.add_permits(1_000);
    let mut calls = JoinSet::new();
    guarded.start(&mut calls, 10, Urgency::Foreground).await;
    assert_eq!(guarded.asked_by().len(), 10, "the first second's");
    guarded.start(&mut calls, 20, Urgency::Background).await;
    guarded.start(&mut calls, 15, Urgency::Foreground).await;
    assert_eq!(guarded.asked_by().len(), 10);
    guarded.pass(1_000).await;
    let sent = guarded.asked_by().len();
    assert!((18..=20).contains(&sent), "{sent} in two seconds");
    guarded.pass(2_500).await;
    let asked = guarded.asked_by();
    assert!((42..=45).contains(&asked.len()), "{} in four and a half seconds", asked.len());
    assert!(asked[..25].iter().all(|urgency| *urgency == Urgency::Foreground), "{asked:?}");
    assert!(asked[25..].iter().all(|urgency| *urgency == Urgency::Background), "{asked:?}");
}

#[tokio::test]
async fn each_region_has_limits_and_a_circuit_of_its_own() {
    let options = Options { in_flight_max: 1, tries_max: 1, breaker_failures: 2, ..Options::default() };
    let guarded = Arc::new(Guarded::new(options, 0));
    let mut calls = JoinSet::new();
    guarded.start(&mut calls, 2, Urgency::Foreground).await;
    assert_eq!(guarded.asked_ms().len(), 1);
    // The first region's only place is taken.
    let elsewhere = Arc::clone(&guarded);
    calls.spawn(async move { elsewhere.call(FRANKFURT, Urgency::Foreground).await });
    settle().await;
    assert_eq!(guarded.asked_ms().len(), 2);
    guarded.kms.ends.add_permits(10);
    calls.join_all().await;
    guarded.is(Mood::Out(OutageCause::Unreachable));
    for _ in 0..5 {
        assert!(guarded.call(IRELAND, Urgency::Foreground).await.is_err());
    }
    assert_eq!(guarded.asked_ms().len(), 3 + 2, "the circuit is open after the second");
    guarded.is(Mood::Serves);
    guarded.call(FRANKFURT, Urgency::Foreground).await.unwrap();
    assert!(guarded.call(IRELAND, Urgency::Foreground).await.is_err());
    guarded.pass(5_000).await;
    guarded.call(IRELAND, Urgency::Foreground).await.unwrap();
}
