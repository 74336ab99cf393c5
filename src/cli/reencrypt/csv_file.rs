//! Rows of a CSV file with a header.

use std::collections::BTreeMap;

use anyhow::{Context as _, bail};
use csv::{ByteRecord, Position, Reader, ReaderBuilder, Terminator, Writer, WriterBuilder};

use super::files::{Input, Output, aside};
use super::ndjson::Fields;
use super::row::{Failure, Page, Place, Row, Sealed, Value, Written};

/// How much is read for a page, at least one row.
const PAGE_BYTES_MAX: usize = 8 << 20;

pub(super) struct CsvFile {
    /// Away while it is being read.
    reader: Option<Reader<Input>>,
    output: Option<Output>,
    fields: Fields,
    /// Where the columns are.
    column: usize,
    key: Option<usize>,
    contexts: Vec<usize>,
    header: ByteRecord,
    header_written: bool,
    delimiter: u8,
    /// How the rows end in the input.
    crlf: bool,
}

/// A page's rows as they were.
pub(super) struct Records {
    records: Vec<(ByteRecord, Option<usize>)>,
    end: (u64, u64, u64),
}

impl CsvFile {
    /// From the beginning, or after what a run before has read.
    pub(super) fn open(
        mut input: Input,
        output: Output,
        fields: Fields,
        delimiter: u8,
        cursor: &serde_json::Value,
    ) -> anyhow::Result<Self> {
        let crlf = input.begins_with_crlf()?;
        // What has more or fewer fields than the header is shown as such, row by row.
        let mut reader =
            ReaderBuilder::new().delimiter(delimiter).has_headers(false).flexible(true).from_reader(input);
        let mut header = ByteRecord::new();
        if !reader.read_byte_record(&mut header)? {
            bail!("the input is empty: the first row of a CSV file names its columns");
        }
        let at = |name: &str| {
            let mut found = header.iter().enumerate().filter(|(_, field)| *field == name.as_bytes());
            match (found.next(), found.next()) {
                (Some((at, _)), None) => Ok(at),
                (Some(_), Some(_)) => bail!("the CSV file has two columns {name:?}"),
                (None, _) => bail!("the CSV file has no column {name:?}"),
            }
        };
        let column = at(&fields.column)?;
        let key = fields.key.as_deref().map(at).transpose()?;
        let contexts: anyhow::Result<Vec<usize>> =
            fields.contexts.columns.iter().map(|(_, column)| at(column)).collect();
        let contexts = contexts?;
        let position = |name: &str| cursor[name].as_u64().unwrap_or_default();
        let resumes = !cursor.is_null();
        if resumes {
            let mut to = Position::new();
            to.set_byte(position("input_bytes")).set_line(position("lines")).set_record(position("records"));
            reader.seek(to)?;
        }
        Ok(Self {
            reader: Some(reader),
            output: Some(output),
            fields,
            column,
            key,
            contexts,
            header,
            header_written: resumes,
            delimiter,
            crlf,
        })
    }

    fn row(&self, record: &ByteRecord) -> Option<Row> {
        let line = record.position().map_or(0, Position::line);
        let text = |at: usize| record.get(at).and_then(|field| std::str::from_utf8(field).ok());
        let name = self.key.and_then(text).map_or_else(|| format!("line {line}"), ToOwned::to_owned);
        if record.len() != self.header.len() {
            let told = format!("it has {} fields, and the header {}", record.len(), self.header.len());
            return Some(Row { name, sealed: Err(Failure::new("malformed_row", told)) });
        }
        if record[self.column].is_empty() {
            return None;
        }
        let sealed = text(self.column)
            .ok_or_else(|| Failure::malformed("it is not UTF-8"))
            .and_then(Sealed::of_text)
            .and_then(|sealed| Ok(Sealed { context: self.context(record)?, ..sealed }));
        Some(Row { name, sealed })
    }

    fn context(&self, record: &ByteRecord) -> Result<BTreeMap<String, String>, Failure> {
        let values = self.contexts.iter().map(|at| {
            let field = record.get(*at).and_then(|field| std::str::from_utf8(field).ok());
            // An empty field is an empty text: CSV knows nothing else.
            field.map(ToOwned::to_owned)
        });
        self.fields.contexts.of(values.collect::<Vec<_>>())
    }

    fn writer(&self) -> Writer<Vec<u8>> {
        let terminator = if self.crlf { Terminator::CRLF } else { Terminator::Any(b'\n') };
        WriterBuilder::new()
            .delimiter(self.delimiter)
            .terminator(terminator)
            .flexible(true)
            .from_writer(Vec::new())
    }
}

impl Place for CsvFile {
    type Hold = Records;

    async fn total(&mut self) -> anyhow::Result<Option<u64>> {
        self.reader.as_ref().context("it is being read")?.get_ref().bytes()
    }

    async fn page(&mut self, rows_max: usize) -> anyhow::Result<Option<Page<Records>>> {
        let mut reader = self.reader.take().context("it is being read")?;
        let before = reader.position().byte();
        let (reader, records) = aside(move || {
            let (mut records, mut bytes) = (Vec::new(), 0);
            let mut record = ByteRecord::new();
            while records.len() < rows_max
                && bytes < PAGE_BYTES_MAX
                && reader.read_byte_record(&mut record)?
            {
                bytes += record.as_slice().len();
                records.push(record.clone());
            }
            Ok((reader, records))
        })
        .await?;
        let end = reader.position();
        let end = (end.byte(), end.line(), end.record());
        self.reader = Some(reader);
        if records.is_empty() {
            return Ok(None);
        }
        let (mut rows, mut kept) = (Vec::new(), Vec::new());
        for record in records {
            let row = self.row(&record).map(|row| {
                rows.push(row);
                rows.len() - 1
            });
            kept.push((record, row));
        }
        Ok(Some(Page { rows, hold: Records { records: kept, end }, progress: end.0 - before }))
    }

    async fn write(&mut self, hold: &Records, mut new: Vec<Option<Value>>) -> anyhow::Result<Written> {
        let mut writer = self.writer();
        if !std::mem::replace(&mut self.header_written, true) {
            writer.write_byte_record(&self.header)?;
        }
        for (record, row) in &hold.records {
            match row.and_then(|row| new[row].take()) {
                Some(Value::Text(text)) => {
                    let fields = record.iter().enumerate();
                    let fields =
                        fields.map(|(at, field)| if at == self.column { text.as_bytes() } else { field });
                    writer.write_record(fields)?;
                }
                Some(Value::Bytes(_)) => bail!("CSV has no bytes"),
                None => writer.write_byte_record(record)?,
            }
        }
        let bytes = writer.into_inner().ok().context("a row cannot be written as CSV")?;
        let mut output = self.output.take().context("it is being written")?;
        let output = aside(move || {
            output.write(&bytes)?;
            output.settle()?;
            Ok(output)
        })
        .await?;
        let (bytes, lines, records) = hold.end;
        let cursor = serde_json::json!({"input_bytes": bytes, "lines": lines, "records": records,
            "output_bytes": output.bytes()});
        self.output = Some(output);
        Ok(Written { cursor, lost: Vec::new() })
    }

    async fn again(&mut self, _: &Records, _: &[usize]) -> anyhow::Result<Page<Records>> {
        bail!("nobody else writes here")
    }

    async fn finish(&mut self) -> anyhow::Result<()> {
        if !std::mem::replace(&mut self.header_written, true) {
            // There was no row, and yet there is a header.
            let mut writer = self.writer();
            writer.write_byte_record(&self.header)?;
            let bytes = writer.into_inner().ok().context("the header cannot be written as CSV")?;
            self.output.as_mut().context("it is being written")?.write(&bytes)?;
        }
        let mut output = self.output.take().context("it is being written")?;
        aside(move || output.finish()).await
    }
}
