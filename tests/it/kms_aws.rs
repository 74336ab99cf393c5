//! AWS KMS behind the contract of [`Kms`], against the emulator: what is particular to AWS.

use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use aws_sdk_kms::config::{Credentials, SharedCredentialsProvider};
use envelope::EncryptionContext;
use keyfold::clock::Clock;
use keyfold::kms::aws::{AwsKms, Options};
use keyfold::kms::guarded::{self, GuardedKms};
use keyfold::kms::{Kms, KmsError, OutageCause, Urgency};
use keyfold::tenant::{AssumedRole, Kek};
use kms_emulator::{CreateKey, Emulator, Fault, FaultScope, Principal, Role};

use crate::kms_contract::KmsFixture;

pub(crate) const IRELAND: &str = "eu-west-1";
pub(crate) const FRANKFURT: &str = "eu-central-1";
const FG: Urgency = Urgency::Foreground;

/// Credentials in place of the environment's: a test does not change its process's environment.
pub(crate) fn credentials(access_key: &str) -> SharedCredentialsProvider {
    SharedCredentialsProvider::new(Credentials::new(access_key, "secret", None, None, "test"))
}

pub(crate) fn options(url: &str) -> Options {
    Options { kms_endpoint: Some(url.to_owned()), sts_endpoint: Some(url.to_owned()), ..Options::default() }
}

/// AWS KMS at this address.
pub(crate) fn aws(url: &str) -> AwsKms {
    AwsKms::with_credentials(options(url), credentials("any"))
}

pub(crate) fn kek(arn: &str) -> Kek {
    Kek::direct(arn.parse().unwrap())
}

pub(crate) struct EmulatorFixture {
    emulator: Emulator,
    kms: Box<dyn Kms>,
}

impl EmulatorFixture {
    pub(crate) async fn new() -> Self {
        let emulator = Emulator::builder().region(IRELAND).region(FRANKFURT).start().await.unwrap();
        let kms = Box::new(aws(&emulator.url()));
        Self { emulator, kms }
    }

    pub(crate) async fn guarded() -> Self {
        let Self { emulator, .. } = Self::new().await;
        let inner = Arc::new(aws(&emulator.url()));
        let kms = Box::new(GuardedKms::new(inner, Clock::system(), guarded::Options::default()));
        Self { emulator, kms }
    }
}

#[async_trait]
impl KmsFixture for EmulatorFixture {
    fn kms(&self) -> &dyn Kms {
        &*self.kms
    }

    async fn create_kek(&self) -> Kek {
        kek(&self.emulator.create_key(IRELAND, CreateKey::new()).unwrap())
    }

    async fn missing_kek(&self) -> Kek {
        kek("arn:aws:kms:eu-west-1:111122223333:key/00000000-0000-0000-0000-000000000000")
    }

    async fn disable(&self, kek: &Kek) {
        self.emulator.disable_key(kek.id.as_str()).unwrap();
    }

    async fn enable(&self, kek: &Kek) {
        self.emulator.enable_key(kek.id.as_str()).unwrap();
    }

    async fn rotate(&self, kek: &Kek) {
        self.emulator.rotate_key(kek.id.as_str()).unwrap();
    }

    async fn schedule_deletion(&self, kek: &Kek) {
        self.emulator.schedule_deletion(kek.id.as_str(), 7).unwrap();
    }

    async fn cancel_deletion(&self, kek: &Kek) {
        self.emulator.cancel_deletion(kek.id.as_str()).unwrap();
    }
}

fn context() -> EncryptionContext {
    let mut context = EncryptionContext::new();
    context.insert("keyfold:tenant", "acme").unwrap();
    context.insert("keyfold:key", "default").unwrap();
    context
}

async fn one_key() -> (Emulator, AwsKms, Kek) {
    let emulator = Emulator::builder().region(IRELAND).region(FRANKFURT).start().await.unwrap();
    let kms = aws(&emulator.url());
    let kek = kek(&emulator.create_key(IRELAND, CreateKey::new()).unwrap());
    (emulator, kms, kek)
}

#[tokio::test]
async fn every_call_names_its_key_and_carries_its_context() {
    let (emulator, kms, first) = one_key().await;
    let second = kek(&emulator.create_key(IRELAND, CreateKey::new()).unwrap());
    let generated = kms.generate(&first, &context(), FG).await.unwrap();
    kms.unwrap(&first, &context(), &generated.wrapped.blob, FG).await.unwrap();
    kms.wrap(&first, &context(), &generated.plaintext, FG).await.unwrap();
    kms.rewrap(&first, &second, &context(), &generated.wrapped.blob, FG).await.unwrap();
    let calls = emulator.calls();
    let operations: Vec<&str> = calls.iter().map(|call| call.operation.as_str()).collect();
    assert_eq!(operations, ["GenerateDataKey", "Decrypt", "Encrypt", "ReEncrypt"]);
    for call in &calls {
        assert_eq!(call.region, IRELAND);
        assert!(call.key.is_some(), "{}", call.operation);
        let pairs = format!("{:?}", call.encryption_context);
        assert!(pairs.contains("acme") && pairs.contains("keyfold:key"), "{}: {pairs}", call.operation);
    }
    let moved = &calls[3];
    assert_eq!(moved.source_key.as_deref(), Some(first.id.as_str()));
    assert_eq!(moved.key.as_deref(), Some(second.id.as_str()));
    assert_eq!(
        format!("{:?}", moved.source_encryption_context),
        format!("{:?}", calls[0].encryption_context)
    );
}

#[tokio::test]
async fn a_failed_call_is_not_tried_again_by_the_sdk() {
    let (emulator, kms, kek) = one_key().await;
    for fault in [Fault::Internal, Fault::Unavailable, Fault::throttle(0), Fault::Reset, Fault::BadGateway] {
        let (id, mark) = (emulator.faults().set(FaultScope::any(), fault.clone()), emulator.mark());
        let failure = kms.generate(&kek, &context(), FG).await.map(drop).unwrap_err();
        assert!(matches!(failure, KmsError::Outage { .. }), "{fault:?}: {failure}");
        assert_eq!(emulator.calls_since(mark).len(), 1, "{fault:?}");
        emulator.faults().remove(id);
    }
}

#[tokio::test]
async fn what_the_kms_says_is_told_apart() {
    use OutageCause::{Credentials, KeyUnavailable, Throttled, Unreachable};
    let (emulator, kms, kek) = one_key().await;
    let faults = [
        (Fault::Internal, Unreachable),
        (Fault::DependencyTimeout, Unreachable),
        (Fault::Unavailable, Unreachable),
        (Fault::BadGateway, Unreachable),
        (Fault::Reset, Unreachable),
        (Fault::KeyUnavailable, KeyUnavailable),
        (Fault::throttle(0), Throttled),
    ];
    for (fault, expected) in faults {
        let id = emulator.faults().set(FaultScope::any(), fault.clone());
        let failure = kms.generate(&kek, &context(), FG).await.map(drop).unwrap_err();
        assert!(
            matches!(&failure, KmsError::Outage { cause, .. } if *cause == expected),
            "{fault:?}: {failure:?}"
        );
        emulator.faults().remove(id);
    }
    emulator.faults().set(FaultScope::any(), Fault::Deny);
    let denied = kms.generate(&kek, &context(), FG).await.map(drop).unwrap_err();
    assert!(matches!(&denied, KmsError::Denied { .. }), "{denied}");
    // The operator sees which permission is missing.
    assert!(denied.to_string().contains("kms:GenerateDataKey"), "{denied}");

    let strict = Emulator::builder().region(IRELAND).strict_credentials().start().await.unwrap();
    let failure = aws(&strict.url()).generate(&kek, &context(), FG).await.map(drop).unwrap_err();
    assert!(matches!(&failure, KmsError::Outage { cause: Credentials, .. }), "{failure:?}");
}

#[tokio::test]
async fn nobody_at_the_address_is_an_outage() {
    let (emulator, kms, kek) = one_key().await;
    emulator.shutdown().await;
    let failure = kms.generate(&kek, &context(), FG).await.map(drop).unwrap_err();
    assert!(matches!(&failure, KmsError::Outage { cause: OutageCause::Unreachable, .. }), "{failure:?}");
}

#[tokio::test]
async fn connections_are_used_again_and_each_region_is_asked_in_its_own_name() {
    let (emulator, kms, ireland) = one_key().await;
    let frankfurt = kek(&emulator.create_key(FRANKFURT, CreateKey::new()).unwrap());
    let generated = kms.generate(&ireland, &context(), FG).await.unwrap();
    // Between regions AWS has no ReEncrypt: the key comes out of the one and goes into the other.
    let moved = kms.rewrap(&ireland, &frankfurt, &context(), &generated.wrapped.blob, FG).await.unwrap();
    assert_eq!(moved.kek, frankfurt.id);
    let opened = kms.unwrap(&frankfurt, &context(), &moved.blob, FG).await.unwrap();
    assert_eq!(opened.expose(), generated.plaintext.expose());
    let regions: Vec<_> = emulator.calls().into_iter().map(|call| (call.region, call.operation)).collect();
    let call = |region: &str, operation: &str| (region.to_owned(), operation.to_owned());
    let expected = [
        call(IRELAND, "GenerateDataKey"),
        call(IRELAND, "Decrypt"),
        call(FRANKFURT, "Encrypt"),
        call(FRANKFURT, "Decrypt"),
    ];
    assert_eq!(regions, expected);
}

#[tokio::test]
async fn replicas_of_a_multi_region_key_open_each_others_wrapped_keys() {
    let (emulator, kms, _) = one_key().await;
    let primary = emulator.create_key(IRELAND, CreateKey::new().multi_region()).unwrap();
    let replica = emulator.replicate_key(&primary, FRANKFURT).unwrap();
    let generated = kms.generate(&kek(&primary), &context(), FG).await.unwrap();
    let opened = kms.unwrap(&kek(&replica), &context(), &generated.wrapped.blob, FG).await.unwrap();
    assert_eq!(opened.expose(), generated.plaintext.expose());
}

const CUSTOMER: &str = "444455556666";
const ROLE: &str = "arn:aws:iam::444455556666:role/keyfold";

/// A key in a customer's account that only his role may use.
async fn customers_key() -> (Emulator, AwsKms, String) {
    let role = Role::new(ROLE).external_id("tenant-7").trust("arn:aws:iam::111122223333:user/service");
    let service = Principal::new("arn:aws:iam::111122223333:user/service");
    let builder = Emulator::builder().region(IRELAND).principal("AKIASERVICE", service).role(role);
    let emulator = builder.start().await.unwrap();
    let arn = emulator.create_key(IRELAND, CreateKey::new().account(CUSTOMER)).unwrap();
    let kms = AwsKms::with_credentials(options(&emulator.url()), credentials("AKIASERVICE"));
    (emulator, kms, arn)
}

fn in_role(arn: &str, external_id: Option<&str>) -> Kek {
    let role = AssumedRole { arn: ROLE.into(), external_id: external_id.map(Into::into) };
    Kek { role: Some(role), ..kek(arn) }
}

#[tokio::test]
async fn a_kek_in_another_account_is_reached_through_its_role_and_external_id() {
    let (emulator, kms, arn) = customers_key().await;
    let denied = kms.generate(&kek(&arn), &context(), FG).await.map(drop).unwrap_err();
    assert!(matches!(denied, KmsError::Denied { .. }), "without the role: {denied}");

    let mark = emulator.mark();
    let kek = in_role(&arn, Some("tenant-7"));
    let generated = kms.generate(&kek, &context(), FG).await.unwrap();
    kms.unwrap(&kek, &context(), &generated.wrapped.blob, FG).await.unwrap();
    let calls = emulator.calls_since(mark);
    let operations: Vec<&str> = calls.iter().map(|call| call.operation.as_str()).collect();
    assert_eq!(operations, ["AssumeRole", "GenerateDataKey", "Decrypt"], "the session is kept");
    assert!(calls[1].principal.contains("assumed-role/keyfold/keyfold"), "{}", calls[1].principal);
}

#[tokio::test]
async fn a_role_that_does_not_trust_the_service_is_a_denial_and_an_sts_that_is_down_an_outage() {
    let (emulator, kms, arn) = customers_key().await;
    let denied = kms.generate(&in_role(&arn, Some("tenant-8")), &context(), FG).await.map(drop).unwrap_err();
    assert!(matches!(&denied, KmsError::Denied { .. }), "{denied:?}");
    let denied = kms.generate(&in_role(&arn, None), &context(), FG).await.map(drop).unwrap_err();
    assert!(matches!(&denied, KmsError::Denied { .. }), "{denied:?}");

    emulator.faults().set(FaultScope::any().operation("AssumeRole"), Fault::Unavailable);
    let outage = kms.generate(&in_role(&arn, Some("tenant-7")), &context(), FG).await.map(drop).unwrap_err();
    assert!(matches!(&outage, KmsError::Outage { cause: OutageCause::Credentials, .. }), "{outage:?}");
    emulator.faults().clear();
    assert!(kms.generate(&in_role(&arn, Some("tenant-7")), &context(), FG).await.is_ok());
}

/// The block of docs/aws.md that is marked so.
fn documented(policy: &str) -> String {
    let page = std::fs::read_to_string(concat!(env!("CARGO_MANIFEST_DIR"), "/docs/aws.md")).unwrap();
    let (_, after) = page.split_once(&format!("```json {policy}\n")).unwrap();
    after.split_once("```").unwrap().0.to_owned()
}

/// Every call that there is, on this key.
async fn every_call(kms: &dyn Kms, kek: &Kek, context: &EncryptionContext) -> Result<(), KmsError> {
    kms.describe(kek, FG).await?;
    let made = kms.generate(kek, context, FG).await?;
    kms.unwrap(kek, context, &made.wrapped.blob, FG).await?;
    kms.wrap(kek, context, &made.plaintext, FG).await?;
    kms.rewrap(kek, kek, context, &made.wrapped.blob, FG).await.map(drop)
}

#[tokio::test]
async fn the_iam_policy_of_the_documentation_is_enough_and_no_action_of_it_too_much() {
    const SERVICE: &str = "arn:aws:iam::111122223333:user/service";
    let emulator = Emulator::builder().region(IRELAND).start().await.unwrap();
    let arn = emulator.create_key(IRELAND, CreateKey::new()).unwrap();
    let example = "arn:aws:kms:eu-west-1:111122223333:key/1234abcd-12ab-34cd-56ef-1234567890ab";
    let policy = documented("iam-policy").replace(example, &arn);
    let kms = AwsKms::with_credentials(options(&emulator.url()), credentials("AKIASERVICE"));
    let principal = |policy: &str| Principal::new(SERVICE).identity_policy(policy);
    emulator.add_principal("AKIASERVICE", principal(&policy)).unwrap();
    every_call(&kms, &kek(&arn), &context()).await.unwrap();
    let actions = policy.lines().filter_map(|line| line.trim().strip_prefix("\"kms:")).collect::<Vec<_>>();
    assert_eq!(actions.len(), 6);
    for action in actions {
        let action = action.trim_end_matches(['"', ',']);
        let without = policy.replace(&format!("\"kms:{action}\""), "\"kms:ListKeys\"");
        emulator.add_principal("AKIASERVICE", principal(&without)).unwrap();
        let outcome = every_call(&kms, &kek(&arn), &context()).await;
        assert!(matches!(&outcome, Err(KmsError::Denied { .. })), "without {action}: {outcome:?}");
    }
}

#[tokio::test]
async fn the_key_policy_of_the_documentation_binds_the_key_to_its_tenant() {
    let service = Principal::new("arn:aws:iam::999988887777:role/keyfold");
    let builder = Emulator::builder().region(IRELAND).principal("AKIASERVICE", service);
    let emulator = builder.start().await.unwrap();
    let arn = emulator.create_key(IRELAND, CreateKey::new().policy(documented("key-policy"))).unwrap();
    let kms = AwsKms::with_credentials(options(&emulator.url()), credentials("AKIASERVICE"));
    every_call(&kms, &kek(&arn), &context()).await.unwrap();
    let mut of_another = EncryptionContext::new();
    of_another.insert("keyfold:tenant", "emil").unwrap();
    let outcome = kms.generate(&kek(&arn), &of_another, FG).await.map(drop);
    assert!(matches!(outcome, Err(KmsError::Denied { .. })), "{outcome:?}");
}

#[tokio::test]
async fn an_answer_about_another_key_is_not_believed() {
    // A proxy that sends every call to another key: it answers correctly, about the wrong one.
    let (emulator, kms, real) = one_key().await;
    let generated = kms.generate(&real, &context(), FG).await.unwrap();
    let proxy = lying_proxy(emulator.url(), real.id.to_string()).await;
    let asked = kek("arn:aws:kms:eu-west-1:111122223333:key/00000000-0000-0000-0000-000000000000");
    let kms = aws(&proxy);
    let outcomes = [
        kms.generate(&asked, &context(), FG).await.map(drop),
        kms.wrap(&asked, &context(), &generated.plaintext, FG).await.map(drop),
        kms.unwrap(&asked, &context(), &generated.wrapped.blob, FG).await.map(drop),
        kms.rewrap(&asked, &asked, &context(), &generated.wrapped.blob, FG).await.map(drop),
        kms.describe(&asked, FG).await.map(drop),
    ];
    for outcome in outcomes {
        assert!(matches!(&outcome, Err(KmsError::Damaged { .. })), "{outcome:?}");
    }
}

/// Passes requests on with every key's id replaced by `key`.
#[expect(clippy::disallowed_methods, reason = "it ends with the test's runtime")]
async fn lying_proxy(target: String, key: String) -> String {
    use axum::body::Bytes;
    use axum::http::HeaderMap;
    let _ = rustls::crypto::aws_lc_rs::default_provider().install_default();
    let client = reqwest::Client::builder().no_proxy().build().unwrap();
    let answer = move |headers: HeaderMap, body: Bytes| async move {
        let mut call: serde_json::Value = serde_json::from_slice(&body).unwrap();
        for name in ["KeyId", "SourceKeyId", "DestinationKeyId"] {
            if call.get(name).is_some() {
                call[name] = key.clone().into();
            }
        }
        let mut request = client.post(&target).body(call.to_string());
        for name in ["authorization", "x-amz-target", "content-type", "x-amz-date"] {
            request = request.header(name, headers[name].clone());
        }
        let answer = request.send().await.unwrap();
        (answer.status(), answer.bytes().await.unwrap())
    };
    let router = axum::Router::new().fallback(axum::routing::any(answer));
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    tokio::spawn(async move { axum::serve(listener, router).await });
    format!("http://{address}")
}

#[tokio::test]
async fn a_region_that_keeps_silent_is_given_up_in_time_by_the_guard() {
    let (emulator, kms, kek) = one_key().await;
    let clock = Clock::manual(keyfold::clock::Timestamp::from_unix_ms(0));
    let guard = GuardedKms::new(Arc::new(kms), clock.clone(), guarded::Options::default());
    emulator.faults().set(FaultScope::any(), Fault::BlackHole);
    let started = clock.monotonic();
    let context = context();
    let call = guard.generate(&kek, &context, FG);
    tokio::pin!(call);
    let failure = loop {
        tokio::select! {
            outcome = &mut call => break outcome.map(drop).unwrap_err(),
            () = tokio::time::sleep(Duration::from_millis(5)) => clock.advance(Duration::from_millis(100)),
        }
    };
    assert!(matches!(failure, KmsError::Outage { .. }), "{failure}");
    let took = clock.monotonic().checked_sub(started).unwrap();
    assert!(took <= Duration::from_millis(5_100), "{took:?}");
    assert!(emulator.calls().len() >= 2, "it is tried again within its time");
}
