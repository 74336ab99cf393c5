//! docs/configuration.md against the configuration as it is read: names, defaults and edges.

use std::collections::{BTreeMap, BTreeSet};

use keyfold::config::{ConfigError, Settings, Variables};

use super::{files, read, rows};
use crate::program::keyfold;

/// No setting's name.
const PROBE: &str = "is_no_setting";

/// The least that an entry of each list or map of tables has to hold.
const ENTRIES: &[(&str, &str)] = &[
    ("quotas.tenants.NAME", "[quotas.tenants.acme]\n"),
    ("quotas.principals.NAME", "[quotas.principals.\"api-key:x\"]\n"),
    ("context[]", "[[context]]\nsource = \"tenant\"\nname = \"n\"\nbind = \"message\"\n"),
    ("access.roles.NAME", "[access.roles.r]\nverbs = [\"encrypt\"]\n"),
    ("access.roles.NAME.context[]", "[[access.roles.r.context]]\nname = \"n\"\nvalues = [\"v\"]\n"),
    (
        "access.grants[]",
        "[[access.grants]]\nprincipal = \"p\"\ntenants = [\"acme\"]\nverbs = [\"encrypt\"]\n",
    ),
    (
        "access.restrictions[]",
        "[[access.restrictions]]\nprincipal = \"p\"\nverbs = [\"encrypt\"]\nkeys = [\"k\"]\n",
    ),
    ("access.restrictions[].context[]", "[[access.restrictions.context]]\nname = \"n\"\nvalues = [\"v\"]\n"),
    ("access.certificates[]", "[[access.certificates]]\ndns = \"d.example\"\n"),
    (
        "access.issuers[]",
        "[[access.issuers]]\nname = \"i\"\nissuer = \"https://i.example\"\naudiences = [\"a\"]\n",
    ),
    (
        "access.issuers[].required_claims[]",
        "[[access.issuers.required_claims]]\nclaim = \"c\"\nvalues = [\"v\"]\n",
    ),
    ("audit.otlp", "[audit.otlp]\nendpoint = \"https://collector.example/v1/logs\"\n"),
];

/// A row of the page.
struct Row {
    /// Such as `http.body_bytes_max` or `access.issuers[].name`.
    name: String,
    default: String,
    range: String,
}

fn documented() -> Vec<Row> {
    let is_setting = |row: &Vec<String>| row.len() == 4;
    let rows = rows(&read("docs/configuration.md"));
    rows.into_iter()
        .filter(is_setting)
        .map(|row| {
            assert!(!row[3].is_empty(), "{row:?}: what it does");
            Row { name: row[0].clone(), default: row[1].replace('`', ""), range: row[2].replace('`', "") }
        })
        .collect()
}

fn load(text: &str) -> Result<Settings, ConfigError> {
    let file = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(file.path(), text).unwrap();
    Settings::load(Some(file.path()), &Variables::default())
}

/// The table of a configuration file in which a setting stands, ready for a line of it, and its name there.
fn place(name: &str) -> (String, &str) {
    let (table, last) = name.rsplit_once('.').unwrap_or(("", name));
    let mut text = String::new();
    for (entry, minimal) in ENTRIES {
        // An entry inside an entry needs the outer one first.
        if table == *entry
            || table.starts_with(&format!("{entry}."))
            || table.starts_with(&format!("{entry}["))
        {
            text += minimal;
        }
    }
    if text.is_empty() && !table.is_empty() {
        text = format!("[{table}]\n");
    }
    (text, last)
}

fn with(name: &str, value: &str) -> Result<Settings, ConfigError> {
    let (table, last) = place(name);
    // Said again, what an entry had to hold would stand twice.
    let others = table.lines().filter(|line| !line.starts_with(&format!("{last} = ")));
    let table: String = others.map(|line| format!("{line}\n")).collect();
    load(&format!("{table}{last} = {value}\n"))
}

/// The names that a table may hold, as the error for another one says.
fn names_in(table: &str) -> Option<Vec<String>> {
    // A single setting inside an entry is no table.
    let is_inside = |entry: &str| table.starts_with(&format!("{entry}."));
    if ENTRIES.iter().any(|(entry, _)| is_inside(entry)) && ENTRIES.iter().all(|(entry, _)| *entry != table) {
        return None;
    }
    let text = if table.is_empty() { String::new() } else { place(&format!("{table}.{PROBE}")).0 };
    let error = load(&format!("{text}{PROBE} = 1\n")).err()?.to_string();
    let expected = error.split_once(&format!("unknown field `{PROBE}`, expected "))?.1;
    // Where it was found stands behind.
    let expected = expected.split(" for ").next()?;
    Some(expected.split('`').skip(1).step_by(2).map(str::to_owned).collect())
}

/// Every setting that the code knows, found out by asking for one that it does not know.
fn known() -> BTreeSet<String> {
    let (mut tables, mut found) = (vec![String::new()], BTreeSet::new());
    while let Some(table) = tables.pop() {
        let names = names_in(&table).unwrap_or_else(|| panic!("'{table}' tells no names"));
        for name in names {
            let path = if table.is_empty() { name } else { format!("{table}.{name}") };
            let forms = [path.clone(), format!("{path}[]"), format!("{path}.NAME")];
            let entry = forms.iter().find(|form| ENTRIES.iter().any(|(entry, _)| entry == form));
            match entry {
                Some(entry) => tables.push(entry.clone()),
                None if names_in(&path).is_some() => tables.push(path),
                None => drop(found.insert(path)),
            }
        }
    }
    found
}

#[test]
fn every_setting_is_documented_and_no_other() {
    let mut documented: Vec<String> = documented().into_iter().map(|row| row.name).collect();
    documented.sort();
    for pair in documented.windows(2) {
        assert_ne!(pair[0], pair[1], "it stands twice in docs/configuration.md");
    }
    let (known, documented) = (known(), BTreeSet::from_iter(documented));
    assert!(known.len() > 100, "{known:?}");
    let missing: Vec<_> = known.difference(&documented).collect();
    let stale: Vec<_> = documented.difference(&known).collect();
    assert!(
        missing.is_empty() && stale.is_empty(),
        "docs/configuration.md lacks {missing:?}, and has {stale:?}"
    );
}

/// A documented value in TOML: a size in bytes, a number with commas, a text.
fn toml_value(text: &str) -> String {
    let plain = text.replace(',', "");
    if let Some((number, unit)) = plain.split_once(' ')
        && let Ok(number) = number.parse::<u64>()
    {
        let scale = match unit {
            "KiB" => 1 << 10,
            "MiB" => 1 << 20,
            _ => panic!("{text}: an unknown unit"),
        };
        return (number * scale).to_string();
    }
    let is_bare = plain.parse::<i64>().is_ok() || ["true", "false"].contains(&text) || text.starts_with('[');
    if is_bare && !text.starts_with('[') {
        plain
    } else if is_bare {
        text.to_owned()
    } else {
        format!("{text:?}")
    }
}

#[test]
fn every_default_is_the_one_that_is_documented() {
    for Row { name, default, .. } in documented() {
        let (table, last) = place(&name);
        let before = format!("{:?}", load(&table).unwrap());
        let without: String =
            table.lines().filter(|line| !line.starts_with(last)).map(|line| format!("{line}\n")).collect();
        if default == "required" {
            let error = load(&without).expect_err(&name).to_string();
            assert!(error.contains("missing") && error.contains(last), "{name}: {error}");
        } else if default == "none" && without != table {
            // One of several that an entry may hold instead of each other.
            let error = load(&without).map(drop).err().map(|error| error.to_string()).unwrap_or_default();
            assert!(!error.contains("missing"), "{name}: {error}");
        } else if default == "none" {
            let nothing = [": None", ": []", ": {}", ": \"\""];
            let is_none = nothing.iter().any(|nothing| before.contains(&format!("{last}{nothing}")));
            assert!(is_none || name.starts_with("context[]"), "{name} has a default: {before}");
        } else {
            let set = with(&name, &toml_value(&default)).unwrap_or_else(|error| panic!("{name}: {error}"));
            assert_eq!(format!("{set:?}"), before, "{name} has another default than {default}");
        }
    }
}

#[test]
fn every_edge_is_where_it_is_documented() {
    for Row { name, default, range } in documented() {
        let number = toml_value(&default).parse::<u64>().is_ok();
        assert_eq!(number, !range.is_empty(), "{name}: a number has a range, and nothing else has one");
        if !number {
            continue;
        }
        let (least, most) = match (range.split_once(" to "), range.strip_suffix(" or more")) {
            (Some((least, most)), _) => (least, Some(most)),
            (None, Some(least)) => (least, None),
            _ => panic!("{name}: {range}: write `1 or more` or `1 to 10`"),
        };
        let least: u64 = toml_value(least).parse().unwrap();
        let accepts = |value: u64| with(&name, &value.to_string()).map(drop);
        accepts(least).unwrap_or_else(|error| panic!("{name}: {error}"));
        if least > 0 {
            let error = accepts(least - 1).expect_err(&name).to_string();
            let last = name.rsplit('.').next().unwrap();
            assert!(error.contains(last), "{name}: the error does not name it: {error}");
        }
        if let Some(most) = most {
            let most: u64 = toml_value(most).parse().unwrap();
            accepts(most).unwrap_or_else(|error| panic!("{name}: {error}"));
            accepts(most + 1).expect_err(&name);
        }
    }
}

/// `http.in_flight_max` is `KEYFOLD_HTTP__IN_FLIGHT_MAX`, and so on for all that is not a list or a map.
#[test]
fn every_single_setting_has_the_environment_variable_that_the_rule_says() {
    let examples = BTreeMap::from([
        ("listen_unix", "/run/keyfold.sock"),
        ("aws.kms_endpoint", "https://kms.example"),
        ("aws.sts_endpoint", "https://sts.example"),
        ("aws.fips", "true"),
    ]);
    for Row { name, default, .. } in documented() {
        let in_entry = ENTRIES.iter().any(|(entry, _)| name.starts_with(&format!("{entry}.")));
        if in_entry || default.starts_with('[') {
            continue;
        }
        let variable = format!("KEYFOLD_{}", name.to_uppercase().replace('.', "__"));
        let is_none = default == "none";
        let value = match examples.get(name.as_str()) {
            Some(example) => (*example).to_owned(),
            None if is_none => "example".to_owned(),
            None => toml_value(&default).trim_matches('"').to_owned(),
        };
        let by_file = with(&name, &toml_value(&value));
        if is_none && by_file.as_ref().is_err_and(|error| error.to_string().contains("sequence")) {
            continue;
        }
        let debug = |set: Result<Settings, ConfigError>| match set {
            Ok(set) => format!("{set:?}"),
            Err(error) => error.to_string(),
        };
        let by_variable = debug(Settings::load(None, &Variables::of([(&variable, &value)])));
        assert_eq!(by_variable, debug(by_file), "{variable} does not set {name}");
    }
}

/// Whatever else begins with `KEYFOLD_` in the code, such as secrets, stands on the page too.
#[test]
fn every_other_environment_variable_is_documented() {
    let page = read("docs/configuration.md");
    for file in files("src", "rs") {
        let text = std::fs::read_to_string(&file).unwrap();
        let code = text.split("#[cfg(test)]").next().unwrap();
        for after in code.split("KEYFOLD_").skip(1) {
            let end = after.find(|c: char| !c.is_ascii_uppercase() && c != '_').unwrap_or(after.len());
            let name = format!("KEYFOLD_{}", &after[..end]);
            let is_secret_or_other = !name.contains("__") && !name.ends_with('_');
            assert!(
                !is_secret_or_other || page.contains(&format!("`{name}`")),
                "docs/configuration.md does not name {name} of {}",
                file.display()
            );
        }
    }
}

#[test]
fn every_flag_of_serve_is_documented() {
    let page = read("docs/configuration.md");
    let folder = tempfile::tempdir().unwrap();
    let help = keyfold(folder.path(), &["serve", "--help"], &[]).ok();
    let flags: Vec<&str> = help.split_whitespace().filter(|word| word.starts_with("--")).collect();
    assert!(flags.len() > 4, "{help}");
    for flag in flags {
        let flag = flag.trim_end_matches(|c: char| !c.is_ascii_alphanumeric());
        assert!(flag == "--help" || page.contains(&format!("`{flag}")), "docs/configuration.md lacks {flag}");
    }
}
