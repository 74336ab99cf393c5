//! Clients of an emulator, and what its answers are checked with.

use std::collections::HashMap;
use std::fmt::Debug;

use aws_sdk_kms::Client;
use aws_sdk_kms::config::retry::RetryConfig;
use aws_sdk_kms::config::timeout::TimeoutConfig;
use aws_sdk_kms::config::{BehaviorVersion, Credentials, Region};
use aws_sdk_kms::error::ProvideErrorMetadata;
use aws_sdk_kms::operation::generate_data_key::GenerateDataKeyOutput;
use aws_sdk_kms::primitives::Blob;
use aws_sdk_kms::types::DataKeySpec;
use kms_emulator::Emulator;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;

pub(crate) const IRELAND: &str = "eu-west-1";
pub(crate) const FRANKFURT: &str = "eu-central-1";
pub(crate) const ACCOUNT: &str = "111122223333";
pub(crate) const OTHER_ACCOUNT: &str = "444455556666";

/// An emulator of two regions.
pub(crate) async fn start() -> Emulator {
    Emulator::builder().region(IRELAND).region(FRANKFURT).start().await.unwrap()
}

/// An SDK client that tries each call once, of the default account.
pub(crate) fn client(kms: &Emulator, region: &str) -> Client {
    client_of(&kms.url(), region, Credentials::new("AKIDEXAMPLE", "secret", None, None, "test"))
}

/// The same with the access key `access_key`; an account number stands for the account's root.
pub(crate) fn client_as(kms: &Emulator, region: &str, access_key: &str) -> Client {
    client_of(&kms.url(), region, Credentials::new(access_key, "secret", None, None, "test"))
}

pub(crate) fn client_of(url: &str, region: &str, credentials: Credentials) -> Client {
    let config = aws_sdk_kms::Config::builder()
        .behavior_version(BehaviorVersion::latest())
        .region(Region::new(region.to_owned()))
        .credentials_provider(credentials)
        .endpoint_url(url)
        .retry_config(RetryConfig::disabled())
        .timeout_config(TimeoutConfig::disabled())
        .build();
    Client::from_conf(config)
}

pub(crate) fn context(pairs: &[(&str, &str)]) -> HashMap<String, String> {
    pairs.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned())).collect()
}

pub(crate) async fn data_key(client: &Client, key: &str) -> GenerateDataKeyOutput {
    client.generate_data_key().key_id(key).key_spec(DataKeySpec::Aes256).send().await.unwrap()
}

pub(crate) fn blob_of(key: &GenerateDataKeyOutput) -> Blob {
    key.ciphertext_blob.clone().unwrap()
}

/// AWS's name of the error, and its message.
#[track_caller]
pub(crate) fn refused<T: Debug, E: ProvideErrorMetadata + Debug>(result: Result<T, E>) -> (String, String) {
    let error = result.expect_err("the call should be refused");
    let code = error.code().unwrap_or_else(|| panic!("no error of AWS's: {error:?}"));
    (code.to_owned(), error.message().unwrap_or_default().to_owned())
}

/// AWS's name of the error.
#[track_caller]
pub(crate) fn code<T: Debug, E: ProvideErrorMetadata + Debug>(result: Result<T, E>) -> String {
    refused(result).0
}

/// Sends a request of our own making; the answer with its head, until the server closes.
pub(crate) async fn raw(kms: &Emulator, request: &str) -> String {
    let mut stream = TcpStream::connect(kms.address()).await.unwrap();
    stream.write_all(request.as_bytes()).await.unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).await.unwrap();
    answer
}

/// A request to the emulator's controls; the body of the answer.
pub(crate) async fn control(kms: &Emulator, method: &str, path: &str, body: &str) -> serde_json::Value {
    let length = body.len();
    let answer = raw(
        kms,
        &format!(
            "{method} /_emulator/{path} HTTP/1.1\r\nHost: emulator\r\nConnection: close\r\n\
             Content-Type: application/json\r\nContent-Length: {length}\r\n\r\n{body}"
        ),
    )
    .await;
    let (head, body) = answer.split_once("\r\n\r\n").unwrap();
    assert!(head.starts_with("HTTP/1.1 2"), "{answer}");
    if body.is_empty() { serde_json::Value::Null } else { serde_json::from_str(body).unwrap() }
}
