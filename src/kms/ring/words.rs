//! What the owners of KEKs have last said, through their KMS, whoever asked and whether he still waited for it.

use std::sync::OnceLock;
use std::time::Duration;

use crate::kms::{KmsError, OutageCause};
use crate::tenant::KekId;

/// Who is told of a denial.
pub(super) type Listener = Box<dyn Fn(&KekId) + Send + Sync>;

/// The last word of each KEK, where there is something to remember: no more than there are KEKs.
#[derive(Default)]
pub(super) struct Words {
    last: papaya::HashMap<KekId, Word>,
    listener: OnceLock<Listener>,
}

#[derive(Clone, Copy)]
enum Word {
    /// It said no.
    No,
    /// It was asked and did not answer, up to this moment; monotonic.
    Silence(Duration),
}

impl Words {
    /// Tells this one of every denial from now on. There is one; a second is not heard.
    pub(super) fn tell(&self, listener: Listener) {
        let _ = self.listener.set(listener);
    }

    /// Takes note of how a call ended, at `now`.
    pub(super) fn heard<T>(&self, kek: &KekId, outcome: &Result<T, KmsError>, now: Duration) {
        let last = self.last.pin();
        match outcome {
            // What was damaged would have been opened.
            Ok(_) | Err(KmsError::Damaged { .. }) => {
                last.remove(kek);
            }
            Err(KmsError::Denied { .. }) => {
                // Remembered first: who looks for a denial after he has kept a data key finds it, or is told.
                last.insert(kek.clone(), Word::No);
                if let Some(listener) = self.listener.get() {
                    listener(kek);
                }
            }
            Err(KmsError::Outage { cause: OutageCause::OwnLimit, .. }) => {}
            Err(KmsError::Outage { .. }) => {
                // A no stands until it is taken back.
                let silent = |word: &Word| match word {
                    Word::No => Word::No,
                    Word::Silence(_) => Word::Silence(now),
                };
                last.update_or_insert(kek.clone(), silent, Word::Silence(now));
            }
        }
    }

    /// Whether it said no, and nothing else since.
    pub(super) fn said_no(&self, kek: &KekId) -> bool {
        matches!(self.last.pin().get(kek), Some(Word::No))
    }

    /// When it last did not answer, where it has not answered since; monotonic.
    pub(super) fn silent_at(&self, kek: &KekId) -> Option<Duration> {
        match self.last.pin().get(kek) {
            Some(Word::Silence(at)) => Some(*at),
            Some(Word::No) | None => None,
        }
    }
}
