//! How the program reaches AWS: with whose credentials, at which endpoint, by which clients, over how many connections.

use std::path::Path;
use std::process::Command;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};

use axum::Json;
use axum::http::{HeaderMap, StatusCode};
use axum::response::IntoResponse;
use axum::routing::{get, put};
use envelope::EncryptionContext;
use keyfold::kms::aws::AwsKms;
use keyfold::kms::{Kms as _, Urgency};
use keyfold::tenant::{AssumedRole, Kek};
use kms_emulator::{CreateKey, Emulator, Principal, Role};
use serde_json::json;
use tokio::io::{AsyncBufReadExt as _, AsyncWriteExt as _, BufReader};
use tokio::net::{TcpListener, TcpStream};
use tokio::task::JoinSet;

use crate::aws_program::{keyfold, printed, run};
use crate::kms_aws::{FRANKFURT, IRELAND, credentials, kek, options};

const ACCOUNT: &str = "arn:aws:iam::111122223333";
const TOKEN: &str = "a-token-of-the-cluster";

/// `keyfold tenant create`, which asks the KMS for the KEK, with nothing of AWS in its environment but these.
fn create_tenant(folder: &Path, kms_url: &str, kek: &str, variables: &[(&str, &str)]) -> Command {
    let mut command = keyfold(folder, kms_url);
    command.env_remove("AWS_ACCESS_KEY_ID").env_remove("AWS_SECRET_ACCESS_KEY");
    for proxy in
        ["HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY", "http_proxy", "https_proxy", "no_proxy", "ALL_PROXY"]
    {
        command.env_remove(proxy);
    }
    command.args(["tenant", "create", "acme", kek]).envs(variables.iter().copied());
    command
}

/// What a container's or an instance's agent gives out, each in its own way.
fn agent() -> axum::Router {
    fn given(access_key: &str) -> serde_json::Value {
        json!({
            "Code": "Success", "Type": "AWS-HMAC", "AccessKeyId": access_key, "SecretAccessKey": "secret",
            "Token": "session", "Expiration": "2099-01-01T00:00:00Z", "LastUpdated": "2026-01-01T00:00:00Z",
        })
    }
    /// An answer for who has shown this.
    fn to_whom(
        headers: &HeaderMap,
        name: &str,
        shown: &str,
        answer: impl IntoResponse,
    ) -> axum::response::Response {
        if headers.get(name).is_some_and(|value| value == shown) {
            return answer.into_response();
        }
        StatusCode::UNAUTHORIZED.into_response()
    }
    const METADATA: &str = "x-aws-ec2-metadata-token";
    axum::Router::new()
        .route(
            "/container",
            get(async |headers: HeaderMap| {
                to_whom(&headers, "authorization", TOKEN, Json(given("AKIACONTAINER")))
            }),
        )
        .route(
            "/latest/api/token",
            put(async || ([("x-aws-ec2-metadata-token-ttl-seconds", "21600")], TOKEN)),
        )
        .route(
            "/latest/meta-data/iam/security-credentials/",
            get(async |headers: HeaderMap| to_whom(&headers, METADATA, TOKEN, "keyfold")),
        )
        .route(
            "/latest/meta-data/iam/security-credentials/keyfold",
            get(async |headers: HeaderMap| to_whom(&headers, METADATA, TOKEN, Json(given("AKIAINSTANCE")))),
        )
}

/// Serves until the test's tasks end; its URL.
async fn served(tasks: &mut JoinSet<()>, router: axum::Router) -> String {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    tasks.spawn(async move { axum::serve(listener, router).await.unwrap() });
    format!("http://{address}")
}

async fn emulator_with_principals() -> Emulator {
    let mut builder = Emulator::builder().region(IRELAND).strict_credentials();
    for name in ["environment", "profile", "container", "instance"] {
        let access_key = format!("AKIA{}", name.to_uppercase());
        builder = builder.principal(access_key, Principal::new(format!("{ACCOUNT}:user/{name}")));
    }
    let web = Role::new(format!("{ACCOUNT}:role/web")).web_identity(TOKEN);
    let chained = Role::new(format!("{ACCOUNT}:role/chained")).trust(format!("{ACCOUNT}:user/profile"));
    builder.role(web).role(chained).start().await.unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn credentials_are_found_wherever_users_of_aws_have_them() {
    let mut tasks = JoinSet::new();
    let agent = served(&mut tasks, agent()).await;
    let emulator = emulator_with_principals().await;
    let kek = emulator.create_key(IRELAND, CreateKey::new()).unwrap();
    let files = tempfile::tempdir().unwrap();
    let file = |name: &str, content: &str| {
        std::fs::write(files.path().join(name), content).unwrap();
        files.path().join(name).to_str().unwrap().to_owned()
    };
    let token = file("token", TOKEN);
    let secrets = file(
        "credentials",
        "[default]\naws_access_key_id = AKIAPROFILE\naws_secret_access_key = secret\n\
         [named]\naws_access_key_id = AKIAPROFILE\naws_secret_access_key = secret\n",
    );
    let config = file(
        "config",
        &format!("[profile chained]\nrole_arn = {ACCOUNT}:role/chained\nsource_profile = named\n"),
    );
    let environment = [("AWS_ACCESS_KEY_ID", "AKIAENVIRONMENT"), ("AWS_SECRET_ACCESS_KEY", "secret")];
    let shared = ("AWS_SHARED_CREDENTIALS_FILE", secrets.as_str());
    let role = format!("{ACCOUNT}:role/web");
    let web = [
        ("AWS_WEB_IDENTITY_TOKEN_FILE", token.as_str()),
        ("AWS_ROLE_ARN", role.as_str()),
        ("AWS_ROLE_SESSION_NAME", "pod"),
    ];
    let container = format!("{agent}/container");
    let container = ("AWS_CONTAINER_CREDENTIALS_FULL_URI", container.as_str());
    let instance = [("AWS_EC2_METADATA_SERVICE_ENDPOINT", agent.as_str())];
    let user = |name: &str| format!("{ACCOUNT}:user/{name}");
    let session = |name: &str| format!("arn:aws:sts::111122223333:assumed-role/{name}");
    let sources: [(&str, Vec<(&str, &str)>, String); 9] = [
        ("environment", environment.to_vec(), user("environment")),
        ("environment before all", [&environment[..], &[shared], &web].concat(), user("environment")),
        ("default profile", vec![shared], user("profile")),
        ("named profile", vec![shared, ("AWS_PROFILE", "named")], user("profile")),
        (
            "a profile's role",
            vec![shared, ("AWS_CONFIG_FILE", &config), ("AWS_PROFILE", "chained")],
            session("chained/"),
        ),
        ("web identity", web.to_vec(), session("web/pod")),
        ("container", vec![container, ("AWS_CONTAINER_AUTHORIZATION_TOKEN", TOKEN)], user("container")),
        ("pod", vec![container, ("AWS_CONTAINER_AUTHORIZATION_TOKEN_FILE", &token)], user("container")),
        ("instance", instance.to_vec(), user("instance")),
    ];
    for (source, variables, expected) in sources {
        let folder = tempfile::tempdir().unwrap();
        let mark = emulator.mark();
        let made = run(create_tenant(folder.path(), &emulator.url(), &kek, &variables)).await;
        assert!(made.status.success(), "{source}: {}", printed(&made));
        let calls = emulator.calls_since(mark);
        let asked = calls.iter().find(|call| call.operation == "DescribeKey").unwrap();
        assert!(asked.principal.starts_with(&expected), "{source}: {}", asked.principal);
    }
    let folder = tempfile::tempdir().unwrap();
    let none = [("AWS_EC2_METADATA_DISABLED", "true")];
    let said = printed(&run(create_tenant(folder.path(), &emulator.url(), &kek, &none)).await);
    assert!(said.contains("credentials"), "{said}");
}

/// A proxy that passes nothing on; the hosts that it was asked for.
async fn proxy(tasks: &mut JoinSet<()>) -> (String, Arc<Mutex<Vec<String>>>) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("http://{}", listener.local_addr().unwrap());
    let asked: Arc<Mutex<Vec<String>>> = Arc::default();
    let hosts = Arc::clone(&asked);
    tasks.spawn(async move {
        loop {
            let (mut stream, _) = listener.accept().await.unwrap();
            let mut line = String::new();
            BufReader::new(&mut stream).read_line(&mut line).await.unwrap();
            hosts.lock().unwrap().push(line.split(' ').nth(1).unwrap_or_default().to_owned());
            let _ = stream.write_all(b"HTTP/1.1 502 Bad Gateway\r\ncontent-length: 0\r\n\r\n").await;
        }
    });
    (url, asked)
}

#[tokio::test(flavor = "multi_thread")]
async fn the_endpoint_is_aws_own_the_fips_one_or_the_one_that_is_set() {
    const KEK: &str = "arn:aws:kms:eu-central-1:111122223333:key/1234abcd-12ab-34cd-56ef-1234567890ab";
    let with_role = format!("{KEK},role={ACCOUNT}:role/keyfold");
    let mut tasks = JoinSet::new();
    let (proxy, asked) = proxy(&mut tasks).await;
    let vpce = "https://vpce-1-kms.{region}.vpce.example.com";
    for (kek, variables, host) in [
        (KEK, vec![], "kms.eu-central-1.amazonaws.com"),
        (KEK, vec![("AWS_USE_FIPS_ENDPOINT", "true")], "kms-fips.eu-central-1.amazonaws.com"),
        (KEK, vec![("KEYFOLD_AWS__FIPS", "true")], "kms-fips.eu-central-1.amazonaws.com"),
        (KEK, vec![("KEYFOLD_AWS__KMS_ENDPOINT", vpce)], "vpce-1-kms.eu-central-1.vpce.example.com"),
        (KEK, vec![("AWS_ENDPOINT_URL_KMS", "https://kms.example.com")], "kms.example.com"),
        (&with_role, vec![], "sts.eu-central-1.amazonaws.com"),
        (&with_role, vec![("KEYFOLD_AWS__FIPS", "true")], "sts-fips.eu-central-1.amazonaws.com"),
        (&with_role, vec![("KEYFOLD_AWS__STS_ENDPOINT", vpce)], "vpce-1-kms.eu-central-1.vpce.example.com"),
        (&with_role, vec![("AWS_ENDPOINT_URL_STS", "https://sts.example.com")], "sts.example.com"),
    ] {
        let folder = tempfile::tempdir().unwrap();
        let mut command = create_tenant(folder.path(), "", kek, &[]);
        command
            .env_remove("AWS_ENDPOINT_URL_KMS")
            .env_remove("AWS_ENDPOINT_URL_STS")
            .env("AWS_ACCESS_KEY_ID", "any")
            .env("AWS_SECRET_ACCESS_KEY", "any")
            .env("HTTPS_PROXY", &proxy)
            .env("KEYFOLD_AWS__TRIES_MAX", "1")
            .envs(variables.iter().copied());
        let refused = run(command).await;
        assert!(!refused.status.success());
        let hosts = std::mem::take(&mut *asked.lock().unwrap());
        assert_eq!(hosts, [format!("{host}:443")], "{variables:?}: {}", printed(&refused));
    }
}

/// Passes connections on, and counts them.
async fn counting_relay(tasks: &mut JoinSet<()>, to: std::net::SocketAddr) -> (String, Arc<AtomicUsize>) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("http://{}", listener.local_addr().unwrap());
    let connections: Arc<AtomicUsize> = Arc::default();
    let count = Arc::clone(&connections);
    tasks.spawn(async move {
        let mut relays = JoinSet::new();
        loop {
            let (mut from, _) = listener.accept().await.unwrap();
            count.fetch_add(1, Ordering::SeqCst);
            relays.spawn(async move {
                let mut to = TcpStream::connect(to).await.unwrap();
                let _ = tokio::io::copy_bidirectional(&mut from, &mut to).await;
            });
        }
    });
    (url, connections)
}

fn context() -> EncryptionContext {
    let mut context = EncryptionContext::new();
    context.insert("keyfold:tenant", "acme").unwrap();
    context
}

async fn generate(kms: &AwsKms, kek: &Kek) {
    kms.generate(kek, &context(), Urgency::Foreground).await.map(drop).unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_hundred_calls_to_keys_in_two_regions_share_a_few_connections() {
    let mut tasks = JoinSet::new();
    let emulator = Emulator::builder().region(IRELAND).region(FRANKFURT).start().await.unwrap();
    let (url, connections) = counting_relay(&mut tasks, emulator.address()).await;
    let keks =
        [IRELAND, FRANKFURT].map(|region| kek(&emulator.create_key(region, CreateKey::new()).unwrap()));
    let kms = Arc::new(AwsKms::with_credentials(options(&url), credentials("any")));
    for n in 0..100 {
        generate(&kms, &keks[n % 2]).await;
    }
    assert_eq!(emulator.count("GenerateDataKey"), 100);
    let one_after_the_other = connections.load(Ordering::SeqCst);
    // A connection that is put back a moment too late for the next call costs another one.
    assert!(one_after_the_other <= 10, "{one_after_the_other} connections for 100 calls");
    // As many at once take as many connections, and the next ones take those.
    for _ in 0..5 {
        let mut at_once = JoinSet::new();
        for n in 0..8 {
            let (kms, kek) = (Arc::clone(&kms), keks[n % 2].clone());
            at_once.spawn(async move { generate(&kms, &kek).await });
        }
        at_once.join_all().await;
    }
    let connections = connections.load(Ordering::SeqCst);
    assert!(connections <= 20, "{connections} connections for 140 calls, 8 at once");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_role_is_assumed_once_for_each_region_however_many_come_at_once() {
    let emulator = Emulator::builder()
        .region(IRELAND)
        .region(FRANKFURT)
        .role(Role::new(format!("{ACCOUNT}:role/one")).external_id("a"))
        .role(Role::new(format!("{ACCOUNT}:role/two")).external_id("b"))
        .start()
        .await
        .unwrap();
    let kms = Arc::new(AwsKms::with_credentials(options(&emulator.url()), credentials("any")));
    let in_role = |region: &str, name: &str, external_id: &str| {
        let arn = format!("{ACCOUNT}:role/{name}");
        let role = AssumedRole { arn: arn.as_str().into(), external_id: Some(external_id.into()) };
        Kek { role: Some(role), ..kek(&emulator.create_key(region, CreateKey::new()).unwrap()) }
    };
    // Two keys of each: the client is the role's, not the key's.
    let mut keks = Vec::new();
    for _ in 0..2 {
        for region in [IRELAND, FRANKFURT] {
            keks.extend([in_role(region, "one", "a"), in_role(region, "two", "b")]);
        }
    }
    let mut at_once = JoinSet::new();
    for n in 0..80 {
        let (kms, kek) = (Arc::clone(&kms), keks[n % keks.len()].clone());
        at_once.spawn(async move { generate(&kms, &kek).await });
    }
    at_once.join_all().await;
    let calls = emulator.calls();
    let mut assumed: Vec<_> =
        calls.iter().filter(|call| call.operation == "AssumeRole").map(|call| call.region.as_str()).collect();
    assumed.sort_unstable();
    assert_eq!(assumed, [FRANKFURT, FRANKFURT, IRELAND, IRELAND]);
    for call in calls.iter().filter(|call| call.operation == "GenerateDataKey") {
        assert!(
            call.principal.ends_with("/keyfold") && call.principal.contains("assumed-role"),
            "{}",
            call.principal
        );
    }
}
