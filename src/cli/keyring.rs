//! `keyfold keyring`

use std::path::PathBuf;
use std::time::Duration;

use clap::Subcommand;

use super::output;
use crate::app::keyring_protection;
use crate::clock::Clock;
use crate::config::{Settings, Variables, passphrase_in};
use crate::kms::KekState;
use crate::kms::local::{KekInfo, LocalKeyRing};

#[derive(Subcommand)]
pub(super) enum KeyringCommand {
    /// Make a new, empty key ring.
    Init {
        /// Without encryption: for development only.
        #[arg(long)]
        dev: bool,
    },
    /// Add a KEK; it is then local:NAME.
    Add {
        /// 1 to 63 characters of a-z, 0-9 and '-'.
        name: String,
    },
    /// Give a KEK a new version. What was wrapped before still opens.
    Rotate {
        /// The KEK's name.
        name: String,
    },
    /// Disable a KEK: nothing is wrapped or unwrapped under it until it is enabled again.
    Disable {
        /// The KEK's name.
        name: String,
    },
    /// Enable a KEK.
    Enable {
        /// The KEK's name.
        name: String,
    },
    /// Delete a KEK's material after a waiting period: what was wrapped under it is then lost for ever.
    ScheduleDeletion {
        /// The KEK's name.
        name: String,
        /// The waiting period in days: 7 to 30.
        #[arg(long, default_value_t = 30)]
        days: u16,
    },
    /// Cancel a scheduled deletion. The KEK is disabled afterwards.
    CancelDeletion {
        /// The KEK's name.
        name: String,
    },
    /// Encrypt the key ring under another passphrase. Restart the server with it afterwards.
    ChangePassphrase {
        /// A file that holds the new passphrase, readable by its owner only.
        #[arg(long, value_name = "FILE")]
        new_passphrase_file: PathBuf,
    },
    /// List the KEKs.
    List,
}

pub(super) async fn run(
    settings: &Settings,
    command: KeyringCommand,
    variables: &Variables,
) -> anyhow::Result<()> {
    let (file, clock) = (settings.keyring_file(), Clock::system());
    if let KeyringCommand::Init { dev } = command {
        let protection = keyring_protection(settings, variables, dev)?;
        let ring = LocalKeyRing::create(file, protection, clock).await?;
        output::line(format_args!(
            "made {}: back it up, and its passphrase with it. Without both, all data under it is lost.",
            ring.path().display()
        ));
        return Ok(());
    }
    let dev = LocalKeyRing::is_unencrypted(&file);
    let ring = LocalKeyRing::open(&file, keyring_protection(settings, variables, dev)?, clock).await?;
    let changed = match command {
        KeyringCommand::Init { .. } => return Ok(()),
        KeyringCommand::Add { name } => ring.add(&name).await?,
        KeyringCommand::Rotate { name } => ring.rotate(&name).await?,
        KeyringCommand::Disable { name } => ring.disable(&name).await?,
        KeyringCommand::Enable { name } => ring.enable(&name).await?,
        KeyringCommand::ScheduleDeletion { name, days } => {
            ring.schedule_deletion(&name, Duration::from_secs(u64::from(days) * 24 * 60 * 60)).await?
        }
        KeyringCommand::CancelDeletion { name } => ring.cancel_deletion(&name).await?,
        KeyringCommand::ChangePassphrase { new_passphrase_file } => {
            let new = passphrase_in(&new_passphrase_file)?;
            ring.change_passphrase(&new).await?;
            output::line(format_args!(
                "{} has the new passphrase: restart the server with it. Copies of the file have the former one.",
                ring.path().display()
            ));
            return Ok(());
        }
        KeyringCommand::List => {
            for kek in ring.list().await? {
                show(&kek);
            }
            return Ok(());
        }
    };
    show(&changed);
    Ok(())
}

fn show(kek: &KekInfo) {
    let state = match kek.state {
        KekState::Enabled => "enabled",
        KekState::Disabled => "disabled",
        KekState::PendingDeletion => "pending deletion",
        KekState::Unusable => "unusable",
    };
    let deletion = kek.deletion_at.map(|at| format!(", deleted at {at}")).unwrap_or_default();
    let versions = kek.versions.len();
    output::line(format_args!(
        "{}  {state}{deletion}  {versions} version(s), since {}",
        kek.id, kek.created_at
    ));
}
