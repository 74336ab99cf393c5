//! docs/observability.md against the log lines that the code writes.

use std::collections::BTreeSet;

use proc_macro2::{TokenStream, TokenTree};

use super::{files, read, rows};

/// The messages of every `tracing::warn!` and `tracing::error!`, with their level.
fn alarms(tokens: TokenStream, found: &mut BTreeSet<(String, String)>) {
    let tokens: Vec<TokenTree> = tokens.into_iter().collect();
    for (at, token) in tokens.iter().enumerate() {
        let TokenTree::Group(group) = token else { continue };
        let word = |back: usize| at.checked_sub(back).map(|at| tokens[at].to_string()).unwrap_or_default();
        let level = word(2);
        if word(1) == "!" && word(5) == "tracing" && ["warn", "error"].contains(&level.as_str()) {
            let last = group.stream().into_iter().filter_map(|token| match token {
                TokenTree::Literal(text) => Some(text.to_string()),
                _ => None,
            });
            let message = last.last().unwrap_or_default().trim_matches('"').to_owned();
            // A `\` at the end of a line of a string swallows the line break and what is indented after it.
            let lines: Vec<&str> = message.split("\\\n").map(str::trim_start).collect();
            found.insert((level, lines.concat()));
        } else {
            alarms(group.stream(), found);
        }
    }
}

#[test]
fn every_warning_and_error_in_the_log_is_documented_and_no_other() {
    let mut written = BTreeSet::new();
    for file in files("src", "rs") {
        let text = std::fs::read_to_string(&file).unwrap();
        alarms(text.parse().unwrap(), &mut written);
    }
    assert!(written.len() > 10, "{written:?}");
    let rows = rows(&read("docs/observability.md"));
    let documented: BTreeSet<(String, String)> = rows
        .into_iter()
        .filter(|row| ["warn", "error"].contains(&row[1].as_str()))
        .map(|row| {
            assert!(row.len() == 3 && !row[2].is_empty(), "{row:?}: message, level, what to do");
            (row[1].clone(), row[0].clone())
        })
        .collect();
    let missing: Vec<_> = written.difference(&documented).collect();
    let stale: Vec<_> = documented.difference(&written).collect();
    assert!(
        missing.is_empty() && stale.is_empty(),
        "docs/observability.md lacks {missing:#?}, and has {stale:#?}"
    );
}
