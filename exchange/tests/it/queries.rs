//! Every query in the source is one that the schema understands, before and after the contract.

use std::path::{Path, PathBuf};

use sqlx::{AssertSqlSafe, Executor, PgPool, SqlSafeStr};

use crate::servers::{Database, Postgres, V2};

/// Not written in the source: those of `personal` stand in the table `user_data`, of which a test of `migrate` runs every
/// one, and those of `migrate` in its files.
const MADE: &str = "AssertSqlSafe(";

#[tokio::test(flavor = "multi_thread")]
async fn the_schema_understands_every_query() {
    let database = Database::migrated_by(V2, Postgres::shared()).await;
    let db = PgPool::connect(&database.app_url).await.unwrap();
    let mut files = Vec::new();
    collect(&Path::new(env!("CARGO_MANIFEST_DIR")).join("src"), &mut files);
    let notification = include_str!("../../src/notification.rs");
    let (_, columns) = notification.split_once("macro_rules! columns").unwrap();
    let columns = columns.split('"').nth(1).unwrap();
    for phase in ["expand", "contract"] {
        let (succeeded, output) = database.migrate_by(V2, phase, &[]);
        assert!(succeeded, "{output}");
        let mut understood = 0;
        for file in &files {
            for query in queries(file, columns) {
                let prepared = db.prepare(AssertSqlSafe(query.clone()).into_sql_str()).await;
                assert!(
                    prepared.is_ok(),
                    "{} after {phase}: {}\n{query}",
                    file.display(),
                    prepared.unwrap_err()
                );
                understood += 1;
            }
        }
        assert!(understood > 90, "only {understood} queries");
    }
}

/// All files of a directory, and of those in it.
pub(crate) fn collect(directory: &Path, files: &mut Vec<PathBuf>) {
    for entry in std::fs::read_dir(directory).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            collect(&path, files);
        } else {
            files.push(path);
        }
    }
}

/// The queries of a file. One that is not written out where it is made fails the test.
fn queries(file: &Path, columns: &str) -> Vec<String> {
    let source = std::fs::read_to_string(file).unwrap();
    let mut queries = Vec::new();
    for call in ["query", "query_as", "query_scalar"] {
        for (at, _) in source.match_indices(&format!("sqlx::{call}(")) {
            let argument = source[at..].split_once('(').unwrap().1.trim_start();
            if argument.starts_with(MADE) {
                continue;
            }
            let query = if let Some(parts) = argument.strip_prefix("concat!(") {
                // Of literals, and of the columns that two modules share.
                let parts = parts.split("))").next().unwrap();
                let parts = parts.replace("columns!(),", &format!("{columns:?},"));
                parts.split('"').skip(1).step_by(2).collect()
            } else {
                let literal = argument.strip_prefix('"');
                let literal = literal.unwrap_or_else(|| panic!("{}: {argument:.60}", file.display()));
                literal.split('"').next().unwrap().to_owned()
            };
            assert!(!query.contains('\\'), "{}: {query}", file.display());
            queries.push(query);
        }
    }
    queries
}
