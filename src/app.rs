//! Assembly: builds everything once, and is the only place that knows all rooms.

mod doctor;
mod hardening;
mod readiness;

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::AtomicUsize;
use std::time::Duration;

use anyhow::{Context as _, bail};
use async_trait::async_trait;
use secrecy::SecretString;
use tokio::sync::Mutex;

pub use self::doctor::{Check, Finding, Trouble};
pub use self::hardening::{Locking, harden};
use self::readiness::ServiceProbe;
use crate::access::{Access, Pepper};
use crate::audit::{Audit, Keys};
use crate::clock::Clock;
use crate::config::{Secrets, Settings, Variables};
use crate::kms::aws::AwsKms;
use crate::kms::guarded::GuardedKms;
use crate::kms::local::{KeyRingError, LocalKeyRing, Protection};
use crate::kms::ring::KekRings;
use crate::kms::router::KmsRouter;
use crate::kms::{KekState, Kms, KmsError, Urgency};
use crate::lifecycle::Lifecycle;
use crate::operations::{KekCheck, OperationError, Operations};
use crate::pool::{DekPool, PoolError};
use crate::rotation::Reconciler;
use crate::spread::Apart;
use crate::store::sqlite::{SqliteOptions, SqliteStore};
use crate::store::watch::ChangeWatch;
use crate::store::{Registry, Store};
use crate::tenant::Kek;

/// The service, built and not yet listening.
pub struct App {
    /// The verbs.
    pub operations: Arc<Operations>,
    /// Who is let in.
    pub access: Arc<Access>,
    /// The registry.
    pub store: Arc<dyn Registry>,
    /// Rotation.
    pub rotation: Reconciler,
    /// The embedded key ring, where there is one.
    pub keyring: Option<LocalKeyRing>,
    /// Everything behind the edge.
    pub front: crate::http::Front,
    /// How many bodies are being streamed now.
    pub open_transfers: Arc<Apart<AtomicUsize>>,
    /// The tasks, and how they stop.
    pub lifecycle: Lifecycle,
    kms: Arc<dyn Kms>,
    pool: DekPool,
    audit: Audit,
    usage_flush: Duration,
}

/// What a test may put in place of the real thing.
pub struct Parts {
    /// The time.
    pub clock: Clock,
    /// The registry.
    pub store: Arc<dyn Registry>,
    /// The KMS.
    pub kms: Arc<dyn Kms>,
    /// The guard in front of it, which knows how its regions are.
    pub guard: Option<GuardedKms>,
    /// The embedded key ring, where there is one.
    pub keyring: Option<LocalKeyRing>,
    /// The server's secret in every API key's hash.
    pub pepper: Pepper,
    /// The record of who did what.
    pub audit: Audit,
}

/// How long the last tasks may take at the end, after the listener has closed.
const STRAGGLERS_TIME_MAX: Duration = Duration::from_secs(5);

impl App {
    /// Opens what the settings name and puts it together.
    pub async fn open(settings: &Settings, variables: &Variables, dev: bool) -> anyhow::Result<Self> {
        let clock = Clock::system();
        let mut settings = settings.clone();
        if dev {
            // Who tries shredding out does not wait an hour for it.
            settings.shredding.waiting_secs_min = 0;
        }
        let settings = &settings;
        make_data_dir(&settings.data_dir)?;
        let pepper = pepper(settings, variables)?;
        let audit = open_audit(settings, variables, &clock)?;
        let store: Arc<dyn Registry> = Arc::new(open_store(settings).await?);
        let (kms, aws, keyring) = open_kms(settings, variables, dev, &clock).await?;
        let guard = Some(aws);
        Self::assemble(settings, Parts { clock, store, kms, guard, keyring, pepper, audit })
    }

    /// Puts the parts together.
    pub fn assemble(settings: &Settings, parts: Parts) -> anyhow::Result<Self> {
        let Parts { clock, store: registry, kms, guard, keyring, pepper, audit } = parts;
        let store: Arc<dyn Store> = Arc::clone(&registry) as Arc<dyn Registry>;
        let lifecycle = Lifecycle::default();
        let stale_max = Duration::from_secs(settings.registry.stale_secs_max);
        let watch = Arc::new(ChangeWatch::new(Arc::clone(&store), clock.clone(), stale_max));
        let pool_options = crate::pool::Options::from(&settings.pool);
        let rings =
            KekRings::new(Arc::clone(&kms), clock.clone(), settings.aws.rings(), lifecycle.tracker.clone());
        let pool = DekPool::new(
            rings,
            Arc::clone(&store),
            Arc::clone(&watch),
            clock.clone(),
            &pool_options,
            Duration::from_millis(settings.aws.call_ms_max),
            &lifecycle.tracker,
        );
        let rules = settings.access.rules()?;
        let access = Access::new(Arc::clone(&registry), Arc::clone(&watch), clock.clone(), pepper, rules)?;
        let access = Arc::new(access);
        let rotation = Reconciler::new(
            crate::rotation::Parts {
                store: Arc::clone(&registry),
                kms: Arc::clone(&kms),
                pool: pool.clone(),
                watch: Arc::clone(&watch),
                clock: clock.clone(),
                audit: audit.clone(),
            },
            crate::rotation::Options::from(&settings.rotation),
        );
        let operations = Operations::new(
            pool.clone(),
            Arc::clone(&registry),
            Arc::clone(&watch),
            Arc::clone(&access),
            clock.clone(),
            Arc::new(AskTheKms(Arc::clone(&kms))),
            audit.clone(),
        );
        let operations = operations
            .with_shredding((&settings.shredding).into())
            .with_tenant_keys_max(settings.registry.tenant_keys_max);
        let operations = Arc::new(operations);
        let probe = Arc::new(ServiceProbe {
            store: Arc::clone(&store),
            watch,
            pool: pool.clone(),
            guard,
            embedded: keyring.is_some(),
            clock,
            last: Mutex::default(),
        });
        let edge = crate::http::service(
            Arc::clone(&operations),
            &access,
            probe,
            &settings.edge(),
            lifecycle.tracker.clone(),
        );
        let (front, open_transfers) = (edge.front, edge.open_transfers);
        let usage_flush = Duration::from_secs(settings.pool.usage_flush_secs);
        Ok(Self {
            operations,
            access,
            store: registry,
            rotation,
            keyring,
            front,
            open_transfers,
            lifecycle,
            kms,
            pool,
            audit,
            usage_flush,
        })
    }

    /// Starts the background tasks.
    pub fn start(&self) {
        let (pool, tracker) = (self.pool.clone(), self.lifecycle.tracker.clone());
        let stop = self.lifecycle.hard.clone();
        self.lifecycle.tracker.spawn(pool.keep(self.usage_flush, tracker, stop));
        self.lifecycle.tracker.spawn(Arc::clone(&self.access).keep(self.lifecycle.hard.clone()));
        self.lifecycle.tracker.spawn(self.rotation.clone().run(self.lifecycle.soft.clone()));
    }

    /// Ends the background tasks, flushes what is counted, wipes the keys and closes the registry.
    pub async fn stop(self) {
        self.lifecycle.soft.cancel();
        self.lifecycle.hard.cancel();
        self.lifecycle.tracker.close();
        // What still waits for a KMS or a registry that does not answer has had its time.
        if tokio::time::timeout(STRAGGLERS_TIME_MAX, self.lifecycle.tracker.wait()).await.is_err() {
            tracing::warn!(
                tasks = self.lifecycle.tracker.len(),
                "ended with tasks that did not come to an end"
            );
        }
        self.pool.clear();
        self.store.close().await;
        let audit = self.audit;
        // Joins threads that write: not on a thread that serves.
        let _ = tokio::task::spawn_blocking(move || audit.close()).await;
    }

    /// The pool of data keys.
    pub fn pool(&self) -> &DekPool {
        &self.pool
    }
}

fn make_data_dir(path: &Path) -> anyhow::Result<()> {
    use std::os::unix::fs::DirBuilderExt as _;
    std::fs::DirBuilder::new().recursive(true).mode(0o700).create(path).with_context(|| {
        format!("the data folder {} cannot be made: name another with --data-dir", path.display())
    })
}

fn pepper(settings: &Settings, variables: &Variables) -> anyhow::Result<Pepper> {
    let secret = Secrets::new(settings, variables).pepper()?;
    Ok(Pepper::new(&secret)?)
}

fn open_audit(settings: &Settings, variables: &Variables, clock: &Clock) -> anyhow::Result<Audit> {
    let options = settings.audit_options();
    if !options.is_on() {
        return Ok(Audit::new(clock.clone()));
    }
    let secret = Secrets::new(settings, variables).audit_key()?;
    let keys = Keys::new(&secret, settings.audit.public_context.clone())?;
    Ok(Audit::open(clock.clone(), &options, &keys)?)
}

/// The master keys that the settings reach: a router over them, and the parts of it that more is asked of.
pub async fn open_kms(
    settings: &Settings,
    variables: &Variables,
    dev: bool,
    clock: &Clock,
) -> anyhow::Result<(Arc<dyn Kms>, GuardedKms, Option<LocalKeyRing>)> {
    let keyring = open_keyring(settings, variables, dev, clock).await?;
    let aws =
        GuardedKms::new(Arc::new(AwsKms::new(settings.aws.reach())), clock.clone(), settings.aws.guard());
    let local = keyring.clone().map(|ring| Arc::new(ring) as Arc<dyn Kms>);
    let kms: Arc<dyn Kms> = Arc::new(KmsRouter::new(local, Arc::new(aws.clone())));
    Ok((kms, aws, keyring))
}

/// Opens the registry that the settings name.
pub async fn open_store(settings: &Settings) -> anyhow::Result<SqliteStore> {
    Ok(SqliteStore::open(&settings.registry_file(), SqliteOptions::default()).await?)
}

/// What protects the key ring that the settings name: the passphrase, or with `--dev` and no passphrase nothing.
pub fn keyring_protection(
    settings: &Settings,
    variables: &Variables,
    dev: bool,
) -> anyhow::Result<Protection> {
    match Secrets::new(settings, variables).keyring_passphrase()? {
        // Always, where there is one: who swaps in an unencrypted key ring of his own must not be obeyed.
        Some(passphrase) => Ok(Protection::Passphrase(SecretString::from(passphrase.as_str()))),
        None if dev => Ok(Protection::Dev),
        None => bail!(
            "the key ring needs its passphrase: set KEYFOLD_KEYRING_PASSPHRASE, or keyring.passphrase_file to a \
             file that holds it"
        ),
    }
}

/// The key ring, where there is one: a service whose master keys are all in AWS KMS needs none.
async fn open_keyring(
    settings: &Settings,
    variables: &Variables,
    dev: bool,
    clock: &Clock,
) -> anyhow::Result<Option<LocalKeyRing>> {
    let file = settings.keyring_file();
    if !file.exists() && settings.keyring.file.is_none() {
        return Ok(None);
    }
    let protection = keyring_protection(settings, variables, dev)?;
    match LocalKeyRing::open(file, protection, clock.clone()).await {
        Ok(ring) => Ok(Some(ring)),
        Err(KeyRingError::Missing { .. }) if dev => Ok(None),
        Err(error) => Err(error.into()),
    }
}

/// Asks the KMS itself whether a KEK can be used.
struct AskTheKms(Arc<dyn Kms>);

#[async_trait]
impl KekCheck for AskTheKms {
    async fn check(&self, kek: &Kek) -> Result<(), OperationError> {
        match self.0.describe(kek, Urgency::Foreground).await {
            Ok(described) if described.state == KekState::Enabled => Ok(()),
            Ok(_) => {
                Err(OperationError::Invalid(format!("the KEK {} is not enabled: enable it first", kek.id)))
            }
            Err(KmsError::Denied { detail, .. }) => {
                Err(OperationError::Invalid(format!("the KEK {} cannot be used: {detail}", kek.id)))
            }
            Err(other) => Err(PoolError::from(other).into()),
        }
    }
}
