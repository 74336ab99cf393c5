//! Which files, and where their results go.

use std::path::{Path, PathBuf};

use anyhow::bail;

use super::{FileArgs, Verb};

/// How encrypted files end.
const EXTENSION: &str = "kf";

/// One file's work.
pub(super) struct Job {
    /// None is standard input.
    pub(super) source: Option<PathBuf>,
    pub(super) target: Target,
}

/// Where a result goes.
pub(super) enum Target {
    Stdout,
    File(PathBuf),
    /// Over what was read, once the result is whole.
    InPlace(PathBuf),
}

/// All the work.
pub(super) struct Jobs {
    pub(super) files: Vec<Job>,
    /// Files in folders that this verb has nothing to do with.
    pub(super) skipped: usize,
    /// What in folders could not be read.
    pub(super) unreadable: Vec<anyhow::Error>,
}

impl Job {
    pub(super) fn name(&self) -> String {
        self.source.as_ref().map_or_else(|| "standard input".to_owned(), |path| path.display().to_string())
    }
}

pub(super) fn jobs(args: &FileArgs, verb: &Verb) -> anyhow::Result<Jobs> {
    let mut jobs = Jobs { files: Vec::new(), skipped: 0, unreadable: Vec::new() };
    let standard_input = [PathBuf::from("-")];
    let files = if args.files.is_empty() { &standard_input } else { args.files.as_slice() };
    if args.output.is_some() && (files.len() > 1 || args.recursive) {
        bail!("--output goes with one file: leave it out, and each result stands beside its file");
    }
    for path in files {
        if path.as_os_str() == "-" {
            let target = named_output(args).unwrap_or(Target::Stdout);
            jobs.files.push(Job { source: None, target });
        } else if path.is_dir() {
            if !args.recursive {
                bail!("{} is a folder: say --recursive to go into it", path.display());
            }
            walk(path, verb, &mut jobs)?;
        } else {
            let target = named_output(args).map_or_else(|| beside(path, verb), Ok)?;
            jobs.files.push(Job { source: Some(path.clone()), target });
        }
    }
    Ok(jobs)
}

fn named_output(args: &FileArgs) -> Option<Target> {
    let output = args.output.as_ref()?;
    Some(if output.as_os_str() == "-" { Target::Stdout } else { Target::File(output.clone()) })
}

fn is_encrypted(path: &Path) -> bool {
    path.extension().is_some_and(|extension| extension == EXTENSION)
}

fn beside(path: &Path, verb: &Verb) -> anyhow::Result<Target> {
    match verb {
        Verb::Encrypt { .. } => {
            let mut name = path.as_os_str().to_owned();
            name.push(".");
            name.push(EXTENSION);
            Ok(Target::File(name.into()))
        }
        Verb::Decrypt if is_encrypted(path) => Ok(Target::File(path.with_extension(""))),
        Verb::Decrypt => {
            bail!("{} does not end in .{EXTENSION}: say with --output where the result goes", path.display())
        }
        // The file itself, and not a symbolic link to it, is replaced. One that is not there is told of when it is read.
        Verb::Rewrap { .. } => Ok(Target::InPlace(path.canonicalize().unwrap_or_else(|_| path.to_owned()))),
    }
}

/// In the order of their names, so that two runs do the same. What cannot be read keeps nothing else from being done.
fn walk(folder: &Path, verb: &Verb, jobs: &mut Jobs) -> anyhow::Result<()> {
    let unreadable =
        |error| anyhow::Error::new(error).context(format!("cannot read the folder {}", folder.display()));
    let listed = match std::fs::read_dir(folder) {
        Ok(listed) => listed,
        Err(error) => {
            jobs.unreadable.push(unreadable(error));
            return Ok(());
        }
    };
    let mut entries = Vec::new();
    for entry in listed {
        match entry.and_then(|entry| Ok((entry.file_name(), entry.file_type()?))) {
            Ok(entry) => entries.push(entry),
            Err(error) => jobs.unreadable.push(unreadable(error)),
        }
    }
    entries.sort_by(|(name, _), (other, _)| name.cmp(other));
    for (name, kind) in entries {
        let path = folder.join(name);
        if kind.is_dir() {
            walk(&path, verb, jobs)?;
        } else if kind.is_file() && is_encrypted(&path) != matches!(verb, Verb::Encrypt { .. }) {
            let target = beside(&path, verb)?;
            jobs.files.push(Job { source: Some(path), target });
        } else {
            jobs.skipped += 1;
        }
    }
    Ok(())
}
