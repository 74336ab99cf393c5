//! Rows of a table in PostgreSQL.

use std::collections::HashSet;
use std::str::FromStr as _;
use std::time::Duration;

use anyhow::{Context as _, bail, ensure};
use sqlx::postgres::{PgConnectOptions, PgRow};
use sqlx::{AssertSqlSafe, Connection as _, Executor as _, PgConnection, Row as _};

use super::row::{Contexts, Page, Place, Row, Sealed, Value, Written};
use super::sql::{Table, quoted};
use crate::clock::Clock;

/// How often a page is written anew that met a deadlock, or a row that somebody else kept locked.
const WRITE_TRIES_MAX: u32 = 10;
/// The wait before that.
const WRITE_AGAIN: Duration = Duration::from_millis(300);
/// Deadlock, serialisation failure, a lock that was not given in time.
const WRITE_AGAIN_CODES: [&str; 3] = ["40P01", "40001", "55P03"];
/// Values must read as text alike in every run, whatever the role or the database has set. And who waits for a row
/// keeps others waiting for those that he has changed already: so he gives up early, and comes again.
const SESSION: &str = "SET datestyle = 'ISO, YMD'; SET timezone = 'UTC'; SET intervalstyle = 'postgres'; \
    SET extra_float_digits = 1; SET bytea_output = 'hex'; SET lock_timeout = '3s'";

pub(super) struct PostgresTable {
    connection: PgConnection,
    contexts: Contexts,
    statements: Statements,
    binary: bool,
    clock: Clock,
    /// After which key to go on, as text.
    after: Option<String>,
    dry_run: bool,
}

struct Statements {
    first: String,
    next: String,
    some: String,
    update: String,
    count: String,
}

/// What was read of a row, so that only that is replaced.
pub(super) struct Kept {
    key: String,
    old: Value,
}

/// A column's type: its name, and that of what it is made of.
struct ColumnType {
    name: String,
    base: String,
}

impl PostgresTable {
    /// Connects, and sees whether the table is as it is said to be.
    pub(super) async fn open(
        url: &str,
        table: &Table,
        contexts: Contexts,
        clock: Clock,
        cursor: &serde_json::Value,
        dry_run: bool,
    ) -> anyhow::Result<Self> {
        let mut connection = PgConnection::connect_with(&options(url)?)
            .await
            .context("cannot connect to the database that --database or KEYFOLD_REENCRYPT_DATABASE names")?;
        connection.execute(SESSION).await?;
        if dry_run {
            connection.execute("SET default_transaction_read_only = on").await?;
        }
        let (key, column) = check(&mut connection, table, &contexts).await?;
        let binary = match column.base.as_str() {
            "bytea" => true,
            "text" | "character varying" => false,
            other => bail!("the column {:?} is {other}: envelopes are kept as text or bytea", table.column),
        };
        let statements = Statements::of(table, &contexts, &key.name, binary)?;
        let after = serde_json::from_value(cursor.clone())?;
        Ok(Self { connection, contexts, statements, binary, clock, after, dry_run })
    }

    fn row(&self, row: &PgRow) -> anyhow::Result<(Row, Kept)> {
        let key: String = row.try_get(0)?;
        let (old, sealed) = if self.binary {
            let bytes: Vec<u8> = row.try_get(1)?;
            let sealed = Sealed::of_bytes(&bytes);
            (Value::Bytes(bytes), sealed)
        } else {
            let text: String = row.try_get(1)?;
            let sealed = Sealed::of_text(&text);
            (Value::Text(text), sealed)
        };
        let columns = (2..row.len()).map(|at| row.try_get::<Option<String>, _>(at));
        let context = self.contexts.of(columns.collect::<Result<Vec<_>, _>>()?);
        let sealed = sealed.and_then(|sealed| Ok(Sealed { context: context?, ..sealed }));
        Ok((Row { name: key.clone(), sealed }, Kept { key, old }))
    }

    fn page_of(&self, rows: &[PgRow]) -> anyhow::Result<Page<Vec<Kept>>> {
        let rows: anyhow::Result<Vec<_>> = rows.iter().map(|row| self.row(row)).collect();
        let (rows, hold): (Vec<_>, Vec<_>) = rows?.into_iter().unzip();
        Ok(Page { progress: rows.len() as u64, rows, hold })
    }

    /// Replaces what is as it was; gives the keys of the rows that were.
    async fn update(&mut self, change: &Change) -> Result<HashSet<String>, sqlx::Error> {
        let query = sqlx::query_scalar(AssertSqlSafe(self.statements.update.as_str())).bind(&change.keys);
        let query = if self.binary {
            query.bind(&change.old_bytes).bind(&change.new_bytes)
        } else {
            query.bind(&change.old_texts).bind(&change.new_texts)
        };
        Ok(query.fetch_all(&mut self.connection).await?.into_iter().collect())
    }
}

/// Columns of what is to be written.
#[derive(Default)]
struct Change {
    at: Vec<usize>,
    keys: Vec<String>,
    old_texts: Vec<String>,
    new_texts: Vec<String>,
    old_bytes: Vec<Vec<u8>>,
    new_bytes: Vec<Vec<u8>>,
}

impl Change {
    fn push(&mut self, at: usize, kept: &Kept, new: Value) {
        match (&kept.old, new) {
            (Value::Text(old), Value::Text(new)) => {
                self.old_texts.push(old.clone());
                self.new_texts.push(new);
            }
            (Value::Bytes(old), Value::Bytes(new)) => {
                self.old_bytes.push(old.clone());
                self.new_bytes.push(new);
            }
            // What was text is written as text.
            _ => return,
        }
        self.at.push(at);
        self.keys.push(kept.key.clone());
    }
}

/// The URL as it is, but for the password, which is looked for where every client of PostgreSQL looks for it.
fn options(url: &str) -> anyhow::Result<PgConnectOptions> {
    crate::http::server::use_crypto_provider();
    // The URL holds a password: it is not repeated.
    let options = PgConnectOptions::from_str(url).ok().context("the database's URL is not valid")?;
    Ok(options.application_name("keyfold reencrypt"))
}

/// Which database a URL means, without credentials.
pub(super) fn identity(url: &str) -> anyhow::Result<String> {
    let options = options(url)?;
    let place = options.get_socket().map_or(options.get_host().to_owned(), |path| path.display().to_string());
    let database = options.get_database().unwrap_or(options.get_username());
    Ok(format!("postgres://{place}:{}/{database}", options.get_port()))
}

impl Statements {
    fn of(table: &Table, contexts: &Contexts, key_type: &str, binary: bool) -> anyhow::Result<Self> {
        let (name, key, column) = (table.quoted()?, quoted(&table.key)?, quoted(&table.column)?);
        // A domain reads as what it is made of.
        let (kind, same) = if binary {
            ("bytea", format!("t.{column}::bytea = v.old"))
        } else {
            // Equal is what is equal byte for byte, whatever the column's collation says.
            ("text", format!("t.{column}::text COLLATE \"C\" = v.old COLLATE \"C\""))
        };
        let mut columns = format!("t.{key}::text, t.{column}::{kind}");
        for (_, context) in &contexts.columns {
            columns.push_str(&format!(", t.{}::text", quoted(context)?));
        }
        let page = format!("t.{column} IS NOT NULL ORDER BY t.{key} LIMIT ");
        Ok(Self {
            first: format!("SELECT {columns} FROM {name} t WHERE {page} $1"),
            next: format!(
                "SELECT {columns} FROM {name} t WHERE t.{key} > $1::text::{key_type} AND {page} $2"
            ),
            some: format!(
                "SELECT {columns} FROM {name} t JOIN unnest($1::text[]) AS v(key) ON t.{key} = v.key::{key_type} \
                 WHERE t.{column} IS NOT NULL"
            ),
            update: format!(
                "UPDATE {name} AS t SET {column} = v.new \
                 FROM unnest($1::text[], $2::{kind}[], $3::{kind}[]) AS v(key, old, new) \
                 WHERE t.{key} = v.key::{key_type} AND {same} RETURNING t.{key}::text"
            ),
            count: format!("SELECT COUNT({column}) FROM {name}"),
        })
    }
}

/// The types of the key and of the envelope's column.
async fn check(
    connection: &mut PgConnection,
    table: &Table,
    contexts: &Contexts,
) -> anyhow::Result<(ColumnType, ColumnType)> {
    let name = table.quoted()?;
    let columns = "SELECT a.attname::text, format_type(a.atttypid, a.atttypmod), \
            format_type(CASE y.typtype WHEN 'd' THEN y.typbasetype ELSE y.oid END, NULL) \
        FROM pg_attribute a JOIN pg_type y ON y.oid = a.atttypid \
        WHERE a.attrelid = to_regclass($1) AND a.attnum > 0 AND NOT a.attisdropped";
    let found = sqlx::query(columns).bind(&name).fetch_all(&mut *connection).await?;
    ensure!(!found.is_empty(), "there is no table {name}");
    let mut types = found
        .iter()
        .map(|row| {
            Ok((row.try_get::<String, _>(0)?, ColumnType { name: row.try_get(1)?, base: row.try_get(2)? }))
        })
        .collect::<Result<std::collections::HashMap<_, _>, sqlx::Error>>()?;
    if let Some((_, missing)) = contexts.columns.iter().find(|(_, column)| !types.contains_key(column)) {
        bail!(table.no_column(missing));
    }
    let unique = "SELECT EXISTS (SELECT 1 FROM pg_index i \
        JOIN pg_attribute a ON a.attrelid = i.indrelid AND a.attnum = i.indkey[0] \
        WHERE i.indrelid = to_regclass($1) AND i.indisunique AND i.indisvalid AND i.indnkeyatts = 1 \
        AND i.indpred IS NULL AND i.indexprs IS NULL AND a.attname = $2)";
    let key = types.remove(&table.key).with_context(|| table.no_column(&table.key))?;
    let column = types.remove(&table.column).with_context(|| table.no_column(&table.column))?;
    let unique = sqlx::query(unique).bind(&name).bind(&table.key).fetch_one(&mut *connection).await?;
    ensure!(unique.try_get::<bool, _>(0)?, table.no_key());
    let (key_name, column_name) = (quoted(&table.key)?, quoted(&table.column)?);
    let empty =
        format!("SELECT EXISTS(SELECT 1 FROM {name} WHERE {key_name} IS NULL AND {column_name} IS NOT NULL)");
    let empty = sqlx::query(AssertSqlSafe(empty)).fetch_one(connection).await?;
    ensure!(!empty.try_get::<bool, _>(0)?, table.empty_keys());
    Ok((key, column))
}

impl Place for PostgresTable {
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
            Some(after) => sqlx::query(AssertSqlSafe(self.statements.next.as_str())).bind(after.clone()),
        };
        let rows = query.bind(rows_max).fetch_all(&mut self.connection).await?;
        let page = self.page_of(&rows)?;
        let Some(last) = page.hold.last() else { return Ok(None) };
        self.after = Some(last.key.clone());
        Ok(Some(page))
    }

    async fn write(&mut self, hold: &Vec<Kept>, new: Vec<Option<Value>>) -> anyhow::Result<Written> {
        let cursor = serde_json::to_value(hold.last().map(|kept| &kept.key))?;
        let mut change = Change::default();
        for (at, (kept, new)) in hold.iter().zip(new).enumerate() {
            if let Some(new) = new {
                change.push(at, kept, new);
            }
        }
        if self.dry_run || change.at.is_empty() {
            return Ok(Written { cursor, lost: Vec::new() });
        }
        let mut tries = 0;
        let updated = loop {
            tries += 1;
            match self.update(&change).await {
                Ok(updated) => break updated,
                Err(sqlx::Error::Database(error))
                    if tries < WRITE_TRIES_MAX
                        && error.code().is_some_and(|code| WRITE_AGAIN_CODES.contains(&&*code)) =>
                {
                    self.clock.sleep(WRITE_AGAIN * tries).await;
                }
                Err(error) => return Err(error.into()),
            }
        };
        let kept = change.at.iter().zip(&change.keys).filter(|(_, key)| !updated.contains(*key));
        Ok(Written { cursor, lost: kept.map(|(at, _)| *at).collect() })
    }

    async fn again(&mut self, hold: &Vec<Kept>, lost: &[usize]) -> anyhow::Result<Page<Vec<Kept>>> {
        let keys: Vec<String> = lost.iter().map(|at| hold[*at].key.clone()).collect();
        let query = sqlx::query(AssertSqlSafe(self.statements.some.as_str())).bind(keys);
        let rows = query.fetch_all(&mut self.connection).await?;
        self.page_of(&rows)
    }

    async fn finish(&mut self) -> anyhow::Result<()> {
        Ok(())
    }
}
