//! Where lines end up: a file with rotation, standard output, syslog.

use std::fs::{File, OpenOptions, TryLockError};
use std::io::{self, Read as _, Seek as _, SeekFrom, Write as _};
use std::os::unix::fs::OpenOptionsExt as _;
use std::os::unix::net::UnixDatagram;
use std::path::{Path, PathBuf};

use super::chain::{Keys, Link, end_of};
use super::room::LINE_BYTES_MAX;

/// How many processes may write beside each other, each a trail of its own.
const TRAILS_MAX: usize = 8;
/// A seal and the record before it are in so much of a file's end.
const TAIL_BYTES_MAX: u64 = 2 * LINE_BYTES_MAX as u64;

/// Something that lines are written to. It may take a part of what it is given.
pub(super) trait Output: Send {
    /// Writes a beginning of these lines, and says how many bytes it took.
    fn write(&mut self, lines: &[u8]) -> io::Result<usize>;

    /// Makes what was written durable.
    fn sync(&mut self) -> io::Result<()>;

    /// Notes how far the trail has come, where that can be noted.
    fn note(&mut self, _link: &Link) -> io::Result<()> {
        Ok(())
    }

    /// Whether it is time to go on in another file.
    fn is_full(&self) -> bool {
        false
    }

    /// Goes on in another file. May be asked again after it has failed.
    fn rotate(&mut self) -> io::Result<()> {
        Ok(())
    }

    /// After the other file was begun: makes that last, and takes away what need not be kept.
    fn settle(&mut self) -> io::Result<()> {
        Ok(())
    }

    /// A place in the trail, to be kept elsewhere, in the words of `keyfold audit verify --anchor`.
    fn anchor(&self, link: &Link) -> String {
        link.anchor()
    }
}

/// Options of the file.
#[derive(Clone, Debug)]
pub struct FileOptions {
    /// The file. Beside it stand its former ones (`audit.00000000000000000001.jsonl`), a lock and a note of how far
    /// the trail has come.
    pub path: PathBuf,
    /// At how many bytes the next file is begun. Default 256 MiB.
    pub rotate_bytes: u64,
    /// How many former files are kept. Default 0: all.
    pub files_max: usize,
}

/// Why the trail cannot be continued.
#[derive(Debug, thiserror::Error)]
pub enum TrailError {
    /// A file cannot be used.
    #[error("the audit file {path} cannot be used: {source}")]
    File {
        /// Which.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// What is there is not what keyfold has written.
    #[error(
        "the audit file {path} does not verify at its end ({fault}): look at it with `keyfold audit verify`, and move \
         it away to begin a new trail"
    )]
    Broken {
        /// Which.
        path: PathBuf,
        /// What is wrong.
        fault: super::Fault,
    },
    /// The collector is not configured as it has to be.
    #[error(transparent)]
    Otlp(#[from] super::OtlpError),
    /// As many processes write as may.
    #[error("{TRAILS_MAX} other processes write their audit beside {0}: end one of them")]
    Busy(PathBuf),
}

/// A file that is continued, rotated, and locked against other processes.
pub(super) struct FileOutput {
    options: FileOptions,
    file: File,
    bytes: u64,
    first_seq: u64,
    written: Link,
    _lock: File,
}

/// A trail that was opened, and how it stands.
pub(super) struct Opened {
    pub(super) output: FileOutput,
    pub(super) link: Link,
    /// Whether the file is new, so that it needs its first line.
    pub(super) is_new: bool,
    /// Bytes of a line that a crash left incomplete; they are cut off.
    pub(super) torn_bytes: u64,
}

impl FileOutput {
    /// Opens the trail at this path; where another process has it, the next beside it (`audit-2.jsonl`).
    pub(super) fn open(options: &FileOptions, keys: &Keys) -> Result<Opened, TrailError> {
        for number in 1..=TRAILS_MAX {
            let path = numbered(&options.path, number);
            let failed = |source| TrailError::File { path: path.clone(), source };
            if let Some(folder) = path.parent() {
                std::fs::create_dir_all(folder).map_err(failed)?;
            }
            let lock = private().create(true).truncate(false).open(beside(&path, "lock")).map_err(failed)?;
            match lock.try_lock() {
                Ok(()) => {
                    let options = FileOptions { path: path.clone(), ..options.clone() };
                    return Self::resume(options, keys, lock);
                }
                Err(TryLockError::WouldBlock) => {}
                Err(TryLockError::Error(source)) => return Err(failed(source)),
            }
        }
        Err(TrailError::Busy(options.path.clone()))
    }

    fn resume(options: FileOptions, keys: &Keys, lock: File) -> Result<Opened, TrailError> {
        let path = options.path.clone();
        let failed = |source| TrailError::File { path: path.clone(), source };
        let mut file = private().create(true).read(true).truncate(false).open(&path).map_err(failed)?;
        let bytes = file.metadata().map_err(failed)?.len();
        let noted = noted(&path).unwrap_or(Link::START);
        let mut opened = Opened {
            output: Self {
                options,
                file: file.try_clone().map_err(failed)?,
                bytes,
                first_seq: 0,
                written: noted,
                _lock: lock,
            },
            link: noted,
            is_new: true,
            torn_bytes: 0,
        };
        if bytes > 0 {
            let tail = tail(&mut file, bytes).map_err(failed)?;
            let (link, torn) =
                end_of(keys, &tail).map_err(|fault| TrailError::Broken { path: path.clone(), fault })?;
            // A note of later lines says that the end was cut. It is kept, so that `verify` tells.
            opened.link = link;
            opened.is_new = false;
            opened.torn_bytes = torn as u64;
            opened.output.bytes -= torn as u64;
            file.set_len(opened.output.bytes).map_err(failed)?;
            if noted.seq > link.seq {
                return Err(TrailError::Broken { path, fault: super::Fault::Truncated(noted.seq) });
            }
        }
        opened.output.first_seq = opened.output.first_seq_on_disk().unwrap_or(opened.link.seq + 1);
        opened.output.file.seek(SeekFrom::End(0)).map_err(failed)?;
        Ok(opened)
    }

    fn first_seq_on_disk(&self) -> Option<u64> {
        let mut head = [0; 64];
        let read = File::open(&self.options.path).ok()?.read(&mut head).ok()?;
        let digits = head[..read].strip_prefix(b"{\"seq\":")?;
        std::str::from_utf8(digits).ok()?.split(',').next()?.parse().ok()
    }

    fn drop_oldest(&self) -> io::Result<()> {
        let former = former_files(&self.options.path)?;
        let keep = if self.options.files_max == 0 { former.len() } else { self.options.files_max };
        for path in &former[..former.len().saturating_sub(keep)] {
            std::fs::remove_file(path)?;
        }
        Ok(())
    }
}

impl Output for FileOutput {
    fn write(&mut self, lines: &[u8]) -> io::Result<usize> {
        let written = self.file.write(lines)?;
        self.bytes += written as u64;
        Ok(written)
    }

    fn sync(&mut self) -> io::Result<()> {
        self.file.sync_data()
    }

    fn note(&mut self, link: &Link) -> io::Result<()> {
        self.written = *link;
        let path = beside(&self.options.path, "head");
        let temporary = beside(&self.options.path, "head.new");
        let mut file = private().create(true).truncate(true).open(&temporary)?;
        file.write_all(link.anchor().as_bytes())?;
        file.sync_data()?;
        std::fs::rename(temporary, path)
    }

    fn is_full(&self) -> bool {
        self.bytes >= self.options.rotate_bytes
    }

    fn rotate(&mut self) -> io::Result<()> {
        let former = beside(&self.options.path, &format!("{:020}.jsonl", self.first_seq));
        // The new file first: a disk that has no room for it leaves everything as it was.
        let next = beside(&self.options.path, "next");
        let file = private().create(true).truncate(true).read(true).open(&next)?;
        match std::fs::rename(&self.options.path, &former) {
            // Only this was done the last time.
            Err(error) if error.kind() == io::ErrorKind::NotFound && former.exists() => {}
            renamed => renamed?,
        }
        std::fs::rename(next, &self.options.path)?;
        self.file = file;
        self.bytes = 0;
        self.first_seq = self.written.seq + 1;
        Ok(())
    }

    fn settle(&mut self) -> io::Result<()> {
        if let Some(folder) = self.options.path.parent() {
            File::open(folder)?.sync_all()?;
        }
        self.drop_oldest()
    }

    fn anchor(&self, link: &Link) -> String {
        let name = self.options.path.file_name().unwrap_or_default().to_string_lossy();
        format!("{name}:{}", link.anchor())
    }
}

fn private() -> OpenOptions {
    let mut options = OpenOptions::new();
    options.write(true).mode(0o600);
    options
}

fn tail(file: &mut File, bytes: u64) -> io::Result<Vec<u8>> {
    let start = bytes.saturating_sub(TAIL_BYTES_MAX);
    file.seek(SeekFrom::Start(start))?;
    let mut tail = Vec::new();
    file.take(TAIL_BYTES_MAX).read_to_end(&mut tail)?;
    if start > 0 {
        let begin = tail.iter().position(|byte| *byte == b'\n').map_or(tail.len(), |at| at + 1);
        tail.drain(..begin);
    }
    Ok(tail)
}

/// `audit.jsonl`, `audit-2.jsonl`...
fn numbered(path: &Path, number: usize) -> PathBuf {
    if number == 1 {
        return path.to_owned();
    }
    let stem = path.file_stem().unwrap_or_default().to_string_lossy().into_owned();
    path.with_file_name(format!("{stem}-{number}.jsonl"))
}

/// `audit.EXTENSION` for `audit.jsonl`.
fn beside(path: &Path, extension: &str) -> PathBuf {
    path.with_extension(extension)
}

/// How far the trail has come by the note beside it.
fn noted(path: &Path) -> Option<Link> {
    Link::from_anchor(&std::fs::read_to_string(beside(path, "head")).ok()?)
}

/// The files before this one, oldest first.
fn former_files(path: &Path) -> io::Result<Vec<PathBuf>> {
    let folder = path.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let stem = path.file_stem().unwrap_or_default().to_string_lossy().into_owned();
    let mut files = Vec::new();
    for entry in std::fs::read_dir(folder)? {
        let name = entry?.file_name().to_string_lossy().into_owned();
        let number = name.strip_prefix(&format!("{stem}.")).and_then(|rest| rest.strip_suffix(".jsonl"));
        if number.is_some_and(|number| number.len() == 20 && number.bytes().all(|b| b.is_ascii_digit())) {
            files.push(folder.join(name));
        }
    }
    files.sort();
    Ok(files)
}

/// One trail on disk: its files from the oldest to the present one, and how far a note says it has come.
#[derive(Debug)]
pub struct TrailFiles {
    /// The present one, which may be missing.
    pub path: PathBuf,
    /// Oldest first.
    pub files: Vec<PathBuf>,
    /// The note beside them.
    pub noted: Option<Link>,
}

/// How often a trail that is rotated while its files are opened is looked at anew. Rotation takes far longer.
const LOOKS_MAX: usize = 10;

impl TrailFiles {
    /// All of them open, so that no rotation takes one away while they are read.
    pub(super) fn open(&self) -> Result<Vec<(PathBuf, File)>, (PathBuf, io::Error)> {
        let mut files = self.files.clone();
        let mut looks = 0;
        loop {
            let opened: Result<Vec<_>, _> = files
                .iter()
                .map(|path| match File::open(path) {
                    Ok(file) => Ok((path.clone(), file)),
                    Err(error) => Err((path.clone(), error)),
                })
                .collect();
            looks += 1;
            let now = trail_files(&self.path).map_err(|error| (self.path.clone(), error))?;
            if now == files || looks == LOOKS_MAX {
                return opened;
            }
            files = now;
        }
    }
}

/// The files of one trail, oldest first.
fn trail_files(path: &Path) -> io::Result<Vec<PathBuf>> {
    let mut files = if path.parent().is_some_and(Path::is_dir) { former_files(path)? } else { vec![] };
    if path.exists() {
        files.push(path.to_owned());
    }
    Ok(files)
}

/// The trails at this path: that of the service, and those of processes that wrote beside it.
pub fn trails(path: &Path) -> io::Result<Vec<TrailFiles>> {
    let mut trails = Vec::new();
    for number in 1..=TRAILS_MAX {
        let path = numbered(path, number);
        // The note first: what it tells of is there when the files are read.
        let (noted, files) = (noted(&path), trail_files(&path)?);
        if !files.is_empty() || noted.is_some() {
            trails.push(TrailFiles { path, files, noted });
        }
    }
    Ok(trails)
}

/// A stream of the process.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stream {
    /// Standard output.
    Output,
    /// Standard error.
    Error,
}

impl Output for Stream {
    fn write(&mut self, lines: &[u8]) -> io::Result<usize> {
        match self {
            Self::Output => io::stdout().lock().write(lines),
            Self::Error => io::stderr().lock().write(lines),
        }
    }

    fn sync(&mut self) -> io::Result<()> {
        match self {
            Self::Output => io::stdout().lock().flush(),
            Self::Error => io::stderr().lock().flush(),
        }
    }
}

/// The local syslog, RFC 5424 over a unix datagram socket: facility authpriv, severity notice.
pub(super) struct Syslog {
    path: PathBuf,
    socket: Option<UnixDatagram>,
}

impl Syslog {
    pub(super) fn new(path: PathBuf) -> Self {
        Self { path, socket: None }
    }

    fn connect(&self) -> io::Result<UnixDatagram> {
        let socket = UnixDatagram::unbound()?;
        socket.connect(&self.path)?;
        Ok(socket)
    }
}

impl Output for Syslog {
    fn write(&mut self, lines: &[u8]) -> io::Result<usize> {
        let end = lines.iter().position(|byte| *byte == b'\n').map_or(lines.len(), |at| at + 1);
        let socket = self.socket.take().map_or_else(|| self.connect(), Ok)?;
        let mut datagram = b"<85>1 - - keyfold - audit - ".to_vec();
        datagram.extend_from_slice(lines[..end].strip_suffix(b"\n").unwrap_or(&lines[..end]));
        // A syslog that was restarted has another socket behind the path: the next try connects again.
        socket.send(&datagram)?;
        self.socket = Some(socket);
        Ok(end)
    }

    fn sync(&mut self) -> io::Result<()> {
        Ok(())
    }
}
