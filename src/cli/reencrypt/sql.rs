//! What is said to databases.

/// A name of theirs, so that nothing in it is anything but a name. SQLite and PostgreSQL quote alike.
pub(super) fn quoted(name: &str) -> anyhow::Result<String> {
    // Where the text ends for the database, what follows would be lost.
    anyhow::ensure!(!name.is_empty() && !name.contains('\0'), "{name:?} is no name of a table or column");
    Ok(format!("\"{}\"", name.replace('"', "\"\"")))
}

/// Which table, and which of its columns.
pub(super) struct Table {
    pub(super) schema: Option<String>,
    pub(super) name: String,
    pub(super) key: String,
    pub(super) column: String,
}

impl Table {
    /// Its name for the database.
    pub(super) fn quoted(&self) -> anyhow::Result<String> {
        let name = quoted(&self.name)?;
        Ok(match &self.schema {
            Some(schema) => format!("{}.{name}", quoted(schema)?),
            None => name,
        })
    }

    pub(super) fn no_key(&self) -> String {
        format!(
            "the column {:?} of {:?} is not unique by itself: --key-column takes a primary key or a column with a \
             unique index, so that no row is left out",
            self.key, self.name
        )
    }

    pub(super) fn no_column(&self, column: &str) -> String {
        format!("the table {:?} has no column {column:?}", self.name)
    }

    pub(super) fn empty_keys(&self) -> String {
        format!("rows of {:?} have no key in {:?}: name another --key-column", self.name, self.key)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_stays_a_name() {
        assert_eq!(quoted("a b").unwrap(), "\"a b\"");
        assert_eq!(quoted("x\" WHERE 1=1 --").unwrap(), "\"x\"\" WHERE 1=1 --\"");
        assert!(quoted("").is_err() && quoted("a\0b").is_err());
    }
}
