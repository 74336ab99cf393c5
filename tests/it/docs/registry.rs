//! The tables in the documentation against those of the registry.

use std::collections::BTreeSet;

use super::{files, read, rows};

#[test]
fn the_registry_page_says_what_every_table_holds_and_of_no_other() {
    let mut made = BTreeSet::new();
    for file in files("migrations", "sql") {
        for line in read(&file).lines() {
            let name = line.strip_prefix("CREATE TABLE ").and_then(|rest| rest.split_whitespace().next());
            made.extend(name.map(str::to_owned));
        }
    }
    // What has been done to the schema is kept by what does it.
    made.insert("keyfold_migrations".to_owned());
    let page = read("docs/registry.md");
    let section = page.split("\n## ").find(|section| section.starts_with("What is in it")).unwrap();
    let cells = rows(section).into_iter().map(|row| row[0].clone());
    let named: BTreeSet<String> = cells
        .flat_map(|cell| cell.split(", ").map(|name| name.trim_matches('`').to_owned()).collect::<Vec<_>>())
        .collect();
    let (missing, stale): (Vec<_>, Vec<_>) =
        (made.difference(&named).collect(), named.difference(&made).collect());
    assert!(missing.is_empty() && stale.is_empty(), "docs/registry.md lacks {missing:?}, and has {stale:?}");
}
