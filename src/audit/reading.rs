//! Reading a trail back: is it whole, and what does it say.

use std::fs::File;
use std::io::{self, BufRead as _, BufReader};
use std::path::PathBuf;
use std::time::Duration;

use serde_json::Value;

use super::chain::{Fault, Keys, Link, Summary, Verifier};
use super::output::TrailFiles;
use crate::clock::Timestamp;

/// Why a trail cannot be vouched for.
#[derive(Debug, thiserror::Error)]
pub enum ReadError {
    /// A file cannot be read.
    #[error("{path} cannot be read: {source}")]
    File {
        /// Which.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// Something is wrong with it.
    #[error(transparent)]
    Fault(#[from] Located),
}

/// What is wrong, and where.
#[derive(Debug, thiserror::Error)]
#[error("{path} line {line}: {fault}")]
pub struct Located {
    /// In which file; the last one where the trail was cut.
    pub path: PathBuf,
    /// In which line, from 1.
    pub line: u64,
    /// What.
    pub fault: Fault,
}

/// Follows a trail through all its files. What the note beside it and `anchors` tell of has to be met.
pub fn verify(trail: &TrailFiles, keys: &Keys, anchors: &[Link]) -> Result<Summary, ReadError> {
    let anchors: Vec<Link> = anchors.iter().copied().chain(trail.noted).collect();
    let mut verifier = Verifier::new(keys, anchors);
    let (mut last_path, mut last_line) = (PathBuf::new(), 0);
    for (path, file) in open(trail)? {
        let failed = |source| ReadError::File { path: path.clone(), source };
        let mut reader = BufReader::with_capacity(1 << 20, file);
        let (mut line, mut number) = (Vec::new(), 0);
        loop {
            line.clear();
            if whole_line(&mut reader, &mut line).map_err(failed)? == 0 {
                break;
            }
            number += 1;
            verifier.line(&line).map_err(|fault| Located { path: path.clone(), line: number, fault })?;
        }
        (last_path, last_line) = (path, number);
    }
    Ok(verifier.end().map_err(|fault| Located { path: last_path, line: last_line, fault })?)
}

fn open(trail: &TrailFiles) -> Result<Vec<(PathBuf, File)>, ReadError> {
    trail.open().map_err(|(path, source)| ReadError::File { path, source })
}

/// How often, and how long each time, the rest of a line is waited for that a service is just writing.
const WAITS_MAX: u32 = 20;
const WAIT: Duration = Duration::from_millis(25);

/// The bytes of the next line, all of them where a service is writing it.
fn whole_line(reader: &mut BufReader<File>, line: &mut Vec<u8>) -> io::Result<usize> {
    reader.read_until(b'\n', line)?;
    for _ in 0..WAITS_MAX {
        if line.is_empty() || line.ends_with(b"\n") {
            break;
        }
        #[expect(clippy::disallowed_methods, reason = "the command line waits, and no worker thread")]
        std::thread::sleep(WAIT);
        reader.read_until(b'\n', line)?;
    }
    Ok(line.len())
}

/// What is looked for; every part that is given has to fit. What the record of a large batch leaves out may be what is
/// looked for: such a record fits.
#[derive(Clone, Debug, Default)]
pub struct Query {
    /// Members of a record and the text that they must have.
    pub members: Vec<(&'static str, String)>,
    /// Not before.
    pub since: Option<Timestamp>,
    /// Before.
    pub until: Option<Timestamp>,
    /// Context pairs.
    pub context: Vec<(String, String)>,
}

impl Query {
    fn fits(&self, record: &Value, keys: &Keys) -> bool {
        let at = record["time"].as_str().and_then(Timestamp::parse_rfc3339);
        self.members.iter().all(|(name, text)| holds(record, name, text))
            && self.since.is_none_or(|since| at.is_some_and(|at| at >= since))
            && self.until.is_none_or(|until| at.is_some_and(|at| at < until))
            && self.context.iter().all(|(name, value)| {
                let tenant = record["tenant"].as_str().unwrap_or_default();
                let recorded = &record["context"][name];
                recorded["value"] == value.as_str()
                    || recorded["hash"] == keys.value_hash(tenant, name, value).as_str()
                    || lists(&record["context_varying"], name)
                    || record["context_varying_more"] == true
            })
    }
}

/// Whether a record's member has this text; a batch's record has lists of some. One whose list is cut may have it.
fn holds(record: &Value, name: &str, text: &str) -> bool {
    let listed = match name {
        "key" => lists(&record["keys"], text) || record["keys_more"] == true,
        "dek" => lists(&record["deks"], text) || record["deks_more"] == true,
        "code" => record["codes"].get(text).is_some(),
        "ref" => lists(&record["refs"], text) || record["refs_more"].is_u64(),
        _ => false,
    };
    listed || record[name] == text
}

fn lists(list: &Value, text: &str) -> bool {
    list.as_array().is_some_and(|list| list.iter().any(|item| item == text))
}

/// Gives every record that fits, oldest first, as it stands in its file.
pub fn search(
    trail: &TrailFiles,
    keys: &Keys,
    query: &Query,
    mut found: impl FnMut(&str),
) -> Result<(), ReadError> {
    for (path, file) in open(trail)? {
        let failed = |source| ReadError::File { path: path.clone(), source };
        for line in BufReader::new(file).lines() {
            let line = line.map_err(failed)?;
            let record: Value = serde_json::from_str(&line).unwrap_or_default();
            let is_record = record["event"] == "call" || record["event"] == "change";
            if is_record && query.fits(&record, keys) {
                found(&line);
            }
        }
    }
    Ok(())
}
