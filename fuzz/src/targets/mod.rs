//! Everything of keyfold that reads bytes of strangers, each as a function of bytes that panics where something is
//! wrong: for libFuzzer (`fuzz/fuzz_targets`) and for the seeded runs of `tests/it/fuzzed.rs`.

mod edge;
mod envelopes;
mod files;
mod service;
mod words;

/// A reader and how to try it.
pub struct Target {
    /// As its libFuzzer program is called.
    pub name: &'static str,
    /// Reads these bytes. Panics where a promise is broken.
    pub run: fn(&[u8]),
    /// Valid input, and what is nearly so.
    pub seeds: fn() -> Vec<Vec<u8>>,
    /// How many mutations a seeded run makes.
    pub rounds: u32,
}

const fn target(name: &'static str, rounds: u32, run: fn(&[u8]), seeds: fn() -> Vec<Vec<u8>>) -> Target {
    Target { name, run, seeds, rounds }
}

/// All of them.
pub const TARGETS: &[Target] = &[
    target("envelope", 20_000, envelopes::open, envelopes::seeds),
    target("envelope_stream", 10_000, envelopes::open_in_pieces, envelopes::stream_seeds),
    target("envelope_text", 10_000, envelopes::text, envelopes::text_seeds),
    target("canonical_context", 20_000, envelopes::canonical_context, envelopes::context_seeds),
    target("names", 20_000, words::names, words::seeds),
    target("proxy_header", 20_000, edge::proxy_header, edge::proxy_seeds),
    target("forwarded", 20_000, edge::forwarded, edge::forwarded_seeds),
    target("encrypt_json", 10_000, service::encrypt_json, service::encrypt_seeds),
    target("decrypt_json", 10_000, service::decrypt_json, service::decrypt_seeds),
    target("rewrap_json", 10_000, service::rewrap_json, service::decrypt_seeds),
    target("batch_json", 5_000, service::batch_json, service::batch_seeds),
    target("lines", 1_500, service::lines, service::line_seeds),
    target("raw_body", 5_000, service::raw_body, service::raw_seeds),
    target("context_header", 10_000, service::context_header, service::header_seeds),
    target("credential", 10_000, service::credential, service::credential_seeds),
    target("key_ring", 5_000, files::key_ring, files::key_ring_seeds),
    target("audit_trail", 5_000, files::audit_trail, files::audit_seeds),
];

/// Runs the target of this name.
pub fn run(name: &str, bytes: &[u8]) {
    let target = TARGETS.iter().find(|target| target.name == name).expect("a target of this name");
    (target.run)(bytes);
}
