//! A service in this process: on a clock that tests move, over a KMS and a registry that can be made to fail, behind
//! a real socket.

use std::net::{SocketAddr, TcpListener};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use keyfold::access::{Pepper, Principal};
use keyfold::app::{App, Parts};
use keyfold::audit::{Audit, Keys};
use keyfold::clock::{Clock, Timestamp};
use keyfold::config::Settings;
use keyfold::http::server::{self, ServerHandle};
use keyfold::http::tls::Tls;
use keyfold::kms::Kms;
use keyfold::kms::guarded::GuardedKms;
use keyfold::kms::local::{LocalKeyRing, Protection};
use keyfold::operations::ApiKeyGrant;
use keyfold::store::sqlite::{SqliteOptions, SqliteStore};
use keyfold::store::{DekScope, Store};
use keyfold::tenant::{Kek, KekRing, TenantId, Verb};
use tempfile::TempDir;
use tokio_util::task::TaskTracker;

use crate::caller::Caller;
use crate::probes::{FaultyStore, ProbedKms};

/// The start of the tests' time: 2026-11-23T12:00:00Z.
pub(crate) const START: Timestamp = Timestamp::from_unix_ms(1_795_435_200_000);
/// The KEK that tenants of the tests have.
pub(crate) const KEK: &str = "local:one";

/// The key of the tests' audit trails.
pub(crate) const AUDIT_KEY: &[u8] = &[9; 32];

/// What outlives a service: the data folder, the key ring, the time.
pub(crate) struct World {
    pub(crate) clock: Clock,
    pub(crate) kms: Arc<ProbedKms>,
    pub(crate) keyring: LocalKeyRing,
    pub(crate) settings: Settings,
    folder: TempDir,
}

impl World {
    pub(crate) async fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let clock = Clock::manual(START);
        let ring_file = folder.path().join("keyring");
        let keyring = LocalKeyRing::create(ring_file, Protection::Dev, clock.clone()).await.unwrap();
        keyring.add(KEK).await.unwrap();
        let settings = Settings { data_dir: folder.path().to_owned(), ..Settings::default() };
        Self { clock, kms: Arc::new(ProbedKms::new(keyring.clone())), keyring, settings, folder }
    }

    /// A file in the data folder.
    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// Opens the registry and starts a service on it, with its background tasks.
    pub(crate) async fn start(&self) -> Service {
        let service = self.start_without_keeper().await;
        service.app.start();
        service
    }

    /// The same without the background tasks: nothing happens but what is asked. With TLS where the settings say so.
    pub(crate) async fn start_without_keeper(&self) -> Service {
        let kms: Arc<dyn Kms> = self.kms.clone();
        serve(&self.settings, &self.clock, kms, None, Some(self.keyring.clone())).await
    }

    /// Moves the time.
    pub(crate) fn pass(&self, secs: u64) {
        self.clock.advance(Duration::from_secs(secs));
    }
}

/// A service on the registry in the settings' data folder, over this KMS, without its background tasks.
pub(crate) async fn serve(
    settings: &Settings,
    clock: &Clock,
    kms: Arc<dyn Kms>,
    guard: Option<GuardedKms>,
    keyring: Option<LocalKeyRing>,
) -> Service {
    let store = Arc::new(FaultyStore::new(open_registry(&settings.registry_file()).await));
    let pepper = Pepper::new(&[7; 32]).unwrap();
    let keys = Keys::new(AUDIT_KEY, settings.audit.public_context.clone()).unwrap();
    let audit = Audit::open(clock.clone(), &settings.audit_options(), &keys).unwrap();
    let parts = Parts { clock: clock.clone(), store: store.clone(), kms, guard, keyring, pepper, audit };
    let app = App::assemble(settings, parts).unwrap();
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    listener.set_nonblocking(true).unwrap();
    let address = listener.local_addr().unwrap();
    let (handle, tasks) = (ServerHandle::default(), TaskTracker::new());
    let (front, options, stop) = (app.front.clone(), settings.http.server(), handle.clone());
    let tls = settings.tls.options(address, &settings.data_dir);
    let tls = tls.map(|options| {
        Arc::new(Tls::open(options, clock.clone(), app.access.certificates().clone()).unwrap())
    });
    match tls.clone() {
        Some(tls) => tasks.spawn(async move {
            server::serve_tls(listener, front, &tls, &options, stop).await.unwrap();
        }),
        None => tasks.spawn(async move { server::serve(listener, front, &options, stop).await.unwrap() }),
    };
    Service { app, store, address, tls, handle, tasks }
}

/// The registry in this file.
pub(crate) async fn open_registry(path: &Path) -> SqliteStore {
    SqliteStore::open(path, SqliteOptions::default()).await.unwrap()
}

/// A service that listens.
pub(crate) struct Service {
    pub(crate) app: App,
    pub(crate) store: Arc<FaultyStore>,
    pub(crate) address: SocketAddr,
    pub(crate) tls: Option<Arc<Tls>>,
    handle: ServerHandle,
    tasks: TaskTracker,
}

impl Service {
    /// A caller without a credential.
    pub(crate) fn anonymous(&self) -> Caller {
        Caller::new(self.address, None)
    }

    /// Makes a tenant with the tests' KEK.
    pub(crate) async fn tenant(&self, id: &str) {
        self.tenant_with(id, &[KEK]).await;
    }

    /// Makes a tenant with these KEKs.
    pub(crate) async fn tenant_with(&self, id: &str, keks: &[&str]) {
        let operate = Principal::local_operator().permit_operate().unwrap();
        let keks = keks.iter().map(|kek| Kek::direct(kek.parse().unwrap())).collect();
        let ring = KekRing::new(keks).unwrap();
        self.app.operations.create_tenant(&operate, id.parse().unwrap(), ring).await.unwrap();
    }

    /// The token of a new API key.
    pub(crate) async fn token(&self, tenants: &[&str], verbs: &[Verb]) -> String {
        let operator = Principal::local_operator();
        let tenants: Vec<TenantId> = tenants.iter().map(|tenant| tenant.parse().unwrap()).collect();
        let permit = operator.permit_admin(&tenants[0]).unwrap();
        let grant = ApiKeyGrant {
            name: "a test's".to_owned(),
            tenants: tenants.clone(),
            verbs: verbs.to_vec(),
            expires_at: None,
        };
        let new = self.app.operations.create_api_key(&permit, &operator, grant).await.unwrap();
        new.token.to_string()
    }

    /// A caller with a new API key.
    pub(crate) async fn caller(&self, tenants: &[&str], verbs: &[Verb]) -> Caller {
        Caller::new(self.address, Some(self.token(tenants, verbs).await))
    }

    /// A new tenant, and a caller that may do everything with it and with the service.
    pub(crate) async fn tenant_and_caller(&self, id: &str) -> Caller {
        self.tenant(id).await;
        self.caller(&[id], &Verb::ALL).await
    }

    /// What the registry counts for the active data key of a tenant's key: (id, messages, bytes).
    pub(crate) async fn counted(&self, tenant: &str, key: &str) -> (String, u64, u64) {
        let scope = DekScope {
            tenant: tenant.parse().unwrap(),
            key: key.parse().unwrap(),
            bound: envelope::EncryptionContext::new(),
        };
        let dek = self.store.active_dek(&scope).await.unwrap().unwrap().dek;
        (dek.id.to_string(), dek.messages, dek.bytes)
    }

    /// Whether the registry has no tenant of this id.
    pub(crate) async fn store_has_no(&self, tenant: &str) -> bool {
        self.store.tenant(&tenant.parse().unwrap()).await.unwrap().is_none()
    }

    /// Ends the service in good order.
    pub(crate) async fn stop(self) {
        self.handle.abort();
        self.tasks.close();
        self.tasks.wait().await;
        self.app.stop().await;
    }
}
