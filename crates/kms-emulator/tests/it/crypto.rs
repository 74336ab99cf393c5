//! Data keys, encryption, decryption.

use aws_sdk_kms::primitives::Blob;
use aws_sdk_kms::types::DataKeySpec;
use kms_emulator::CreateKey;

use crate::world::{FRANKFURT, IRELAND, blob_of, client, code, context, data_key, refused, start};

#[tokio::test]
async fn a_data_key_opens_again_and_its_blob_has_the_size_of_aws() {
    let kms = start().await;
    let key = kms.create_key(IRELAND, CreateKey::new()).unwrap();
    let client = client(&kms, IRELAND);
    let made = data_key(&client, &key).await;
    assert_eq!(made.key_id(), Some(key.as_str()));
    assert_eq!(made.plaintext().unwrap().as_ref().len(), 32);
    assert_eq!(blob_of(&made).as_ref().len(), 184);
    let material = made.key_material_id().unwrap();
    assert_eq!(material.len(), 64);

    let opened = client.decrypt().ciphertext_blob(blob_of(&made)).key_id(&key).send().await.unwrap();
    assert_eq!(opened.plaintext(), made.plaintext());
    assert_eq!(opened.key_id(), Some(key.as_str()));
    assert_eq!(opened.key_material_id(), Some(material));
}

#[tokio::test]
async fn an_encrypted_data_key_has_the_size_of_aws() {
    let kms = start().await;
    let key = kms.create_key(IRELAND, CreateKey::new()).unwrap();
    let client = client(&kms, IRELAND);
    let sealed = client.encrypt().key_id(&key).plaintext(Blob::new([7; 32])).send().await.unwrap();
    let blob = sealed.ciphertext_blob.clone().unwrap();
    assert_eq!(blob.as_ref().len(), 167);
    assert_eq!(sealed.key_id(), Some(key.as_str()));
    // Without a KeyId the blob says which key it is under.
    let opened = client.decrypt().ciphertext_blob(blob).send().await.unwrap();
    assert_eq!(opened.plaintext().unwrap().as_ref(), [7; 32]);
}

#[tokio::test]
async fn a_data_key_without_plaintext_opens_too() {
    let kms = start().await;
    let key = kms.create_key(IRELAND, CreateKey::new()).unwrap();
    let client = client(&kms, IRELAND);
    let made =
        client.generate_data_key_without_plaintext().key_id(&key).number_of_bytes(64).send().await.unwrap();
    let opened = client.decrypt().ciphertext_blob(made.ciphertext_blob.unwrap()).send().await.unwrap();
    assert_eq!(opened.plaintext().unwrap().as_ref().len(), 64);
}

#[tokio::test]
async fn another_context_is_an_invalid_ciphertext() {
    let kms = start().await;
    let key = kms.create_key(IRELAND, CreateKey::new()).unwrap();
    let client = client(&kms, IRELAND);
    let under = context(&[("a", "b"), ("c", "d")]);
    let made = client
        .generate_data_key()
        .key_id(&key)
        .key_spec(DataKeySpec::Aes256)
        .set_encryption_context(Some(under.clone()))
        .send()
        .await
        .unwrap();
    let open = async |context| {
        client.decrypt().ciphertext_blob(blob_of(&made)).set_encryption_context(context).send().await
    };
    assert!(open(Some(under)).await.is_ok());
    for other in [
        None,
        Some(context(&[])),
        Some(context(&[("a", "b")])),
        Some(context(&[("a", "b"), ("c", "D")])),
        Some(context(&[("a", "bcd")])),
        Some(context(&[("a", "b, c:d")])),
        Some(context(&[("ab", "cd")])),
        Some(context(&[("a", "bc"), ("d", "")])),
        Some(context(&[("a", "d"), ("c", "b")])),
        Some(context(&[("a", "b"), ("c", "d"), ("e", "f")])),
    ] {
        assert_eq!(code(open(other.clone()).await), "InvalidCiphertextException", "{other:?}");
    }
}

#[tokio::test]
async fn a_tampered_blob_is_an_invalid_ciphertext_and_never_another_plaintext() {
    let kms = start().await;
    let key = kms.create_key(IRELAND, CreateKey::new()).unwrap();
    let client = client(&kms, IRELAND);
    let made = data_key(&client, &key).await;
    let good = blob_of(&made).into_inner();
    for at in 0..good.len() {
        let mut bad = good.clone();
        bad[at] ^= 1;
        let opened = client.decrypt().ciphertext_blob(Blob::new(bad)).key_id(&key).send().await;
        let code = code(opened);
        // The bytes that name the key (38 to 53) and its kind (37) make the blob another key's.
        let expected =
            if (37..54).contains(&at) { "IncorrectKeyException" } else { "InvalidCiphertextException" };
        assert_eq!(code, expected, "byte {at}");
    }
    for bad in [&good[..good.len() - 1], &good[..60], b"x", &[0; 6145]] {
        let opened = client.decrypt().ciphertext_blob(Blob::new(bad)).key_id(&key).send().await;
        assert_eq!(code(opened), "InvalidCiphertextException", "{} bytes", bad.len());
    }
}

#[tokio::test]
async fn the_wrong_key_is_an_incorrect_key() {
    let kms = start().await;
    let key = kms.create_key(IRELAND, CreateKey::new()).unwrap();
    let other = kms.create_key(IRELAND, CreateKey::new().alias("alias/other")).unwrap();
    let client = client(&kms, IRELAND);
    let blob = blob_of(&data_key(&client, &key).await);
    for wrong in [other.as_str(), "alias/other"] {
        let opened = client.decrypt().ciphertext_blob(blob.clone()).key_id(wrong).send().await;
        assert_eq!(code(opened), "IncorrectKeyException", "{wrong}");
        let moved = client.re_encrypt().ciphertext_blob(blob.clone()).source_key_id(wrong);
        assert_eq!(code(moved.destination_key_id(&key).send().await), "IncorrectKeyException", "{wrong}");
    }
}

#[tokio::test]
async fn a_key_of_another_region_is_not_found() {
    let kms = start().await;
    let key = kms.create_key(IRELAND, CreateKey::new()).unwrap();
    let (ireland, frankfurt) = (client(&kms, IRELAND), client(&kms, FRANKFURT));
    let blob = blob_of(&data_key(&ireland, &key).await);
    let by_arn = frankfurt.decrypt().ciphertext_blob(blob.clone()).key_id(&key).send().await;
    let (name, message) = refused(by_arn);
    assert_eq!(name, "NotFoundException");
    assert!(message.contains("Invalid arn eu-west-1"), "{message}");
    let id = key.rsplit('/').next().unwrap();
    let by_id = frankfurt.encrypt().key_id(id).plaintext(Blob::new("x")).send().await;
    assert_eq!(code(by_id), "NotFoundException");
    let (name, message) = refused(frankfurt.decrypt().ciphertext_blob(blob).send().await);
    assert_eq!(name, "AccessDeniedException");
    assert!(message.contains("does not exist in this region"), "{message}");
}

#[tokio::test]
async fn a_key_has_four_names() {
    let kms = start().await;
    let key = kms.create_key(IRELAND, CreateKey::new().alias("alias/app/main")).unwrap();
    let client = client(&kms, IRELAND);
    let id = key.rsplit('/').next().unwrap();
    let alias_arn = "arn:aws:kms:eu-west-1:111122223333:alias/app/main";
    for name in [id, key.as_str(), "alias/app/main", alias_arn] {
        let made = data_key(&client, name).await;
        // The answer always has the key's ARN.
        assert_eq!(made.key_id(), Some(key.as_str()), "{name}");
        let opened = client.decrypt().ciphertext_blob(blob_of(&made)).key_id(name).send().await.unwrap();
        assert_eq!(opened.key_id(), Some(key.as_str()), "{name}");
    }
    for (name, expected) in [
        ("alias/none", "NotFoundException"),
        ("00000000-0000-4000-8000-000000000000", "NotFoundException"),
        ("no-uuid", "NotFoundException"),
        ("arn:aws:kms:eu-west-1:111122223333:alias/none", "NotFoundException"),
        ("arn:aws:kms:nonsense", "InvalidArnException"),
    ] {
        assert_eq!(code(client.describe_key().key_id(name).send().await), expected, "{name}");
    }
}

#[tokio::test]
async fn re_encryption_moves_a_blob_to_another_key_and_context() {
    let kms = start().await;
    let from = kms.create_key(IRELAND, CreateKey::new()).unwrap();
    let to = kms.create_key(IRELAND, CreateKey::new()).unwrap();
    let client = client(&kms, IRELAND);
    let sealed = client
        .encrypt()
        .key_id(&from)
        .plaintext(Blob::new("plain"))
        .encryption_context("a", "b")
        .send()
        .await
        .unwrap();
    let move_it = |context: &str| {
        client
            .re_encrypt()
            .ciphertext_blob(sealed.ciphertext_blob.clone().unwrap())
            .source_key_id(&from)
            .source_encryption_context("a", context)
            .destination_key_id(&to)
            .destination_encryption_context("c", "d")
    };
    assert_eq!(code(move_it("x").send().await), "InvalidCiphertextException");
    let moved = move_it("b").send().await.unwrap();
    assert_eq!((moved.source_key_id(), moved.key_id()), (Some(from.as_str()), Some(to.as_str())));
    let material =
        |arn: &str| kms.describe_key(arn).unwrap()["CurrentKeyMaterialId"].as_str().unwrap().to_owned();
    assert_eq!(moved.source_key_material_id().unwrap(), material(&from));
    assert_eq!(moved.destination_key_material_id().unwrap(), material(&to));
    let blob = moved.ciphertext_blob.unwrap();
    let opened = client.decrypt().ciphertext_blob(blob).key_id(&to).encryption_context("c", "d").send().await;
    assert_eq!(opened.unwrap().plaintext().unwrap().as_ref(), b"plain");
}

#[tokio::test]
async fn parameters_are_checked() {
    let kms = start().await;
    let key = kms.create_key(IRELAND, CreateKey::new()).unwrap();
    let client = client(&kms, IRELAND);
    let generate = || client.generate_data_key().key_id(&key);
    assert_eq!(code(generate().send().await), "ValidationException");
    let both = generate().number_of_bytes(32).key_spec(DataKeySpec::Aes256);
    assert_eq!(code(both.send().await), "ValidationException");
    assert_eq!(code(generate().number_of_bytes(1025).send().await), "ValidationException");
    assert_eq!(code(generate().key_spec("AES_512".into()).send().await), "ValidationException");
    let long = client.encrypt().key_id(&key).plaintext(Blob::new([0; 4097]));
    assert_eq!(code(long.send().await), "ValidationException");
    let most = client.encrypt().key_id(&key).plaintext(Blob::new([0; 4096]));
    assert!(most.send().await.is_ok());
    let big = generate().number_of_bytes(1).encryption_context("k", "v".repeat(8192));
    assert_eq!(code(big.send().await), "ValidationException");
    let dry = generate().number_of_bytes(1).dry_run(true);
    assert_eq!(code(dry.send().await), "DryRunOperationException");
}

#[tokio::test]
async fn a_key_for_signing_does_not_encrypt() {
    let kms = start().await;
    let client = client(&kms, IRELAND);
    let made = client
        .create_key()
        .key_usage("SIGN_VERIFY".into())
        .key_spec("ECC_NIST_P256".into())
        .send()
        .await
        .unwrap();
    let key = made.key_metadata.unwrap().key_id;
    let sealed = client.encrypt().key_id(&key).plaintext(Blob::new("x")).send().await;
    assert_eq!(code(sealed), "InvalidKeyUsageException");
    let made = client.generate_data_key().key_id(&key).number_of_bytes(32).send().await;
    assert_eq!(code(made), "InvalidKeyUsageException");
}
