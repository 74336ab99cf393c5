//! A result that is there whole, or not at all.

use std::fs::{File, Metadata, Permissions};
use std::io;
use std::os::unix::fs::{MetadataExt as _, OpenOptionsExt as _, PermissionsExt as _, fchown};
use std::path::{Path, PathBuf};

use anyhow::Context as _;
use tokio::io::{AsyncWrite, AsyncWriteExt as _};

use super::places::Target;
use crate::cli::put::{ensure_free, put};

/// What of its source's permissions a result has. It may belong to another user than its source, and must not run in his
/// name.
const MODE_MASK: u32 = 0o777;

/// Written beside its place, and put there at the end. Dropped before that, it leaves nothing.
pub(super) struct OutputFile {
    pub(super) writer: Box<dyn AsyncWrite + Send + Unpin>,
    /// None is standard output.
    place: Option<Place>,
}

struct Place {
    temporary: PathBuf,
    target: PathBuf,
    file: File,
    source: Option<Metadata>,
    replaces_source: bool,
    overwrite: bool,
}

impl Drop for Place {
    fn drop(&mut self) {
        // Gone already where it was put in place.
        let _ = std::fs::remove_file(&self.temporary);
    }
}

impl OutputFile {
    pub(super) fn open(target: &Target, source: Option<&Path>, force: bool) -> anyhow::Result<Self> {
        let replaces_source = matches!(target, Target::InPlace(_));
        let (target, overwrite) = match target {
            Target::Stdout => return Ok(Self { writer: Box::new(tokio::io::stdout()), place: None }),
            Target::File(target) => (target, force),
            Target::InPlace(target) => (target, true),
        };
        if !overwrite {
            ensure_free(target)?;
        }
        target.file_name().with_context(|| format!("{} names no file", target.display()))?;
        let temporary = target.with_file_name(temporary_name()?);
        // For nobody else as long as it is not whole: it may hold plaintext.
        let file = std::fs::OpenOptions::new().write(true).create_new(true).mode(0o600).open(&temporary);
        let file = file.with_context(|| format!("cannot write {}", temporary.display()))?;
        let source = source.and_then(|path| std::fs::metadata(path).ok());
        let target = target.clone();
        let place = Place { temporary, target, file: file.try_clone()?, source, replaces_source, overwrite };
        let writer = Box::new(tokio::io::BufWriter::with_capacity(1 << 20, tokio::fs::File::from_std(file)));
        Ok(Self { writer, place: Some(place) })
    }

    /// Whether it is to replace what it is made from.
    pub(super) fn in_place(&self) -> bool {
        self.place.as_ref().is_some_and(|place| place.replaces_source)
    }

    /// All is written: it goes where it belongs.
    pub(super) async fn finish(mut self) -> anyhow::Result<()> {
        self.writer.flush().await?;
        let Some(place) = self.place else { return Ok(()) };
        place.take_after_source()?;
        place.file.sync_all()?;
        put(&place.temporary, &place.target, place.overwrite)
    }
}

impl Place {
    /// The permissions of its source; in place also the owner, as far as this user may give files away.
    fn take_after_source(&self) -> io::Result<()> {
        let Some(source) = &self.source else { return Ok(()) };
        let own = self.file.metadata()?;
        if self.replaces_source && (own.uid(), own.gid()) != (source.uid(), source.gid()) {
            // Whoever may not give it to the owner may still be of the group.
            let _ = fchown(&self.file, Some(source.uid()), Some(source.gid()))
                .or_else(|_| fchown(&self.file, None, Some(source.gid())));
        }
        self.file.set_permissions(Permissions::from_mode(source.mode() & MODE_MASK))
    }
}

/// Short, so that any name that the system takes can be a target's, and nobody else's: in a container every process may
/// have the same number.
fn temporary_name() -> anyhow::Result<String> {
    let mut random = [0; 8];
    getrandom::fill(&mut random).map_err(|_| anyhow::anyhow!("the operating system gives no randomness"))?;
    Ok(format!(".keyfold-{:016x}", u64::from_ne_bytes(random)))
}
