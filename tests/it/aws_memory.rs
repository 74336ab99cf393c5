//! The data keys in the program's memory: none is there after its eviction, its expiry and the program's end.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt as _;
use std::time::{Duration, Instant};

use base64::Engine as _;
use base64::engine::general_purpose::{STANDARD, STANDARD_NO_PAD, URL_SAFE_NO_PAD};
use kms_emulator::{CreateKey, Emulator};
use nix::sys::ptrace;
use nix::sys::signal::Signal;
use nix::sys::wait::{WaitStatus, waitpid};
use nix::unistd::Pid;
use serde_json::json;
use sha2::block_api::compress256;

use crate::aws_program::{Program, keyfold};
use crate::kms_aws::IRELAND;

/// Longer than anything takes that is waited for here.
const TIME_MAX: Duration = Duration::from_secs(60);

/// A text or number that gives a data key away, and what it is.
type Trace = (String, Vec<u8>);

/// A data key as its bytes could stand in memory. Its second half stands for it: what an allocator writes over the
/// beginning of freed memory must not pass for wiping.
fn spelled(key: &[u8]) -> Vec<Trace> {
    let half = &key[16..];
    let hex: String = half.iter().map(|byte| format!("{byte:02x}")).collect();
    let mut traces = vec![
        ("raw".to_owned(), half.to_vec()),
        ("hex".to_owned(), hex.clone().into_bytes()),
        ("HEX".to_owned(), hex.to_uppercase().into_bytes()),
    ];
    // In base64 what it looks like depends on how many bytes stand before it. Characters that other bytes have a
    // part in are left out.
    for before in 0..3 {
        let bytes = [&[0, 0][..before], half].concat();
        let own = (8 * before).div_ceil(6)..8 * bytes.len() / 6;
        let (standard, url_safe) = (STANDARD_NO_PAD.encode(&bytes), URL_SAFE_NO_PAD.encode(&bytes));
        traces.push((format!("base64, {before} bytes in"), standard[own.clone()].into()));
        traces.push((format!("base64url, {before} bytes in"), url_safe[own].into()));
    }
    traces
}

/// What a data key in use is kept as: the two states of HMAC-SHA-256 that it leads to. They are as secret.
fn prepared(key: &[u8]) -> Vec<Trace> {
    let state = |pad: u8| {
        let mut block = [pad; 64];
        block.iter_mut().zip(key).for_each(|(block, key)| *block ^= key);
        // The initial hash value of SHA-256 (FIPS 180-4, 5.3.3).
        let mut state = [
            0x6a09_e667,
            0xbb67_ae85,
            0x3c6e_f372,
            0xa54f_f53a,
            0x510e_527f,
            0x9b05_688c,
            0x1f83_d9ab,
            0x5be0_cd19,
        ];
        compress256(&mut state, &[block]);
        state[4..].iter().flat_map(|word: &u32| word.to_ne_bytes()).collect()
    };
    vec![("inner state".to_owned(), state(0x36)), ("outer state".to_owned(), state(0x5c))]
}

/// Every page that a process can write to and has, in runs of such pages.
fn memory_of(process: u32) -> Vec<Vec<u8>> {
    for _ in 0..50 {
        // Between the reading of its map and of its pages a region can go. Then it is all read again.
        if let Ok(pages) = snapshot(process) {
            return pages;
        }
    }
    panic!("the memory of the process cannot be read: its map changes all the time");
}

fn snapshot(process: u32) -> io::Result<Vec<Vec<u8>>> {
    let open = |name: &str| File::open(format!("/proc/{process}/{name}"));
    let (memory, page_map) = (open("mem")?, open("pagemap")?);
    let page = region::page::size() as u64;
    let mut runs = Vec::new();
    for (start, end) in io::read_to_string(open("maps")?)?.lines().filter_map(writable) {
        // Eight bytes for each page: the two highest bits say whether it is in memory, or swapped out.
        let mut entries = vec![0; usize::try_from((end - start) / page * 8).unwrap()];
        page_map.read_exact_at(&mut entries, start / page * 8)?;
        let there: Vec<bool> = entries.chunks_exact(8).map(|entry| entry[7] >> 6 != 0).collect();
        let mut at = 0;
        for run in there.chunk_by(|one, next| one == next) {
            if run[0] {
                let mut bytes = vec![0; run.len() * page as usize];
                memory.read_exact_at(&mut bytes, start + at * page)?;
                runs.push(bytes);
            }
            at += run.len() as u64;
        }
    }
    Ok(runs)
}

fn writable(line: &str) -> Option<(u64, u64)> {
    let mut fields = line.split_ascii_whitespace();
    let (start, end) = fields.next()?.split_once('-')?;
    let address = |text| u64::from_str_radix(text, 16).ok();
    fields.next()?.starts_with("rw").then_some((address(start)?, address(end)?))
}

/// What of these traces is in memory.
fn found(memory: &[Vec<u8>], traces: &[Trace]) -> Vec<String> {
    let is_there = |needle: &[u8]| {
        let finder = memchr::memmem::Finder::new(needle);
        memory.iter().any(|run| finder.find(run).is_some())
    };
    traces.iter().filter(|(_, needle)| is_there(needle)).map(|(name, _)| name.clone()).collect()
}

/// Everything that gives one of these keys away.
fn every_trace(keys: &[Vec<u8>]) -> Vec<Trace> {
    keys.iter().flat_map(|key| [spelled(key), prepared(key)].concat()).collect()
}

/// Waits until none of these traces is in the process's memory.
async fn until_gone(process: u32, traces: &[Trace], what: &str) {
    #[expect(clippy::disallowed_methods, reason = "the program goes by the real time")]
    let began = Instant::now();
    loop {
        let left = found(&memory_of(process), traces);
        if left.is_empty() {
            return;
        }
        assert!(began.elapsed() < TIME_MAX, "{what}: in memory are {left:?}");
        tokio::time::sleep(Duration::from_millis(200)).await;
    }
}

async fn emulator_with_key() -> (Emulator, String) {
    let emulator = Emulator::builder().region(IRELAND).remember_data_keys().start().await.unwrap();
    let kek = emulator.create_key(IRELAND, CreateKey::new()).unwrap();
    (emulator, kek)
}

/// A program whose memory its own user, who runs this test, may read. Its connections to the KMS close after a second:
/// their buffers hold the last answers.
fn start(emulator: &Emulator, kek: &str, folder: &tempfile::TempDir, settings: &[(&str, &str)]) -> Program {
    let mut command = keyfold(folder.path(), &emulator.url());
    command
        .env("KEYFOLD_MEMORY__NOT_DUMPABLE", "false")
        .env("KEYFOLD_AWS__CONNECTION_IDLE_SECS_MAX", "1")
        .envs(settings.iter().copied());
    Program::start(command, folder.path(), kek)
}

/// Encrypts under each of these keys of the tenant `dev`, which makes a data key for each.
async fn encrypt_under(program: &Program, keys: &[&str]) -> Vec<String> {
    let mut ciphertexts = Vec::new();
    for key in keys {
        if *key != "default" {
            program.caller.post("/v1/tenants/dev/keys", &json!({"key": key})).await.ok(201);
        }
        let body = json!({"plaintext": STANDARD.encode(b"hello"), "key": key});
        let answer = program.caller.post("/v1/encrypt", &body).await.ok(200);
        ciphertexts.push(answer["ciphertext"].as_str().unwrap().to_owned());
    }
    ciphertexts
}

#[tokio::test(flavor = "multi_thread")]
async fn an_evicted_data_key_is_nowhere_in_the_programs_memory() {
    let (emulator, kek) = emulator_with_key().await;
    let folder = tempfile::tempdir().unwrap();
    let program = start(&emulator, &kek, &folder, &[("KEYFOLD_POOL__TENANT_DEKS_MAX", "2")]);
    let process = program.process.id();
    let ciphertexts = encrypt_under(&program, &["default", "two", "three", "four"]).await;
    // Evicted by the others: fetched again, in the place of the third.
    program.caller.decrypt(&ciphertexts[0], &json!({})).await;
    let keys = emulator.data_keys();
    assert_eq!(keys.len(), 4);
    assert!(emulator.count("Decrypt") >= 1);
    let (live, evicted) = ([keys[0].clone(), keys[3].clone()], [keys[1].clone(), keys[2].clone()]);
    until_gone(process, &every_trace(&evicted), "after eviction").await;
    // Those in use are kept as states, and not as their bytes.
    let bytes: Vec<Trace> = live.iter().flat_map(|key| spelled(key)).collect();
    until_gone(process, &bytes, "in use").await;
    for key in &live {
        let memory = memory_of(process);
        assert_eq!(
            found(&memory, &prepared(key)),
            ["inner state", "outer state"],
            "the search finds nothing"
        );
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_data_key_whose_time_is_over_is_nowhere_in_the_programs_memory() {
    let (emulator, kek) = emulator_with_key().await;
    let folder = tempfile::tempdir().unwrap();
    let program = start(&emulator, &kek, &folder, &[("KEYFOLD_POOL__DEK_PLAINTEXT_SECS_MAX", "10")]);
    let process = program.process.id();
    encrypt_under(&program, &["default"]).await;
    let keys = emulator.data_keys();
    assert_eq!(found(&memory_of(process), &prepared(&keys[0])), ["inner state", "outer state"]);
    until_gone(process, &every_trace(&keys), "after its time").await;
    // The program is as well as before.
    encrypt_under(&program, &["default"]).await;
    assert_eq!(found(&memory_of(process), &prepared(&keys[0])), ["inner state", "outer state"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn at_its_end_the_program_leaves_no_data_key_in_memory() {
    let (emulator, kek) = emulator_with_key().await;
    let folder = tempfile::tempdir().unwrap();
    // Its connections to the KMS are open to the end, with what is in their buffers.
    let settings = [("KEYFOLD_AWS__CONNECTION_IDLE_SECS_MAX", "600")];
    let mut program = start(&emulator, &kek, &folder, &settings);
    let process = program.process.id();
    let ciphertexts = encrypt_under(&program, &["default", "two", "three"]).await;
    program.caller.decrypt(&ciphertexts[0], &json!({})).await;
    let keys = emulator.data_keys();
    for key in &keys {
        assert_eq!(found(&memory_of(process), &prepared(key)), ["inner state", "outer state"]);
    }
    let last = tokio::task::spawn_blocking(move || memory_at_exit(process)).await.unwrap();
    assert!(program.process.wait().unwrap().success());
    // Its environment is there until the end: the search sees what is there.
    assert_eq!(found(&last, &[("environment".to_owned(), b"AKIASERVICE".to_vec())]), ["environment"]);
    let left = found(&last, &every_trace(&keys));
    assert!(left.is_empty(), "in memory are {left:?}");
}

/// Ends a process, and stops it in its exit: all of its code has run, and its memory is still there. One thread does
/// it all, because a tracer is a thread.
fn memory_at_exit(process: u32) -> Vec<Vec<u8>> {
    let pid = Pid::from_raw(i32::try_from(process).unwrap());
    ptrace::seize(pid, ptrace::Options::PTRACE_O_TRACEEXIT).unwrap();
    nix::sys::signal::kill(pid, Signal::SIGTERM).unwrap();
    loop {
        match waitpid(pid, None).unwrap() {
            WaitStatus::PtraceEvent(_, _, event) if event == ptrace::Event::PTRACE_EVENT_EXIT as i32 => break,
            WaitStatus::Stopped(_, signal) => ptrace::cont(pid, signal).unwrap(),
            other => panic!("it came to another end: {other:?}"),
        }
    }
    let memory = memory_of(process);
    ptrace::detach(pid, None).unwrap();
    memory
}
