//! moto, an AWS KMS that nobody here wrote, as the second opinion on the wire.

use std::io::{BufRead as _, BufReader};
use std::process::{Child, Command, Stdio};

use async_trait::async_trait;
use aws_sdk_kms::Client;
use aws_sdk_kms::config::{BehaviorVersion, Region};
use keyfold::kms::Kms;
use keyfold::kms::aws::AwsKms;
use keyfold::tenant::Kek;

use crate::kms_aws::{IRELAND, aws, credentials, kek};
use crate::kms_contract::{KmsFixture, hold_to_all_but};

/// Where moto differs from AWS, by the line of the contract that shows it.
const NOT_KEPT: &[&str] = &[
    // A KeyId that is not the blob's is AccessDeniedException, where AWS has IncorrectKeyException.
    "no_other_kek_opens_a_wrapped_key",
    "rewrap_moves_a_data_key_to_another_kek",
    // A context is bound by its pairs' text one after the other: {a: "b", c: "d"} is {ab: "cd"}.
    "no_other_context_opens_a_wrapped_key",
    // The first bytes name the key: changed, they are AccessDeniedException.
    "a_changed_wrapped_key_is_damaged",
    "rewrap_refuses_a_changed_wrapped_key",
    // ReEncrypt does not look at SourceKeyId.
    "a_missing_kek_is_denied_for_everything",
    // Disabled keys, and keys pending deletion, go on working.
    "a_disabled_kek_is_denied_until_it_is_enabled",
    "a_kek_pending_deletion_is_denied_until_that_is_cancelled",
];

#[tokio::test]
async fn the_contract_is_kept_against_moto_in_all_that_moto_does_as_aws_does() {
    hold_to_all_but(&MotoFixture::new(), NOT_KEPT).await;
}

/// A moto server. It ends with the value.
pub(crate) struct Moto {
    child: Child,
    pub(crate) url: String,
}

impl Moto {
    pub(crate) fn start() -> Self {
        let mut child = Command::new(python())
            .args(["-u", "-m", "moto.server", "-H", "127.0.0.1", "-p", "0"])
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()
            .expect("KEYFOLD_TEST_PYTHON does not run");
        let lines = BufReader::new(child.stderr.take().unwrap()).lines();
        let mut said = String::new();
        for line in lines.map_while(Result::ok) {
            if let Some((_, url)) = line.split_once("Running on ") {
                return Self { child, url: url.trim().to_owned() };
            }
            said.push_str(&line);
            said.push('\n');
        }
        panic!("moto does not start (KEYFOLD_TEST_PYTHON needs the package moto[server]):\n{said}");
    }
}

impl Drop for Moto {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// The interpreter comes from whoever runs the tests.
#[expect(clippy::disallowed_methods, reason = "the test has no configuration of its own")]
pub(crate) fn python() -> String {
    std::env::var("KEYFOLD_TEST_PYTHON").expect(
        "KEYFOLD_TEST_PYTHON is not set: it must name a Python that has boto3 and moto[server] \
         (python3 -m venv DIR && DIR/bin/pip install boto3 'moto[server]'; KEYFOLD_TEST_PYTHON=DIR/bin/python)",
    )
}

struct MotoFixture {
    kms: AwsKms,
    owner: Client,
    _moto: Moto,
}

impl MotoFixture {
    fn new() -> Self {
        let moto = Moto::start();
        Self { kms: aws(&moto.url), owner: owner(&moto.url), _moto: moto }
    }
}

/// A client with the rights of the keys' owner.
pub(crate) fn owner(url: &str) -> Client {
    let config = aws_sdk_kms::Config::builder()
        .behavior_version(BehaviorVersion::latest())
        .region(Region::new(IRELAND))
        .endpoint_url(url)
        .credentials_provider(credentials("owner"))
        .build();
    Client::from_conf(config)
}

pub(crate) async fn create_key(owner: &Client) -> String {
    owner.create_key().send().await.unwrap().key_metadata.unwrap().arn.unwrap()
}

/// moto's administration knows keys by their id only.
fn id(kek: &Kek) -> &str {
    kek.id.as_str().rsplit('/').next().unwrap()
}

#[async_trait]
impl KmsFixture for MotoFixture {
    fn kms(&self) -> &dyn Kms {
        &self.kms
    }

    async fn create_kek(&self) -> Kek {
        kek(&create_key(&self.owner).await)
    }

    async fn missing_kek(&self) -> Kek {
        kek("arn:aws:kms:eu-west-1:123456789012:key/00000000-0000-0000-0000-000000000000")
    }

    async fn disable(&self, kek: &Kek) {
        self.owner.disable_key().key_id(id(kek)).send().await.unwrap();
    }

    async fn enable(&self, kek: &Kek) {
        self.owner.enable_key().key_id(id(kek)).send().await.unwrap();
    }

    async fn rotate(&self, kek: &Kek) {
        self.owner.rotate_key_on_demand().key_id(id(kek)).send().await.unwrap();
    }

    async fn schedule_deletion(&self, kek: &Kek) {
        self.owner.schedule_key_deletion().key_id(id(kek)).send().await.unwrap();
    }

    async fn cancel_deletion(&self, kek: &Kek) {
        self.owner.cancel_key_deletion().key_id(id(kek)).send().await.unwrap();
    }
}
