//! Every link from one of our pages to another leads somewhere.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use super::{files, top};

fn pages() -> Vec<PathBuf> {
    let mut pages = files("docs", "md");
    let at_the_top = std::fs::read_dir(top()).unwrap().map(|entry| entry.unwrap().path());
    pages.extend(at_the_top.filter(|path| path.extension().is_some_and(|end| end == "md")));
    for folder in ["crates", "examples"] {
        pages.extend(files(folder, "md"));
    }
    pages
}

/// What stands in the parentheses of `[text](target)`, outside of code.
fn targets(text: &str) -> Vec<String> {
    let mut found = vec![];
    let mut inside_code = false;
    for line in text.lines() {
        if line.starts_with("```") {
            inside_code = !inside_code;
        }
        if inside_code {
            continue;
        }
        for after in line.split("](").skip(1) {
            found.extend(after.split(')').next().map(str::to_owned));
        }
    }
    found
}

/// The anchors of a page's headings, as GitHub and GitLab make them.
fn anchors(text: &str) -> BTreeSet<String> {
    let heading = |line: &str| -> Option<String> {
        let title = line.trim_start_matches('#').strip_prefix(' ').filter(|_| line.starts_with('#'))?;
        let kept = title.to_lowercase().replace(' ', "-");
        Some(kept.chars().filter(|c| c.is_alphanumeric() || matches!(c, '-' | '_')).collect())
    };
    text.lines().filter_map(heading).collect()
}

#[test]
fn every_link_between_our_pages_leads_to_a_page_and_a_heading() {
    let mut wrong = vec![];
    for page in pages() {
        let text = std::fs::read_to_string(&page).unwrap();
        for target in targets(&text) {
            if target.starts_with("https://") || target.starts_with("http://") {
                continue;
            }
            let (path, anchor) = target.split_once('#').unwrap_or((&target, ""));
            let file = if path.is_empty() { page.clone() } else { page.parent().unwrap().join(path) };
            let found = file.exists() && (anchor.is_empty() || anchors(&read_page(&file)).contains(anchor));
            if !found {
                wrong.push(format!("{}: {target}", page.strip_prefix(top()).unwrap().display()));
            }
        }
    }
    assert!(wrong.is_empty(), "these lead nowhere:\n{}", wrong.join("\n"));
}

fn read_page(path: &Path) -> String {
    std::fs::read_to_string(path).unwrap()
}

/// A page that the index does not name is not found by anybody.
#[test]
fn the_index_names_every_page_and_the_readme_the_index() {
    let index = read_page(&top().join("docs/README.md"));
    for page in files("docs", "md") {
        let name = page.strip_prefix(top().join("docs")).unwrap().to_str().unwrap().to_owned();
        if name != "README.md" {
            assert!(index.contains(&format!("]({name})")), "docs/README.md does not name {name}");
        }
    }
    let readme = read_page(&top().join("README.md"));
    for link in ["](docs/README.md)", "](docs/configuration.md)"] {
        assert!(readme.contains(link), "README.md lacks {link}");
    }
}
