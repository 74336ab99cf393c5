//! How far a job is, in a file: whoever stops it, or kills it, goes on there.

use std::collections::BTreeMap;
use std::io::Write as _;
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, bail};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::report::Report;

/// The shape of the file.
const VERSION: u32 = 1;

/// What a job is: everything that decides what becomes of a row.
pub(super) type Parameters = BTreeMap<String, Value>;

#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct State {
    version: u32,
    pub(super) job: Parameters,
    /// What was read from: it must be the same when the job goes on, and may be another when it begins anew.
    pub(super) input: Value,
    /// Everything before it is done; `null` at the beginning.
    pub(super) cursor: Value,
    pub(super) finished: bool,
    pub(super) report: Report,
}

/// The file, and what stands in it.
pub(super) struct StateFile {
    path: Option<PathBuf>,
    pub(super) state: State,
}

impl StateFile {
    /// The job from its beginning, or from where it was left. A file of another job is refused.
    pub(super) fn open(path: Option<PathBuf>, job: Parameters, input: Value) -> anyhow::Result<Self> {
        let fresh = |job| State {
            version: VERSION,
            job,
            input: input.clone(),
            cursor: Value::Null,
            finished: false,
            report: Report::default(),
        };
        let Some(path) = path else { return Ok(Self { path: None, state: fresh(job) }) };
        let text = match std::fs::read(&path) {
            Ok(text) => text,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
                let mut file = Self { path: Some(path), state: fresh(job) };
                // Now, and not after the first page, it shows whether it can be written.
                file.save()?;
                return Ok(file);
            }
            Err(error) => return Err(error).with_context(|| format!("cannot read {}", path.display())),
        };
        let told = || format!("{} is no state of this command", path.display());
        let state: State = serde_json::from_slice(&text).with_context(told)?;
        if state.version != VERSION {
            bail!("{}: it is of version {}", told(), state.version);
        }
        if state.job != job {
            let names =
                state.job.keys().chain(job.keys()).filter(|name| state.job.get(*name) != job.get(*name));
            let names: std::collections::BTreeSet<&str> = names.map(String::as_str).collect();
            let names: Vec<&str> = names.into_iter().collect();
            bail!(
                "{} is the state of another job: not the same {}. Name another file",
                path.display(),
                names.join(", ")
            );
        }
        if state.finished || state.cursor.is_null() {
            return Ok(Self { path: Some(path), state: fresh(job) });
        }
        if state.input != input {
            bail!(
                "{} was begun with an input that has changed since: remove it to begin anew",
                path.display()
            );
        }
        Ok(Self { path: Some(path), state })
    }

    /// Whether a run before this one got somewhere.
    pub(super) fn resumes(&self) -> bool {
        !self.state.cursor.is_null()
    }

    /// Replaces the file: at any moment there is the old one or the new one, whole.
    pub(super) fn save(&mut self) -> anyhow::Result<()> {
        let Some(path) = &self.path else { return Ok(()) };
        replace(path, &self.state).with_context(|| format!("cannot write {}", path.display()))
    }
}

fn replace(path: &Path, state: &State) -> anyhow::Result<()> {
    let name = path.file_name().context("it names no file")?;
    let mut hidden = std::ffi::OsString::from(".");
    hidden.push(name);
    hidden.push(".new");
    let temporary = path.with_file_name(hidden);
    // Keys of rows can be personal data.
    let mut file =
        std::fs::OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(&temporary)?;
    file.write_all(&serde_json::to_vec(state)?)?;
    file.sync_all()?;
    std::fs::rename(&temporary, path)?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn job(column: &str) -> Parameters {
        [("column".to_owned(), json!(column)), ("table".to_owned(), json!("t"))].into()
    }

    #[test]
    fn a_job_goes_on_where_it_was_and_begins_anew_when_it_was_finished() {
        let folder = tempfile::tempdir().unwrap();
        let path = Some(folder.path().join("state"));
        let mut file = StateFile::open(path.clone(), job("a"), json!(1)).unwrap();
        assert!(!file.resumes());
        file.state.cursor = json!(17);
        file.state.report.rows = 3;
        file.save().unwrap();
        let mut file = StateFile::open(path.clone(), job("a"), json!(1)).unwrap();
        assert!(file.resumes());
        assert_eq!((&file.state.cursor, file.state.report.rows), (&json!(17), 3));
        let changed = StateFile::open(path.clone(), job("a"), json!(2)).err().unwrap();
        assert!(changed.to_string().contains("changed since"), "{changed}");
        file.state.finished = true;
        file.save().unwrap();
        let file = StateFile::open(path, job("a"), json!(2)).unwrap();
        assert!(!file.resumes() && file.state.report.rows == 0);
    }

    #[test]
    fn the_state_of_another_job_or_of_another_program_is_refused() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("state");
        StateFile::open(Some(path.clone()), job("a"), json!(1)).unwrap();
        let other = StateFile::open(Some(path.clone()), job("b"), json!(1)).err().unwrap();
        assert!(other.to_string().contains("not the same column. Name"), "{other}");
        for text in ["", "{}", "[1]", "{\"version\": 1}"] {
            std::fs::write(&path, text).unwrap();
            let error = StateFile::open(Some(path.clone()), job("a"), json!(1)).err().unwrap();
            assert!(error.to_string().contains("no state of this command"), "{error}");
        }
    }
}
