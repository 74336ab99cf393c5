//! Aliases.

use kms_emulator::CreateKey;

use crate::world::{FRANKFURT, IRELAND, client, code, data_key, start};

#[tokio::test]
async fn an_alias_moves_from_key_to_key() {
    let kms = start().await;
    let one = kms.create_key(IRELAND, CreateKey::new()).unwrap();
    let two = kms.create_key(IRELAND, CreateKey::new()).unwrap();
    let client = client(&kms, IRELAND);
    let create =
        async |key: &str| client.create_alias().alias_name("alias/app").target_key_id(key).send().await;
    create(&one).await.unwrap();
    assert_eq!(code(create(&two).await), "AlreadyExistsException");
    assert_eq!(data_key(&client, "alias/app").await.key_id(), Some(one.as_str()));
    client.update_alias().alias_name("alias/app").target_key_id(&two).send().await.unwrap();
    assert_eq!(data_key(&client, "alias/app").await.key_id(), Some(two.as_str()));
    client.delete_alias().alias_name("alias/app").send().await.unwrap();
    assert_eq!(code(client.describe_key().key_id("alias/app").send().await), "NotFoundException");
    assert_eq!(code(client.delete_alias().alias_name("alias/app").send().await), "NotFoundException");
    let update = client.update_alias().alias_name("alias/app").target_key_id(&one).send().await;
    assert_eq!(code(update), "NotFoundException");
}

#[tokio::test]
async fn names_are_checked() {
    let kms = start().await;
    let key = kms.create_key(IRELAND, CreateKey::new()).unwrap();
    let client = client(&kms, IRELAND);
    for (name, expected) in [
        ("app", "ValidationException"),
        ("alias/", "ValidationException"),
        ("alias/a b", "InvalidAliasNameException"),
        ("alias/aws/s3", "NotAuthorizedException"),
    ] {
        let answer = client.create_alias().alias_name(name).target_key_id(&key).send().await;
        assert_eq!(code(answer), expected, "{name}");
    }
}

#[tokio::test]
async fn aliases_and_keys_are_listed_by_region_in_pages() {
    let kms = start().await;
    let key = kms.create_key(IRELAND, CreateKey::new()).unwrap();
    kms.create_key(IRELAND, CreateKey::new().alias("alias/other")).unwrap();
    for name in ["alias/a", "alias/b", "alias/c"] {
        kms.set_alias(name, &key).unwrap();
    }
    kms.create_key(FRANKFURT, CreateKey::new().alias("alias/far")).unwrap();
    let client = client(&kms, IRELAND);
    let pages = client.list_aliases().key_id(&key).into_paginator().page_size(2).items().send();
    let names: Vec<String> =
        pages.try_collect().await.unwrap().into_iter().filter_map(|alias| alias.alias_name).collect();
    assert_eq!(names, ["alias/a", "alias/b", "alias/c"]);
    assert_eq!(client.list_aliases().send().await.unwrap().aliases().len(), 4);
    let keys = client.list_keys().into_paginator().page_size(1).items().send().try_collect().await.unwrap();
    assert_eq!(keys.len(), 2);
    assert_eq!(code(client.list_keys().marker("nonsense").send().await), "InvalidMarkerException");
}
