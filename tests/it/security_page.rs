//! SECURITY.md names the test that shows each of its claims: this holds that the tests are there.

use std::path::Path;

/// Every `file::name` in backticks, with the file in full.
fn named(page: &str) -> Vec<(String, String)> {
    let quoted = page.split('`').skip(1).step_by(2);
    let tests = quoted.filter_map(|text| text.rsplit_once("::"));
    // The example that says how they are written.
    let tests = tests.filter(|named| *named != ("file", "name"));
    let place = |file: &str| if file.contains('/') { file.to_owned() } else { format!("tests/it/{file}.rs") };
    tests.map(|(file, name)| (place(file), name.to_owned())).collect()
}

#[test]
fn every_test_that_the_security_page_names_exists() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let page = std::fs::read_to_string(root.join("SECURITY.md")).unwrap();
    let tests = named(&page);
    assert!(tests.len() > 40, "{} are named", tests.len());
    let missing = |(file, name): &&(String, String)| {
        let source = std::fs::read_to_string(root.join(file)).unwrap_or_default();
        let declared = source.split_once(&format!("fn {name}("));
        let attribute =
            declared.and_then(|(before, _)| before.rsplit('\n').find(|line| line.starts_with("#[")));
        !attribute.is_some_and(|attribute| attribute.contains("test"))
    };
    let missing: Vec<_> = tests.iter().filter(missing).collect();
    assert!(missing.is_empty(), "SECURITY.md names tests that are not there: {missing:#?}");
    assert!(root.join("tests/schemathesis/run.py").exists());
}

#[test]
fn every_boundary_has_its_part_of_the_security_page() {
    let page = include_str!("../../SECURITY.md");
    let parts = ["caller", "network", "KMS", "database", "operator", "host", "audit sink"];
    for part in parts {
        assert!(page.contains(&format!("\n## The {part}\n")), "{part}");
    }
}
