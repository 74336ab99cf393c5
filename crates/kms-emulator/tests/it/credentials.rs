//! Who calls: signatures, registered access keys, assumed roles.

use std::time::Duration;

use aws_config::sts::AssumeRoleProvider;
use aws_sdk_kms::config::{Credentials, ProvideCredentials, Region};
use kms_emulator::{CreateKey, Emulator, Principal, Role};
use serde_json::json;

use crate::world::{
    ACCOUNT, FRANKFURT, IRELAND, OTHER_ACCOUNT, client, client_as, client_of, code, data_key, raw, refused,
    start,
};

const ROLE: &str = "arn:aws:iam::444455556666:role/team/keyfold";

fn request(headers: &str, body: &str) -> String {
    let length = body.len();
    format!(
        "POST / HTTP/1.1\r\nHost: kms\r\nConnection: close\r\nContent-Type: application/x-amz-json-1.1\r\n\
         {headers}Content-Length: {length}\r\n\r\n{body}"
    )
}

const SIGNED: &str = "Authorization: AWS4-HMAC-SHA256 Credential=A/20260101/eu-west-1/kms/aws4_request, SignedHeaders=host, \
     Signature=0\r\n";

#[tokio::test]
async fn an_unsigned_request_is_refused() {
    let kms = start().await;
    let answer = raw(&kms, &request("X-Amz-Target: TrentService.ListKeys\r\n", "{}")).await;
    let (head, body) = answer.split_once("\r\n\r\n").unwrap();
    assert!(head.starts_with("HTTP/1.1 400"), "{head}");
    assert!(head.contains("x-amzn-errortype: MissingAuthenticationTokenException"), "{head}");
    assert!(head.contains("content-type: application/x-amz-json-1.1"), "{head}");
    assert!(head.contains("x-amzn-requestid: "), "{head}");
    let expected =
        json!({"__type": "MissingAuthenticationTokenException", "message": "Missing Authentication Token"});
    assert_eq!(serde_json::from_str::<serde_json::Value>(body).unwrap(), expected);
    assert_eq!(kms.calls()[0].error_code(), Some("MissingAuthenticationTokenException"));
}

#[tokio::test]
async fn malformed_requests_are_told_what_is_wrong() {
    let kms = start().await;
    let target = "X-Amz-Target: TrentService.ListKeys\r\n";
    let other_service = SIGNED.replace("/kms/", "/s3/");
    let other_region = SIGNED.replace("eu-west-1", "mars-north-1");
    for (headers, body, expected) in [
        (format!("{SIGNED}{target}"), "{}", "200"),
        (format!("{SIGNED}{target}"), "", "200"),
        (format!("{SIGNED}{target}"), "{", "SerializationException"),
        (format!("{SIGNED}{target}"), r#"{"Limit": "x"}"#, "SerializationException"),
        (format!("{SIGNED}X-Amz-Target: TrentService.Nothing\r\n"), "{}", "UnknownOperationException"),
        (format!("{SIGNED}X-Amz-Target: Other.ListKeys\r\n"), "{}", "UnknownOperationException"),
        (SIGNED.to_owned(), "{}", "UnknownOperationException"),
        (format!("Authorization: Bearer x\r\n{target}"), "{}", "IncompleteSignatureException"),
        (format!("{other_service}{target}"), "{}", "InvalidSignatureException"),
        (format!("{other_region}{target}"), "{}", "InvalidSignatureException"),
    ] {
        let answer = raw(&kms, &request(&headers, body)).await;
        assert!(answer.contains(expected), "{headers}{body}: {answer}");
    }
}

#[tokio::test]
async fn the_access_key_tells_account_and_principal() {
    let kms = Emulator::builder()
        .region(IRELAND)
        .account("999900001111")
        .principal("AKIAALICE", Principal::new("arn:aws:iam::444455556666:user/alice"))
        .start()
        .await
        .unwrap();
    for (access_key, account, principal) in [
        ("anything", "999900001111", "arn:aws:iam::999900001111:root"),
        (OTHER_ACCOUNT, OTHER_ACCOUNT, "arn:aws:iam::444455556666:root"),
        ("AKIAALICE", OTHER_ACCOUNT, "arn:aws:iam::444455556666:user/alice"),
    ] {
        let made = client_as(&kms, IRELAND, access_key).create_key().send().await.unwrap();
        assert_eq!(made.key_metadata.unwrap().aws_account_id(), Some(account));
        assert_eq!(kms.calls().pop().unwrap().principal, principal);
    }
}

#[tokio::test]
async fn unknown_access_keys_can_be_refused() {
    let kms = Emulator::builder().region(IRELAND).strict_credentials().start().await.unwrap();
    let answer = client(&kms, IRELAND).list_keys().send().await;
    assert_eq!(code(answer), "UnrecognizedClientException");
    kms.add_principal("AKIDEXAMPLE", Principal::new("arn:aws:iam::111122223333:user/bob")).unwrap();
    assert!(client(&kms, IRELAND).list_keys().send().await.is_ok());
}

/// Credentials as aws-config gets them: AssumeRole, over HTTP.
async fn assume(
    kms: &Emulator,
    access_key: &str,
    external_id: Option<&str>,
) -> Result<Credentials, impl std::fmt::Debug> {
    let config = aws_config::defaults(aws_config::BehaviorVersion::latest())
        .region(Region::new(IRELAND))
        .endpoint_url(kms.url())
        .credentials_provider(Credentials::new(access_key, "secret", None, None, "test"))
        .load()
        .await;
    let mut role = AssumeRoleProvider::builder(ROLE).session_name("it").region(Region::new(IRELAND));
    if let Some(id) = external_id {
        role = role.external_id(id);
    }
    role.configure(&config).build().await.provide_credentials().await
}

#[tokio::test]
async fn a_role_is_assumed_with_its_external_id() {
    let kms = start().await;
    kms.add_role(Role::new(ROLE).external_id("tenant-7").trust(ACCOUNT)).unwrap();
    let theirs = kms.create_key(IRELAND, CreateKey::new().account(OTHER_ACCOUNT)).unwrap();
    assert_eq!(
        code(client(&kms, IRELAND).generate_data_key().key_id(&theirs).number_of_bytes(32).send().await),
        "AccessDeniedException"
    );
    for wrong in [None, Some("tenant-8")] {
        let error = format!("{:?}", assume(&kms, ACCOUNT, wrong).await.unwrap_err());
        assert!(error.contains("AccessDenied") && error.contains("sts:AssumeRole"), "{error}");
    }
    // Not for a caller whom the role does not trust, either.
    assert!(assume(&kms, "777788889999", Some("tenant-7")).await.is_err());

    let credentials = assume(&kms, ACCOUNT, Some("tenant-7")).await.unwrap();
    let client = client_of(&kms.url(), IRELAND, credentials.clone());
    assert_eq!(data_key(&client, &theirs).await.key_id(), Some(theirs.as_str()));
    let call = kms.calls().pop().unwrap();
    assert_eq!(call.principal, "arn:aws:sts::444455556666:assumed-role/keyfold/it");
    assert_eq!(call.account, OTHER_ACCOUNT);
    assert_eq!(kms.count("AssumeRole"), 4);

    // Key policies name the role.
    let policy = json!({"Statement": [
        {"Effect": "Allow", "Principal": {"AWS": OTHER_ACCOUNT}, "Action": "kms:*", "Resource": "*"},
        {"Effect": "Deny", "Principal": {"AWS": ROLE}, "Action": "kms:Generate*", "Resource": "*"},
    ]});
    kms.set_policy(&theirs, &policy.to_string()).unwrap();
    let (name, message) =
        refused(client.generate_data_key().key_id(&theirs).number_of_bytes(32).send().await);
    assert_eq!(name, "AccessDeniedException");
    assert!(
        message.starts_with("User: arn:aws:sts::444455556666:assumed-role/keyfold/it is not"),
        "{message}"
    );

    // Not without the session's token, and not for ever.
    let id = credentials.access_key_id();
    assert_eq!(code(client_as(&kms, IRELAND, id).list_keys().send().await), "UnrecognizedClientException");
    assert!(client.list_keys().send().await.is_ok());
    kms.advance(Duration::from_hours(1));
    assert_eq!(code(client.list_keys().send().await), "ExpiredTokenException");
}

#[tokio::test]
async fn a_role_is_assumed_with_a_web_identity() {
    let kms = start().await;
    kms.add_role(Role::new(ROLE).external_id("x").web_identity("the.jwt.token")).unwrap();
    let ask = |token: &str| {
        let body = format!(
            "Action=AssumeRoleWithWebIdentity&Version=2011-06-15&RoleSessionName=pod&WebIdentityToken={token}&\
             RoleArn=arn%3Aaws%3Aiam%3A%3A444455556666%3Arole%2Fteam%2Fkeyfold"
        );
        let request = request("", &body);
        request.replace("application/x-amz-json-1.1", "application/x-www-form-urlencoded")
    };
    let answer = raw(&kms, &ask("another")).await;
    assert!(answer.starts_with("HTTP/1.1 403") && answer.contains("<Code>AccessDenied</Code>"), "{answer}");
    let answer = raw(&kms, &ask("the.jwt.token")).await;
    assert!(answer.contains("<AssumeRoleWithWebIdentityResult>"), "{answer}");
    let part = |name: &str| {
        let (_, rest) = answer.split_once(&format!("<{name}>")).unwrap();
        rest.split_once('<').unwrap().0.to_owned()
    };
    let (id, secret, token) = (part("AccessKeyId"), part("SecretAccessKey"), part("SessionToken"));
    let credentials = Credentials::new(id, secret, Some(token), None, "test");
    assert!(client_of(&kms.url(), FRANKFURT, credentials).list_keys().send().await.is_ok());
}
