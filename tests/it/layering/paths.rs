//! Which paths a source file names, and where. Comments, doc comments, strings and `#[cfg(test)]` modules name none.

use std::path::{Path, PathBuf};

use proc_macro2::{Delimiter, TokenStream, TokenTree};

/// A path such as `crate::pool::PoolError`, as it stands in the source.
pub(super) struct Named {
    pub(super) line: usize,
    pub(super) segments: Vec<String>,
}

impl Named {
    /// The path's text.
    pub(super) fn text(&self) -> String {
        self.segments.join("::")
    }

    /// Whether it is `prefix` (such as `std::fs`) or something below it.
    pub(super) fn is_under(&self, prefix: &str) -> bool {
        let mut segments = self.segments.iter();
        prefix.split("::").all(|wanted| segments.next().is_some_and(|segment| segment == wanted))
    }
}

/// A file of ours, with what it names.
pub(super) struct Source {
    /// From the top of the repository.
    pub(super) path: PathBuf,
    pub(super) text: String,
    pub(super) paths: Vec<Named>,
    /// Every identifier outside of paths, too: keywords such as `unsafe`.
    pub(super) words: Vec<(usize, String)>,
}

/// All Rust files below this folder of the repository, but for those that are tests.
pub(super) fn sources(folder: &str) -> Vec<Source> {
    let top = Path::new(env!("CARGO_MANIFEST_DIR"));
    let mut files = vec![];
    walk(&top.join(folder), &mut files);
    assert!(!files.is_empty(), "there is no source in {folder}");
    files.sort();
    files.into_iter().map(|file| read(top, &file)).collect()
}

fn walk(folder: &Path, files: &mut Vec<PathBuf>) {
    for entry in std::fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        let name = path.file_name().unwrap().to_string_lossy().into_owned();
        if path.is_dir() && name != "tests" {
            walk(&path, files);
        } else if path.extension().is_some_and(|extension| extension == "rs") && name != "tests.rs" {
            files.push(path);
        }
    }
}

fn read(top: &Path, file: &Path) -> Source {
    let text = std::fs::read_to_string(file).unwrap();
    let path = file.strip_prefix(top).unwrap().to_owned();
    let tokens: TokenStream =
        text.parse().unwrap_or_else(|error| panic!("{} is not Rust: {error}", path.display()));
    let mut source = Source { path, text, paths: vec![], words: vec![] };
    collect(tokens, &mut source);
    source
}

fn collect(tokens: TokenStream, source: &mut Source) {
    let tokens = without_tests(tokens.into_iter().collect());
    let mut at = 0;
    while at < tokens.len() {
        match &tokens[at] {
            TokenTree::Ident(word) => {
                source.words.push((word.span().start().line, word.to_string()));
                if word == "use" {
                    at = use_tree(&tokens, at + 1, &[], &mut source.paths);
                } else {
                    at = plain_path(&tokens, at, &mut source.paths);
                }
            }
            TokenTree::Group(group) => {
                collect(group.stream(), source);
                at += 1;
            }
            // `Type::method` after a `>`, or `::std::fs`: what follows the colons is read as a path of its own.
            _ => at += 1,
        }
    }
}

/// `a::b::c` from `at`; says where it ends.
fn plain_path(tokens: &[TokenTree], mut at: usize, paths: &mut Vec<Named>) -> usize {
    let line = tokens[at].span().start().line;
    let mut segments = vec![tokens[at].to_string()];
    at += 1;
    while is_colons(tokens, at) {
        let Some(TokenTree::Ident(segment)) = tokens.get(at + 2) else { break };
        segments.push(segment.to_string());
        at += 3;
    }
    if segments.len() > 1 {
        paths.push(Named { line, segments });
    }
    at
}

/// The tree of a `use`, from `at` to its `;` or `,`; says where it ends.
fn use_tree(tokens: &[TokenTree], mut at: usize, prefix: &[String], paths: &mut Vec<Named>) -> usize {
    let mut segments = prefix.to_vec();
    let mut line = 0;
    while let Some(token) = tokens.get(at) {
        match token {
            TokenTree::Ident(word) if word == "as" => at += 1,
            TokenTree::Ident(word) => {
                line = word.span().start().line;
                segments.push(word.to_string());
            }
            TokenTree::Group(group) if group.delimiter() == Delimiter::Brace => {
                let inner: Vec<TokenTree> = group.stream().into_iter().collect();
                let mut next = 0;
                while next < inner.len() {
                    next = use_tree(&inner, next, &segments, paths);
                }
                segments.clear();
            }
            TokenTree::Punct(end) if matches!(end.as_char(), ';' | ',') => {
                at += 1;
                break;
            }
            _ => {}
        }
        at += 1;
    }
    if !segments.is_empty() && line > 0 {
        paths.push(Named { line, segments });
    }
    at
}

fn is_colons(tokens: &[TokenTree], at: usize) -> bool {
    let colon = |at: usize| matches!(tokens.get(at), Some(TokenTree::Punct(punct)) if punct.as_char() == ':');
    colon(at) && colon(at + 1)
}

/// Leaves out what stands behind `#[cfg(test)]`: tests may reach for what they like.
fn without_tests(tokens: Vec<TokenTree>) -> Vec<TokenTree> {
    let mut kept = vec![];
    let mut tokens = tokens.into_iter();
    while let Some(token) = tokens.next() {
        let is_test_gate = matches!(&token, TokenTree::Group(group) if group.delimiter() == Delimiter::Bracket
            && group.stream().to_string().replace(' ', "") == "cfg(test)");
        if !is_test_gate {
            kept.push(token);
            continue;
        }
        for skipped in tokens.by_ref() {
            let ends = match &skipped {
                TokenTree::Punct(punct) => punct.as_char() == ';',
                TokenTree::Group(group) => group.delimiter() == Delimiter::Brace,
                _ => false,
            };
            if ends {
                break;
            }
        }
    }
    kept
}

/// What these lines name, for the tests of this file itself.
#[cfg(test)]
fn named(text: &str) -> Vec<String> {
    let mut source = Source { path: PathBuf::new(), text: String::new(), paths: vec![], words: vec![] };
    collect(text.parse().unwrap(), &mut source);
    source.paths.iter().map(|path| format!("{} {}", path.line, path.text())).collect()
}

#[test]
fn paths_are_found_in_every_form_and_only_in_code() {
    let text = "use crate::store::{Store as _, rows::{self, Row}};\n\
                // crate::comment::No\n\
                /// [`crate::doc::No`]\n\
                fn f() -> Result<crate::pool::Error, std::io::Error> { let s = \"crate::text::No\"; m!(::tokio::spawn(x)) }\n\
                #[cfg(test)]\n\
                mod tests { use crate::test::No; }\n\
                fn g() { crate::kms::go() }";
    assert_eq!(
        named(text),
        [
            "1 crate::store::Store",
            "1 crate::store::rows::self",
            "1 crate::store::rows::Row",
            "4 crate::pool::Error",
            "4 std::io::Error",
            "4 tokio::spawn",
            "7 crate::kms::go",
        ]
    );
}
