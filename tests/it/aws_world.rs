//! A service in this process whose master keys are in an AWS KMS that can be made to fail.

use std::sync::Arc;
use std::time::Duration;

use keyfold::clock::Clock;
use keyfold::config::Settings;
use keyfold::kms::Kms;
use keyfold::kms::aws::AwsKms;
use keyfold::kms::guarded::GuardedKms;
use keyfold::kms::router::KmsRouter;
use keyfold::tenant::Verb;
use kms_emulator::{Builder, Call, CreateKey, Emulator, Fault, FaultScope, Outcome};
use tempfile::TempDir;
use tokio::task::JoinHandle;

use crate::caller::Caller;
use crate::kms_aws::{FRANKFURT, IRELAND, credentials, options};
use crate::service::{START, Service, serve};

/// What outlives a service: the KMS, the data folder, the time.
///
/// The time runs as fast as the world's does, and can be moved on beside that: calls to the KMS are real, and take
/// real time.
pub(crate) struct AwsWorld {
    pub(crate) emulator: Emulator,
    pub(crate) clock: Clock,
    pub(crate) settings: Settings,
    _folder: TempDir,
    running: JoinHandle<()>,
}

impl AwsWorld {
    pub(crate) async fn new() -> Self {
        Self::of(Emulator::builder().region(IRELAND).region(FRANKFURT)).await
    }

    /// The same over this emulator.
    #[expect(clippy::disallowed_methods, reason = "ended when the world is dropped")]
    pub(crate) async fn of(builder: Builder) -> Self {
        let emulator = builder.remember_data_keys().start().await.unwrap();
        let folder = tempfile::tempdir().unwrap();
        let settings = Settings { data_dir: folder.path().to_owned(), ..Settings::default() };
        let clock = Clock::manual(START);
        let runs = clock.clone();
        let running = tokio::spawn(async move {
            loop {
                tokio::time::sleep(Duration::from_millis(10)).await;
                runs.advance(Duration::from_millis(10));
            }
        });
        Self { emulator, clock, settings, _folder: folder, running }
    }

    /// A service on the data folder, with its background tasks.
    pub(crate) async fn start(&self) -> Service {
        self.start_as("any").await
    }

    /// The same with this access key.
    pub(crate) async fn start_as(&self, access_key: &str) -> Service {
        let inner = AwsKms::with_credentials(options(&self.emulator.url()), credentials(access_key));
        let inner = Arc::new(inner);
        let guard = GuardedKms::new(inner, self.clock.clone(), self.settings.aws.guard());
        let kms: Arc<dyn Kms> = Arc::new(KmsRouter::new(None, Arc::new(guard.clone())));
        let service = serve(&self.settings, &self.clock, kms, Some(guard), None).await;
        service.app.start();
        service
    }

    /// A key in this region; its ARN.
    pub(crate) fn key(&self, region: &str) -> String {
        self.emulator.create_key(region, CreateKey::new()).unwrap()
    }

    /// A multi-Region key with a replica; their ARNs.
    pub(crate) fn replicated_key(&self) -> [String; 2] {
        let primary = self.emulator.create_key(IRELAND, CreateKey::new().multi_region()).unwrap();
        let replica = self.emulator.replicate_key(&primary, FRANKFURT).unwrap();
        [primary, replica]
    }

    /// A tenant with these KEKs, and who may do everything with it.
    pub(crate) async fn tenant(&self, service: &Service, id: &str, keks: &[&str]) -> Caller {
        service.tenant_with(id, keks).await;
        service.caller(&[id], &Verb::ALL).await
    }

    /// Moves the time on, a second at a go, and lets the background do what falls due. A go is far shorter than the
    /// time that a call has, and calls that will be answered are answered before the next: or else a slow machine would
    /// look like an outage.
    pub(crate) async fn pass(&self, secs: u64) {
        let mut left = secs;
        while left > 0 {
            let step = left.min(1);
            self.clock.advance(Duration::from_secs(step));
            left -= step;
            tokio::time::sleep(Duration::from_millis(10)).await;
            for _ in 0..200 {
                if self.unanswered() == 0 {
                    break;
                }
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        }
    }

    /// Calls that have arrived and will be answered.
    fn unanswered(&self) -> usize {
        let faults = self.emulator.faults().list();
        let swallows = |call: &Call| {
            faults.iter().any(|rule| {
                let FaultScope { region, operation, .. } = &rule.scope;
                rule.fault == Fault::BlackHole
                    && region.as_ref().is_none_or(|region| *region == call.region)
                    && operation.as_ref().is_none_or(|operation| *operation == call.operation)
            })
        };
        self.emulator.count_where(|call| call.outcome == Outcome::Pending && !swallows(call))
    }

    /// Calls of this operation so far, whatever became of them.
    pub(crate) fn count(&self, operation: &str) -> usize {
        self.emulator.count(operation)
    }

    /// Calls to this region so far that make, open or wrap data keys.
    pub(crate) fn calls_to(&self, region: &str) -> usize {
        self.emulator.count_where(|call| call.region == region && call.operation != "DescribeKey")
    }
}

impl Drop for AwsWorld {
    fn drop(&mut self) {
        self.running.abort();
    }
}
