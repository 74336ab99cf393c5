//! docs/errors.md against the table of codes.

use std::collections::BTreeSet;

use keyfold::http::problem::Code;

use super::{read, rows};

#[test]
fn every_code_is_documented_as_it_is_and_no_other() {
    let documented: BTreeSet<[String; 3]> = rows(&read("docs/errors.md"))
        .into_iter()
        .map(|row| {
            assert_eq!(row.len(), 5, "{row:?}: code, status, retryable, meaning, what to do");
            assert!(row.iter().all(|cell| !cell.is_empty()), "{row:?}");
            [row[0].clone(), row[1].clone(), row[2].clone()]
        })
        .collect();
    let is = |code: &Code| {
        let again = if code.retryable() { "yes" } else { "no" };
        [code.name().to_owned(), code.status().as_u16().to_string(), again.to_owned()]
    };
    let codes: BTreeSet<_> = Code::ALL.iter().map(is).collect();
    let missing: Vec<_> = codes.difference(&documented).collect();
    let stale: Vec<_> = documented.difference(&codes).collect();
    assert!(missing.is_empty() && stale.is_empty(), "docs/errors.md lacks {missing:?}, and has {stale:?}");
}

#[test]
fn the_list_of_codes_is_complete() {
    // One row a code in the table that says what each means, which the compiler holds complete.
    let table = read("src/http/problem.rs").matches("=> Meaning(").count();
    assert_eq!(Code::ALL.len(), table, "Code::ALL in src/http/problem.rs");
}
