//! Gives a finished file its name.

use std::fs::File;
use std::io;
use std::path::Path;

use anyhow::{Context as _, bail};
use rustix::fs::{CWD, RenameFlags, renameat_with};
use rustix::io::Errno;

/// Refuses a name that something has already.
pub(super) fn ensure_free(target: &Path) -> anyhow::Result<()> {
    if target.symlink_metadata().is_ok() {
        bail!("{} is there already: say --force to overwrite it", target.display());
    }
    Ok(())
}

/// Puts a file that was written beside its place in its place, in one step. What came there meanwhile is replaced only
/// to `overwrite`.
pub(super) fn put(temporary: &Path, target: &Path, overwrite: bool) -> anyhow::Result<()> {
    let done = if overwrite {
        std::fs::rename(temporary, target)
    } else {
        put_anew(&[rename_anew, link_anew, look_and_rename], temporary, target)
    };
    if done.as_ref().is_err_and(|error| error.kind() == io::ErrorKind::AlreadyExists) {
        ensure_free(target)?;
    }
    done.and_then(|()| sync_folder(target)).with_context(|| format!("cannot write {}", target.display()))
}

/// One way to give a file a name that nothing has yet.
type PutAnew = fn(&Path, &Path) -> io::Result<()>;

/// By the first of these ways that the file system knows.
fn put_anew(ways: &[PutAnew], from: &Path, to: &Path) -> io::Result<()> {
    let mut done = Err(io::ErrorKind::Unsupported.into());
    for way in ways {
        done = way(from, to);
        if !done.as_ref().is_err_and(is_unknown_here) {
            break;
        }
    }
    done
}

/// What file systems say to a rename that must not replace, and to links, where they have no such thing.
fn is_unknown_here(error: &io::Error) -> bool {
    let unknown = [Errno::INVAL, Errno::NOSYS, Errno::OPNOTSUPP, Errno::PERM];
    Errno::from_io_error(error).is_some_and(|errno| unknown.contains(&errno))
}

fn rename_anew(from: &Path, to: &Path) -> io::Result<()> {
    Ok(renameat_with(CWD, from, CWD, to, RenameFlags::NOREPLACE)?)
}

fn link_anew(from: &Path, to: &Path) -> io::Result<()> {
    std::fs::hard_link(from, to)?;
    std::fs::remove_file(from)
}

/// Between the look and the rename somebody else may take the name: this is for file systems that know nothing better.
fn look_and_rename(from: &Path, to: &Path) -> io::Result<()> {
    match to.symlink_metadata() {
        Ok(_) => Err(io::ErrorKind::AlreadyExists.into()),
        Err(error) if error.kind() == io::ErrorKind::NotFound => std::fs::rename(from, to),
        Err(error) => Err(error),
    }
}

/// A name outlives a power cut once its folder is written. Who may write into a folder but not read it cannot ask for
/// that, and some file systems know no such thing.
fn sync_folder(target: &Path) -> io::Result<()> {
    let folder = target.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let Ok(folder) = File::open(folder) else { return Ok(()) };
    folder.sync_all().or_else(|error| if is_unknown_here(&error) { Ok(()) } else { Err(error) })
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    /// As exFAT says it of links, and network mounts of both.
    fn unknown(_: &Path, _: &Path) -> io::Result<()> {
        Err(Errno::PERM.into())
    }

    #[test]
    fn a_file_gets_its_name_on_any_file_system_and_takes_nobodys() {
        let all: [&[PutAnew]; 4] = [
            &[rename_anew],
            &[unknown, link_anew],
            &[unknown, unknown, look_and_rename],
            &[rename_anew, link_anew, look_and_rename],
        ];
        for ways in all {
            let folder = tempfile::tempdir().unwrap();
            let (from, to) = (folder.path().join("from"), folder.path().join("to"));
            fs::write(&from, "new").unwrap();
            put_anew(ways, &from, &to).unwrap();
            assert_eq!(fs::read_to_string(&to).unwrap(), "new");
            assert!(!from.exists());
            fs::write(&from, "newer").unwrap();
            let refused = put_anew(ways, &from, &to).unwrap_err();
            assert_eq!(refused.kind(), io::ErrorKind::AlreadyExists);
            assert_eq!(fs::read_to_string(&to).unwrap(), "new");
        }
    }
}
