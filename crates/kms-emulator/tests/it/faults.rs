//! Faults on demand.

use std::time::{Duration, Instant};

use aws_sdk_kms::error::{ProvideErrorMetadata as _, SdkError};
use kms_emulator::{CreateKey, Emulator, Fault, FaultScope, Outcome};

use crate::world::{FRANKFURT, IRELAND, blob_of, client, code, control, data_key, raw, refused, start};

const PATIENCE: Duration = Duration::from_millis(300);

#[tokio::test]
async fn errors_of_the_service_hit_their_region_and_operation_only() {
    let kms = start().await;
    let key = kms.create_key(IRELAND, CreateKey::new()).unwrap();
    let far = kms.create_key(FRANKFURT, CreateKey::new()).unwrap();
    let (ireland, frankfurt) = (client(&kms, IRELAND), client(&kms, FRANKFURT));
    let blob = blob_of(&data_key(&ireland, &key).await);
    for (fault, status, expected) in [
        (Fault::Internal, 500, "KMSInternalException"),
        (Fault::DependencyTimeout, 500, "DependencyTimeoutException"),
        (Fault::KeyUnavailable, 500, "KeyUnavailableException"),
        (Fault::Unavailable, 503, "ServiceUnavailableException"),
        (Fault::Deny, 400, "AccessDeniedException"),
        (Fault::throttle(0), 400, "ThrottlingException"),
    ] {
        kms.faults().set(FaultScope::region(IRELAND).operation("Decrypt"), fault);
        let error = ireland.decrypt().ciphertext_blob(blob.clone()).send().await.unwrap_err();
        assert_eq!(error.raw_response().unwrap().status().as_u16(), status);
        assert_eq!(error.code(), Some(expected));
        let injected = Outcome::Error { code: expected.to_owned(), injected: true };
        assert_eq!(kms.calls().pop().unwrap().outcome, injected);
        data_key(&ireland, &key).await;
        data_key(&frankfurt, &far).await;
        kms.faults().clear();
        assert!(ireland.decrypt().ciphertext_blob(blob.clone()).send().await.is_ok());
    }
}

#[tokio::test]
async fn a_denial_sounds_like_one_of_aws() {
    let kms = start().await;
    let key = kms.create_key(IRELAND, CreateKey::new()).unwrap();
    kms.faults().set(FaultScope::key(&key), Fault::Deny);
    let made = client(&kms, IRELAND).generate_data_key().key_id(&key).number_of_bytes(32).send().await;
    let (_, message) = refused(made);
    assert_eq!(
        message,
        format!(
            "User: arn:aws:iam::111122223333:root is not authorized to perform: kms:GenerateDataKey \
             on resource: {key} with an explicit deny in a resource-based policy"
        )
    );
}

#[tokio::test]
async fn a_fault_can_hit_one_key_or_a_number_of_calls() {
    let kms = start().await;
    let one = kms.create_key(IRELAND, CreateKey::new()).unwrap();
    let two = kms.create_key(IRELAND, CreateKey::new()).unwrap();
    let client = client(&kms, IRELAND);
    let generate = async |key: &str| client.generate_data_key().key_id(key).number_of_bytes(32).send().await;
    kms.faults().set_times(FaultScope::key(&one), Fault::Internal, 2);
    assert!(generate(&two).await.is_ok());
    assert_eq!(code(generate(&one).await), "KMSInternalException");
    assert_eq!(code(generate(&one).await), "KMSInternalException");
    assert!(generate(&one).await.is_ok());
    // A Decrypt without a KeyId is known by its blob.
    let blob = generate(&one).await.unwrap().ciphertext_blob.unwrap();
    kms.faults().set(FaultScope::key(&one), Fault::Internal);
    assert_eq!(code(client.decrypt().ciphertext_blob(blob).send().await), "KMSInternalException");
}

#[tokio::test]
async fn a_throttle_counts_by_the_emulators_clock() {
    let kms = Emulator::builder().region(IRELAND).frozen_clock().start().await.unwrap();
    let key = kms.create_key(IRELAND, CreateKey::new()).unwrap();
    let client = client(&kms, IRELAND);
    kms.faults().set(FaultScope::region(IRELAND), Fault::throttle(5));
    let passed = async || {
        let mut passed = 0;
        for _ in 0..8 {
            match client.generate_data_key().key_id(&key).number_of_bytes(32).send().await {
                Ok(_) => passed += 1,
                error => assert_eq!(code(error), "ThrottlingException"),
            }
        }
        passed
    };
    assert_eq!(passed().await, 5);
    assert_eq!(passed().await, 0);
    kms.advance(Duration::from_millis(400));
    assert_eq!(passed().await, 2);
    kms.advance(Duration::from_mins(1));
    assert_eq!(passed().await, 5);
    assert_eq!(kms.count_where(|call| call.error_code() == Some("ThrottlingException")), 4 * 8 - 12);
}

#[tokio::test]
async fn latency_delays_the_answer() {
    let kms = start().await;
    let key = kms.create_key(IRELAND, CreateKey::new()).unwrap();
    let client = client(&kms, IRELAND);
    data_key(&client, &key).await;
    kms.faults().set(FaultScope::any().operation("GenerateDataKey"), Fault::latency(PATIENCE));
    #[expect(clippy::disallowed_methods, reason = "how long it really takes is what is tested")]
    let started = Instant::now();
    data_key(&client, &key).await;
    assert!(started.elapsed() >= PATIENCE);
}

#[tokio::test]
async fn a_reset_is_an_error_of_the_connection() {
    let kms = start().await;
    let key = kms.create_key(IRELAND, CreateKey::new()).unwrap();
    let client = client(&kms, IRELAND);
    kms.faults().set(FaultScope::any(), Fault::Reset);
    let made = client.generate_data_key().key_id(&key).number_of_bytes(32).send().await;
    let error = made.unwrap_err();
    assert!(matches!(error, SdkError::DispatchFailure(_)), "{error:?}");
    assert_eq!(kms.calls().pop().unwrap().outcome, Outcome::Reset);
    // On the wire it is an RST and not an orderly end.
    let body = r#"{"KeyId": "alias/x"}"#;
    let mut stream = tokio::net::TcpStream::connect(kms.address()).await.unwrap();
    let request = format!(
        "POST / HTTP/1.1\r\nHost: kms\r\nAuthorization: AWS4-HMAC-SHA256 \
         Credential=A/20260101/eu-west-1/kms/aws4_request, SignedHeaders=host, Signature=0\r\n\
         X-Amz-Target: TrentService.DescribeKey\r\nContent-Length: {}\r\n\r\n{body}",
        body.len()
    );
    tokio::io::AsyncWriteExt::write_all(&mut stream, request.as_bytes()).await.unwrap();
    let read = tokio::io::AsyncReadExt::read(&mut stream, &mut [0; 1]).await;
    assert_eq!(read.unwrap_err().kind(), std::io::ErrorKind::ConnectionReset);

    kms.faults().clear();
    data_key(&client, &key).await;
}

#[tokio::test]
async fn a_black_hole_never_answers() {
    let kms = start().await;
    let key = kms.create_key(IRELAND, CreateKey::new()).unwrap();
    let far = kms.create_key(FRANKFURT, CreateKey::new()).unwrap();
    let (ireland, frankfurt) = (client(&kms, IRELAND), client(&kms, FRANKFURT));
    kms.faults().set(FaultScope::region(IRELAND), Fault::BlackHole);
    let mut held = Box::pin(ireland.generate_data_key().key_id(&key).number_of_bytes(32).send());
    assert!(tokio::time::timeout(PATIENCE, &mut held).await.is_err());
    assert_eq!(kms.calls()[0].outcome, Outcome::Pending);
    tokio::time::timeout(Duration::from_secs(5), data_key(&frankfurt, &far)).await.unwrap();

    // Clearing the fault does not give back what it has swallowed.
    kms.faults().clear();
    data_key(&ireland, &key).await;
    assert!(tokio::time::timeout(PATIENCE, &mut held).await.is_err());

    // The log tells when the client gives up.
    drop(held);
    let given_up = async {
        while kms.calls()[0].outcome != Outcome::Abandoned {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    tokio::time::timeout(Duration::from_secs(5), given_up).await.unwrap();
}

#[tokio::test]
async fn a_shutdown_ends_what_a_black_hole_holds() {
    let kms = start().await;
    let key = kms.create_key(IRELAND, CreateKey::new()).unwrap();
    let client = client(&kms, IRELAND);
    kms.faults().set(FaultScope::any(), Fault::BlackHole);
    let held = client.generate_data_key().key_id(&key).number_of_bytes(32).send();
    let stop = async {
        while kms.calls().is_empty() {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        kms.shutdown().await;
    };
    let (made, ()) =
        tokio::time::timeout(Duration::from_secs(4), async { tokio::join!(held, stop) }).await.unwrap();
    assert!(matches!(made.unwrap_err(), SdkError::DispatchFailure(_)));
    // And then nobody listens.
    let made = client.generate_data_key().key_id(&key).number_of_bytes(32).send().await;
    assert!(matches!(made.unwrap_err(), SdkError::DispatchFailure(_)));
}

#[tokio::test]
async fn a_bad_gateway_is_no_answer_of_aws() {
    let kms = start().await;
    kms.faults().set(FaultScope::any(), Fault::BadGateway);
    let error = client(&kms, IRELAND).list_keys().send().await.unwrap_err();
    assert_eq!(error.raw_response().unwrap().status().as_u16(), 502);
}

#[tokio::test]
async fn faults_are_set_and_cleared_over_http() {
    let kms = start().await;
    let key = kms.create_key(IRELAND, CreateKey::new()).unwrap();
    let client = client(&kms, IRELAND);
    let generate = async || client.generate_data_key().key_id(&key).number_of_bytes(32).send().await;
    let fault = r#"{"region": "eu-west-1", "operation": "GenerateDataKey", "fault": {"kind": "internal"}}"#;
    let id = control(&kms, "POST", "faults", fault).await["id"].clone();
    assert_eq!(code(generate().await), "KMSInternalException");
    let listed = control(&kms, "GET", "faults", "").await;
    assert_eq!(listed["faults"][0]["fault"]["kind"], "internal");
    assert_eq!(listed["faults"][0]["region"], "eu-west-1");
    control(&kms, "DELETE", &format!("faults/{id}"), "").await;
    assert!(generate().await.is_ok());
    control(&kms, "POST", "faults", r#"{"times": 1, "fault": {"kind": "throttle", "per_second": 0}}"#).await;
    control(&kms, "POST", "faults", r#"{"fault": {"kind": "latency", "millis": 1}}"#).await;
    assert_eq!(code(generate().await), "ThrottlingException");
    assert!(generate().await.is_ok());
    control(&kms, "DELETE", "faults", "").await;
    // A misspelt scope is refused; it would hit everything.
    let body = r#"{"regoin": "eu-west-1", "fault": {"kind": "internal"}}"#;
    let answer = raw(
        &kms,
        &format!(
            "POST /_emulator/faults HTTP/1.1\r\nHost: emulator\r\nConnection: close\r\n\
             Content-Type: application/json\r\nContent-Length: {}\r\n\r\n{body}",
            body.len()
        ),
    )
    .await;
    assert!(answer.starts_with("HTTP/1.1 422"), "{answer}");
    assert!(kms.faults().list().is_empty());
}
