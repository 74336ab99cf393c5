//! One data key, several master keys: a tenant's KEK ring.
//!
//! A data key is made by the first member that answers and wrapped under every other, so that any one of them can
//! open it. Replicas of one multi-Region key share a wrapped form. The nearest member is asked first; one that keeps
//! silent does not hold up the others: after a moment the next one is asked beside it. What it then has to say is
//! still heard, and remembered: a replica that answered faster is no way round its owner's no.

mod words;

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Duration;

use envelope::{EncryptionContext, KeyMaterial};
use tokio::sync::mpsc;
use tokio_util::task::TaskTracker;

use super::{Generated, Kms, KmsError, Urgency, Wrapped};
use crate::clock::Clock;
use crate::tenant::{Kek, KekId, KekRing};

use self::words::Words;

/// How rings are used.
#[derive(Clone, Debug)]
pub struct Options {
    /// AWS regions, the nearest first. KEKs in regions that do not stand here come after, in their ring's order.
    /// Default: none, that is the ring's own order.
    pub regions_nearest: Vec<String>,
    /// After how long without an answer of one member the next one is asked beside it, in milliseconds. Default 500.
    pub hedge_ms: u64,
    /// How long a new data key waits for its further wrapped forms, in milliseconds. Default 1,000. It then goes
    /// without those that have not come.
    pub wrap_ms_max: u64,
}

impl Default for Options {
    fn default() -> Self {
        Self { regions_nearest: Vec::new(), hedge_ms: 500, wrap_ms_max: 1_000 }
    }
}

/// Uses KEK rings.
pub struct KekRings {
    kms: Arc<dyn Kms>,
    clock: Clock,
    options: Options,
    tracker: TaskTracker,
    words: Arc<Words>,
}

/// A new data key under a whole ring.
pub struct RingGenerated {
    /// The key itself.
    pub plaintext: KeyMaterial,
    /// The member that made it.
    pub by: KekId,
    /// Its wrapped forms, in the ring's order; members that did not answer are missing.
    pub wrapped: Vec<Wrapped>,
    /// Why members are missing.
    pub missing: Vec<KmsError>,
}

/// A data key that a ring has opened.
pub struct RingUnwrapped {
    /// The key itself.
    pub plaintext: KeyMaterial,
    /// The member that opened it.
    pub by: KekId,
}

/// Why no member of a ring made or opened a data key.
pub struct RingFailure {
    /// Each member's answer, in the order in which they came. Empty where no wrapped form is of a KEK that is
    /// believed.
    pub failures: Vec<KmsError>,
    /// Whether a call ended without an answer of any kind: a fault of keyfold's own, which the log has.
    pub broken: bool,
}

impl RingFailure {
    /// The answer that decides. An outage of a member that might have answered comes first: it may pass. One of a KEK
    /// that has said no, or whose replica has, does not: what the owner has cut off must not look as if it would. Then
    /// a denial, and then damage.
    pub fn deciding(self) -> Option<KmsError> {
        let failures = &self.failures;
        let decides = failures.iter().min_by_key(|failure| match failure {
            // Of several the one that is over first: any member will do.
            KmsError::Outage { kek, again_in, .. } if !denied(failures, kek) => (0, *again_in),
            KmsError::Denied { .. } => (1, None),
            KmsError::Damaged { .. } => (2, None),
            KmsError::Outage { again_in, .. } => (3, *again_in),
        });
        decides.cloned()
    }
}

impl KekRings {
    /// Rings over this KMS. What a member has still to say when nobody waits for it any more runs out on `tracker`.
    pub fn new(kms: Arc<dyn Kms>, clock: Clock, options: Options, tracker: TaskTracker) -> Self {
        Self { kms, clock, options, tracker, words: Arc::default() }
    }

    /// Tells `listener` of every denial, also of one that comes when nobody waits for it any more. For one listener.
    pub fn on_denial(&self, listener: impl Fn(&KekId) + Send + Sync + 'static) {
        self.words.tell(Box::new(listener));
    }

    /// The denial that forbids the use of what `by` has given: it is a replica of one of `keks` that would have been
    /// asked before it, and has said no.
    pub fn forbidden(&self, by: &KekId, keks: &[Kek]) -> Option<KmsError> {
        let members = self.nearest_first(keks);
        let denier = self.denier(&members, by)?;
        Some(KmsError::denied(denier, format!("it has said no, and {by} is a replica of it")))
    }

    /// When this KEK's KMS last did not answer, where it has not answered since; monotonic. Calls that the service's own
    /// limits did not let through say nothing.
    pub fn silent_at(&self, kek: &KekId) -> Option<Duration> {
        self.words.silent_at(kek)
    }

    /// Makes a data key by the first member that answers, and wraps it under the others.
    pub async fn generate(
        &self,
        ring: &KekRing,
        context: &EncryptionContext,
        urgency: Urgency,
    ) -> Result<RingGenerated, RingFailure> {
        let context = Arc::new(context.clone());
        let members = self.asked(ring.members());
        let race = Race::new(self, members.into_iter().map(|member| (member, ())).collect());
        let kms = Arc::clone(&self.kms);
        let of_ring = Arc::clone(&context);
        let ask = move |member: Kek, ()| {
            let (kms, context) = (Arc::clone(&kms), Arc::clone(&of_ring));
            async move { kms.generate(&member, &context, urgency).await }
        };
        let (by, Generated { plaintext, wrapped }, mut missing) = race.run(ask).await?;
        let mut forms = vec![wrapped];
        self.wrap_under_others(ring, &context, &plaintext, urgency, &mut forms, &mut missing).await;
        let at = |kek: &KekId| ring.members().iter().position(|member| member.id == *kek);
        forms.sort_by_key(|form| at(&form.kek));
        missing.sort_by_key(|failure| at(failure.kek()));
        Ok(RingGenerated { plaintext, by, wrapped: forms, missing })
    }

    /// Asks all members that are not served yet at the same time, and waits for them for a stated time.
    async fn wrap_under_others(
        &self,
        ring: &KekRing,
        context: &Arc<EncryptionContext>,
        plaintext: &KeyMaterial,
        urgency: Urgency,
        forms: &mut Vec<Wrapped>,
        missing: &mut Vec<KmsError>,
    ) {
        let (answer, mut answers) = mpsc::unbounded_channel();
        let mut asked: Vec<KekId> = Vec::new();
        for member in ring.members() {
            let served = forms.iter().any(|form| form.kek.same_material(&member.id))
                || asked.iter().any(|other| other.same_material(&member.id));
            if served
                || missing.iter().any(|failure| *failure.kek() == member.id)
                || denied(missing, &member.id)
            {
                continue;
            }
            asked.push(member.id.clone());
            let (kms, context) = (Arc::clone(&self.kms), Arc::clone(context));
            let (words, clock) = (Arc::clone(&self.words), self.clock.clone());
            // Its own copy: the task may outlive this call, by the guard's deadline at most.
            let plaintext = plaintext.duplicate();
            let (member, answer) = (member.clone(), answer.clone());
            self.tracker.spawn(async move {
                let wrapped = kms.wrap(&member, &context, &plaintext, urgency).await;
                drop(plaintext);
                words.heard(&member.id, &wrapped, clock.monotonic());
                // Nobody waits any more: the rotation adds what is missing.
                let _ = answer.send(wrapped);
            });
        }
        drop(answer);
        let patience = self.clock.sleep(Duration::from_millis(self.options.wrap_ms_max));
        tokio::pin!(patience);
        while !asked.is_empty() {
            let answered = tokio::select! {
                biased;
                answered = answers.recv() => answered,
                () = &mut patience => None,
            };
            match answered {
                Some(Ok(form)) => {
                    asked.retain(|kek| *kek != form.kek);
                    forms.push(form);
                }
                Some(Err(failure)) => {
                    asked.retain(|kek| kek != failure.kek());
                    missing.push(failure);
                }
                None => break,
            }
        }
        let late = |kek| KmsError::outage(kek, "it did not wrap a new data key in time");
        missing.extend(asked.iter().map(late));
    }

    /// Opens a data key by the first of its wrapped forms whose KEK answers. `keks` are the KEKs that are believed.
    pub async fn unwrap(
        &self,
        keks: &[Kek],
        forms: &[(KekId, &[u8])],
        context: &EncryptionContext,
        urgency: Urgency,
    ) -> Result<RingUnwrapped, RingFailure> {
        let members = self.asked(keks).into_iter().filter_map(|member| {
            let (_, blob) = forms.iter().find(|(kek, _)| kek.same_material(&member.id))?;
            Some((member, blob.to_vec()))
        });
        let race = Race::new(self, members.collect());
        let (kms, context) = (Arc::clone(&self.kms), Arc::new(context.clone()));
        let ask = move |member: Kek, blob: Vec<u8>| {
            let (kms, context) = (Arc::clone(&kms), Arc::clone(&context));
            async move { kms.unwrap(&member, &context, &blob, urgency).await }
        };
        let (by, plaintext, _) = race.run(ask).await?;
        Ok(RingUnwrapped { plaintext, by })
    }

    /// The members in the order in which they are asked, without those that a no before them rules out.
    fn asked(&self, keks: &[Kek]) -> Vec<Kek> {
        let members = self.nearest_first(keks);
        let ruled_out = |member: &Kek| self.denier(&members, &member.id).is_some();
        members.iter().filter(|member| !ruled_out(member)).cloned().collect()
    }

    /// The member before `kek` that is a replica of it and whose last word was no. It is asked again itself, and can
    /// take that back.
    fn denier<'a>(&self, members: &'a [Kek], kek: &KekId) -> Option<&'a KekId> {
        let before = members.iter().map(|member| &member.id).take_while(|id| *id != kek);
        before.into_iter().find(|id| id.same_material(kek) && self.words.said_no(id))
    }

    fn nearest_first(&self, keks: &[Kek]) -> Vec<Kek> {
        let nearest = &self.options.regions_nearest;
        let distance = |kek: &Kek| {
            kek.id
                .region()
                .and_then(|region| nearest.iter().position(|near| near == region))
                .unwrap_or(nearest.len())
        };
        let mut keks = keks.to_vec();
        keks.sort_by_key(distance);
        keks
    }
}

/// Asks one member after the other, the next one as soon as one has failed or kept silent for a while.
struct Race<'a, W> {
    rings: &'a KekRings,
    waiting: VecDeque<(Kek, W)>,
    failures: Vec<KmsError>,
}

impl<'a, W: Send + 'static> Race<'a, W> {
    fn new(rings: &'a KekRings, waiting: VecDeque<(Kek, W)>) -> Self {
        Self { rings, waiting, failures: Vec::new() }
    }

    /// The first success, who gave it, and what others had said before.
    async fn run<T, F>(mut self, ask: impl Fn(Kek, W) -> F) -> Result<(KekId, T, Vec<KmsError>), RingFailure>
    where
        T: Send + 'static,
        F: Future<Output = Result<T, KmsError>> + Send + 'static,
    {
        let (answer, mut answers) = mpsc::unbounded_channel();
        // Dropped when all have been asked: the channel then ends with the last of their tasks, however it ends.
        let mut answer = Some(answer);
        let mut unheard = 0_usize;
        let hedge = Duration::from_millis(self.rings.options.hedge_ms);
        loop {
            if let Some((member, what)) = self.next() {
                let (id, work) = (member.id.clone(), ask(member, what));
                let answer = answer.clone();
                let (words, clock) = (Arc::clone(&self.rings.words), self.rings.clock.clone());
                // A task of its own: what it learns of its region counts, whoever wins.
                self.rings.tracker.spawn(async move {
                    let outcome = work.await;
                    words.heard(&id, &outcome, clock.monotonic());
                    answer.map(|answer| answer.send((id, outcome)))
                });
                unheard += 1;
            }
            if self.waiting.is_empty() {
                answer = None;
            }
            let answered = tokio::select! {
                biased;
                answered = answers.recv() => answered,
                () = self.rings.clock.sleep(hedge), if answer.is_some() => continue,
            };
            let Some((by, outcome)) = answered else {
                return Err(RingFailure { failures: self.failures, broken: unheard > 0 });
            };
            unheard -= 1;
            match outcome {
                // Its replica has said no in the meantime: that counts for this one too.
                Ok(_) if denied(&self.failures, &by) => {}
                Ok(given) => return Ok((by, given, self.failures)),
                Err(failure) => self.failures.push(failure),
            }
        }
    }

    /// A replica of a KEK that has said no is not asked: it would be a way round its owner's decision.
    fn next(&mut self) -> Option<(Kek, W)> {
        while let Some((member, what)) = self.waiting.pop_front() {
            if !denied(&self.failures, &member.id) {
                return Some((member, what));
            }
        }
        None
    }
}

fn denied(failures: &[KmsError], kek: &KekId) -> bool {
    failures
        .iter()
        .any(|failure| matches!(failure, KmsError::Denied { .. }) && failure.kek().same_material(kek))
}
