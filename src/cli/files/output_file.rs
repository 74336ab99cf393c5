//! A result that is there whole, or not at all.

use std::os::unix::fs::{OpenOptionsExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};

use anyhow::{Context as _, bail};
use tokio::fs::File;
use tokio::io::{AsyncWrite, AsyncWriteExt as _};

use super::places::Target;

/// Written beside its place, and put there at the end. Dropped before that, it leaves nothing.
pub(super) struct OutputFile {
    pub(super) writer: Box<dyn AsyncWrite + Send + Unpin>,
    place: Option<Place>,
}

struct Place {
    temporary: PathBuf,
    target: PathBuf,
    file: std::fs::File,
    mode: u32,
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
        let (target, overwrite) = match target {
            Target::Stdout => return Ok(Self { writer: Box::new(tokio::io::stdout()), place: None }),
            Target::File(target) => (target, force),
            Target::InPlace(target) => (target, true),
        };
        if !overwrite && target.symlink_metadata().is_ok() {
            bail!("{} is there already: say --force to overwrite it", target.display());
        }
        let name = target.file_name().with_context(|| format!("{} names no file", target.display()))?;
        let mut hidden = std::ffi::OsString::from(".");
        hidden.push(name);
        hidden.push(format!(".keyfold-{}", std::process::id()));
        let temporary = target.with_file_name(hidden);
        // For nobody else as long as it is not whole: it may hold plaintext.
        let file = std::fs::OpenOptions::new().write(true).create_new(true).mode(0o600).open(&temporary);
        let file = file.with_context(|| format!("cannot write {}", temporary.display()))?;
        let mode = source.and_then(|path| std::fs::metadata(path).ok());
        let mode = mode.map_or(0o600, |metadata| metadata.permissions().mode() & 0o7777);
        let place = Place { temporary, target: target.clone(), file: file.try_clone()?, mode, overwrite };
        let writer = Box::new(tokio::io::BufWriter::with_capacity(1 << 20, File::from_std(file)));
        Ok(Self { writer, place: Some(place) })
    }

    /// All is written: it goes where it belongs.
    pub(super) async fn finish(mut self) -> anyhow::Result<()> {
        self.writer.flush().await?;
        let Some(place) = self.place else { return Ok(()) };
        place.file.set_permissions(std::fs::Permissions::from_mode(place.mode))?;
        place.file.sync_all()?;
        if place.overwrite {
            std::fs::rename(&place.temporary, &place.target)?;
        } else {
            // A link fails where the name was taken meanwhile; a rename would replace what is there.
            std::fs::hard_link(&place.temporary, &place.target)
                .with_context(|| format!("{} cannot be written", place.target.display()))?;
        }
        Ok(())
    }
}
