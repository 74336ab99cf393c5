//! The key ring's file: who may read it, what is refused, what survives a crash, who notices a change.

use std::fs::{self, Permissions};
use std::io::Write;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use envelope::EncryptionContext;
use keyfold::clock::{Clock, Timestamp};
use keyfold::kms::local::{KeyRingError, LocalKeyRing, Protection};
use keyfold::kms::{KekState, Kms, KmsError, Urgency};
use keyfold::tenant::Kek;
use tempfile::TempDir;

const WEEK: Duration = Duration::from_hours(7 * 24);

fn encrypted() -> Protection {
    Protection::Passphrase("correct horse battery".into())
}

fn clock() -> Clock {
    Clock::manual(Timestamp::from_unix_ms(1_764_000_000_000))
}

/// A folder with a key ring in it that holds one KEK.
struct Place {
    folder: TempDir,
    protection: Protection,
    clock: Clock,
}

impl Place {
    async fn with(protection: Protection) -> Self {
        let place = Self { folder: tempfile::tempdir().unwrap(), protection, clock: clock() };
        let ring = LocalKeyRing::create(place.path(), place.protection.clone(), place.clock.clone());
        ring.await.unwrap().add("payments").await.unwrap();
        place
    }

    fn path(&self) -> PathBuf {
        self.folder.path().join("keyring")
    }

    async fn try_open(&self) -> Result<LocalKeyRing, KeyRingError> {
        LocalKeyRing::open(self.path(), self.protection.clone(), self.clock.clone()).await
    }

    async fn open(&self) -> LocalKeyRing {
        self.try_open().await.unwrap()
    }

    fn bytes(&self) -> Vec<u8> {
        fs::read(self.path()).unwrap()
    }

    fn put(&self, bytes: &[u8]) {
        fs::write(self.path(), bytes).unwrap();
    }

    /// The error of opening the file as it is now; neither that nor an attempt to change it touches the file.
    async fn refusal(&self) -> KeyRingError {
        let before = self.bytes();
        let error = self.try_open().await.expect_err("opened");
        let created = LocalKeyRing::create(self.path(), self.protection.clone(), self.clock.clone()).await;
        assert!(matches!(created, Err(KeyRingError::Exists { .. })), "{created:?}");
        assert_eq!(self.bytes(), before, "{error}");
        error
    }
}

fn kek(name: &str) -> Kek {
    Kek::direct(format!("local:{name}").parse().unwrap())
}

async fn generate(ring: &LocalKeyRing, name: &str) -> Result<Vec<u8>, KmsError> {
    let made = ring.generate(&kek(name), &EncryptionContext::new(), Urgency::Foreground).await?;
    Ok(made.wrapped.blob)
}

async fn unwrap(ring: &LocalKeyRing, name: &str, blob: &[u8]) -> Result<(), KmsError> {
    ring.unwrap(&kek(name), &EncryptionContext::new(), blob, Urgency::Foreground).await.map(drop)
}

fn mode(path: &Path) -> u32 {
    fs::metadata(path).unwrap().permissions().mode() & 0o7777
}

fn set_mode(path: &Path, mode: u32) {
    fs::set_permissions(path, Permissions::from_mode(mode)).unwrap();
}

#[tokio::test]
async fn a_new_key_ring_is_its_owners_alone() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("keyfold-data/keys/ring");
    let ring = LocalKeyRing::create(&path, Protection::Dev, clock()).await.unwrap();
    assert_eq!(ring.list().await.unwrap(), []);
    ring.add("payments").await.unwrap();
    assert_eq!(mode(&path), 0o600);
    assert_eq!(mode(&path.with_file_name("ring.lock")), 0o600);
    assert_eq!(mode(path.parent().unwrap()), 0o700);
    assert_eq!(mode(&folder.path().join("keyfold-data")), 0o700);
}

#[tokio::test]
async fn a_key_ring_reads_back_in_another_process() {
    for protection in [encrypted(), Protection::Dev] {
        let place = Place::with(protection).await;
        let ring = place.open().await;
        let blob = generate(&ring, "payments").await.unwrap();
        let info = ring.rotate("payments").await.unwrap();
        let again = place.open().await;
        assert_eq!(again.list().await.unwrap(), [info]);
        unwrap(&again, "payments", &blob).await.unwrap();
    }
}

#[tokio::test]
async fn a_file_that_is_there_is_never_overwritten_by_a_new_key_ring() {
    let place = Place::with(Protection::Dev).await;
    for bytes in [place.bytes().as_slice(), b"", b"somebody else's letter"] {
        place.put(bytes);
        for protection in [encrypted(), Protection::Dev] {
            let created = LocalKeyRing::create(place.path(), protection, clock()).await;
            assert!(matches!(created, Err(KeyRingError::Exists { .. })), "{created:?}");
            assert_eq!(place.bytes(), bytes);
        }
    }
}

#[tokio::test]
async fn a_file_that_others_may_touch_is_refused() {
    let place = Place::with(Protection::Dev).await;
    for bits in [0o040, 0o020, 0o010, 0o004, 0o002, 0o001, 0o077] {
        set_mode(&place.path(), 0o600 | bits);
        let error = place.refusal().await;
        assert!(matches!(error, KeyRingError::Loose { .. }), "{error}");
        assert!(error.to_string().contains(&format!("chmod 600 {}", place.path().display())), "{error}");
    }
    for bits in [0o600, 0o400] {
        set_mode(&place.path(), bits);
        place.open().await;
    }
}

#[tokio::test]
async fn a_key_ring_cut_at_any_byte_is_called_cut_short() {
    for protection in [encrypted(), Protection::Dev] {
        let place = Place::with(protection).await;
        let whole = place.bytes();
        for length in 0..whole.len() {
            place.put(&whole[..length]);
            let error = place.try_open().await.expect_err("opened");
            match length {
                0 => assert!(matches!(error, KeyRingError::Empty { .. }), "{error}"),
                _ => assert!(matches!(error, KeyRingError::Truncated { .. }), "at {length}: {error}"),
            }
        }
        place.put(&whole[..whole.len() / 2]);
        place.refusal().await;
        place.put(&whole);
        place.open().await;
    }
}

/// Damage is never mistaken for a wrong passphrase, which would send the operator looking for the wrong
/// thing.
#[tokio::test]
async fn a_key_ring_with_any_byte_changed_is_refused() {
    for protection in [encrypted(), Protection::Dev] {
        let place = Place::with(protection).await;
        let whole = place.bytes();
        for at in 0..whole.len() {
            for bit in 0..8 {
                let mut bytes = whole.clone();
                bytes[at] ^= 1 << bit;
                place.put(&bytes);
                let error = place.try_open().await.expect_err("opened");
                let named = matches!(
                    error,
                    KeyRingError::Damaged { .. }
                        | KeyRingError::Truncated { .. }
                        | KeyRingError::Foreign { .. }
                        | KeyRingError::NewerFormat { .. }
                );
                assert!(named, "byte {at}, bit {bit}: {error}");
            }
        }
        place.put(&[whole.as_slice(), b"\n"].concat());
        assert!(matches!(place.refusal().await, KeyRingError::Damaged { .. }));
    }
}

#[tokio::test]
async fn a_damaged_key_ring_is_not_changed() {
    let place = Place::with(encrypted()).await;
    let ring = place.open().await;
    let mut bytes = place.bytes();
    *bytes.last_mut().unwrap() ^= 1;
    place.put(&bytes);
    for outcome in [ring.add("other").await, ring.rotate("payments").await, ring.disable("payments").await] {
        assert!(matches!(outcome, Err(KeyRingError::Damaged { .. })), "{outcome:?}");
    }
    assert_eq!(place.bytes(), bytes);
}

#[tokio::test]
async fn each_wrong_way_to_open_a_key_ring_says_what_to_do() {
    let mut place = Place::with(encrypted()).await;
    place.protection = Protection::Passphrase("incorrect horse battery".into());
    let error = place.refusal().await;
    assert!(matches!(error, KeyRingError::WrongPassphrase { .. }), "{error}");
    for protection in [Protection::Dev, Protection::Passphrase("".into())] {
        place.protection = protection;
        let error = place.try_open().await.expect_err("opened");
        assert!(matches!(error, KeyRingError::PassphraseMissing { .. }), "{error}");
        assert!(error.to_string().contains("KEYFOLD_KEYRING_PASSPHRASE"), "{error}");
    }
    let mut place = Place::with(Protection::Dev).await;
    assert!(place.bytes().starts_with(b"keyfold key ring, format 1\nprotection: NONE"));
    place.protection = encrypted();
    let error = place.refusal().await;
    assert!(matches!(error, KeyRingError::NotEncrypted { .. }), "{error}");
    assert!(error.to_string().contains("--dev"), "{error}");
    let short = Protection::Passphrase("battery".into());
    let error = LocalKeyRing::create(place.folder.path().join("new"), short, clock()).await;
    assert!(matches!(error, Err(KeyRingError::ShortPassphrase)), "{error:?}");
}

#[tokio::test]
async fn a_key_ring_without_encryption_can_be_told_without_opening_it() {
    let (clear, sealed) = (Place::with(Protection::Dev).await, Place::with(encrypted()).await);
    assert!(LocalKeyRing::is_unencrypted(&clear.path()));
    assert!(!LocalKeyRing::is_unencrypted(&sealed.path()));
    assert!(!LocalKeyRing::is_unencrypted(&clear.folder.path().join("missing")));
    assert!(!LocalKeyRing::is_unencrypted(clear.folder.path()));
}

#[tokio::test]
async fn what_is_not_a_key_ring_is_not_taken_for_one() {
    let place = Place::with(Protection::Dev).await;
    place.put(b"-----BEGIN PRIVATE KEY-----\n");
    assert!(matches!(place.refusal().await, KeyRingError::Foreign { .. }));
    place.put(b"");
    assert!(matches!(place.refusal().await, KeyRingError::Empty { .. }));

    fs::remove_file(place.path()).unwrap();
    let missing = place.try_open().await.expect_err("opened");
    assert!(matches!(missing, KeyRingError::Missing { .. }), "{missing}");
    let elsewhere = place.folder.path().join("no/such/folder");
    let missing = LocalKeyRing::open(&elsewhere, Protection::Dev, clock()).await;
    assert!(matches!(missing, Err(KeyRingError::Missing { .. })), "{missing:?}");

    let refused = |opened: Result<LocalKeyRing, _>| matches!(opened, Err(KeyRingError::NotAFile { .. }));
    fs::create_dir(place.path()).unwrap();
    assert!(refused(place.try_open().await), "a folder");
    fs::remove_dir(place.path()).unwrap();
    let target = Place::with(Protection::Dev).await;
    symlink(target.path(), place.path()).unwrap();
    assert!(refused(place.try_open().await), "a link");
    fs::remove_file(place.path()).unwrap();
    let fifo = std::process::Command::new("mkfifo").args(["-m", "600"]).arg(place.path()).status().unwrap();
    assert!(fifo.success());
    assert!(refused(place.try_open().await), "a pipe");
}

#[tokio::test]
async fn an_encrypted_key_ring_shows_nothing_of_its_keks() {
    let place = Place::with(encrypted()).await;
    let bytes = place.bytes();
    assert!(!bytes.windows(8).any(|window| window == b"payments"));
    let debug = format!("{:?}", place.open().await);
    assert!(!debug.contains("horse"), "{debug}");
    let first = place.bytes();
    place.open().await.enable("payments").await.unwrap();
    assert_ne!(place.bytes()[first.len() - 32..], first[first.len() - 32..], "two writings look the same");
}

#[tokio::test]
async fn names_are_slugs_with_or_without_their_prefix() {
    let place = Place::with(Protection::Dev).await;
    let ring = place.open().await;
    assert_eq!(ring.rotate("local:payments").await.unwrap().versions.len(), 2);
    for bad in ["", "Payments", "a b", "local:", "local:local:a", "../a"] {
        let added = ring.add(bad).await;
        assert!(matches!(added, Err(KeyRingError::Name(_))), "{bad:?}: {added:?}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn of_many_administrators_at_once_none_loses_a_change() {
    let place = Place::with(encrypted()).await;
    // All are open before the first begins: opening takes longer than all the changes of one.
    let mut rings = Vec::new();
    for _ in 0..4 {
        rings.push(place.open().await);
    }
    let mut admins = tokio::task::JoinSet::new();
    for (admin, ring) in rings.into_iter().enumerate() {
        admins.spawn(async move {
            for n in 0..5 {
                ring.add(&format!("kek-{admin}-{n}")).await.unwrap();
                ring.rotate("payments").await.unwrap();
            }
        });
    }
    admins.join_all().await;
    let keks = place.open().await.list().await.unwrap();
    assert_eq!(keks.len(), 1 + 4 * 5);
    assert_eq!(
        keks.iter().find(|info| info.id.as_str() == "local:payments").unwrap().versions.len(),
        1 + 4 * 5
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn of_two_that_make_a_key_ring_at_once_one_does() {
    let folder = tempfile::tempdir().unwrap();
    let create = || LocalKeyRing::create(folder.path().join("keyring"), encrypted(), clock());
    let outcomes = tokio::join!(create(), create());
    let made = match outcomes {
        (Ok(made), Err(KeyRingError::Exists { .. })) | (Err(KeyRingError::Exists { .. }), Ok(made)) => made,
        other => panic!("{other:?}"),
    };
    made.add("payments").await.unwrap();
}

/// A changed file takes the old one's place in one step: there is no moment without a whole file.
#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn whoever_looks_during_a_change_finds_a_whole_file() {
    let place = Place::with(Protection::Dev).await;
    let admin = place.open().await;
    let mut changes = tokio::task::JoinSet::new();
    changes.spawn(async move {
        for _ in 0..300 {
            admin.rotate("payments").await.unwrap();
        }
    });
    let mut looks = 0;
    while changes.try_join_next().transpose().unwrap().is_none() {
        place.open().await;
        looks += 1;
    }
    assert!(looks > 50, "looked {looks} times only");
}

#[tokio::test(start_paused = true)]
async fn a_change_waits_for_the_lock_and_not_for_ever() {
    let place = Place::with(Protection::Dev).await;
    let ring = place.open().await;
    let lock = fs::File::open(place.folder.path().join("keyring.lock")).unwrap();
    lock.lock().unwrap();
    let busy = ring.add("other").await;
    assert!(matches!(busy, Err(KeyRingError::Busy { .. })), "{busy:?}");
    let add = ring.add("other");
    let unlock = async {
        tokio::time::sleep(Duration::from_secs(2)).await;
        lock.unlock().unwrap();
    };
    tokio::join!(add, unlock).0.unwrap();
}

#[tokio::test]
async fn a_crash_before_the_rename_leaves_the_old_file() {
    let place = Place::with(encrypted()).await;
    let newer = Place::with(encrypted()).await;
    let left_behind = place.folder.path().join(".keyring.new");
    for bytes in [newer.bytes(), newer.bytes()[..100].to_vec(), vec![]] {
        fs::write(&left_behind, bytes).unwrap();
        let ring = place.open().await;
        let before = ring.list().await.unwrap();
        let after = ring.rotate("payments").await.unwrap();
        assert_eq!(after.versions[..before[0].versions.len()], before[0].versions);
        assert!(!left_behind.exists());
        assert_eq!(mode(&place.path()), 0o600);
    }
}

/// Two processes rotate one KEK as fast as they can and are killed in the middle, again and again: the file
/// opens each time, and every rotation that was reported as done is in it.
#[tokio::test]
async fn killed_administrators_leave_a_whole_file_with_every_finished_change() {
    let place = Place::with(Protection::Dev).await;
    let mut versions = 1;
    for round in 0..6 {
        let mut children: Vec<_> = (0..2)
            .map(|_| {
                tokio::process::Command::new(std::env::current_exe().unwrap())
                    .args([
                        "--exact",
                        "keyring_file::the_administrator_who_is_killed",
                        "--ignored",
                        "--nocapture",
                    ])
                    .current_dir(place.folder.path())
                    .stdout(Stdio::piped())
                    .stderr(Stdio::null())
                    .spawn()
                    .unwrap()
            })
            .collect();
        tokio::time::sleep(Duration::from_millis(150 + 17 * round)).await;
        let mut done = 0;
        for child in &mut children {
            child.start_kill().unwrap();
        }
        for child in children {
            let output = child.wait_with_output().await.unwrap();
            assert_eq!(output.status.signal(), Some(9), "it ended before it was killed");
            done += String::from_utf8_lossy(&output.stdout).lines().filter(|line| *line == "rotated").count();
        }
        let now = place.open().await.list().await.unwrap()[0].versions.len();
        assert!(
            now >= versions + done,
            "{done} were reported done on top of {versions}, and there are {now}"
        );
        assert!(
            now <= versions + done + 2,
            "{done} were reported done on top of {versions}, and there are {now}"
        );
        versions = now;
    }
    assert!(versions > 6, "only {versions} versions: nothing was killed in the middle of its work");
    place.open().await.rotate("payments").await.unwrap();
}

#[tokio::test]
#[ignore = "the process that killed_administrators_... starts and kills"]
async fn the_administrator_who_is_killed() {
    let Ok(ring) = LocalKeyRing::open("keyring", Protection::Dev, Clock::system()).await else { return };
    let mut out = std::io::stdout();
    writeln!(out).unwrap();
    loop {
        ring.rotate("payments").await.unwrap();
        out.write_all(b"rotated\n").unwrap();
        out.flush().unwrap();
    }
}

#[tokio::test]
async fn a_running_server_notices_what_another_process_changed() {
    for protection in [encrypted(), Protection::Dev] {
        let place = Place::with(protection).await;
        let (server, admin) = (place.open().await, place.open().await);
        let blob = generate(&server, "payments").await.unwrap();
        for _ in 0..3 {
            admin.disable("payments").await.unwrap();
            let denied = unwrap(&server, "payments", &blob).await;
            assert!(matches!(denied, Err(KmsError::Denied { .. })), "{denied:?}");
            admin.enable("payments").await.unwrap();
            unwrap(&server, "payments", &blob).await.unwrap();
        }
        admin.add("new").await.unwrap();
        generate(&server, "new").await.unwrap();
    }
}

type Spoil<'a> = Box<dyn Fn() + 'a>;

/// The file's new state may be a denial, so its old one is not used.
#[tokio::test]
async fn a_running_server_whose_file_cannot_be_read_has_an_outage_until_it_can() {
    let place = Place::with(encrypted()).await;
    let server = place.open().await;
    let blob = generate(&server, "payments").await.unwrap();
    let (whole, elsewhere) = (place.bytes(), place.folder.path().join("elsewhere"));
    let flipped: Vec<u8> =
        whole[..whole.len() - 1].iter().copied().chain([whole[whole.len() - 1] ^ 1]).collect();
    let stranger = Place::with(encrypted()).await.bytes();
    let clear = Place::with(Protection::Dev).await.bytes();
    let spoils: [(Spoil<'_>, &str); 6] = [
        (Box::new(|| fs::rename(place.path(), &elsewhere).unwrap()), "there is no key ring"),
        (Box::new(|| set_mode(&place.path(), 0o640)), "is open to others"),
        (Box::new(|| place.put(&whole[..200])), "is cut short"),
        (Box::new(|| place.put(&flipped)), "is damaged"),
        (Box::new(|| place.put(b"")), "is empty"),
        (Box::new(|| place.put(&clear)), "is NOT encrypted"),
    ];
    for (spoil, text) in spoils {
        spoil();
        for _ in 0..2 {
            match unwrap(&server, "payments", &blob).await {
                Err(KmsError::Outage { detail, .. }) => assert!(detail.contains(text), "{detail}"),
                other => panic!("{text}: {other:?}"),
            }
        }
        let described = server.describe(&kek("payments"), Urgency::Foreground).await;
        assert!(matches!(described, Err(KmsError::Outage { .. })), "{described:?}");
        let _ = fs::rename(&elsewhere, place.path());
        place.put(&whole);
        set_mode(&place.path(), 0o600);
        unwrap(&server, "payments", &blob).await.unwrap();
    }
    // Another key ring under the same passphrase has another payments KEK.
    place.put(&stranger);
    let foreign = unwrap(&server, "payments", &blob).await;
    assert!(matches!(foreign, Err(KmsError::Damaged { .. })), "{foreign:?}");
}

#[tokio::test]
async fn a_kek_is_deleted_for_good_when_its_waiting_time_is_over_and_not_before() {
    let place = Place::with(Protection::Dev).await;
    let (server, admin) = (place.open().await, place.open().await);
    let blob = generate(&server, "payments").await.unwrap();
    admin.add("other").await.unwrap();
    let info = admin.schedule_deletion("payments", WEEK).await.unwrap();
    assert_eq!(info.deletion_at, Some(place.clock.now().plus(WEEK)));
    let id: envelope::DataKeyId = info.versions[0].material.parse().unwrap();
    let in_file = || place.bytes().windows(16).any(|window| window == id.as_bytes());

    place.clock.advance(WEEK.checked_sub(Duration::from_millis(1)).unwrap());
    let state = server.describe(&kek("payments"), Urgency::Foreground).await.unwrap().state;
    assert_eq!(state, KekState::PendingDeletion);
    assert!(in_file());
    admin.cancel_deletion("payments").await.unwrap();
    admin.enable("payments").await.unwrap();
    unwrap(&server, "payments", &blob).await.unwrap();

    admin.schedule_deletion("payments", WEEK).await.unwrap();
    let state = server.describe(&kek("payments"), Urgency::Foreground).await.unwrap().state;
    assert_eq!(state, KekState::PendingDeletion);
    place.clock.advance(WEEK);
    let gone = server.describe(&kek("payments"), Urgency::Foreground).await;
    assert!(matches!(gone, Err(KmsError::Denied { .. })), "{gone:?}");
    assert!(!in_file());
    let cancelled = admin.cancel_deletion("payments").await;
    assert!(matches!(cancelled, Err(KeyRingError::UnknownKek(_))), "{cancelled:?}");
    // A new KEK of the same name is another one.
    admin.add("payments").await.unwrap();
    let denied = unwrap(&server, "payments", &blob).await;
    assert!(matches!(denied, Err(KmsError::Damaged { .. })), "{denied:?}");
    assert_eq!(admin.list().await.unwrap().len(), 2);
}

#[tokio::test]
async fn root_does_not_take_the_file_away_from_the_servers_user() {
    let place = Place::with(Protection::Dev).await;
    if std::os::unix::fs::chown(place.path(), Some(12_345), None).is_err() {
        return; // Only root can give a file away, and only root needs to be kept from it.
    }
    let before = place.bytes();
    let error = place.open().await.add("other").await.expect_err("changed");
    assert!(matches!(error, KeyRingError::OtherOwner { owner: 12_345, .. }), "{error}");
    assert_eq!(place.bytes(), before);
    assert!(!place.folder.path().join(".keyring.new").exists());
}
