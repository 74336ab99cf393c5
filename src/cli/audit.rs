//! `keyfold audit`: on the audit files, while the service runs or not.

use std::path::PathBuf;

use anyhow::{Context as _, bail};
use clap::{Args, Subcommand};

use super::output;
use crate::audit::{self, Keys, Link, Query, TrailFiles};
use crate::clock::Timestamp;
use crate::config::{Secrets, Settings, Variables};

#[derive(Subcommand)]
pub(super) enum AuditCommand {
    /// Check that no record was changed, removed, added or reordered, and that the end was not cut.
    Verify {
        /// The audit file; the configured one where none is named.
        file: Option<PathBuf>,
        /// FILE:SEQ:CODE of a seal, as the service's log has it: this record has to be there. Shows a trail that was
        /// cut, replaced or taken away together with the note beside it. Without FILE, in the first trail.
        #[arg(long, value_name = "FILE:SEQ:CODE")]
        anchor: Vec<String>,
        /// The trail need not begin at record 1: former files are kept elsewhere, or no longer.
        #[arg(long)]
        partial: bool,
    },
    /// Find records. Every condition has to fit; each record is printed as it stands in its file. Where the record of
    /// a large batch leaves something out that is looked for, it is printed too.
    Search(Box<SearchArgs>),
}

#[derive(Args)]
pub(super) struct SearchArgs {
    /// The audit file; the configured one where none is named.
    file: Option<PathBuf>,
    /// In this tenant.
    #[arg(long)]
    tenant: Option<String>,
    /// By this principal, as api-key:ID.
    #[arg(long)]
    principal: Option<String>,
    /// This verb, or kind of change: encrypt, decrypt, rewrap, tenant.create...
    #[arg(long)]
    what: Option<String>,
    /// With this outcome: begin, done, failed, abandoned, refused.
    #[arg(long)]
    outcome: Option<String>,
    /// With this code, as context_mismatch.
    #[arg(long)]
    code: Option<String>,
    /// Under this key.
    #[arg(long)]
    key: Option<String>,
    /// Under this data key.
    #[arg(long)]
    dek: Option<String>,
    /// Of the item that its caller calls so.
    #[arg(long = "ref", value_name = "REF")]
    reference: Option<String>,
    /// Of this request.
    #[arg(long)]
    request_id: Option<String>,
    /// From this address.
    #[arg(long)]
    source: Option<String>,
    /// Not before this time, as 2026-11-23T12:00:00Z.
    #[arg(long, value_name = "TIME")]
    since: Option<String>,
    /// Before this time.
    #[arg(long, value_name = "TIME")]
    until: Option<String>,
    /// With this pair in its encryption context. The value is hashed and compared: it is in no record.
    #[arg(long, value_name = "NAME=VALUE")]
    context: Vec<String>,
}

pub(super) fn run(settings: &Settings, command: AuditCommand, variables: &Variables) -> anyhow::Result<()> {
    let secret = Secrets::new(settings, variables).present_audit_key()?;
    let keys = Keys::new(&secret, vec![])?;
    match command {
        AuditCommand::Verify { file, anchor, partial } => {
            let partial = partial || settings.audit.file.as_ref().is_some_and(|file| file.files_max > 0);
            verify(&trails(settings, file)?, &keys, &anchor, partial)
        }
        AuditCommand::Search(args) => {
            let trails = trails(settings, args.file.clone())?;
            let query = args.query()?;
            for trail in trails {
                audit::search(&trail, &keys, &query, |line| output::line(line))?;
            }
            Ok(())
        }
    }
}

fn trails(settings: &Settings, file: Option<PathBuf>) -> anyhow::Result<Vec<TrailFiles>> {
    let path = file.unwrap_or_else(|| settings.audit_file());
    let trails = audit::trails(&path)?;
    if trails.is_empty() {
        bail!("there is no audit at {}: name its file", path.display());
    }
    Ok(trails)
}

fn verify(trails: &[TrailFiles], keys: &Keys, anchors: &[String], partial: bool) -> anyhow::Result<()> {
    let mut anchored = vec![vec![]; trails.len()];
    for text in anchors {
        let (name, link) = anchor(text).with_context(|| {
            format!("{text:?} is not FILE:SEQ:CODE of a seal, as the log or this command tells it")
        })?;
        let named =
            |trail: &TrailFiles| name.is_empty() || trail.path.file_name().is_some_and(|file| file == name);
        let at = trails.iter().position(named).with_context(|| format!("the trail {name} is not here"))?;
        anchored[at].push(link);
    }
    for (trail, anchors) in trails.iter().zip(anchored) {
        let summary = audit::verify(trail, keys, &anchors)?;
        let (name, first) = (trail.path.display(), summary.first);
        if first > 1 && !partial {
            bail!(
                "{name}: records 1 to {} are missing. If their files are kept elsewhere, say --partial",
                first - 1
            );
        }
        output::line(format_args!(
            "{name}: records {first} to {} are whole{}{}",
            summary.last.seq,
            if first > 1 { "; those before are not here" } else { "" },
            if summary.sealed {
                ", sealed"
            } else {
                "; not sealed at the end: it is being written, or a crash ended it"
            },
        ));
        for seq in &summary.unfinished {
            output::line(format_args!(
                "record {seq} begins a change that has no outcome: it is under way, or a crash ended it"
            ));
        }
        let file = trail.path.file_name().unwrap_or_default().to_string_lossy();
        output::line(format_args!("anchor {file}:{}", summary.last.anchor()));
    }
    Ok(())
}

/// The file, which may be left out, and the place in it.
fn anchor(text: &str) -> Option<(&str, Link)> {
    let mut parts = text.rsplitn(3, ':');
    let (code, seq) = (parts.next()?, parts.next()?);
    Some((parts.next().unwrap_or_default(), Link::from_anchor(&format!("{seq}:{code}"))?))
}

impl SearchArgs {
    fn query(self) -> anyhow::Result<Query> {
        let members = [
            ("tenant", self.tenant),
            ("principal", self.principal),
            ("what", self.what),
            ("outcome", self.outcome),
            ("code", self.code),
            ("key", self.key),
            ("dek", self.dek),
            ("ref", self.reference),
            ("request_id", self.request_id),
            ("source", self.source),
        ];
        let time = |text: Option<String>| {
            let parse = |text: String| {
                Timestamp::parse_rfc3339(&text)
                    .with_context(|| format!("{text:?} is not a time as 2026-11-23T12:00:00Z"))
            };
            text.map(parse).transpose()
        };
        let pair = |text: &String| {
            let (name, value) =
                text.split_once('=').with_context(|| format!("{text:?} is not NAME=VALUE"))?;
            Ok((name.to_owned(), value.to_owned()))
        };
        Ok(Query {
            members: members.into_iter().filter_map(|(name, text)| Some((name, text?))).collect(),
            since: time(self.since)?,
            until: time(self.until)?,
            context: self.context.iter().map(pair).collect::<anyhow::Result<_>>()?,
        })
    }
}
