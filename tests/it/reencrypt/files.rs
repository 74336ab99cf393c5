//! Rows in files: NDJSON and CSV.

use std::io::Write as _;
use std::process::Stdio;

use serde_json::{Value, json};

use super::{Desk, dek_of, deks_of};

/// Lines as an export may have them: fields in any order, numbers that JSON readers round, spaces, an empty line.
fn lines(sealed: &[String]) -> String {
    let mut lines = String::new();
    for (row, sealed) in sealed.iter().enumerate() {
        lines.push_str(&match row % 3 {
            0 => format!("{{\"id\":{row},\"secret\":\"{sealed}\",\"n\":1.000000000000000000001}}\n"),
            1 => format!("{{ \"z\": {{\"secret\": 1}}, \"secret\" : \"{sealed}\", \"id\":\"{row}\" }}\r\n"),
            _ => format!("\n{{\"secret\":\"{sealed}\",\"a\":null,\"\\u0069d\":{row}}}\n"),
        });
    }
    lines
}

const FIELDS: [&str; 8] =
    ["--column", "secret", "--context-column", "row_id=id", "-c", "table=people", "--envelope", "compact"];

/// The envelopes, and what the lines are without them.
fn apart(lines: &str) -> (Vec<String>, String) {
    let (mut sealed, mut rest) = (Vec::new(), String::new());
    for line in lines.split_inclusive('\n') {
        let Ok(parsed) = serde_json::from_str::<Value>(line) else {
            rest.push_str(line);
            continue;
        };
        let secret = parsed["secret"].as_str().unwrap().to_owned();
        rest.push_str(&line.replacen(&secret, "", 1));
        sealed.push(secret);
    }
    (sealed, rest)
}

fn rows(sealed: &[String]) -> impl Iterator<Item = (usize, &str)> {
    sealed.iter().map(String::as_str).enumerate()
}

#[tokio::test(flavor = "multi_thread")]
async fn lines_killed_five_times_come_out_whole_and_the_rest_of_them_byte_for_byte() {
    const ROWS: usize = 12_000;
    let desk = Desk::new().await;
    let input = lines(&desk.sealed(0..ROWS).await);
    std::fs::write(desk.path("rows.ndjson"), &input).unwrap();
    let (_, to) = desk.rotate().await;
    let args = [&["rows.ndjson", "-o", "new.ndjson", "--state", "state", "--batch-rows", "100"], &FIELDS[..]]
        .concat();
    let mut before = 0;
    for _ in 0..5 {
        let told = desk.killed(&args, "state", before + 1_000).await;
        assert!(told > before && told < ROWS as u64);
        assert!(!desk.path("new.ndjson").exists(), "it has its name before it is whole");
        before = told;
    }
    let report = desk.report(&args).await;
    assert_eq!((&report["rows"], &report["failed"]), (&json!(ROWS), &json!([])));
    let output = desk.read("new.ndjson");
    let ((sealed, rest), (_, rest_before)) = (apart(&output), apart(&input));
    assert!(rest == rest_before, "something else was changed");
    assert_eq!(deks_of(sealed.iter().map(String::as_str)), [to].into());
    desk.all_open(rows(&sealed)).await;
    assert_eq!(desk.read("rows.ndjson"), input);
    let names: Vec<_> =
        std::fs::read_dir(desk.folder.path()).unwrap().map(|e| e.unwrap().file_name()).collect();
    assert_eq!(names.len(), 3, "{names:?}");
    // In place, and again: the second run changes none.
    let again = [&["new.ndjson", "-o", "new.ndjson", "--force"], &FIELDS[..]].concat();
    assert_eq!(desk.report(&again).await["renewed"], json!({}));
    assert!(desk.read("new.ndjson") == output);
}

#[tokio::test(flavor = "multi_thread")]
async fn csv_killed_five_times_comes_out_whole() {
    const ROWS: usize = 6_000;
    let desk = Desk::new().await;
    let sealed = desk.sealed(0..ROWS).await;
    let mut input = "name;id;secret\r\n".to_owned();
    for (row, sealed) in sealed.iter().enumerate() {
        input.push_str(&format!("\"a; \"\"quoted\"\"\nname {row}\";{row};{sealed}\r\n"));
    }
    std::fs::write(desk.path("rows.csv"), &input).unwrap();
    let (_, to) = desk.rotate().await;
    let args = [
        &["rows.csv", "-o", "new.csv", "--delimiter", ";", "--state", "state", "--batch-rows", "50"],
        &FIELDS[..],
    ]
    .concat();
    let mut before = 0;
    for _ in 0..5 {
        let told = desk.killed(&args, "state", before + 500).await;
        assert!(told > before && told < ROWS as u64);
        before = told;
    }
    assert_eq!(desk.report(&args).await["rows"], ROWS);
    let output = desk.read("new.csv");
    let mut reader = csv::ReaderBuilder::new().delimiter(b';').from_reader(output.as_bytes());
    let records: Vec<csv::StringRecord> = reader.records().map(Result::unwrap).collect();
    let renewed: Vec<String> = records.iter().map(|record| record[2].to_owned()).collect();
    assert_eq!(deks_of(renewed.iter().map(String::as_str)), [to].into());
    desk.all_open(rows(&renewed)).await;
    let mut lines = output.split_inclusive("\r\n");
    let mut rest = lines.next().unwrap().to_owned();
    for ((old, new), line) in sealed.iter().zip(&renewed).zip(lines) {
        rest.push_str(&line.replacen(new, old, 1));
    }
    assert!(rest == input, "something else was changed");
}

/// Of either form: a dry run makes nothing, a second run changes nothing.
#[tokio::test(flavor = "multi_thread")]
async fn a_dry_run_makes_no_file_and_a_second_run_changes_no_byte() {
    let desk = Desk::new().await;
    let sealed = desk.sealed(0..30).await;
    std::fs::write(desk.path("rows.ndjson"), lines(&sealed)).unwrap();
    let records = sealed.iter().enumerate().map(|(row, sealed)| format!("{row},\"a, b\",{sealed}\n"));
    std::fs::write(desk.path("rows.csv"), format!("id,name,secret\n{}", records.collect::<String>()))
        .unwrap();
    let (from, to) = desk.rotate().await;
    for form in ["ndjson", "csv"] {
        let (rows, once, twice) = (format!("rows.{form}"), format!("once.{form}"), format!("twice.{form}"));
        let input = desk.read(&rows);
        for output in [&["-o", once.as_str()][..], &[]] {
            let dry = [&[rows.as_str(), "--dry-run"], output, &FIELDS[..]].concat();
            let (out, err) = desk.not_ok(&dry).await;
            assert!(out.contains(&format!("{from} -> {to}: 30 would be renewed")), "{out}");
            assert!(err.contains("30 of 30 rows are not up to date"), "{err}");
            assert!(!out.contains("kf1."), "a dry run prints no rows");
        }
        assert!(!desk.path(&once).exists() && desk.read(&rows) == input, "a dry run wrote something");
        let first = desk.report(&[&[rows.as_str(), "-o", once.as_str()], &FIELDS[..]].concat()).await;
        assert_eq!(first["renewed"], json!({&from: {&to: 30}}));
        let second = desk.report(&[&[once.as_str(), "-o", twice.as_str()], &FIELDS[..]].concat()).await;
        assert_eq!((&second["renewed"], &second["current"]), (&json!({}), &json!({&to: 30})));
        assert!(desk.read(&twice) == desk.read(&once) && desk.read(&rows) == input);
        let dry = desk.ok(&[&[once.as_str(), "--dry-run"], &FIELDS[..]].concat()).await;
        assert!(dry.contains("0 would be renewed, 30 up to date"), "{dry}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn standard_input_goes_to_standard_output_and_what_fails_stays_as_it_is() {
    let desk = Desk::new().await;
    let sealed = desk.sealed(0..4).await;
    let (_, to) = desk.rotate().await;
    let input = format!(
        "{{\"id\":0,\"secret\":\"{}\"}}\n{{\"id\":1,\"secret\":null}}\nnonsense\n{{\"secret\":\"{}\"}}\n\
         {{\"id\":9,\"secret\":\"{}\"}}\n{{\"id\":3,\"secret\":\"{}\",\"secret\":1}}",
        sealed[0], sealed[1], sealed[2], sealed[3]
    );
    let mut args = vec!["--format", "ndjson", "--key-column", "id"];
    args.extend(FIELDS);
    let mut command = desk.command(&args);
    command.stdin(Stdio::piped());
    let told = input.clone();
    let output = tokio::task::spawn_blocking(move || {
        let mut child = command.spawn().unwrap();
        child.stdin.take().unwrap().write_all(told.as_bytes()).unwrap();
        child.wait_with_output().unwrap()
    })
    .await
    .unwrap();
    assert_eq!(output.status.code(), Some(1));
    let (out, err) = (String::from_utf8(output.stdout).unwrap(), String::from_utf8(output.stderr).unwrap());
    let (first, rest) = out.split_once('\n').unwrap();
    let renewed: Value = serde_json::from_str(first).unwrap();
    assert_eq!(dek_of(renewed["secret"].as_str().unwrap()), to);
    assert_eq!(rest, input.split_once('\n').unwrap().1);
    assert!(err.contains("5 rows: 1 renewed, 0 up to date, 4 failed"), "{err}");
    assert!(err.contains("malformed_row: 2 failed: line 3, 3\n"), "{err}");
    assert!(err.contains("no_context_value: 1 failed: line 4\n"), "{err}");
    assert!(err.contains("context_mismatch: 1 failed: 9\n"), "{err}");
}

#[tokio::test(flavor = "multi_thread")]
async fn what_makes_no_sense_is_refused_with_what_to_do() {
    let desk = Desk::new().await;
    let sealed = desk.sealed(0..1).await;
    std::fs::write(desk.path("rows.csv"), format!("id,secret\n0,{}\n", sealed[0])).unwrap();
    std::fs::write(desk.path("rows.ndjson"), "{\"id\":0}\n").unwrap();
    for (args, told) in [
        ("--column secret", "--format"),
        ("rows.csv --column secret --state s", "--state needs a file"),
        ("rows.csv --column secret -o rows.csv", "--force"),
        ("rows.csv --column nothing", "no column \"nothing\""),
        ("rows.csv --column secret --context-column x=y", "no column \"y\""),
        ("rows.csv --column secret -c x", "no '='"),
        ("rows.csv --column secret -c =1", "not valid"),
        ("rows.csv --column secret --delimiter é", "ASCII"),
        ("rows.ndjson --column secret", "no line has a field"),
        ("gone.csv --column secret", "cannot read gone.csv"),
        ("--database mysql://x --column secret", "sqlite:FILE"),
        ("--database sqlite:gone.db --column secret --table t --key-column id", "cannot open gone.db"),
        ("--database sqlite:gone.db --column secret", "cannot open gone.db"),
    ] {
        let (out, err) = desk.not_ok(&args.split(' ').collect::<Vec<_>>()).await;
        assert!(err.contains(told) && out.is_empty(), "{args}: {out}{err}");
    }
    // A state of a file that has changed since is of no use.
    let args =
        [&["rows.csv", "-o", "new.csv", "--state", "state", "--batch-rows", "1"], &FIELDS[..]].concat();
    let sealed = desk.sealed(0..400).await;
    let rows: Vec<String> =
        sealed.iter().enumerate().map(|(row, sealed)| format!("{row},{sealed}\n")).collect();
    std::fs::write(desk.path("rows.csv"), format!("id,secret\n{}", rows.concat())).unwrap();
    desk.killed(&args, "state", 5).await;
    std::fs::write(desk.path("rows.csv"), format!("id,secret\n{}\n", rows.concat())).unwrap();
    let (_, err) = desk.not_ok(&args).await;
    assert!(err.contains("has changed since"), "{err}");
}
