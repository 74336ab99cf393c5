//! What reads bytes of strangers, on valid input that is changed at random: always the same changes, so that a failure
//! comes again. `fuzz/` gives the same functions to libFuzzer, which looks further.

#[path = "../../fuzz/src/targets/mod.rs"]
#[expect(unreachable_pub, reason = "the other crate's library shows them")]
mod targets;

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;

use targets::TARGETS;

/// Longer input is cut: a seeded run is to be short.
const INPUT_BYTES_MAX: usize = 200_000;

/// SplitMix64: enough for choosing what to change.
struct Chance(u64);

impl Chance {
    fn below(&mut self, bound: usize) -> usize {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = self.0;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        usize::try_from((mixed ^ (mixed >> 31)) % bound.max(1) as u64).unwrap()
    }
}

/// What readers trip over: edges of integers, quotes, escapes, ends of lines, halves of characters.
const INTERESTING: [&[u8]; 16] = [
    b"\0",
    b"\xff\xff\xff\xff",
    b"\x7f\xff",
    b"\x80",
    b"\"",
    b"\\u0000",
    b"\\",
    b"\n",
    b"\r\n",
    b"=",
    b",",
    b"{",
    b"]",
    b"\xc3",
    b"null",
    b"1e999",
];

fn changed(seeds: &[Vec<u8>], chance: &mut Chance) -> Vec<u8> {
    let mut bytes = seeds[chance.below(seeds.len())].clone();
    for _ in 0..=chance.below(4) {
        let at = chance.below(bytes.len() + 1);
        let length = chance.below(1 + (bytes.len() - at).min(40));
        match chance.below(7) {
            0 => bytes.truncate(at),
            1 | 2 if at < bytes.len() => bytes[at] ^= 1 << chance.below(8),
            3 => drop(bytes.drain(at..at + length)),
            4 => {
                let again = bytes[at..at + length].to_vec();
                bytes.splice(at..at, again);
            }
            5 => {
                let other = &seeds[chance.below(seeds.len())];
                let from = chance.below(other.len() + 1);
                bytes.truncate(at);
                bytes.extend_from_slice(&other[from..]);
            }
            _ => {
                let put = INTERESTING[chance.below(INTERESTING.len())].iter().copied();
                bytes.splice(at..at, put);
            }
        }
        bytes.truncate(INPUT_BYTES_MAX);
    }
    bytes
}

fn seeded(name: &str) {
    let target = TARGETS.iter().find(|target| target.name == name).unwrap();
    let seeds = (target.seeds)();
    let mut chance = Chance(name.len() as u64);
    let changed = (0..target.rounds).map(|_| changed(&seeds, &mut chance));
    for input in seeds.iter().cloned().chain(changed) {
        let tried = catch_unwind(AssertUnwindSafe(|| targets::run(name, &input)));
        assert!(tried.is_ok(), "{name} fails on: {}", input.escape_ascii());
    }
}

/// A test for each target, so that they run beside one another.
macro_rules! seeded {
    ($($name:ident),* $(,)?) => {
        $(#[test]
        fn $name() {
            seeded(stringify!($name));
        })*

        const SEEDED: &[&str] = &[$(stringify!($name)),*];
    };
}

seeded! {
    envelope, envelope_stream, envelope_text, canonical_context, names, proxy_header, forwarded, encrypt_json,
    decrypt_json, rewrap_json, batch_json, lines, raw_body, context_header, credential, key_ring, audit_trail,
}

#[test]
fn every_target_is_run_here_and_by_libfuzzer() {
    let named: Vec<&str> = TARGETS.iter().map(|target| target.name).collect();
    assert_eq!(named, SEEDED);
    let fuzz = Path::new(env!("CARGO_MANIFEST_DIR")).join("fuzz");
    let manifest = std::fs::read_to_string(fuzz.join("Cargo.toml")).unwrap();
    for name in named {
        let program = std::fs::read_to_string(fuzz.join(format!("fuzz_targets/{name}.rs"))).unwrap();
        assert!(program.contains(&format!("run(\"{name}\"")), "{name}");
        assert!(manifest.contains(&format!("name = \"{name}\"\n")), "{name}");
    }
}
