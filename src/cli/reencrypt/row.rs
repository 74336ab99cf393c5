//! A row that holds an envelope, wherever it is kept.

use std::collections::BTreeMap;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use envelope::{DataKeyId, inspect, text};
use serde::{Deserialize, Serialize};

/// A row, as it was read.
pub(super) struct Row {
    /// Its key, or the number of its line: how people find it again.
    pub(super) name: String,
    /// What is to be brought up to date, and with which context; or why it cannot be.
    pub(super) sealed: Result<Sealed, Failure>,
}

/// An envelope with its context.
pub(super) struct Sealed {
    /// In text form.
    pub(super) envelope: String,
    pub(super) form: Form,
    pub(super) dek: DataKeyId,
    pub(super) context: BTreeMap<String, String>,
}

/// How an envelope is written where it is kept: what is new is written as the old was.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Form {
    /// `kf1.` and so on, as the service gives it out.
    Text,
    /// The binary envelope in standard base64 with padding.
    Base64,
    /// The bytes of the binary envelope.
    Binary,
    /// The bytes of the text form.
    TextBytes,
}

/// Why a row is not up to date.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Failure {
    /// The service's code, or this command's own.
    pub(super) code: String,
    pub(super) detail: String,
}

impl Failure {
    pub(super) fn new(code: &str, detail: impl Into<String>) -> Self {
        Self { code: code.to_owned(), detail: detail.into() }
    }

    pub(super) fn malformed(detail: impl Into<String>) -> Self {
        Self::new("malformed_envelope", detail)
    }

    /// There is no value for a pair of the context: to leave the pair out, or to take an empty one, would be a guess.
    pub(super) fn no_context(column: &str) -> Self {
        Self::new("no_context_value", format!("the column {column:?} of the context is empty"))
    }
}

impl Sealed {
    /// What a column of text holds.
    pub(super) fn of_text(value: &str) -> Result<Self, Failure> {
        if value.starts_with(text::PREFIX) {
            return Self::of_envelope(value.to_owned(), Form::Text);
        }
        let bytes = STANDARD.decode(value).map_err(|_| {
            Failure::malformed(
                "it is neither an envelope in text form (kf1....) nor one in base64 with padding",
            )
        })?;
        Self::of_envelope(text::encode(&bytes), Form::Base64)
    }

    /// What a column of bytes holds.
    pub(super) fn of_bytes(value: &[u8]) -> Result<Self, Failure> {
        if value.starts_with(text::PREFIX.as_bytes()) {
            let value = std::str::from_utf8(value).map_err(|_| Failure::malformed("it is cut or damaged"))?;
            return Self::of_envelope(value.to_owned(), Form::TextBytes);
        }
        Self::of_envelope(text::encode(value), Form::Binary)
    }

    fn of_envelope(envelope: String, form: Form) -> Result<Self, Failure> {
        let dek = dek_of(&envelope).map_err(Failure::malformed)?;
        Ok(Self { envelope, form, dek, context: BTreeMap::new() })
    }
}

/// Which data key an envelope in text form was sealed under.
pub(super) fn dek_of(envelope: &str) -> Result<DataKeyId, String> {
    let bytes = text::decode(envelope).map_err(|error| error.to_string())?;
    Ok(inspect(&bytes).map_err(|error| error.to_string())?.dek_id())
}

/// What is written into a row.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Value {
    Text(String),
    Bytes(Vec<u8>),
}

impl Form {
    /// An envelope that the service gave, in this form.
    pub(super) fn write(self, envelope: String) -> anyhow::Result<Value> {
        Ok(match self {
            Self::Text => Value::Text(envelope),
            Self::TextBytes => Value::Bytes(envelope.into_bytes()),
            Self::Base64 => Value::Text(STANDARD.encode(text::decode(&envelope)?)),
            Self::Binary => Value::Bytes(text::decode(&envelope)?),
        })
    }
}

/// Where the context of a row comes from: constant pairs, and pairs whose values stand in columns.
pub(super) struct Contexts {
    pub(super) constant: BTreeMap<String, String>,
    /// (the pair's name, its column)
    pub(super) columns: Vec<(String, String)>,
}

impl Contexts {
    /// The context of a row, by the values of its columns in their order.
    pub(super) fn of(
        &self,
        values: impl IntoIterator<Item = Option<String>>,
    ) -> Result<BTreeMap<String, String>, Failure> {
        let mut context = self.constant.clone();
        for ((name, column), value) in self.columns.iter().zip(values) {
            context.insert(name.clone(), value.ok_or_else(|| Failure::no_context(column))?);
        }
        Ok(context)
    }
}

/// Rows that were read together, with what their place needs to write them back.
pub(super) struct Page<H> {
    pub(super) rows: Vec<Row>,
    pub(super) hold: H,
    /// By how much the progress bar goes on.
    pub(super) progress: u64,
}

/// What became of a page that was written.
pub(super) struct Written {
    /// Where the next run goes on, once all pages before this one are written.
    pub(super) cursor: serde_json::Value,
    /// The rows, by their position in the page, that somebody else had changed or removed meanwhile: they were kept.
    pub(super) lost: Vec<usize>,
}

/// Where rows are kept.
pub(super) trait Place {
    /// What it needs to write a page back.
    type Hold: Send + 'static;

    /// How far the progress bar goes, where that is known.
    async fn total(&mut self) -> anyhow::Result<Option<u64>>;

    /// The next rows that hold something, at most so many; `None` at the end.
    async fn page(&mut self, rows_max: usize) -> anyhow::Result<Option<Page<Self::Hold>>>;

    /// Writes what is new, all or nothing, and only into rows that still hold what was read. With a dry run it writes
    /// nothing, and loses no row.
    async fn write(&mut self, hold: &Self::Hold, new: Vec<Option<Value>>) -> anyhow::Result<Written>;

    /// Reads lost rows again: those that are still there.
    async fn again(&mut self, hold: &Self::Hold, lost: &[usize]) -> anyhow::Result<Page<Self::Hold>>;

    /// All pages are written.
    async fn finish(&mut self) -> anyhow::Result<()>;
}
