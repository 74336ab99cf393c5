//! What files of rows are read from and written to.

use std::fs::File;
use std::io::{self, BufRead as _, BufWriter, Read, Seek, SeekFrom, Write as _};
use std::os::unix::fs::{MetadataExt as _, OpenOptionsExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};

use anyhow::{Context as _, ensure};
use serde_json::{Value, json};

use crate::cli::put::{ensure_free, put};

/// How much is looked at for the end of the first line.
const PEEK_BYTES: usize = 64 << 10;

/// Files are read and written where nothing waits behind them: standard input may say nothing for hours.
pub(super) async fn aside<T: Send + 'static>(
    work: impl FnOnce() -> anyhow::Result<T> + Send + 'static,
) -> anyhow::Result<T> {
    tokio::task::spawn_blocking(work).await?
}

/// A file, or standard input, which is not read twice.
pub(super) enum Input {
    File(File),
    Stdin(io::Stdin),
}

impl Input {
    pub(super) fn open(path: Option<&Path>) -> anyhow::Result<Self> {
        let Some(path) = path else { return Ok(Self::Stdin(io::stdin())) };
        let file = File::open(path).with_context(|| format!("cannot read {}", path.display()))?;
        ensure!(!file.metadata()?.is_dir(), "{} is a folder", path.display());
        Ok(Self::File(file))
    }

    /// How long it is, where that is known.
    pub(super) fn bytes(&self) -> anyhow::Result<Option<u64>> {
        let Self::File(file) = self else { return Ok(None) };
        Ok(Some(file.metadata()?).filter(std::fs::Metadata::is_file).map(|file| file.len()))
    }

    /// Whether its first line ends with CR LF. Nothing is taken from it.
    pub(super) fn begins_with_crlf(&mut self) -> io::Result<bool> {
        let mut start = vec![0; PEEK_BYTES];
        match self {
            Self::File(file) => {
                let read = file.read(&mut start)?;
                start.truncate(read);
                file.seek(SeekFrom::Start(0))?;
            }
            Self::Stdin(stdin) => start = stdin.lock().fill_buf()?.to_vec(),
        }
        Ok(start.split(|byte| *byte == b'\n').next().is_some_and(|line| line.ends_with(b"\r")))
    }

    /// What tells whether it is the same as before.
    pub(super) fn identity(path: Option<&Path>) -> anyhow::Result<Value> {
        let Some(path) = path else { return Ok(Value::Null) };
        let found = std::fs::metadata(path).with_context(|| format!("cannot read {}", path.display()))?;
        Ok(json!([found.dev(), found.ino(), found.len(), found.mtime(), found.mtime_nsec()]))
    }
}

impl Read for Input {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        match self {
            Self::File(file) => file.read(buffer),
            Self::Stdin(stdin) => stdin.read(buffer),
        }
    }
}

impl Seek for Input {
    fn seek(&mut self, to: SeekFrom) -> io::Result<u64> {
        match self {
            Self::File(file) => file.seek(to),
            Self::Stdin(_) => Err(io::Error::from(io::ErrorKind::NotSeekable)),
        }
    }
}

/// Where the rows go.
pub(super) enum Output {
    Stdout(BufWriter<io::Stdout>),
    File(OutputFile),
    /// A dry run.
    Nowhere,
}

/// A file that gets its name when it is whole. Until then it lies beside its place, and a job that goes on later finds
/// it there.
pub(super) struct OutputFile {
    writer: BufWriter<File>,
    bytes: u64,
    temporary: PathBuf,
    target: PathBuf,
    /// What it is made from: its permissions, and what it was when the job began.
    source: Option<(PathBuf, Value)>,
    overwrite: bool,
    /// Whether it is left for another run.
    keep: bool,
}

/// What becomes of an output file.
pub(super) struct OutputOptions<'a> {
    pub(super) target: &'a Path,
    pub(super) source: Option<&'a Path>,
    pub(super) overwrite: bool,
    pub(super) keep: bool,
}

impl Output {
    /// A file that goes on after so many bytes.
    pub(super) fn file(options: &OutputOptions<'_>, bytes: u64) -> anyhow::Result<Self> {
        let OutputOptions { target, source, overwrite, keep } = *options;
        if !overwrite {
            ensure_free(target)?;
        }
        let name = target.file_name().with_context(|| format!("{} names no file", target.display()))?;
        let mut hidden = std::ffi::OsString::from(".");
        hidden.push(name);
        hidden.push(".keyfold-reencrypt");
        let temporary = target.with_file_name(hidden);
        let file =
            std::fs::OpenOptions::new().write(true).create(true).truncate(false).mode(0o600).open(&temporary);
        let mut file = file.with_context(|| format!("cannot write {}", temporary.display()))?;
        // Two that write into one file would leave neither's.
        ensure!(file.try_lock().is_ok(), "another process writes {} right now", target.display());
        let found = file.metadata()?.len();
        ensure!(
            found >= bytes,
            "{} lacks what the state file says was written: remove the state file to begin anew",
            temporary.display()
        );
        file.set_len(bytes)?;
        file.seek(SeekFrom::Start(bytes))?;
        let source = match source {
            Some(source) => Some((source.to_owned(), Input::identity(Some(source))?)),
            None => None,
        };
        let writer = BufWriter::with_capacity(1 << 20, file);
        Ok(Self::File(OutputFile {
            writer,
            bytes,
            temporary,
            target: target.to_owned(),
            source,
            overwrite,
            keep,
        }))
    }

    /// How many bytes the file has, once it is told to keep them.
    pub(super) fn bytes(&self) -> u64 {
        match self {
            Self::File(file) => file.bytes,
            Self::Stdout(_) | Self::Nowhere => 0,
        }
    }

    pub(super) fn write(&mut self, bytes: &[u8]) -> io::Result<()> {
        match self {
            Self::Stdout(stdout) => stdout.write_all(bytes),
            Self::File(file) => {
                file.bytes += bytes.len() as u64;
                file.writer.write_all(bytes)
            }
            Self::Nowhere => Ok(()),
        }
    }

    /// What was written stays written, whatever happens.
    pub(super) fn settle(&mut self) -> io::Result<()> {
        match self {
            Self::Stdout(stdout) => stdout.flush(),
            Self::File(file) => {
                file.writer.flush()?;
                if file.keep { file.writer.get_ref().sync_data() } else { Ok(()) }
            }
            Self::Nowhere => Ok(()),
        }
    }

    /// It is whole: it goes where it belongs.
    pub(super) fn finish(&mut self) -> anyhow::Result<()> {
        self.settle()?;
        let Self::File(file) = self else { return Ok(()) };
        let mut mode = 0o600;
        if let Some((source, identity)) = &file.source {
            let now = Input::identity(Some(source))?;
            ensure!(
                now == *identity,
                "{} was changed meanwhile: nothing was written, begin anew",
                source.display()
            );
            mode = std::fs::metadata(source)?.permissions().mode() & 0o777;
        }
        let written = file.writer.get_ref();
        written.set_permissions(std::fs::Permissions::from_mode(mode))?;
        written.sync_all()?;
        put(&file.temporary, &file.target, file.overwrite)
    }
}

impl Drop for OutputFile {
    fn drop(&mut self) {
        if !self.keep {
            // Gone already where it was put in place.
            let _ = std::fs::remove_file(&self.temporary);
        }
    }
}
