//! The batches of a migration file.

/// How a batch is run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Mode<'a> {
    /// In a transaction, with its record.
    Transaction,
    /// Outside any.
    OutsideTransaction,
    /// Again and again until it changes no more rows, each time in a transaction of its own.
    Repeat {
        /// A query of how many rows that will be, about.
        whole: Option<&'a str>,
    },
}

/// A part of a file that is run, and recorded, on its own.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Batch<'a> {
    pub(super) mode: Mode<'a>,
    pub(super) sql: &'a str,
}

/// Splits a file at its `-- batch` lines. What stands before the first one is a batch in a transaction.
pub(super) fn split(file: &str) -> Vec<Batch<'_>> {
    let mut batches = Vec::new();
    let mut rest = file;
    let mut mode = Mode::Transaction;
    loop {
        let mut length = 0;
        let next = rest.split_inclusive('\n').find_map(|line| {
            let found = directive(line).map(|mode| (mode, length + line.len()));
            if found.is_none() {
                length += line.len();
            }
            found
        });
        let (sql, _) = rest.split_at(length);
        if sql
            .lines()
            .map(str::trim)
            .any(|line| !line.is_empty() && !line.starts_with("--"))
        {
            batches.push(Batch { mode, sql });
        }
        let Some((next_mode, end)) = next else {
            return batches;
        };
        (mode, rest) = (next_mode, rest.split_at(end).1);
    }
}

/// The mode of the batch that begins with this line, if one does.
fn directive(line: &str) -> Option<Mode<'_>> {
    match line.trim() {
        "-- batch" => Some(Mode::Transaction),
        "-- batch outside transaction" => Some(Mode::OutsideTransaction),
        "-- batch repeat" => Some(Mode::Repeat { whole: None }),
        other => other
            .strip_prefix("-- batch repeat of ")
            .map(|whole| Mode::Repeat { whole: Some(whole) }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_is_split_into_batches() {
        let file = "-- why\ncreate table a ();\n-- batch outside transaction\ncreate index concurrently b on a (c);\n\
                    -- batch repeat\n-- batch repeat of select 3\nupdate a;\n-- batch\nselect 1;\nselect 2;";
        let batches = split(file);
        let expected = [
            (Mode::Transaction, "-- why\ncreate table a ();\n"),
            (
                Mode::OutsideTransaction,
                "create index concurrently b on a (c);\n",
            ),
            (
                Mode::Repeat {
                    whole: Some("select 3"),
                },
                "update a;\n",
            ),
            (Mode::Transaction, "select 1;\nselect 2;"),
        ];
        assert_eq!(batches, expected.map(|(mode, sql)| Batch { mode, sql }));
    }
}
