//! `keyfold inspect`: what stands in an envelope's head, in clear.

use std::fs::File;
use std::io::{self, Read};
use std::path::PathBuf;

use anyhow::Context as _;
use clap::Args;
use envelope::{HEAD_BYTES_MAX, Head, inspect, text};

use super::output;

#[derive(Args)]
pub(super) struct InspectArgs {
    /// The envelope, binary or in text form (kf1....); standard input where no file, or `-`, is named.
    file: Option<PathBuf>,
}

pub(super) fn run(args: &InspectArgs) -> anyhow::Result<()> {
    // The head is at the front, and bounded: a terabyte behind it is not read.
    let limit = (HEAD_BYTES_MAX * 2) as u64;
    let mut bytes = Vec::new();
    match args.file.as_deref().filter(|file| file.as_os_str() != "-") {
        Some(file) => {
            let opened = File::open(file).with_context(|| format!("cannot read {}", file.display()))?;
            opened.take(limit).read_to_end(&mut bytes)?;
        }
        None => {
            io::stdin().lock().take(limit).read_to_end(&mut bytes)?;
        }
    }
    let head = if bytes.starts_with(text::PREFIX.as_bytes()) {
        inspect(&decode_head(&bytes)?)
    } else {
        inspect(&bytes)
    };
    show(&head.context("this is not a keyfold envelope, or not its beginning")?);
    Ok(())
}

/// The text form of a head: what was read of a long envelope may end within a group of four characters.
fn decode_head(bytes: &[u8]) -> anyhow::Result<Vec<u8>> {
    let text = std::str::from_utf8(bytes).context("the text form of an envelope is ASCII")?.trim_end();
    if let Ok(whole) = text::decode(text) {
        return Ok(whole);
    }
    let encoded = text.len() - text::PREFIX.len();
    let cut = text::PREFIX.len() + encoded / 4 * 4;
    text::decode(text.get(..cut).unwrap_or(text)).context("this is not a keyfold envelope in text form")
}

fn show(head: &Head) {
    let id = head.dek_id();
    output::line("format            keyfold envelope, version 1");
    output::line(format_args!("data key          {id}"));
    let wrapped = head.wrapped();
    if wrapped.is_compact() {
        output::line("weight            compact: the registry is needed to open it");
    } else {
        output::line("weight            embedded: opens with the master key alone");
        for (name, value) in wrapped.kms_context().into_iter().flat_map(envelope::EncryptionContext::iter) {
            output::line(format_args!("KMS context       {name} = {value}"));
        }
        for key in wrapped.keys() {
            output::line(format_args!("wrapped under     {} ({} bytes)", key.kek, key.blob.len()));
        }
    }
    output::line(format_args!("head              {} bytes; the sealed message follows", head.body_offset()));
    output::line("message context   authenticated and not stored: decryption must bring it");
}
