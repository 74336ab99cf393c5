//! The commands in the documentation against those that the program has.

use std::collections::BTreeSet;

use super::{read, rows};
use crate::program::keyfold;

/// The commands below this one, as its help names them.
fn commands(path: &[&str]) -> Vec<String> {
    let folder = tempfile::tempdir().unwrap();
    let help = keyfold(folder.path(), &[path, &["--help"]].concat(), &[]).ok();
    let listed = help.lines().skip_while(|line| *line != "Commands:").skip(1);
    let listed = listed.take_while(|line| line.starts_with("  "));
    // What is indented further goes on with the line before.
    let names =
        listed.filter(|line| !line.starts_with("   ")).filter_map(|line| line.split_whitespace().next());
    names.filter(|name| *name != "help").map(str::to_owned).collect()
}

#[test]
fn the_commands_page_lists_every_command_and_no_other() {
    let mut known = BTreeSet::new();
    for command in commands(&[]) {
        let below = commands(&[&command]);
        if below.is_empty() {
            known.insert(command);
        } else {
            known.extend(below.iter().map(|below| format!("{command} {below}")));
        }
    }
    assert!(known.len() > 20, "{known:?}");
    let documented: BTreeSet<String> =
        rows(&read("docs/commands.md")).into_iter().map(|row| row[0].clone()).collect();
    let missing: Vec<_> = known.difference(&documented).collect();
    let stale: Vec<_> = documented.difference(&known).collect();
    assert!(missing.is_empty() && stale.is_empty(), "docs/commands.md lacks {missing:?}, and has {stale:?}");
}

/// The key ring's page explains each of its commands.
#[test]
fn the_key_rings_page_lists_its_commands() {
    let page = read("docs/keyring.md");
    let rows = page.lines().filter_map(|line| line.strip_prefix("| `keyfold keyring "));
    let documented: BTreeSet<String> =
        rows.filter_map(|row| row.split([' ', '`']).next()).map(str::to_owned).collect();
    assert_eq!(documented, BTreeSet::from_iter(commands(&["keyring"])));
}
