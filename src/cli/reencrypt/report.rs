//! What a job has done so far, over all its runs.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use super::row::Failure;
use super::service::Outcome;

/// How many rows are named for each code when the report is printed; all stand in the JSON form.
const NAMED_ROWS_MAX: usize = 20;

#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Report {
    /// Rows that hold an envelope, or should.
    pub(super) rows: u64,
    /// Rows that were renewed (in a dry run: would be), by the data key of the old envelope and that of the new one.
    pub(super) renewed: BTreeMap<String, BTreeMap<String, u64>>,
    /// Rows that were up to date, by data key.
    pub(super) current: BTreeMap<String, u64>,
    /// Rows that somebody else changed meanwhile. What they hold now is counted above.
    pub(super) changed_meanwhile: u64,
    /// Rows that somebody else removed meanwhile.
    pub(super) removed_meanwhile: u64,
    /// Rows that are not up to date.
    pub(super) failed: Vec<FailedRow>,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct FailedRow {
    /// Its key, or `line N`.
    pub(super) row: String,
    #[serde(flatten)]
    pub(super) failure: Failure,
}

impl Report {
    pub(super) fn count(&mut self, row: &str, outcome: &Outcome) {
        match outcome {
            Outcome::Current(dek) => *self.current.entry(dek.to_string()).or_default() += 1,
            Outcome::Renewed { from, to, .. } => {
                let from = self.renewed.entry(from.to_string()).or_default();
                *from.entry(to.to_string()).or_default() += 1;
            }
            Outcome::Failed(failure) => self.fail(row, failure.clone()),
        }
    }

    pub(super) fn fail(&mut self, row: &str, failure: Failure) {
        self.failed.push(FailedRow { row: row.to_owned(), failure });
    }

    pub(super) fn renewed_rows(&self) -> u64 {
        self.renewed.values().flat_map(BTreeMap::values).sum()
    }

    pub(super) fn current_rows(&self) -> u64 {
        self.current.values().sum()
    }

    /// In lines for people.
    pub(super) fn lines(&self, dry_run: bool) -> Vec<String> {
        let renewed = if dry_run { "would be renewed" } else { "renewed" };
        let mut lines = vec![format!(
            "{} rows: {} {renewed}, {} up to date, {} failed",
            self.rows,
            self.renewed_rows(),
            self.current_rows(),
            self.failed.len()
        )];
        for (from, to) in &self.renewed {
            for (to, rows) in to {
                lines.push(if from == to {
                    format!("  {from}: {rows} {renewed}, their wrapped keys only")
                } else {
                    format!("  {from} -> {to}: {rows} {renewed}")
                });
            }
        }
        lines.extend(self.current.iter().map(|(dek, rows)| format!("  {dek}: {rows} up to date")));
        if self.changed_meanwhile + self.removed_meanwhile > 0 {
            lines.push(format!(
                "  somebody else changed {} and removed {} meanwhile: that was kept",
                self.changed_meanwhile, self.removed_meanwhile
            ));
        }
        let mut codes: BTreeMap<&str, Vec<&FailedRow>> = BTreeMap::new();
        for failed in &self.failed {
            codes.entry(&failed.failure.code).or_default().push(failed);
        }
        for (code, rows) in codes {
            let named: Vec<&str> =
                rows.iter().take(NAMED_ROWS_MAX).map(|failed| failed.row.as_str()).collect();
            let more = match rows.len().saturating_sub(NAMED_ROWS_MAX) {
                0 => String::new(),
                more => format!(" and {more} more (--json names all)"),
            };
            lines.push(format!("  {code}: {} failed: {}{more}", rows.len(), named.join(", ")));
            lines.push(format!("    the first: {}", rows[0].failure.detail));
        }
        lines
    }
}
