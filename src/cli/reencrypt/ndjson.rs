//! Rows that are lines of JSON. All that is not the envelope stays as it is, byte for byte.

use std::fmt;
use std::io::{BufRead as _, BufReader, Read as _, Seek as _, SeekFrom};
use std::ops::Range;

use anyhow::{Context as _, bail, ensure};
use serde::de::{Deserialize, Deserializer, MapAccess, Visitor};
use serde_json::value::RawValue;

use super::files::{Input, Output, aside};
use super::row::{Contexts, Failure, Page, Place, Row, Sealed, Value, Written};

/// The longest line.
const LINE_BYTES_MAX: usize = 64 << 20;
/// How much is read for a page, at least one line.
const PAGE_BYTES_MAX: usize = 8 << 20;

/// Which fields are which.
pub(super) struct Fields {
    pub(super) column: String,
    /// What names a row; the number of its line where nothing does.
    pub(super) key: Option<String>,
    pub(super) contexts: Contexts,
}

pub(super) struct Ndjson {
    /// Away while it is being read.
    input: Option<BufReader<Input>>,
    output: Option<Output>,
    fields: Fields,
    bytes_read: u64,
    lines_read: u64,
    /// Whether any line had the field of the envelope.
    column_seen: bool,
}

/// A page's lines, and where the envelopes stand in them.
pub(super) struct Lines {
    lines: Vec<Line>,
    end: Position,
}

struct Line {
    bytes: Vec<u8>,
    /// The row that it is, and where its envelope stands; none where there is nothing to renew.
    row: Option<(usize, Range<usize>)>,
}

/// How far was read.
#[derive(Clone, Copy)]
struct Position {
    bytes: u64,
    lines: u64,
    column_seen: bool,
}

impl Ndjson {
    /// From the beginning, or after what a run before has read.
    pub(super) fn open(
        mut input: Input,
        output: Output,
        fields: Fields,
        cursor: &serde_json::Value,
    ) -> anyhow::Result<Self> {
        let (bytes_read, lines_read) = (number(cursor, "input_bytes"), number(cursor, "lines"));
        let column_seen = cursor["column_seen"] == true;
        if bytes_read > 0 {
            input.seek(SeekFrom::Start(bytes_read))?;
        }
        let input = Some(BufReader::with_capacity(1 << 20, input));
        Ok(Self { input, output: Some(output), fields, bytes_read, lines_read, column_seen })
    }

    fn row(&mut self, bytes: &[u8]) -> Option<(Row, Range<usize>)> {
        let line = self.lines_read;
        let mut name = format!("line {line}");
        let fail = |name: String, failure| Some((Row { name, sealed: Err(failure) }, 0..0));
        if bytes.trim_ascii().is_empty() {
            return None;
        }
        let found: Object<'_> = match serde_json::from_slice(bytes) {
            Ok(found) => found,
            Err(error) => {
                return fail(name, Failure::new("malformed_row", format!("it is no JSON object: {error}")));
            }
        };
        if let Some(key) = self.fields.key.as_ref().and_then(|key| found.text(key).ok()?) {
            name = key;
        }
        let raw = match found.field(&self.fields.column) {
            Ok(raw) => raw?,
            Err(failure) => return fail(name, failure),
        };
        self.column_seen = true;
        if raw.get() == "null" {
            return None;
        }
        let start = raw.get().as_ptr().addr() - bytes.as_ptr().addr();
        let sealed = serde_json::from_str::<String>(raw.get())
            .map_err(|_| Failure::malformed("it is no string"))
            .and_then(|text| Sealed::of_text(&text))
            .and_then(|sealed| Ok(Sealed { context: self.context(&found)?, ..sealed }));
        Some((Row { name, sealed }, start..start + raw.get().len()))
    }

    fn context(&self, found: &Object<'_>) -> Result<std::collections::BTreeMap<String, String>, Failure> {
        let columns = self.fields.contexts.columns.iter();
        let values: Result<Vec<_>, _> = columns.map(|(_, column)| found.text(column)).collect();
        self.fields.contexts.of(values?)
    }
}

fn number(cursor: &serde_json::Value, name: &str) -> u64 {
    cursor[name].as_u64().unwrap_or_default()
}

impl Place for Ndjson {
    type Hold = Lines;

    async fn total(&mut self) -> anyhow::Result<Option<u64>> {
        self.input.as_ref().context("it is being read")?.get_ref().bytes()
    }

    async fn page(&mut self, rows_max: usize) -> anyhow::Result<Option<Page<Lines>>> {
        let mut input = self.input.take().context("it is being read")?;
        let (input, lines) = aside(move || {
            let lines = read_lines(&mut input, rows_max)?;
            Ok((input, lines))
        })
        .await?;
        self.input = Some(input);
        if lines.is_empty() {
            ensure!(
                self.column_seen || self.lines_read == 0,
                "no line has a field {:?}: is it the right --column?",
                self.fields.column
            );
            return Ok(None);
        }
        let before = self.bytes_read;
        let (mut rows, mut kept) = (Vec::new(), Vec::new());
        for bytes in lines {
            self.bytes_read += bytes.len() as u64;
            self.lines_read += 1;
            let row = self.row(&bytes).map(|(row, range)| {
                rows.push(row);
                (rows.len() - 1, range)
            });
            kept.push(Line { bytes, row });
        }
        let end = Position { bytes: self.bytes_read, lines: self.lines_read, column_seen: self.column_seen };
        Ok(Some(Page { rows, hold: Lines { lines: kept, end }, progress: self.bytes_read - before }))
    }

    async fn write(&mut self, hold: &Lines, mut new: Vec<Option<Value>>) -> anyhow::Result<Written> {
        let mut bytes = Vec::new();
        for line in &hold.lines {
            match line.row.as_ref().and_then(|(row, range)| Some((new[*row].take()?, range))) {
                Some((Value::Text(text), range)) => {
                    bytes.extend_from_slice(&line.bytes[..range.start]);
                    serde_json::to_writer(&mut bytes, &text)?;
                    bytes.extend_from_slice(&line.bytes[range.end..]);
                }
                Some((Value::Bytes(_), _)) => bail!("JSON has no bytes"),
                None => bytes.extend_from_slice(&line.bytes),
            }
        }
        let mut output = self.output.take().context("it is being written")?;
        let output = aside(move || {
            output.write(&bytes)?;
            output.settle()?;
            Ok(output)
        })
        .await?;
        let Position { bytes, lines, column_seen } = hold.end;
        let cursor = serde_json::json!({"input_bytes": bytes, "lines": lines, "output_bytes": output.bytes(),
            "column_seen": column_seen});
        self.output = Some(output);
        Ok(Written { cursor, lost: Vec::new() })
    }

    async fn again(&mut self, _: &Lines, _: &[usize]) -> anyhow::Result<Page<Lines>> {
        bail!("nobody else writes here")
    }

    async fn finish(&mut self) -> anyhow::Result<()> {
        let mut output = self.output.take().context("it is being written")?;
        aside(move || output.finish()).await
    }
}

fn read_lines(input: &mut BufReader<Input>, lines_max: usize) -> anyhow::Result<Vec<Vec<u8>>> {
    let (mut lines, mut total) = (Vec::new(), 0);
    while lines.len() < lines_max && total < PAGE_BYTES_MAX {
        let mut line = Vec::new();
        input.take(LINE_BYTES_MAX as u64 + 1).read_until(b'\n', &mut line)?;
        if line.is_empty() {
            break;
        }
        ensure!(line.len() <= LINE_BYTES_MAX, "a line is longer than {LINE_BYTES_MAX} bytes");
        total += line.len();
        lines.push(line);
    }
    Ok(lines)
}

/// A line's fields, as they stand there.
struct Object<'a>(Vec<(String, &'a RawValue)>);

impl<'a> Object<'a> {
    fn field(&self, name: &str) -> Result<Option<&'a RawValue>, Failure> {
        let mut found = self.0.iter().filter(|(field, _)| field == name).map(|(_, value)| *value);
        let first = found.next();
        // Readers of JSON differ in which of the two they take.
        match found.next() {
            Some(_) => Err(Failure::new("malformed_row", format!("it has two fields {name:?}"))),
            None => Ok(first),
        }
    }

    /// A value of the context: a string as it is, a number or a truth value as it is written.
    fn text(&self, name: &str) -> Result<Option<String>, Failure> {
        let Some(raw) = self.field(name)? else { return Ok(None) };
        let no_text = || Failure::new("no_context_value", format!("{name:?} is neither text nor number"));
        match raw.get().as_bytes()[0] {
            b'n' => Ok(None),
            b'"' => serde_json::from_str(raw.get()).map(Some).map_err(|_| no_text()),
            b'{' | b'[' => Err(no_text()),
            _ => Ok(Some(raw.get().to_owned())),
        }
    }
}

impl<'de: 'a, 'a> Deserialize<'de> for Object<'a> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Fields;
        impl<'de> Visitor<'de> for Fields {
            type Value = Vec<(String, &'de RawValue)>;

            fn expecting(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
                formatter.write_str("an object")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Self::Value, A::Error> {
                let mut fields = Vec::new();
                while let Some(field) = map.next_entry()? {
                    fields.push(field);
                }
                Ok(fields)
            }
        }
        deserializer.deserialize_map(Fields).map(Self)
    }
}
