//! Secrets that come from outside: never in `Debug`, wiped when dropped.

use std::io::Write as _;
use std::os::unix::fs::{OpenOptionsExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};

use zeroize::Zeroizing;

use super::{Settings, Variables};

/// Bytes of a pepper or an audit key that keyfold makes itself.
const MADE_BYTES: usize = 32;
/// The longest secret that is read from a file.
const SECRET_BYTES_MAX: u64 = 64 * 1024;

/// What is wrong with a secret.
#[derive(Debug, thiserror::Error)]
pub enum SecretError {
    /// A file cannot be read or written.
    #[error("the {what} file {path} cannot be used: {source}")]
    File {
        /// What it holds.
        what: &'static str,
        /// Which.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// Others can read it.
    #[error("the {what} file {path} can be read by others (mode {mode:03o}): run chmod 600 {path}")]
    Loose {
        /// What it holds.
        what: &'static str,
        /// Which.
        path: PathBuf,
        /// Its permissions.
        mode: u32,
    },
    /// It is too short, too long or empty.
    #[error("the {what} in {path} is {problem}")]
    Unfit {
        /// What it is.
        what: &'static str,
        /// Where.
        path: PathBuf,
        /// What is wrong.
        problem: &'static str,
    },
}

/// Reads secrets from where the settings say.
pub struct Secrets<'a> {
    settings: &'a Settings,
    variables: &'a Variables,
}

impl<'a> Secrets<'a> {
    /// The secrets of these settings.
    pub fn new(settings: &'a Settings, variables: &'a Variables) -> Self {
        Self { settings, variables }
    }

    /// The key ring's passphrase, from the environment or its file; none where neither is set.
    pub fn keyring_passphrase(&self) -> Result<Option<Zeroizing<String>>, SecretError> {
        if let Some(passphrase) = self.variables.value("KEYFOLD_KEYRING_PASSPHRASE") {
            return Ok(Some(Zeroizing::new(passphrase.to_owned())));
        }
        let Some(path) = &self.settings.keyring.passphrase_file else { return Ok(None) };
        let what = "passphrase";
        let bytes = read(path, what)?;
        let text = std::str::from_utf8(&bytes).map_err(|_| unfit(path, what, "not UTF-8 text"))?;
        // An editor ends the file with a line break, which nobody types.
        let text = text.strip_suffix('\n').unwrap_or(text);
        let text = text.strip_suffix('\r').unwrap_or(text);
        if text.is_empty() {
            Err(unfit(path, what, "empty"))
        } else {
            Ok(Some(Zeroizing::new(text.to_owned())))
        }
    }

    /// The pepper, from the environment or its file; made where there is none yet.
    pub fn pepper(&self) -> Result<Zeroizing<Vec<u8>>, SecretError> {
        self.made_once("KEYFOLD_PEPPER", &self.settings.pepper_file(), "pepper")
    }

    /// The audit key, from the environment or its file; made where there is none yet.
    pub fn audit_key(&self) -> Result<Zeroizing<Vec<u8>>, SecretError> {
        self.made_once("KEYFOLD_AUDIT_KEY", &self.settings.audit_key_file(), "audit key")
    }

    /// The audit key where there is one: who verifies does not make it.
    pub fn present_audit_key(&self) -> Result<Zeroizing<Vec<u8>>, SecretError> {
        match self.variables.value("KEYFOLD_AUDIT_KEY") {
            Some(key) => Ok(Zeroizing::new(key.as_bytes().to_vec())),
            None => read(&self.settings.audit_key_file(), "audit key"),
        }
    }

    fn made_once(
        &self,
        variable: &str,
        path: &Path,
        what: &'static str,
    ) -> Result<Zeroizing<Vec<u8>>, SecretError> {
        if let Some(secret) = self.variables.value(variable) {
            return Ok(Zeroizing::new(secret.as_bytes().to_vec()));
        }
        match read(path, what) {
            Err(SecretError::File { source, .. }) if source.kind() == std::io::ErrorKind::NotFound => {
                let mut secret = Zeroizing::new(vec![0; MADE_BYTES]);
                let failed = |source| SecretError::File { what, path: path.to_owned(), source };
                getrandom::fill(&mut secret).map_err(|error| failed(std::io::Error::other(error)))?;
                match write_new_secret(path, &secret) {
                    Ok(()) => Ok(secret),
                    // Another process was faster: its secret is the one.
                    Err(source) if source.kind() == std::io::ErrorKind::AlreadyExists => read(path, what),
                    Err(source) => Err(failed(source)),
                }
            }
            other => other,
        }
    }
}

fn unfit(path: &Path, what: &'static str, problem: &'static str) -> SecretError {
    SecretError::Unfit { what, path: path.to_owned(), problem }
}

fn read(path: &Path, what: &'static str) -> Result<Zeroizing<Vec<u8>>, SecretError> {
    let failed = |source| SecretError::File { what, path: path.to_owned(), source };
    let metadata = std::fs::metadata(path).map_err(failed)?;
    let mode = metadata.permissions().mode() & 0o777;
    if mode & 0o077 != 0 {
        return Err(SecretError::Loose { what, path: path.to_owned(), mode });
    }
    if metadata.len() > SECRET_BYTES_MAX {
        return Err(unfit(path, what, "longer than 64 KiB"));
    }
    std::fs::read(path).map(Zeroizing::new).map_err(failed)
}

/// Writes a file that only its owner can read, whole or not at all, and never over another.
pub fn write_new_secret(path: &Path, bytes: &[u8]) -> std::io::Result<()> {
    let folder = path.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let mut temporary = path.as_os_str().to_owned();
    temporary.push(format!(".{}.new", std::process::id()));
    let temporary = PathBuf::from(temporary);
    let written = (|| {
        let mut file =
            std::fs::OpenOptions::new().write(true).create_new(true).mode(0o600).open(&temporary)?;
        file.write_all(bytes)?;
        file.sync_all()?;
        // A link fails where the name is taken; a rename would replace what is there.
        std::fs::hard_link(&temporary, path)?;
        std::fs::File::open(folder)?.sync_all()
    })();
    let removed = std::fs::remove_file(&temporary);
    written.and(removed)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn settings(dir: &Path) -> Settings {
        Settings { data_dir: dir.to_owned(), ..Settings::default() }
    }

    #[test]
    fn a_pepper_is_made_once_and_only_its_owner_can_read_it() {
        let dir = tempfile::tempdir().unwrap();
        let (settings, variables) = (settings(dir.path()), Variables::default());
        let first = Secrets::new(&settings, &variables).pepper().unwrap();
        assert_eq!(first.len(), MADE_BYTES);
        assert_eq!(*Secrets::new(&settings, &variables).pepper().unwrap(), *first);
        let path = settings.pepper_file();
        assert_eq!(std::fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o640)).unwrap();
        let error = Secrets::new(&settings, &variables).pepper().unwrap_err().to_string();
        assert!(error.contains("chmod 600"), "{error}");
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 1, "no temporary file is left");
    }

    #[test]
    fn a_passphrase_comes_from_the_environment_or_a_file_without_its_line_break() {
        let dir = tempfile::tempdir().unwrap();
        let mut settings = settings(dir.path());
        let none = Variables::default();
        assert!(Secrets::new(&settings, &none).keyring_passphrase().unwrap().is_none());
        let path = dir.path().join("passphrase");
        write_new_secret(&path, b"correct horse\n").unwrap();
        settings.keyring.passphrase_file = Some(path.clone());
        assert_eq!(**Secrets::new(&settings, &none).keyring_passphrase().unwrap().unwrap(), *"correct horse");
        let variables = Variables::of([("KEYFOLD_KEYRING_PASSPHRASE", "battery")]);
        assert_eq!(**Secrets::new(&settings, &variables).keyring_passphrase().unwrap().unwrap(), *"battery");
        assert!(write_new_secret(&path, b"other").is_err(), "a secret is never overwritten");
    }
}
