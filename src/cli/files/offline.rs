//! Files straight against a KMS: no service, no registry.

use anyhow::{Context as _, bail};
use envelope::{EncryptionContext, Head, HeadReader, Opener, Sealer, replace_head};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use zeroize::Zeroizing;

use super::{Done, Input, OutputFile, Verb};
use crate::app;
use crate::clock::Clock;
use crate::config::{Settings, Variables};
use crate::kms::local::LocalKeyRing;
use crate::offline::{Offline, OfflineKey};
use crate::tenant::{KekRing, TenantId};

/// How much is read at once.
const PIECE_BYTES: usize = 1 << 20;

pub(super) struct Direct {
    offline: Offline,
    keks: KekRing,
    tenant: Option<TenantId>,
    /// One for all files of this run: each has its own message key all the same.
    sealing: Option<OfflineKey>,
}

impl Direct {
    pub(super) async fn open(
        settings: &Settings,
        variables: &Variables,
        keks: KekRing,
        tenant: Option<TenantId>,
        verb: &Verb,
    ) -> anyhow::Result<Self> {
        let clock = Clock::system();
        let dev = LocalKeyRing::is_unencrypted(&settings.keyring_file());
        let (kms, _, _) = app::open_kms(settings, variables, dev, &clock).await?;
        let offline = Offline::new(kms, keks.clone());
        let sealing = match verb {
            Verb::Encrypt { weight: Some(weight), .. } if weight == "compact" => {
                bail!("offline there is no registry that a compact envelope could rely on")
            }
            Verb::Encrypt { key, .. } => {
                let tenant =
                    tenant.clone().context("name the tenant with --tenant: it is bound to the data")?;
                Some(offline.new_key(tenant, key.clone(), clock.now()).await?)
            }
            Verb::Decrypt | Verb::Rewrap { .. } => None,
        };
        Ok(Self { offline, keks, tenant, sealing })
    }

    pub(super) async fn carry_out(
        &self,
        verb: &Verb,
        context: &EncryptionContext,
        input: &mut Input,
        output: &mut OutputFile,
    ) -> anyhow::Result<Done> {
        match (verb, &self.sealing) {
            (Verb::Encrypt { .. }, Some(key)) => encrypt(key, context, input, output).await?,
            (Verb::Rewrap { to }, _) => {
                let (head, body) = read_head(input).await?;
                let to = to.as_ref().unwrap_or(&self.keks);
                let section = self.offline.rewrap(&head, to, self.tenant.as_ref(), None).await?;
                output.writer.write_all(&replace_head(&head.to_bytes(), &section)?.0).await?;
                output.writer.write_all(&body).await?;
                tokio::io::copy(&mut input.reader, &mut output.writer).await?;
            }
            _ => self.decrypt(context, input, output).await?,
        }
        Ok(Done::Written)
    }

    async fn decrypt(
        &self,
        context: &EncryptionContext,
        input: &mut Input,
        output: &mut OutputFile,
    ) -> anyhow::Result<()> {
        let (head, body) = read_head(input).await?;
        let key = self.offline.key_of(&head, self.tenant.as_ref(), None).await?;
        let mut opener = Opener::new(&key.key, &key.message_context(context)?, &head)?;
        let mut out = Zeroizing::new(Vec::new());
        let mut piece = body;
        loop {
            opener.update(&piece, &mut out)?;
            output.writer.write_all(&out).await?;
            out.clear();
            if !read(input, &mut piece).await? {
                break;
            }
        }
        opener.finish(&mut out)?;
        output.writer.write_all(&out).await?;
        Ok(())
    }
}

async fn encrypt(
    key: &OfflineKey,
    context: &EncryptionContext,
    input: &mut Input,
    output: &mut OutputFile,
) -> anyhow::Result<()> {
    let mut salt = envelope::Salt::default();
    getrandom::fill(&mut salt).map_err(|_| crate::offline::OfflineError::Random)?;
    let mut sealer = Sealer::new(&key.key, salt, &key.section, &key.message_context(context)?);
    output.writer.write_all(sealer.head()).await?;
    let (mut piece, mut out) = (Vec::new(), Vec::new());
    while read(input, &mut piece).await? {
        sealer.update(&piece, &mut out)?;
        output.writer.write_all(&out).await?;
        out.clear();
    }
    sealer.finish(&mut out)?;
    output.writer.write_all(&out).await?;
    Ok(())
}

/// The next piece; false at the end.
async fn read(input: &mut Input, piece: &mut Vec<u8>) -> std::io::Result<bool> {
    piece.resize(PIECE_BYTES, 0);
    let bytes = input.reader.read(piece).await?;
    piece.truncate(bytes);
    Ok(bytes > 0)
}

/// The head, and what was read behind it.
async fn read_head(input: &mut Input) -> anyhow::Result<(Head, Vec<u8>)> {
    let (mut reader, mut piece) = (HeadReader::new(), Vec::new());
    while read(input, &mut piece).await? {
        if let Some((head, body)) = reader.push(&piece)? {
            let body = body.to_vec();
            return Ok((head, body));
        }
    }
    Err(reader.unfinished().into())
}
