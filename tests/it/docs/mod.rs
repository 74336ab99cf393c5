//! The documentation against the code: what it lists is what there is.

mod commands;
mod configuration;
mod errors;
mod links;
mod log;
mod registry;

use std::path::{Path, PathBuf};

/// The repository.
fn top() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

fn read(path: impl AsRef<Path>) -> String {
    let path = top().join(path);
    std::fs::read_to_string(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

/// The cells of every table row that begins with a word in backticks, without the backticks of that word.
fn rows(text: &str) -> Vec<Vec<String>> {
    let cells = |line: &str| -> Vec<String> {
        // A `|` inside a cell is written `\|`.
        let line = line.trim().trim_matches('|').replace("\\|", "\u{0}");
        line.split('|').map(|cell| cell.trim().replace('\u{0}', "|")).collect()
    };
    let named = text.lines().filter(|line| line.starts_with("| `")).map(cells);
    named
        .map(|mut row| {
            row[0] = row[0].trim_matches('`').to_owned();
            row
        })
        .collect()
}

/// All files below a folder of the repository that end like this.
fn files(folder: &str, extension: &str) -> Vec<PathBuf> {
    let (mut folders, mut found) = (vec![top().join(folder)], vec![]);
    while let Some(folder) = folders.pop() {
        for entry in std::fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                folders.push(path);
            } else if path.extension().is_some_and(|found| found == extension) {
                found.push(path);
            }
        }
    }
    found.sort();
    found
}
