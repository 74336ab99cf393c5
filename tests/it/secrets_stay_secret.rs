//! Every operation of the service, well and badly used, with the log turned up as far as it goes: no plaintext, context
//! value, token, passphrase, data key or master key is found in the log, in an error's answer, or in the files that are
//! not meant for it.

use std::collections::{BTreeSet, HashMap};
use std::path::Path;

use base64::Engine as _;
use base64::engine::general_purpose::{STANDARD, URL_SAFE_NO_PAD};
use envelope::{DataKey, DataKeyId, EncryptionContext, KeyMaterial, inspect, open, text as envelope_text};
use keyfold::kms::kms_context;
use keyfold::store::Store as _;
use reqwest::Method;
use serde_json::{Value, json};

use crate::caller::{Answer, Caller, receive, text};
use crate::contract::{DOCUMENT, template};
use crate::program::{Program, keyfold};
use crate::service::open_registry;

const PLAINTEXT: &str = "plaintext-canary-7f3a9c";
const CONTEXT: &str = "context-value-canary-51d2e8";
const PASSPHRASE: &str = "passphrase-canary-c04b77";
const PEPPER: &str = "pepper-canary-0123456789abcdef0123456789abcdef";

/// What must not be found: as it is, and in the forms in which it could slip through.
#[derive(Default)]
struct Canaries {
    /// What each form is of, and the form.
    forms: Vec<(String, Vec<u8>)>,
    /// The forms by how they begin: there are too many to look for one by one.
    by_start: HashMap<[u8; START_BYTES], Vec<usize>>,
}

/// Every form is longer.
const START_BYTES: usize = 8;

impl Canaries {
    fn new() -> Self {
        let mut canaries = Self::default();
        for secret in [PLAINTEXT, CONTEXT, PASSPHRASE, PEPPER] {
            canaries.add(secret, secret.as_bytes());
        }
        canaries
    }

    fn add(&mut self, name: &str, bytes: &[u8]) {
        let hex: String = bytes.iter().map(|byte| format!("{byte:02x}")).collect();
        let list = format!("{bytes:?}");
        self.add_form(name, bytes.to_vec());
        for text in [&hex.to_uppercase(), &hex, &list[1..list.len() - 1]] {
            self.add_form(name, text.as_bytes().to_vec());
        }
        // Base64 of a text that holds it: whatever stands in front shifts it by none, one or two bytes.
        for shift in 0..3 {
            let shifted = [&vec![b' '; shift][..], bytes].concat();
            for encoded in [STANDARD.encode(&shifted), URL_SAFE_NO_PAD.encode(&shifted)] {
                // The characters at either end depend on what is beside it.
                let form = &encoded[4 * usize::from(shift > 0)..encoded.len() / 4 * 4 - 4];
                self.add_form(name, form.as_bytes().to_vec());
            }
        }
    }

    fn add_form(&mut self, name: &str, form: Vec<u8>) {
        let start = *form.first_chunk().unwrap();
        self.by_start.entry(start).or_default().push(self.forms.len());
        self.forms.push((name.to_owned(), form));
    }

    /// A token's secret half; the id is public.
    fn add_token(&mut self, token: &str) {
        self.add(token, &token.as_bytes()[20..]);
        let raw = URL_SAFE_NO_PAD.decode(&token[20..]).unwrap();
        let hex: String = raw.iter().map(|byte| format!("{byte:02x}")).collect();
        self.add_form(token, hex.into_bytes());
        self.add_form(token, raw);
    }

    fn found_in(&self, bytes: &[u8]) -> Option<&str> {
        let at = |at: usize| {
            let forms = self.by_start.get(bytes[at..].first_chunk::<START_BYTES>()?)?;
            let mut forms = forms.iter().map(|form| &self.forms[*form]);
            forms.find(|(_, form)| bytes[at..].starts_with(form)).map(|(name, _)| name.as_str())
        };
        (0..bytes.len()).find_map(at)
    }

    #[track_caller]
    fn assert_absent(&self, bytes: &[u8], place: &str) {
        if let Some(secret) = self.found_in(bytes) {
            let text = String::from_utf8_lossy(bytes);
            let lines: Vec<&str> =
                text.lines().filter(|line| self.found_in(line.as_bytes()).is_some()).collect();
            panic!("{secret:?} is in {place}: {lines:#?}");
        }
    }
}

/// A caller that remembers which operations it has called with success, and looks at every error.
struct Suspicious<'a> {
    canaries: &'a Canaries,
    /// The errors' answers, for the secrets that are not known before the end.
    refusals: String,
    called: BTreeSet<&'static str>,
}

impl Suspicious<'_> {
    async fn call(&mut self, caller: &Caller, method: &str, path: &str, body: &Value) -> Value {
        let (answer, operation) = self.send(caller, method, path, body).await;
        assert!((200..300).contains(&answer.status), "{method} {path}: {}", answer.raw);
        self.called.insert(operation.unwrap());
        answer.json
    }

    async fn fail(&mut self, caller: &Caller, method: &str, path: &str, body: &Value) {
        let (answer, _) = self.send(caller, method, path, body).await;
        assert!((400..500).contains(&answer.status), "{method} {path}: {}", answer.raw);
        self.canaries.assert_absent(answer.raw.as_bytes(), &format!("the answer to {method} {path} {body}"));
        self.refusals.push_str(&answer.raw);
    }

    async fn send(
        &self,
        caller: &Caller,
        method: &str,
        path: &str,
        body: &Value,
    ) -> (Answer, Option<&'static str>) {
        let upper: Method = method.to_uppercase().parse().unwrap();
        let mut request = caller.request(upper, path);
        if !body.is_null() {
            request = request.header("content-type", "application/json").body(body.to_string());
        }
        let operation =
            template(path).and_then(|path| DOCUMENT["paths"][path][method]["operationId"].as_str());
        (receive(request).await, operation)
    }
}

/// Each operation as it is meant to be used. An operation that is new in the document is called here, or the test fails.
async fn use_all(sus: &mut Suspicious<'_>, caller: &Caller, tokens: &mut Vec<String>, round: usize) {
    let none = &Value::Null;
    for path in ["/live", "/ready"] {
        sus.call(caller, "get", path, none).await;
    }
    let context = json!({"record": CONTEXT});
    let seal = json!({"plaintext": STANDARD.encode(PLAINTEXT), "context": context});
    let ciphertext = text(&sus.call(caller, "post", "/v1/encrypt", &seal).await["ciphertext"]);
    let open = json!({"ciphertext": ciphertext, "context": context});
    assert_eq!(sus.call(caller, "post", "/v1/decrypt", &open).await["plaintext"], STANDARD.encode(PLAINTEXT));
    sus.call(caller, "post", "/v1/rewrap", &open).await;
    let tenant = json!({"tenant": format!("t{round}"), "keks": [{"kek": "local:main"}]});
    sus.call(caller, "post", "/v1/tenants", &tenant).await;
    sus.call(caller, "get", "/v1/tenants", none).await;
    sus.call(caller, "get", "/v1/tenants/acme", none).await;
    sus.call(caller, "put", "/v1/tenants/acme", &json!({"status": "enabled"})).await;
    sus.call(caller, "post", "/v1/tenants/acme/keys", &json!({"key": format!("k{round}")})).await;
    sus.call(caller, "get", "/v1/tenants/acme/keys", none).await;
    sus.call(caller, "get", "/v1/tenants/acme/keys/default", none).await;
    sus.call(caller, "put", "/v1/tenants/acme/keys/default", &json!({"policy": {"dek_messages_max": 2}}))
        .await;
    let grant = json!({"name": "ci", "verbs": ["encrypt"]});
    let made = sus.call(caller, "post", "/v1/tenants/acme/api-keys", &grant).await;
    tokens.push(text(&made["token"]));
    let caller_of_new = caller.with_token(text(&made["token"]));
    // Enough for new data keys, under the policy above.
    for _ in 0..5 {
        sus.call(&caller_of_new, "post", "/v1/encrypt", &seal).await;
    }
    sus.call(caller, "get", "/v1/tenants/acme/api-keys", none).await;
    let revoke = format!("/v1/tenants/acme/api-keys/{}/revoke", text(&made["id"]));
    sus.call(caller, "post", &revoke, none).await;
    sus.fail(&caller_of_new, "post", "/v1/encrypt", &seal).await;
    use_grants(sus, caller).await;
}

async fn use_grants(sus: &mut Suspicious<'_>, caller: &Caller) {
    let grants = "/v1/tenants/acme/grants";
    let grant = json!({"principal": "jwt:corp:alice", "verbs": ["decrypt"], "keys": ["default"]});
    let made = sus.call(caller, "post", grants, &grant).await;
    sus.call(caller, "get", grants, &Value::Null).await;
    sus.call(caller, "delete", &format!("{grants}/{}", text(&made["grant"])), &Value::Null).await;
}

/// The administration of data keys, rotation and destruction.
async fn use_rotation(sus: &mut Suspicious<'_>, caller: &Caller, round: usize) {
    let none = &Value::Null;
    let seal = json!({"plaintext": STANDARD.encode(PLAINTEXT)});
    let dek = text(&sus.call(caller, "post", "/v1/encrypt", &seal).await["dek_id"]);
    sus.call(caller, "post", "/v1/tenants/acme/keys/default/rotate", none).await;
    sus.call(caller, "get", "/v1/tenants/acme/keys/default/deks", none).await;
    for step in ["revoke", "restore"] {
        sus.call(caller, "post", &format!("/v1/tenants/acme/deks/{dek}/{step}"), none).await;
    }
    for doomed in [
        format!("/v1/tenants/acme/deks/{dek}/shred"),
        format!("/v1/tenants/acme/keys/k{round}/shred"),
        format!("/v1/tenants/t{round}/shred"),
    ] {
        sus.call(caller, "post", &doomed, &json!({"waiting_secs": 3_600})).await;
        sus.call(caller, "delete", &doomed, none).await;
    }
    sus.call(caller, "get", "/v1/tenants/acme/shreds", none).await;
    let job = sus.call(caller, "post", "/v1/tenants/acme/rewrap-keys", none).await;
    sus.call(caller, "get", "/v1/jobs", none).await;
    sus.call(caller, "get", &format!("/v1/jobs/{}", text(&job["job_id"])), none).await;
    sus.call(caller, "get", "/v1/kek-use?kek=local:main", none).await;
    for path in [format!("/v1/jobs/{PASSPHRASE}"), format!("/v1/tenants/acme/deks/{PASSPHRASE}/revoke")] {
        let (answer, _) =
            sus.send(caller, if path.contains("jobs") { "get" } else { "post" }, &path, none).await;
        assert!((400..500).contains(&answer.status), "{path}: {}", answer.raw);
    }
}

/// The same in bulk: batches, lines, and raw bytes.
async fn use_bulk(sus: &mut Suspicious<'_>, caller: &Caller) {
    let context = json!({"record": CONTEXT});
    let seal = json!({"plaintext": STANDARD.encode(PLAINTEXT), "context": context});
    let batch = json!({"items": [seal, {"plaintext": PLAINTEXT, "context": context}]});
    let sealed = sus.call(caller, "post", "/v1/encrypt/batch", &batch).await;
    let ciphertext = text(&sealed["items"][0]["ciphertext"]);
    sus.canaries.assert_absent(sealed.to_string().as_bytes(), "the answer to a batch");
    let (open, wrong) =
        (json!({"ciphertext": ciphertext, "context": context}), json!({"ciphertext": ciphertext}));
    sus.call(caller, "post", "/v1/decrypt/batch", &json!({"items": [open]})).await;
    sus.call(caller, "post", "/v1/rewrap/batch", &json!({"items": [open, wrong]})).await;
    for (path, lines) in [("/v1/encrypt/batch", seal.to_string()), ("/v1/rewrap/batch", open.to_string())] {
        // The second line is no JSON, and holds what must not be quoted.
        let lines = format!("{lines}\n{PLAINTEXT} {CONTEXT}\n");
        let request =
            caller.request(Method::POST, path).header("content-type", "application/x-ndjson").body(lines);
        let answer = receive(request).await;
        assert_eq!((answer.status, answer.raw.lines().count()), (200, 2), "{}", answer.raw);
        sus.canaries.assert_absent(answer.raw.as_bytes(), path);
    }
    let envelope = envelope_text::decode(&ciphertext).unwrap();
    let damaged = [&envelope[..envelope.len() - 1], &[envelope[envelope.len() - 1] ^ 1]].concat();
    for (path, body, right) in [
        ("/v1/encrypt", PLAINTEXT.as_bytes(), true),
        ("/v1/decrypt", &envelope, true),
        ("/v1/rewrap", &envelope, true),
        ("/v1/rewrap/head", &envelope, true),
        ("/v1/decrypt", &damaged, false),
        ("/v1/decrypt", PLAINTEXT.as_bytes(), false),
        ("/v1/rewrap/head", PLAINTEXT.as_bytes(), false),
    ] {
        let raw = |context: String| {
            let request =
                caller.request(Method::POST, path).header("content-type", "application/octet-stream");
            request.header("keyfold-context", context).body(body.to_vec())
        };
        let answer = receive(raw(format!("record=\"{CONTEXT}\""))).await;
        assert_eq!(answer.status == 200, right, "{path}: {}", answer.raw);
        if right {
            let (answer, operation) = (answer, DOCUMENT["paths"][path]["post"]["operationId"].as_str());
            assert_eq!(answer.headers["content-type"], "application/octet-stream");
            sus.called.insert(operation.unwrap());
        } else {
            sus.canaries.assert_absent(answer.raw.as_bytes(), path);
        }
        for context in [format!("record={CONTEXT}?"), format!("record=\"{CONTEXT}")] {
            let answer = receive(raw(context)).await;
            assert!(answer.status == 400 || path == "/v1/rewrap/head", "{path}: {}", answer.raw);
            if answer.status != 200 {
                sus.canaries.assert_absent(answer.raw.as_bytes(), path);
            }
        }
    }
}

/// Each operation as it is easily misused, with a secret where it does not belong.
async fn misuse_all(sus: &mut Suspicious<'_>, caller: &Caller) {
    let context = json!({"record": CONTEXT});
    let base64 = STANDARD.encode(PLAINTEXT);
    let ciphertext = caller.encrypt(PLAINTEXT.as_bytes(), &context).await;
    for body in [
        json!({"plaintext": PLAINTEXT, "context": context}),
        json!({"plaintext": [PLAINTEXT]}),
        json!({"plaintext": {"text": PLAINTEXT}}),
        json!({"plaintext": 5, "context": context}),
        json!({"plaintext": base64, "context": CONTEXT}),
        json!({"plaintext": base64, "context": [CONTEXT]}),
        json!({"plaintext": base64, "context": {"record": [CONTEXT]}}),
        json!({"plaintext": base64, "context": {"keyfold:tenant": CONTEXT}}),
        json!({"plaintext": base64, "context": {"record": CONTEXT.repeat(500)}}),
        json!({"plaintext": base64, "context": context, "key": "nothing"}),
        json!({"plaintext": base64, "context": context, "surplus": PLAINTEXT}),
        json!([base64, CONTEXT]),
        json!(base64),
    ] {
        sus.fail(caller, "post", "/v1/encrypt", &body).await;
    }
    for path in ["/v1/decrypt", "/v1/rewrap"] {
        for body in [
            json!({"ciphertext": PLAINTEXT}),
            json!({"ciphertext": base64}),
            json!({"ciphertext": ciphertext, "context": {"record": CONTEXT, "more": CONTEXT}}),
            json!({"ciphertext": ciphertext}),
            json!({"ciphertext": &ciphertext[..ciphertext.len() - 4], "context": context}),
            json!({"ciphertext": ciphertext, "context": context, "plaintext": base64}),
        ] {
            sus.fail(caller, "post", path, &body).await;
        }
    }
    // Rewrapping does not look at a body that it need not seal again.
    let damaged = format!("{}AAAA", &ciphertext[..ciphertext.len() - 4]);
    sus.fail(caller, "post", "/v1/decrypt", &json!({"ciphertext": damaged, "context": context})).await;
    // A token where its id belongs, in a path that is there and in one that is not.
    let token = caller.token();
    for path in [
        format!("/v1/tenants/acme/api-keys/{token}/revoke"),
        format!("/v1/tenants/acme/api-keys/{token}"),
        format!("/v1/tenants/{token}/keys"),
        format!("/v1/tenants/acme/keys/{token}"),
        format!("/{token}?token={token}"),
    ] {
        let (answer, _) = sus.send(caller, "post", &path, &json!({})).await;
        assert!((400..500).contains(&answer.status), "{path}");
    }
    for wrong in [format!("{token}A"), token[..62].to_owned(), format!("Bearer {token}")] {
        sus.fail(&caller.with_token(wrong), "post", "/v1/encrypt", &json!({"plaintext": base64})).await;
    }
    let twice = caller.with_header("authorization", &format!("Bearer {token}"));
    sus.fail(&twice, "get", "/v1/tenants", &Value::Null).await;
    sus.fail(&caller.as_tenant(CONTEXT), "post", "/v1/encrypt", &json!({})).await;
}

/// Every data key in the registry and the KEK that wraps them, in plaintext: opened by hand from the files and the
/// passphrase, since the program never gives them out.
async fn unwrapped_keys(data: &Path) -> Vec<(String, [u8; 32])> {
    let payload = key_ring_payload(&data.join("keyring"));
    let store = open_registry(&data.join("registry.sqlite")).await;
    let (mut keys, mut found) = (Vec::new(), BTreeSet::new());
    for tenant in store.tenants(None, 1_000).await.unwrap() {
        for key in store.keys(&tenant.id, None, 1_000).await.unwrap() {
            for stored in store.deks(&tenant.id, &key.name, None, 1_000).await.unwrap() {
                let id = stored.dek.id;
                let context = kms_context(&tenant.id, &key.name, id, &stored.dek.scope.bound).unwrap();
                for form in &stored.wrapped {
                    let version = inspect(&form.blob).unwrap().dek_id();
                    // The KEK is where in the payload the 32 bytes stand that open it.
                    let opened = payload.windows(32).find_map(|candidate| {
                        let kek = DataKey::new(version, KeyMaterial::from_slice(candidate).unwrap());
                        let dek = open(&kek, &context, &form.blob).ok()?;
                        Some((<[u8; 32]>::try_from(candidate).unwrap(), dek))
                    });
                    let (kek, dek) = opened.unwrap();
                    keys.push((format!("data key {id}"), dek.as_slice().try_into().unwrap()));
                    found.insert((format!("KEK version {version}"), kek));
                }
            }
        }
    }
    store.close().await;
    assert_eq!(found.len(), 1, "one KEK of one version");
    keys.extend(found);
    keys
}

/// What a key ring's file holds, as docs/keyring.md describes it.
fn key_ring_payload(file: &Path) -> Vec<u8> {
    let bytes = std::fs::read(file).unwrap();
    let ends: Vec<usize> = (0..bytes.len()).filter(|at| bytes[*at] == b'\n').take(3).collect();
    let bound = std::str::from_utf8(&bytes[..=ends[1]]).unwrap();
    let number = |name: &str| bound.split_whitespace().find_map(|word| word.strip_prefix(name)).unwrap();
    let salt = u128::from_str_radix(number("salt="), 16).unwrap().to_be_bytes();
    let cost = |name: &str| number(name).parse::<u32>().unwrap();
    let parameters =
        argon2::Params::new(cost("memory_kib="), cost("passes="), cost("lanes="), Some(32)).unwrap();
    let mut key = [0; 32];
    argon2::Argon2::new(argon2::Algorithm::Argon2id, argon2::Version::V0x13, parameters)
        .hash_password_into(PASSPHRASE.as_bytes(), &salt, &mut key)
        .unwrap();
    let key = DataKey::new(DataKeyId::from_bytes(salt), KeyMaterial::from_slice(&key).unwrap());
    let mut context = EncryptionContext::new();
    context.insert("keyfold:keyring", bound).unwrap();
    open(&key, &context, &bytes[ends[2] + 1..]).unwrap().to_vec()
}

fn files(folder: &Path) -> Vec<std::path::PathBuf> {
    std::fs::read_dir(folder)
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .filter(|path| path.is_file())
        .collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn no_secret_is_in_the_log_in_an_error_or_in_a_file_that_is_not_meant_for_it() {
    let folder = tempfile::tempdir().unwrap();
    let secrets = [("KEYFOLD_KEYRING_PASSPHRASE", PASSPHRASE), ("KEYFOLD_PEPPER", PEPPER)];
    let run = |arguments: &[&str]| keyfold(folder.path(), arguments, &secrets).ok();
    run(&["keyring", "init"]);
    run(&["keyring", "add", "main"]);
    run(&["tenant", "create", "acme", "local:main"]);
    let made = run(&[
        "api-key",
        "create",
        "acme",
        "--name",
        "all",
        "--verbs",
        "encrypt,decrypt,rewrap,admin,operate",
    ]);
    let token = made.lines().last().unwrap().to_owned();
    let mut canaries = Canaries::new();
    canaries.add_token(&token);
    assert!(
        canaries.found_in(format!("x{}", STANDARD.encode(format!("a{PLAINTEXT}b"))).as_bytes()).is_some()
    );

    for (format, filter) in [("json", "trace"), ("text", "info,keyfold=trace")] {
        let variables =
            [&secrets[..], &[("KEYFOLD_LOG__FILTER", filter), ("KEYFOLD_LOG__FORMAT", format)]].concat();
        let program = Program::serve(folder.path(), &[], &variables).await;
        let mut tokens = Vec::new();
        let mut sus = Suspicious { canaries: &canaries, refusals: String::new(), called: BTreeSet::new() };
        let http1 = program.anonymous().with_token(&token);
        for (round, caller) in [http1.clone(), http1.over_http2()].into_iter().enumerate() {
            let round = round + if format == "json" { 0 } else { 2 };
            use_all(&mut sus, &caller, &mut tokens, round).await;
            use_rotation(&mut sus, &caller, round).await;
            use_bulk(&mut sus, &caller).await;
            misuse_all(&mut sus, &caller).await;
        }
        let all: BTreeSet<&str> = DOCUMENT["paths"]
            .as_object()
            .unwrap()
            .values()
            .flat_map(|item| item.as_object().unwrap().values())
            .map(|operation| operation["operationId"].as_str().unwrap())
            .collect();
        assert_eq!(
            all.difference(&sus.called).collect::<Vec<_>>(),
            Vec::<&&str>::new(),
            "not called by this test"
        );
        let log = program.stop().await;
        assert!(
            log.contains("request refused") && log.contains("keyfold::audit"),
            "the log is not turned up"
        );
        let refusals = sus.refusals;
        for token in &tokens {
            canaries.add_token(token);
        }
        let keys = unwrapped_keys(&folder.path().join("keyfold-data")).await;
        assert!(keys.len() > 10, "new data keys under the policy, and their KEK");
        for (name, key) in &keys {
            canaries.add(name, key);
            // The search finds what a stray {:?} would write.
            let strays = [format!("key: {key:?}"), format!("key {}", STANDARD.encode(key))];
            assert!(strays.iter().all(|stray| canaries.found_in(stray.as_bytes()) == Some(name)));
        }
        canaries.assert_absent(refusals.as_bytes(), "an error's answer");
        canaries.assert_absent(log.as_bytes(), &format!("the log ({filter})"));
    }
    for file in files(&folder.path().join("keyfold-data")) {
        canaries.assert_absent(&std::fs::read(&file).unwrap(), &file.display().to_string());
    }
}
