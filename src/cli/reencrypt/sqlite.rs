//! Rows of a table in SQLite.

use std::path::Path;
use std::time::Duration;

use anyhow::{Context as _, bail, ensure};
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use serde::{Deserialize, Serialize};
use sqlx::sqlite::{SqliteArguments, SqliteConnectOptions, SqliteRow};
use sqlx::{AssertSqlSafe, Connection as _, Row as _, Sqlite, SqliteConnection};

use super::row::{Contexts, Failure, Page, Place, Row, Sealed, Value, Written};
use super::sql::{Table, quoted};

/// How long another process may keep the database locked.
const BUSY_TIME_MAX: Duration = Duration::from_mins(1);

pub(super) struct SqliteTable {
    connection: SqliteConnection,
    contexts: Contexts,
    statements: Statements,
    /// After which key to go on.
    after: Option<Key>,
    dry_run: bool,
}

struct Statements {
    first: String,
    next: String,
    one: String,
    update: String,
    count: String,
}

/// The value of a key, of whatever type: a column of SQLite may hold any.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum Key {
    Integer(i64),
    /// The bits: no decimal form loses nothing.
    Real(u64),
    Text(String),
    /// In base64.
    Blob(String),
}

/// What was read of a row, so that only that is replaced.
pub(super) struct Kept {
    key: Key,
    old: Option<Value>,
}

type Query<'q> = sqlx::query::Query<'q, Sqlite, SqliteArguments>;

impl SqliteTable {
    /// Opens the database, and sees whether the table is as it is said to be.
    pub(super) async fn open(
        file: &Path,
        table: &Table,
        contexts: Contexts,
        cursor: &serde_json::Value,
        dry_run: bool,
    ) -> anyhow::Result<Self> {
        ensure!(table.schema.is_none(), "--schema is for PostgreSQL: a SQLite file has none");
        let options = SqliteConnectOptions::new().filename(file).create_if_missing(false);
        let options = options.busy_timeout(BUSY_TIME_MAX).read_only(dry_run);
        let connection = SqliteConnection::connect_with(&options).await;
        let mut connection = connection.with_context(|| format!("cannot open {}", file.display()))?;
        check(&mut connection, table, &contexts).await?;
        let statements = Statements::of(table, &contexts)?;
        let after = serde_json::from_value(cursor.clone())?;
        Ok(Self { connection, contexts, statements, after, dry_run })
    }

    fn row(&self, row: &SqliteRow) -> anyhow::Result<(Row, Kept)> {
        let key = Key::of(row)?;
        let value: &str = row.try_get_unchecked(2)?;
        let (old, sealed) = match value {
            "text" => {
                let text: String = row.try_get_unchecked(3).context("a value is not UTF-8")?;
                let sealed = Sealed::of_text(&text);
                (Some(Value::Text(text)), sealed)
            }
            "blob" => {
                let bytes: Vec<u8> = row.try_get_unchecked(3)?;
                let sealed = Sealed::of_bytes(&bytes);
                (Some(Value::Bytes(bytes)), sealed)
            }
            other => (None, Err(Failure::malformed(format!("it is neither text nor blob but {other}")))),
        };
        let columns = (4..row.len()).map(|at| row.try_get_unchecked::<Option<String>, _>(at));
        let context = self.contexts.of(columns.collect::<Result<Vec<_>, _>>()?);
        let sealed = sealed.and_then(|sealed| Ok(Sealed { context: context?, ..sealed }));
        Ok((Row { name: key.to_string(), sealed }, Kept { key, old }))
    }

    fn page_of(&self, rows: &[SqliteRow]) -> anyhow::Result<Page<Vec<Kept>>> {
        let rows: anyhow::Result<Vec<_>> = rows.iter().map(|row| self.row(row)).collect();
        let (rows, hold): (Vec<_>, Vec<_>) = rows?.into_iter().unzip();
        Ok(Page { progress: rows.len() as u64, rows, hold })
    }
}

impl Statements {
    fn of(table: &Table, contexts: &Contexts) -> anyhow::Result<Self> {
        let (name, key, column) = (table.quoted()?, quoted(&table.key)?, quoted(&table.column)?);
        let mut columns = format!("typeof(t.{key}), t.{key}, typeof(t.{column}), t.{column}");
        for (_, context) in &contexts.columns {
            columns.push_str(&format!(", CAST(t.{} AS TEXT)", quoted(context)?));
        }
        // BINARY: two keys, or two envelopes, that differ only in their case are two.
        let page = format!("t.{column} IS NOT NULL ORDER BY t.{key} COLLATE BINARY LIMIT ");
        Ok(Self {
            first: format!("SELECT {columns} FROM {name} t WHERE {page} ?1"),
            next: format!("SELECT {columns} FROM {name} t WHERE t.{key} COLLATE BINARY > ?1 AND {page} ?2"),
            one: format!(
                "SELECT {columns} FROM {name} t WHERE t.{key} COLLATE BINARY = ?1 AND t.{column} IS NOT NULL"
            ),
            update: format!(
                "UPDATE {name} SET {column} = ?1 WHERE {key} COLLATE BINARY = ?2 AND {column} COLLATE BINARY = ?3"
            ),
            count: format!("SELECT COUNT({column}) FROM {name}"),
        })
    }
}

/// A name that is no column would be taken for a text by SQLite, quoted or not: so they are looked up.
async fn check(connection: &mut SqliteConnection, table: &Table, contexts: &Contexts) -> anyhow::Result<()> {
    let columns = "SELECT name, pk FROM pragma_table_info(?1)";
    let found = sqlx::query(columns).bind(&table.name).fetch_all(&mut *connection).await?;
    if found.is_empty() {
        bail!("there is no table {:?}", table.name);
    }
    let found: Vec<(String, i64)> = found.iter().map(|row| (row.get(0), row.get(1))).collect();
    let has = |column: &str| found.iter().any(|(name, _)| name.eq_ignore_ascii_case(column));
    let named = contexts.columns.iter().map(|(_, column)| column);
    if let Some(missing) = [&table.key, &table.column].into_iter().chain(named).find(|column| !has(column)) {
        bail!(table.no_column(missing));
    }
    let primary: Vec<&str> = found.iter().filter(|(_, pk)| *pk > 0).map(|(name, _)| name.as_str()).collect();
    let is_primary = primary.len() == 1 && primary[0].eq_ignore_ascii_case(&table.key);
    let unique = "SELECT EXISTS(SELECT 1 FROM pragma_index_list(?1) l WHERE l.\"unique\" = 1 AND l.partial = 0 \
                  AND (SELECT COUNT(*) FROM pragma_index_info(l.name)) = 1 \
                  AND (SELECT lower(i.name) FROM pragma_index_info(l.name) i) = lower(?2))";
    let unique = sqlx::query(unique).bind(&table.name).bind(&table.key).fetch_one(&mut *connection).await?;
    ensure!(is_primary || unique.get(0), table.no_key());
    let (name, key, column) = (table.quoted()?, quoted(&table.key)?, quoted(&table.column)?);
    let empty = format!("SELECT EXISTS(SELECT 1 FROM {name} WHERE {key} IS NULL AND {column} IS NOT NULL)");
    let empty = sqlx::query(AssertSqlSafe(empty)).fetch_one(connection).await?;
    ensure!(!empty.get::<bool, _>(0), table.empty_keys());
    Ok(())
}

impl Place for SqliteTable {
    type Hold = Vec<Kept>;

    async fn total(&mut self) -> anyhow::Result<Option<u64>> {
        let count = AssertSqlSafe(self.statements.count.as_str());
        let count: i64 = sqlx::query_scalar(count).fetch_one(&mut self.connection).await?;
        Ok(u64::try_from(count).ok())
    }

    async fn page(&mut self, rows_max: usize) -> anyhow::Result<Option<Page<Vec<Kept>>>> {
        let rows_max = i64::try_from(rows_max)?;
        let query = match &self.after {
            None => sqlx::query(AssertSqlSafe(self.statements.first.as_str())),
            Some(after) => after.bind(sqlx::query(AssertSqlSafe(self.statements.next.as_str()))),
        };
        let rows = query.bind(rows_max).fetch_all(&mut self.connection).await?;
        let page = self.page_of(&rows)?;
        let Some(last) = page.hold.last() else { return Ok(None) };
        self.after = Some(last.key.clone());
        Ok(Some(page))
    }

    async fn write(&mut self, hold: &Vec<Kept>, new: Vec<Option<Value>>) -> anyhow::Result<Written> {
        let cursor = serde_json::to_value(hold.last().map(|kept| &kept.key))?;
        let mut lost = Vec::new();
        if !self.dry_run && new.iter().any(Option::is_some) {
            let mut change = self.connection.begin_with("BEGIN IMMEDIATE").await?;
            for (at, (kept, new)) in hold.iter().zip(new).enumerate() {
                let (Some(new), Some(old)) = (new, &kept.old) else { continue };
                let query = sqlx::query(AssertSqlSafe(self.statements.update.as_str()));
                let query = bind(query, &new);
                let query = kept.key.bind(query);
                let query = bind(query, old);
                if query.execute(&mut *change).await?.rows_affected() == 0 {
                    lost.push(at);
                }
            }
            change.commit().await?;
        }
        Ok(Written { cursor, lost })
    }

    async fn again(&mut self, hold: &Vec<Kept>, lost: &[usize]) -> anyhow::Result<Page<Vec<Kept>>> {
        let mut rows = Vec::new();
        for &at in lost {
            let query = hold[at].key.bind(sqlx::query(AssertSqlSafe(self.statements.one.as_str())));
            rows.extend(query.fetch_optional(&mut self.connection).await?);
        }
        self.page_of(&rows)
    }

    async fn finish(&mut self) -> anyhow::Result<()> {
        Ok(())
    }
}

impl Key {
    fn of(row: &SqliteRow) -> anyhow::Result<Self> {
        Ok(match row.try_get_unchecked::<&str, _>(0)? {
            "integer" => Self::Integer(row.try_get_unchecked(1)?),
            "real" => Self::Real(row.try_get_unchecked::<f64, _>(1)?.to_bits()),
            "text" => Self::Text(row.try_get_unchecked(1).context("a key is not UTF-8")?),
            "blob" => Self::Blob(STANDARD.encode(row.try_get_unchecked::<&[u8], _>(1)?)),
            _ => bail!("a row has no key"),
        })
    }

    fn bind<'q>(&self, query: Query<'q>) -> Query<'q> {
        match self {
            Self::Integer(key) => query.bind(*key),
            Self::Real(bits) => query.bind(f64::from_bits(*bits)),
            Self::Text(key) => query.bind(key.clone()),
            // It was encoded here.
            Self::Blob(key) => query.bind(STANDARD.decode(key).unwrap_or_default()),
        }
    }
}

impl std::fmt::Display for Key {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Integer(key) => write!(formatter, "{key}"),
            Self::Real(bits) => write!(formatter, "{}", f64::from_bits(*bits)),
            Self::Text(key) => formatter.write_str(key),
            Self::Blob(key) => write!(formatter, "base64:{key}"),
        }
    }
}

fn bind<'q>(query: Query<'q>, value: &Value) -> Query<'q> {
    match value {
        Value::Text(text) => query.bind(text.clone()),
        Value::Bytes(bytes) => query.bind(bytes.clone()),
    }
}
