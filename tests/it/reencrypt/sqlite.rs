//! Rows of a table in SQLite.

use std::path::Path;

use serde_json::{Value, json};
use sqlx::sqlite::SqliteConnectOptions;
use sqlx::{AssertSqlSafe, Connection, Row, SqliteConnection};

use super::{Desk, deks_of};

const COLUMNS: [&str; 10] = [
    "--key-column",
    "id",
    "--column",
    "secret",
    "--context-column",
    "row_id=id",
    "-c",
    "table=people",
    "--envelope",
    "compact",
];

async fn open(path: &Path) -> SqliteConnection {
    let options = SqliteConnectOptions::new().filename(path).create_if_missing(true);
    SqliteConnection::connect_with(&options.busy_timeout(std::time::Duration::from_secs(30))).await.unwrap()
}

async fn run(connection: &mut SqliteConnection, statement: &str) -> u64 {
    sqlx::raw_sql(AssertSqlSafe(statement.to_owned())).execute(connection).await.unwrap().rows_affected()
}

/// A table `people` with these envelopes, and beside it what they were.
async fn table(path: &Path, sealed: &[String]) -> SqliteConnection {
    let mut connection = open(path).await;
    run(&mut connection, "CREATE TABLE people (id INTEGER PRIMARY KEY, name TEXT, secret TEXT)").await;
    let fill = "INSERT INTO people SELECT key, 'name ' || key, value FROM json_each(?1)";
    sqlx::query(fill).bind(json!(sealed).to_string()).execute(&mut connection).await.unwrap();
    run(&mut connection, "CREATE TABLE before AS SELECT * FROM people").await;
    connection
}

async fn number(connection: &mut SqliteConnection, statement: &str) -> u64 {
    let row = sqlx::query(AssertSqlSafe(statement.to_owned())).fetch_one(connection).await.unwrap();
    u64::try_from(row.get::<i64, _>(0)).unwrap()
}

async fn secrets(connection: &mut SqliteConnection) -> Vec<(usize, String)> {
    let rows = sqlx::query("SELECT id, secret FROM people ORDER BY id").fetch_all(connection).await.unwrap();
    rows.iter().map(|row| (usize::try_from(row.get::<i64, _>(0)).unwrap(), row.get(1))).collect()
}

fn borrowed(rows: &[(usize, String)]) -> impl Iterator<Item = (usize, &str)> {
    rows.iter().map(|(row, secret)| (*row, secret.as_str()))
}

#[tokio::test(flavor = "multi_thread")]
async fn a_hundred_thousand_rows_are_renewed_though_the_command_is_killed_five_times() {
    const ROWS: usize = 100_000;
    let desk = Desk::new().await;
    let sealed = desk.sealed(0..ROWS).await;
    let mut connection = table(&desk.path("app.db"), &sealed).await;
    let (from, to) = desk.rotate().await;
    let args =
        [&["--database", "sqlite:app.db", "--table", "people", "--state", "state"], &COLUMNS[..]].concat();
    let still_old = "SELECT COUNT(*) FROM people JOIN before USING (id, secret)";
    let mut before = 0;
    for kill in 1..=5 {
        let least = before + 5_000 + u64::from(getrandom::u32().unwrap() % 9_000);
        let told = desk.killed(&args, "state", least).await;
        // What the state says is done is done; beside that there may be one page more.
        let renewed = ROWS as u64 - number(&mut connection, still_old).await;
        assert!(told <= renewed && renewed <= told + 1_000, "kill {kill}: {told} told, {renewed} renewed");
        assert!(before < told && told < ROWS as u64, "kill {kill} came at {told}");
        before = told;
    }
    let report = desk.report(&args).await;
    assert_eq!(report["rows"], ROWS);
    let (again, renewed) =
        (report["current"][&to].as_u64().unwrap_or(0), report["renewed"][&from][&to].as_u64());
    assert_eq!(renewed.unwrap() + again, ROWS as u64);
    assert!(again <= 5_000, "{again} pages were done twice");
    assert_eq!((&report["failed"], &report["changed_meanwhile"]), (&json!([]), &json!(0)));
    // All rows are new, none is lost, and nothing else was touched.
    let renewed = secrets(&mut connection).await;
    assert_eq!(deks_of(renewed.iter().map(|(_, secret)| secret.as_str())), [to.clone()].into());
    desk.all_open(borrowed(&renewed)).await;
    assert_eq!(
        number(&mut connection, "SELECT COUNT(*) FROM people JOIN before USING (id, name)").await,
        ROWS as u64
    );
    // The second run changes none.
    run(&mut connection, "CREATE TABLE after AS SELECT * FROM people").await;
    let second = desk.report(&args).await;
    assert_eq!(
        (&second["rows"], &second["current"][&to], &second["renewed"]),
        (&json!(ROWS), &json!(ROWS), &json!({}))
    );
    let same = "SELECT COUNT(*) FROM people JOIN after USING (id, name, secret)";
    assert_eq!(number(&mut connection, same).await, ROWS as u64);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_dry_run_says_what_would_be_and_changes_nothing() {
    let desk = Desk::new().await;
    let mut connection = table(&desk.path("app.db"), &desk.sealed(0..30).await).await;
    let (from, to) = desk.rotate().await;
    let file = std::fs::read(desk.path("app.db")).unwrap();
    let args = [&["--database", "sqlite:app.db", "--table", "people"], &COLUMNS[..]].concat();
    let dry = [&args[..], &["--dry-run"]].concat();
    let (out, err) = desk.not_ok(&dry).await;
    assert!(out.contains(&format!("{from} -> {to}: 30 would be renewed")), "{out}");
    assert!(err.contains("30 of 30 rows are not up to date"), "{err}");
    assert!(std::fs::read(desk.path("app.db")).unwrap() == file, "the file was written to");
    assert!(desk.ok(&args).await.contains("30 renewed"));
    assert!(desk.ok(&dry).await.contains("0 would be renewed, 30 up to date"));
    let renewed = secrets(&mut connection).await;
    desk.all_open(borrowed(&renewed)).await;
}

/// Somebody else writes while the command runs: the trigger stands for him, at the worst moment there is.
#[tokio::test(flavor = "multi_thread")]
async fn what_somebody_else_writes_or_removes_meanwhile_is_kept() {
    let desk = Desk::new().await;
    let mut sealed = desk.sealed(0..20).await;
    let mut connection = table(&desk.path("app.db"), &sealed).await;
    // Row 7 is sealed anew by its owner, under the old data key, and row 11 under the new one.
    let (mine, (_, to)) = (desk.sealed(7..8).await.remove(0), desk.rotate().await);
    let newest = desk.sealed(11..12).await.remove(0);
    let trigger = format!(
        "CREATE TRIGGER other AFTER UPDATE ON people WHEN old.id = 3 BEGIN \
         UPDATE people SET secret = '{mine}' WHERE id = 7; UPDATE people SET secret = '{newest}' WHERE id = 11; \
         DELETE FROM people WHERE id = 15; END"
    );
    run(&mut connection, &trigger).await;
    let args = [&["--database", "sqlite:app.db", "--table", "people"], &COLUMNS[..]].concat();
    let report = desk.report(&args).await;
    assert_eq!((&report["changed_meanwhile"], &report["removed_meanwhile"]), (&json!(2), &json!(1)));
    assert_eq!((&report["rows"], &report["current"]), (&json!(19), &json!({&to: 1})));
    let renewed = secrets(&mut connection).await;
    assert_eq!(renewed.len(), 19);
    sealed.remove(15);
    assert!(renewed.iter().any(|(row, secret)| (*row, secret) == (11, &newest)), "it was current: it stays");
    assert_eq!(deks_of(renewed.iter().map(|(_, secret)| secret.as_str())), [to].into());
    desk.all_open(borrowed(&renewed)).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn rows_that_cannot_be_renewed_are_named_by_code_and_stay_as_they_are() {
    let desk = Desk::new().await;
    let sealed = desk.sealed(0..10).await;
    let mut connection = table(&desk.path("app.db"), &sealed).await;
    desk.rotate().await;
    run(&mut connection, "UPDATE people SET secret = 'hello' WHERE id = 2").await;
    run(&mut connection, "UPDATE people SET secret = 5 WHERE id = 4").await;
    run(&mut connection, "UPDATE people SET secret = (SELECT secret FROM before WHERE id = 0) WHERE id = 6")
        .await;
    run(&mut connection, "UPDATE people SET secret = NULL WHERE id = 8").await;
    let args = [&["--database", "sqlite:app.db", "--table", "people"], &COLUMNS[..]].concat();
    let (out, err) = desk.not_ok(&args).await;
    assert!(out.contains("9 rows: 6 renewed, 0 up to date, 3 failed"), "{out}");
    assert!(out.contains("malformed_envelope: 2 failed: 2, 4\n"), "{out}");
    assert!(out.contains("context_mismatch: 1 failed: 6\n"), "{out}");
    assert!(err.contains("3 of 9 rows are not up to date"), "{err}");
    let kept = "SELECT COUNT(*) FROM people JOIN before USING (id) WHERE people.secret = before.secret OR \
        people.secret IN ('hello', '5') OR people.id = 6 AND people.secret = (SELECT secret FROM before WHERE id = 0)";
    assert_eq!(number(&mut connection, kept).await, 3);
    let (_, err) = desk.not_ok(&[&args[..], &["--failures-max", "1"]].concat()).await;
    assert!(err.contains("--failures-max 1"), "{err}");
}

/// Envelopes as text, as base64 and as bytes; keys of every kind; names that have to be quoted.
#[tokio::test(flavor = "multi_thread")]
async fn any_key_any_name_and_every_form_of_an_envelope_will_do() {
    use base64::Engine as _;
    let desk = Desk::new().await;
    let sealed = desk.sealed(0..6).await;
    let mut connection = open(&desk.path("app.db")).await;
    run(
        &mut connection,
        "CREATE TABLE \"odd \"\"table; --\" (\"select\" UNIQUE NOT NULL, \"the \"\"row\" TEXT, \"s p\")",
    )
    .await;
    let keys = ["1", "2.5", "'it''s'", "'IT''S'", "x'00ff'", "x'01'"];
    for (row, (key, sealed)) in keys.iter().zip(&sealed).enumerate() {
        let bytes = envelope::text::decode(sealed).unwrap();
        let insert = format!("INSERT INTO \"odd \"\"table; --\" VALUES ({key}, ?1, ?2)");
        let insert = sqlx::query(AssertSqlSafe(insert)).bind(row.to_string());
        let insert = match row % 3 {
            0 => insert.bind(sealed.clone()),
            1 => insert.bind(base64::engine::general_purpose::STANDARD.encode(bytes)),
            _ => insert.bind(bytes),
        };
        insert.execute(&mut connection).await.unwrap();
    }
    let (_, to) = desk.rotate().await;
    let args = [
        "--database",
        "sqlite:app.db",
        "--table",
        "odd \"table; --",
        "--key-column",
        "select",
        "--column",
        "s p",
        "--context-column",
        "row_id=the \"row",
        "-c",
        "table=people",
        "--batch-rows",
        "1",
    ];
    assert_eq!(desk.report(&args).await["rows"], 6);
    let read =
        sqlx::query("SELECT \"the \"\"row\", \"s p\" FROM \"odd \"\"table; --\"").fetch_all(&mut connection);
    let mut rows: Vec<(usize, String)> = Vec::new();
    for row in read.await.unwrap() {
        let number: usize = row.get::<String, _>(0).parse().unwrap();
        rows.push((
            number,
            match number % 3 {
                0 => row.get(1),
                1 => envelope::text::encode(
                    &base64::engine::general_purpose::STANDARD.decode(row.get::<String, _>(1)).unwrap(),
                ),
                _ => envelope::text::encode(&row.get::<Vec<u8>, _>(1)),
            },
        ));
    }
    assert_eq!(deks_of(rows.iter().map(|(_, secret)| secret.as_str())), [to].into());
    desk.all_open(borrowed(&rows)).await;
    // What is no column is not taken for a text, and what does not tell rows apart is no key.
    for (at, name, told) in [
        (5, "nothing", "no column"),
        (7, "nothing", "no column"),
        (3, "nothing", "no table"),
        (9, "row_id=nothing", "no column"),
        (5, "the \"row", "not unique"),
    ] {
        let mut wrong = args;
        wrong[at] = name;
        let (_, err) = desk.not_ok(&wrong).await;
        assert!(err.contains(told), "{err}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_state_of_another_job_is_refused() {
    let desk = Desk::new().await;
    table(&desk.path("app.db"), &desk.sealed(0..3).await).await;
    let args =
        [&["--database", "sqlite:app.db", "--table", "people", "--state", "state"], &COLUMNS[..]].concat();
    desk.ok(&args).await;
    let (_, err) = desk.not_ok(&[&args[..], &["-c", "more=1"]].concat()).await;
    assert!(err.contains("state of another job: not the same context"), "{err}");
    let (_, err) = desk.not_ok(&[&args[..], &["--dry-run"]].concat()).await;
    assert!(err.contains("not the same dry run"), "{err}");
    // Another pace is the same job.
    desk.ok(&[&args[..], &["--batch-rows", "1", "--concurrency", "1"]].concat()).await;
    let state: Value = serde_json::from_str(&desk.read("state")).unwrap();
    assert!(!state.to_string().contains("kf_"), "the credential stands in the state file");
}
