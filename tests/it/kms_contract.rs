//! The contract of [`Kms`], line by line, for every implementation in the table at the end.
//!
//! A new implementation writes a [`KmsFixture`] and adds its line there.

use std::time::Duration;

use async_trait::async_trait;
use envelope::{EncryptionContext, KeyMaterial};
use keyfold::clock::{Clock, Timestamp};
use keyfold::kms::local::{LocalKeyRing, Protection};
use keyfold::kms::{KekState, Kms, KmsError, Urgency, Wrapped};
use keyfold::tenant::{Kek, KekHome};

/// A KMS under test, and the rights of the owner of its KEKs.
#[async_trait]
pub(crate) trait KmsFixture: Sync {
    fn kms(&self) -> &dyn Kms;
    /// A new, enabled KEK.
    async fn create_kek(&self) -> Kek;
    /// A KEK of this KMS's kind that does not exist.
    async fn missing_kek(&self) -> Kek;
    async fn disable(&self, kek: &Kek);
    async fn enable(&self, kek: &Kek);
    /// Gives the KEK new material.
    async fn rotate(&self, kek: &Kek);
    async fn schedule_deletion(&self, kek: &Kek);
    async fn cancel_deletion(&self, kek: &Kek);
}

const FG: Urgency = Urgency::Foreground;

fn context(pairs: &[(&str, &str)]) -> EncryptionContext {
    let mut context = EncryptionContext::new();
    for (name, value) in pairs {
        context.insert(*name, *value).unwrap();
    }
    context
}

fn of_tenant_a() -> EncryptionContext {
    context(&[("keyfold:tenant", "a"), ("keyfold:key", "default")])
}

/// What a call gave, without the key, so that it can be shown.
fn outcome<T>(result: Result<T, KmsError>) -> Result<(), KmsError> {
    result.map(drop)
}

#[track_caller]
fn assert_denied<T>(result: Result<T, KmsError>, kek: &Kek, call: &str) {
    let outcome = outcome(result);
    assert!(
        matches!(&outcome, Err(KmsError::Denied { kek: named, .. }) if *named == kek.id),
        "{call}: {outcome:?}"
    );
}

#[track_caller]
fn assert_damaged<T>(result: Result<T, KmsError>, what: &str) {
    let outcome = outcome(result);
    assert!(matches!(outcome, Err(KmsError::Damaged { .. })), "{what}: {outcome:?}");
}

/// A data key that the KMS made under `kek` for tenant a.
async fn generated(fixture: &dyn KmsFixture, kek: &Kek) -> (KeyMaterial, Wrapped) {
    let generated = fixture.kms().generate(kek, &of_tenant_a(), FG).await.unwrap();
    assert_eq!(generated.wrapped.kek, kek.id);
    (generated.plaintext, generated.wrapped)
}

async fn unwrapped(fixture: &dyn KmsFixture, kek: &Kek, blob: &[u8]) -> [u8; 32] {
    *fixture.kms().unwrap(kek, &of_tenant_a(), blob, FG).await.unwrap().expose()
}

async fn what_generate_made_unwrap_opens(fixture: &dyn KmsFixture) {
    let kek = fixture.create_kek().await;
    let (plaintext, wrapped) = generated(fixture, &kek).await;
    assert_eq!(unwrapped(fixture, &kek, &wrapped.blob).await, *plaintext.expose());
    assert!(u16::try_from(wrapped.blob.len()).is_ok());
    let hidden = !wrapped.blob.windows(32).any(|window| window == plaintext.expose());
    assert!(hidden, "the wrapped key shows the key");
}

async fn what_wrap_made_unwrap_opens(fixture: &dyn KmsFixture) {
    let kek = fixture.create_kek().await;
    let plaintext = KeyMaterial::from_slice(&[0x5a; 32]).unwrap();
    let wrapped = fixture.kms().wrap(&kek, &of_tenant_a(), &plaintext, FG).await.unwrap();
    assert_eq!(wrapped.kek, kek.id);
    assert_eq!(unwrapped(fixture, &kek, &wrapped.blob).await, *plaintext.expose());
}

async fn no_two_data_keys_are_the_same(fixture: &dyn KmsFixture) {
    let kek = fixture.create_kek().await;
    let (first, first_wrapped) = generated(fixture, &kek).await;
    let (second, second_wrapped) = generated(fixture, &kek).await;
    assert_ne!(first.expose(), second.expose());
    assert_ne!(first.expose(), &[0; 32]);
    assert_ne!(first_wrapped.blob, second_wrapped.blob);
}

async fn no_other_kek_opens_a_wrapped_key(fixture: &dyn KmsFixture) {
    let (kek, other) = (fixture.create_kek().await, fixture.create_kek().await);
    let (_, wrapped) = generated(fixture, &kek).await;
    let kms = fixture.kms();
    assert_damaged(kms.unwrap(&other, &of_tenant_a(), &wrapped.blob, FG).await, "unwrap");
    assert_damaged(kms.rewrap(&other, &kek, &of_tenant_a(), &wrapped.blob, FG).await, "rewrap");
}

/// Among the wrong contexts are those that naive ways of writing down the pairs confuse with the right one.
async fn no_other_context_opens_a_wrapped_key(fixture: &dyn KmsFixture) {
    let kek = fixture.create_kek().await;
    let right = context(&[("a", "b"), ("c", "d")]);
    let made = fixture.kms().generate(&kek, &right, FG).await.unwrap();
    let wrong: &[&[(&str, &str)]] = &[
        &[],
        &[("a", "b")],
        &[("c", "d")],
        &[("a", "b"), ("c", "e")],
        &[("a", "b"), ("c", "D")],
        &[("a", "d"), ("c", "b")],
        &[("b", "a"), ("d", "c")],
        &[("ab", "cd")],
        &[("a", "bcd")],
        &[("abc", "d")],
        &[("ab", ""), ("cd", "")],
        &[("a", "b,c:d")],
        &[("a", "b"), ("c", "d"), ("e", "f")],
        &[("a", "b"), ("c", "d"), ("e", "")],
        &[("a", "b"), ("c", "d ")],
    ];
    for pairs in wrong {
        let opened = fixture.kms().unwrap(&kek, &context(pairs), &made.wrapped.blob, FG).await;
        assert_damaged(opened, &format!("unwrap under {pairs:?}"));
        let moved = fixture.kms().rewrap(&kek, &kek, &context(pairs), &made.wrapped.blob, FG).await;
        assert_damaged(moved, &format!("rewrap under {pairs:?}"));
    }
    let reordered = context(&[("c", "d"), ("a", "b")]);
    assert!(fixture.kms().unwrap(&kek, &reordered, &made.wrapped.blob, FG).await.is_ok());
}

async fn a_changed_wrapped_key_is_damaged(fixture: &dyn KmsFixture) {
    let kek = fixture.create_kek().await;
    let (_, wrapped) = generated(fixture, &kek).await;
    for at in 0..wrapped.blob.len() {
        for bit in [0x01, 0x80] {
            let mut blob = wrapped.blob.clone();
            blob[at] ^= bit;
            let opened = fixture.kms().unwrap(&kek, &of_tenant_a(), &blob, FG).await;
            assert_damaged(opened, &format!("byte {at} changed"));
        }
    }
}

async fn a_wrapped_key_cut_short_or_longer_is_damaged(fixture: &dyn KmsFixture) {
    let kek = fixture.create_kek().await;
    let (_, wrapped) = generated(fixture, &kek).await;
    let longer = [wrapped.blob.as_slice(), &[0]].concat();
    // AWS KMS refuses an empty blob as an invalid request, before it looks at keys: nobody sends one.
    let cut = (1..wrapped.blob.len()).map(|length| &wrapped.blob[..length]);
    for blob in cut.chain([longer.as_slice(), b"not a wrapped key"]) {
        let opened = fixture.kms().unwrap(&kek, &of_tenant_a(), blob, FG).await;
        assert_damaged(opened, &format!("{} bytes", blob.len()));
    }
}

async fn what_was_wrapped_before_a_rotation_still_opens(fixture: &dyn KmsFixture) {
    let kek = fixture.create_kek().await;
    let (before, wrapped_before) = generated(fixture, &kek).await;
    for _ in 0..3 {
        fixture.rotate(&kek).await;
    }
    let (after, wrapped_after) = generated(fixture, &kek).await;
    assert_eq!(unwrapped(fixture, &kek, &wrapped_before.blob).await, *before.expose());
    assert_eq!(unwrapped(fixture, &kek, &wrapped_after.blob).await, *after.expose());
}

/// Where the KMS tells its material at all, it tells that what was wrapped before a rotation is old.
async fn a_rotation_shows_in_the_material(fixture: &dyn KmsFixture) {
    let kek = fixture.create_kek().await;
    let (_, before) = generated(fixture, &kek).await;
    let description = fixture.kms().describe(&kek, FG).await.unwrap();
    if let (Some(wrapped), Some(current)) = (&before.material, &description.material) {
        assert_eq!(wrapped, current);
    }
    fixture.rotate(&kek).await;
    let (_, after) = generated(fixture, &kek).await;
    let description = fixture.kms().describe(&kek, FG).await.unwrap();
    if let (Some(old), Some(new)) = (&before.material, &after.material) {
        assert_ne!(old, new);
        assert_eq!(description.material.as_ref(), Some(new));
    }
}

async fn rewrap_moves_a_data_key_to_another_kek(fixture: &dyn KmsFixture) {
    let (from, to) = (fixture.create_kek().await, fixture.create_kek().await);
    let (plaintext, wrapped) = generated(fixture, &from).await;
    let moved = fixture.kms().rewrap(&from, &to, &of_tenant_a(), &wrapped.blob, FG).await.unwrap();
    assert_eq!(moved.kek, to.id);
    assert_eq!(unwrapped(fixture, &to, &moved.blob).await, *plaintext.expose());
    assert_damaged(fixture.kms().unwrap(&from, &of_tenant_a(), &moved.blob, FG).await, "under the old KEK");
    // The old form is not taken away.
    assert_eq!(unwrapped(fixture, &from, &wrapped.blob).await, *plaintext.expose());
}

async fn rewrap_brings_a_data_key_to_the_current_material(fixture: &dyn KmsFixture) {
    let kek = fixture.create_kek().await;
    let (plaintext, wrapped) = generated(fixture, &kek).await;
    fixture.rotate(&kek).await;
    let renewed = fixture.kms().rewrap(&kek, &kek, &of_tenant_a(), &wrapped.blob, FG).await.unwrap();
    assert_ne!(renewed.blob, wrapped.blob);
    assert_eq!(renewed.material, fixture.kms().describe(&kek, FG).await.unwrap().material);
    assert_eq!(unwrapped(fixture, &kek, &renewed.blob).await, *plaintext.expose());
}

async fn rewrap_refuses_a_changed_wrapped_key(fixture: &dyn KmsFixture) {
    let (from, to) = (fixture.create_kek().await, fixture.create_kek().await);
    let (_, wrapped) = generated(fixture, &from).await;
    for at in [0, wrapped.blob.len() / 2, wrapped.blob.len() - 1] {
        let mut blob = wrapped.blob.clone();
        blob[at] ^= 1;
        let moved = fixture.kms().rewrap(&from, &to, &of_tenant_a(), &blob, FG).await;
        assert_damaged(moved, &format!("byte {at} changed"));
    }
}

/// Everything but `describe` is denied, in the name of the KEK that is to blame.
async fn assert_unusable(fixture: &dyn KmsFixture, kek: &Kek, blob: &[u8]) {
    let (kms, context) = (fixture.kms(), of_tenant_a());
    let other = fixture.create_kek().await;
    let (plaintext, others) = generated(fixture, &other).await;
    assert_denied(kms.generate(kek, &context, FG).await, kek, "generate");
    assert_denied(kms.wrap(kek, &context, &plaintext, FG).await, kek, "wrap");
    assert_denied(kms.unwrap(kek, &context, blob, FG).await, kek, "unwrap");
    assert_denied(kms.rewrap(kek, &other, &context, blob, FG).await, kek, "rewrap from");
    assert_denied(kms.rewrap(&other, kek, &context, &others.blob, FG).await, kek, "rewrap to");
    // Another KEK is not concerned.
    assert_eq!(unwrapped(fixture, &other, &others.blob).await, *plaintext.expose());
}

async fn a_disabled_kek_is_denied_until_it_is_enabled(fixture: &dyn KmsFixture) {
    let kek = fixture.create_kek().await;
    let (plaintext, wrapped) = generated(fixture, &kek).await;
    fixture.disable(&kek).await;
    assert_unusable(fixture, &kek, &wrapped.blob).await;
    assert_eq!(fixture.kms().describe(&kek, FG).await.unwrap().state, KekState::Disabled);
    fixture.enable(&kek).await;
    assert_eq!(unwrapped(fixture, &kek, &wrapped.blob).await, *plaintext.expose());
    assert!(fixture.kms().generate(&kek, &of_tenant_a(), FG).await.is_ok());
}

async fn a_kek_pending_deletion_is_denied_until_that_is_cancelled(fixture: &dyn KmsFixture) {
    let kek = fixture.create_kek().await;
    let (plaintext, wrapped) = generated(fixture, &kek).await;
    fixture.schedule_deletion(&kek).await;
    assert_unusable(fixture, &kek, &wrapped.blob).await;
    assert_eq!(fixture.kms().describe(&kek, FG).await.unwrap().state, KekState::PendingDeletion);
    fixture.cancel_deletion(&kek).await;
    assert_eq!(fixture.kms().describe(&kek, FG).await.unwrap().state, KekState::Disabled);
    fixture.enable(&kek).await;
    assert_eq!(unwrapped(fixture, &kek, &wrapped.blob).await, *plaintext.expose());
}

async fn a_missing_kek_is_denied_for_everything(fixture: &dyn KmsFixture) {
    let missing = fixture.missing_kek().await;
    let (_, wrapped) = generated(fixture, &fixture.create_kek().await).await;
    assert_unusable(fixture, &missing, &wrapped.blob).await;
    assert_denied(fixture.kms().describe(&missing, FG).await, &missing, "describe");
}

async fn describe_tells_the_kek_and_its_state(fixture: &dyn KmsFixture) {
    let kek = fixture.create_kek().await;
    let description = fixture.kms().describe(&kek, FG).await.unwrap();
    assert_eq!((description.kek, description.state), (kek.id.clone(), KekState::Enabled));
}

async fn a_repeated_call_changes_nothing_that_an_earlier_one_gave(fixture: &dyn KmsFixture) {
    let (kek, other) = (fixture.create_kek().await, fixture.create_kek().await);
    let (plaintext, wrapped) = generated(fixture, &kek).await;
    let kms = fixture.kms();
    for _ in 0..2 {
        generated(fixture, &kek).await;
        kms.wrap(&kek, &of_tenant_a(), &plaintext, Urgency::Background).await.unwrap();
        kms.rewrap(&kek, &other, &of_tenant_a(), &wrapped.blob, Urgency::Background).await.unwrap();
        assert_eq!(kms.describe(&kek, FG).await.unwrap(), kms.describe(&kek, FG).await.unwrap());
        assert_eq!(unwrapped(fixture, &kek, &wrapped.blob).await, *plaintext.expose());
    }
}

/// Hands the lines of the contract to another macro, after what that one is given.
macro_rules! with_every_line {
    ($then:ident! $($given:tt)*) => {
        $then! {
            $($given)*;
            what_generate_made_unwrap_opens,
            what_wrap_made_unwrap_opens,
            no_two_data_keys_are_the_same,
            no_other_kek_opens_a_wrapped_key,
            no_other_context_opens_a_wrapped_key,
            a_changed_wrapped_key_is_damaged,
            a_wrapped_key_cut_short_or_longer_is_damaged,
            what_was_wrapped_before_a_rotation_still_opens,
            a_rotation_shows_in_the_material,
            rewrap_moves_a_data_key_to_another_kek,
            rewrap_brings_a_data_key_to_the_current_material,
            rewrap_refuses_a_changed_wrapped_key,
            a_disabled_kek_is_denied_until_it_is_enabled,
            a_kek_pending_deletion_is_denied_until_that_is_cancelled,
            a_missing_kek_is_denied_for_everything,
            describe_tells_the_kek_and_its_state,
            a_repeated_call_changes_nothing_that_an_earlier_one_gave,
        }
    };
}

/// One test for each line of the contract, in a module named after the implementation.
macro_rules! tests_of {
    ($implementation:ident, $fixture:expr; $($line:ident,)+) => {
        mod $implementation {
            #[allow(unused_imports, clippy::wildcard_imports)]
            use super::*;

            $(#[tokio::test]
            async fn $line() {
                super::$line(&$fixture.await).await;
            })+
        }
    };
}

/// All lines in one go, for an implementation that takes long to start. It names the lines that it does not keep:
/// they are left out, and a name that is no line is an error.
macro_rules! lines_but {
    ($fixture:expr, $not_kept:expr; $($line:ident,)+) => {{
        let (fixture, not_kept): (&dyn KmsFixture, &[&str]) = ($fixture, $not_kept);
        let lines = [$(stringify!($line)),+];
        assert!(not_kept.iter().all(|name| lines.contains(name)), "{not_kept:?}");
        $(if !not_kept.contains(&stringify!($line)) {
            $line(fixture).await;
        })+
    }};
}

/// Holds an implementation to the lines of the contract, all but those that are known not to be kept.
pub(crate) async fn hold_to_all_but(fixture: &dyn KmsFixture, not_kept: &[&str]) {
    with_every_line!(lines_but! fixture, not_kept);
}

// The implementations. moto is held to it in kms_moto.rs.
with_every_line!(tests_of! local_encrypted, LocalFixture::new(Protection::Passphrase("correct horse battery".into())));
with_every_line!(tests_of! local_dev, LocalFixture::new(Protection::Dev));
with_every_line!(tests_of! aws, crate::kms_aws::EmulatorFixture::new());
with_every_line!(tests_of! aws_guarded, crate::kms_aws::EmulatorFixture::guarded());

struct LocalFixture {
    ring: LocalKeyRing,
    /// The owner's commands come from another process.
    admin: LocalKeyRing,
    _folder: tempfile::TempDir,
}

impl LocalFixture {
    async fn new(protection: Protection) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("keyring");
        let clock = Clock::manual(Timestamp::from_unix_ms(1_764_000_000_000));
        let admin = LocalKeyRing::create(&path, protection.clone(), clock.clone()).await.unwrap();
        let ring = LocalKeyRing::open(&path, protection, clock).await.unwrap();
        Self { ring, admin, _folder: folder }
    }
}

fn name(kek: &Kek) -> &str {
    match kek.id.home() {
        KekHome::Local { name } => name,
        KekHome::Aws { .. } => panic!("{} is not of a key ring", kek.id),
    }
}

#[async_trait]
impl KmsFixture for LocalFixture {
    fn kms(&self) -> &dyn Kms {
        &self.ring
    }

    async fn create_kek(&self) -> Kek {
        let count = self.admin.list().await.unwrap().len();
        Kek::direct(self.admin.add(&format!("kek-{count}")).await.unwrap().id)
    }

    async fn missing_kek(&self) -> Kek {
        Kek::direct("local:missing".parse().unwrap())
    }

    async fn disable(&self, kek: &Kek) {
        self.admin.disable(name(kek)).await.unwrap();
    }

    async fn enable(&self, kek: &Kek) {
        self.admin.enable(name(kek)).await.unwrap();
    }

    async fn rotate(&self, kek: &Kek) {
        self.admin.rotate(name(kek)).await.unwrap();
    }

    async fn schedule_deletion(&self, kek: &Kek) {
        self.admin.schedule_deletion(name(kek), Duration::from_hours(7 * 24)).await.unwrap();
    }

    async fn cancel_deletion(&self, kek: &Kek) {
        self.admin.cancel_deletion(name(kek)).await.unwrap();
    }
}
