//! Rows of a table in PostgreSQL.

use std::time::Duration;

use serde_json::json;
use sqlx::{AssertSqlSafe, Connection as _, PgConnection, Row as _};

use super::{Desk, deks_of};
use crate::postgres_server::PostgresServer;

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

async fn run(connection: &mut PgConnection, statement: &str) {
    sqlx::raw_sql(AssertSqlSafe(statement.to_owned())).execute(connection).await.unwrap();
}

/// A table `people` with these envelopes.
async fn table(connection: &mut PgConnection, sealed: &[String]) {
    run(connection, "CREATE TABLE people (id bigint PRIMARY KEY, name text, secret text)").await;
    let fill =
        "INSERT INTO people SELECT n - 1, 'name', c FROM unnest($1::text[]) WITH ORDINALITY AS v(c, n)";
    sqlx::query(fill).bind(sealed).execute(connection).await.unwrap();
}

async fn secrets(connection: &mut PgConnection) -> Vec<(usize, String)> {
    let rows = sqlx::query("SELECT id, secret FROM people ORDER BY id").fetch_all(connection).await.unwrap();
    rows.iter().map(|row| (usize::try_from(row.get::<i64, _>(0)).unwrap(), row.get(1))).collect()
}

fn borrowed(rows: &[(usize, String)]) -> impl Iterator<Item = (usize, &str)> {
    rows.iter().map(|(row, secret)| (*row, secret.as_str()))
}

#[tokio::test(flavor = "multi_thread")]
async fn all_rows_are_renewed_though_the_command_is_killed_five_times() {
    const ROWS: usize = 15_000;
    let (desk, server) = (Desk::new().await, PostgresServer::start().await);
    let (mut connection, url) = (server.connect().await, server.url());
    table(&mut connection, &desk.sealed(0..ROWS).await).await;
    let (from, to) = desk.rotate().await;
    let before_all = secrets(&mut connection).await;
    let args =
        [&["--database", &url, "--table", "people", "--state", "state", "--batch-rows", "200"], &COLUMNS[..]]
            .concat();
    // Nothing is changed by looking.
    let (out, _) =
        desk.not_ok(&[&args[..4], &["--dry-run", "--state", "other"], &COLUMNS[..]].concat()).await;
    assert!(out.contains(&format!("{from} -> {to}: {ROWS} would be renewed")), "{out}");
    assert!(secrets(&mut connection).await == before_all);
    let mut before = 0;
    for _ in 0..5 {
        let told = desk.killed(&args, "state", before + 1_000).await;
        assert!(told > before && told < ROWS as u64, "{told}");
        before = told;
        let renewed = secrets(&mut connection).await;
        let renewed = renewed.iter().zip(&before_all).filter(|(now, before)| now != before).count() as u64;
        assert!(told <= renewed && renewed <= told + 200, "{told} told, {renewed} renewed");
    }
    assert_eq!(desk.report(&args).await["rows"], ROWS);
    let renewed = secrets(&mut connection).await;
    assert_eq!(renewed.len(), ROWS);
    assert_eq!(deks_of(renewed.iter().map(|(_, secret)| secret.as_str())), [to.clone()].into());
    desk.all_open(borrowed(&renewed)).await;
    let second = desk.report(&args).await;
    assert_eq!((&second["current"][&to], &second["renewed"]), (&json!(ROWS), &json!({})));
    assert!(secrets(&mut connection).await == renewed, "the second run changed something");
}

/// Somebody has changed rows and not yet said so: the command waits for him, and his rows stay his.
#[tokio::test(flavor = "multi_thread")]
async fn rows_that_somebody_else_holds_locked_and_changes_are_kept() {
    let (desk, server) = (Desk::new().await, PostgresServer::start().await);
    let (mut connection, mut other, url) = (server.connect().await, server.connect().await, server.url());
    table(&mut connection, &desk.sealed(0..40).await).await;
    let mine = desk.sealed(7..8).await.remove(0);
    let (_, to) = desk.rotate().await;
    let newest = desk.sealed(11..12).await.remove(0);
    let mut change = other.begin().await.unwrap();
    let update = "UPDATE people SET secret = $1 WHERE id = $2";
    for (id, secret) in [(7_i64, &mine), (11, &newest)] {
        sqlx::query(update).bind(secret).bind(id).execute(&mut *change).await.unwrap();
    }
    sqlx::query("DELETE FROM people WHERE id = 15").execute(&mut *change).await.unwrap();
    let args = [&["--database", &url, "--table", "people"], &COLUMNS[..]].concat();
    let report = async {
        let report = desk.report(&args).await;
        assert_eq!((&report["changed_meanwhile"], &report["removed_meanwhile"]), (&json!(2), &json!(1)));
        assert_eq!((&report["rows"], &report["current"]), (&json!(39), &json!({&to: 1})));
    };
    let other = async {
        // Longer than a lock is waited for: it comes again.
        let waits = "SELECT COUNT(*) FROM pg_locks WHERE NOT granted";
        while sqlx::query_scalar::<_, i64>(waits).fetch_one(&mut connection).await.unwrap() == 0 {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        tokio::time::sleep(Duration::from_millis(3_500)).await;
        change.commit().await.unwrap();
    };
    tokio::join!(report, other);
    let renewed = secrets(&mut connection).await;
    assert!(renewed.contains(&(11, newest)), "it was current: it stays");
    assert_eq!(renewed.len(), 39);
    assert_eq!(deks_of(renewed.iter().map(|(_, secret)| secret.as_str())), [to].into());
    desk.all_open(borrowed(&renewed)).await;
}

/// Bytes, domains, keys that are no numbers, names that have to be quoted.
#[tokio::test(flavor = "multi_thread")]
async fn any_key_any_name_and_every_form_of_an_envelope_will_do() {
    let (desk, server) = (Desk::new().await, PostgresServer::start().await);
    let (mut connection, url) = (server.connect().await, server.url());
    let sealed = desk.sealed(0..6).await;
    run(
        &mut connection,
        "CREATE SCHEMA \"odd \"\"one\"; CREATE DOMAIN envelope AS bytea CHECK (length(VALUE) > 3); \
         CREATE TABLE \"odd \"\"one\".\"Select\" (\"at\" timestamptz NOT NULL, \"the \"\"row\" int, \"s p\" envelope); \
         CREATE UNIQUE INDEX ON \"odd \"\"one\".\"Select\" (\"at\"); ALTER ROLE kf SET timezone = 'Asia/Kathmandu'; \
         ALTER ROLE kf SET datestyle = 'SQL, DMY'",
    )
    .await;
    for (row, sealed) in sealed.iter().enumerate() {
        let insert = "INSERT INTO \"odd \"\"one\".\"Select\" VALUES ('2026-03-04 05:06:07.123456+00'::timestamptz \
            + interval '1 day' * $1, $1, $2)";
        let row = i32::try_from(row).unwrap();
        sqlx::query(insert)
            .bind(row)
            .bind(envelope::text::decode(sealed).unwrap())
            .execute(&mut connection)
            .await
            .unwrap();
    }
    let (_, to) = desk.rotate().await;
    let args = [
        "--database",
        &url,
        "--schema",
        "odd \"one",
        "--table",
        "Select",
        "--key-column",
        "at",
        "--column",
        "s p",
        "--context-column",
        "row_id=the \"row",
        "-c",
        "table=people",
        "--batch-rows",
        "1",
        "--envelope",
        "compact",
    ];
    assert_eq!(desk.report(&args).await["rows"], 6);
    let read = "SELECT \"the \"\"row\", \"s p\"::bytea FROM \"odd \"\"one\".\"Select\"";
    let rows: Vec<(usize, String)> = sqlx::query(read)
        .fetch_all(&mut connection)
        .await
        .unwrap()
        .iter()
        .map(|row| {
            (
                usize::try_from(row.get::<i32, _>(0)).unwrap(),
                envelope::text::encode(&row.get::<Vec<u8>, _>(1)),
            )
        })
        .collect();
    assert_eq!(deks_of(rows.iter().map(|(_, secret)| secret.as_str())), [to].into());
    desk.all_open(borrowed(&rows)).await;
    for (at, name, told) in [
        (5, "nothing", "no table"),
        (7, "nothing", "no column"),
        (9, "nothing", "no column"),
        (11, "row_id=nothing", "no column"),
        (7, "the \"row", "not unique"),
        (9, "the \"row", "text or bytea"),
    ] {
        let mut wrong = args;
        wrong[at] = name;
        let (_, err) = desk.not_ok(&wrong).await;
        assert!(err.contains(told), "{err}");
    }
    let (_, err) = desk
        .not_ok(&[
            "--database",
            "postgres://kf:canary@%2Fnowhere/x",
            "--table",
            "t",
            "--key-column",
            "a",
            "--column",
            "b",
        ])
        .await;
    assert!(err.contains("cannot connect") && !err.contains("canary"), "{err}");
}
