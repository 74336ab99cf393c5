//! One tenant alone cannot fill the service.

use std::net::SocketAddr;
use std::time::Duration;

use keyfold::config::HttpSettings;
use serde_json::json;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;

use crate::caller::Caller;
use crate::service::{KEK, World};

/// A path and the media type of what is sent there.
type Call = (&'static str, &'static str);

/// A call that is in flight for as long as this is kept: its head is sent, its body never. Or what the service says
/// instead of asking for the body.
async fn begin(address: SocketAddr, caller: &Caller, call: Call) -> Result<TcpStream, String> {
    let mut stream = TcpStream::connect(address).await.unwrap();
    let (path, media_type) = call;
    let head = format!(
        "POST {path} HTTP/1.1\r\nhost: x\r\nauthorization: Bearer {}\r\ncontent-type: {media_type}\r\n\
         content-length: 1000\r\nexpect: 100-continue\r\n\r\n",
        caller.token()
    );
    stream.write_all(head.as_bytes()).await.unwrap();
    let mut answer = vec![0; 16 << 10];
    let read = tokio::time::timeout(Duration::from_secs(60), stream.read(&mut answer)).await;
    let answer = String::from_utf8_lossy(&answer[..read.unwrap().unwrap()]).into_owned();
    if answer.starts_with("HTTP/1.1 100") { Ok(stream) } else { Err(answer) }
}

async fn one_leaves_room(call: Call, limit: impl FnOnce(&mut HttpSettings)) {
    let mut world = World::new().await;
    limit(&mut world.settings.http);
    let service = world.start().await;
    let (flood, meek) = (service.tenant_and_caller("flood").await, service.tenant_and_caller("meek").await);
    let late = service.tenant_and_caller("late").await;
    let mut floods = Vec::new();
    for _ in 0..6 {
        floods.push(begin(service.address, &flood, call).await.unwrap());
    }
    // Three quarters are what one tenant gets.
    let refused = begin(service.address, &flood, call).await.unwrap_err();
    assert!(refused.starts_with("HTTP/1.1 503") && refused.contains("\"overloaded\""), "{refused}");
    assert!(refused.contains("its share"), "{refused}");
    assert!(refused.to_ascii_lowercase().contains("retry-after: "), "{refused}");
    // Another one sees nothing of it.
    let answer = match call.0 {
        "/v1/encrypt" => meek.try_encrypt(b"hello", &json!({})).await,
        _ => meek.get(call.0).await,
    };
    assert_eq!(answer.status, 200, "{}", answer.raw);
    let mut meeks = Vec::new();
    for _ in 0..2 {
        meeks.push(begin(service.address, &meek, call).await.unwrap());
    }
    // Full. The place that comes free is for who has none yet.
    assert!(begin(service.address, &late, call).await.is_err());
    floods.pop();
    let mut got = None;
    let asks = async {
        while got.is_none() {
            assert!(begin(service.address, &flood, call).await.is_err(), "the flood got the place");
            assert!(begin(service.address, &meek, call).await.is_err(), "two of eight are a third's share");
            got = begin(service.address, &late, call).await.ok();
        }
    };
    assert!(tokio::time::timeout(Duration::from_secs(60), asks).await.is_ok(), "the place never came free");
    // All of it over, nobody is held to anything.
    drop((floods, meeks, got));
    let alone = async {
        loop {
            let mut held = Vec::new();
            while held.len() < 6
                && let Ok(stream) = begin(service.address, &flood, call).await
            {
                held.push(stream);
            }
            if held.len() == 6 {
                break;
            }
        }
    };
    assert!(tokio::time::timeout(Duration::from_secs(60), alone).await.is_ok(), "places were lost");
    service.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_flood_of_one_tenants_calls_leaves_room_for_the_others() {
    one_leaves_room(("/v1/encrypt", "application/json"), |http| http.in_flight_max = 8).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_flood_of_one_tenants_transfers_leaves_room_for_the_others() {
    one_leaves_room(("/v1/encrypt", "application/octet-stream"), |http| http.transfers_max = 8).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_flood_of_one_administrators_calls_leaves_room_for_the_others() {
    one_leaves_room(("/v1/tenants", "application/json"), |http| http.admin_in_flight_max = 8).await;
}

/// Administration has places of its own, and only so many: a KMS that hangs under it does not stop the data plane.
#[tokio::test(flavor = "multi_thread")]
async fn administration_calls_beyond_their_places_are_refused_and_data_calls_go_on() {
    let mut world = World::new().await;
    world.settings.http.admin_in_flight_max = 1;
    let service = world.start_without_keeper().await;
    let caller = service.tenant_and_caller("acme").await;
    let sealed = caller.encrypt(b"hello", &json!({})).await;
    let arrived = world.kms.calls();
    world.kms.hold();
    let slow = caller.clone();
    let made = tokio::task::JoinSet::from_iter([async move {
        slow.post("/v1/tenants", &json!({"tenant": "beta", "keks": [{"kek": KEK}]})).await
    }]);
    world.kms.arrived(arrived + 1).await;
    let refused = caller.get("/v1/tenants").await;
    refused.problem("overloaded");
    assert!(refused.headers.contains_key("retry-after"));
    assert_eq!(caller.decrypt(&sealed, &json!({})).await, b"hello");
    caller.encrypt(b"hello", &json!({})).await;
    world.kms.release();
    made.join_all().await.pop().unwrap().ok(201);
    caller.get("/v1/tenants").await.ok(200);
    service.stop().await;
}
