//! What the documents say of the tests is so.
#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

fn repository() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap().to_owned()
}

/// Names of the functions in this directory's Rust files that are tests, by their attribute.
fn tests_below(directory: &Path, found: &mut BTreeSet<String>) {
    for entry in fs::read_dir(directory).unwrap().flatten() {
        let path = entry.path();
        if path.is_dir() {
            tests_below(&path, found);
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            let mut is_test = false;
            for line in fs::read_to_string(&path).unwrap().lines().map(str::trim) {
                if line.starts_with("#[test]") || line.starts_with("#[tokio::test") {
                    is_test = true;
                } else if let Some((_, name)) = line.split_once("fn ").filter(|_| is_test) {
                    found.insert(name.split(['(', '<']).next().unwrap().to_owned());
                    is_test = false;
                } else if !line.starts_with("#[") && !line.starts_with("//") {
                    is_test = false;
                }
            }
        }
    }
}

/// The rows of every table whose last column is called `column`: their last cells.
fn cells(document: &str, column: &str) -> Vec<String> {
    let mut wanted = false;
    let mut cells = Vec::new();
    for line in document.lines() {
        let Some(row) = line.strip_prefix('|').and_then(|row| row.strip_suffix('|')) else {
            wanted = false;
            continue;
        };
        let last = row.rsplit('|').next().unwrap().trim();
        if last == column {
            wanted = true;
        } else if wanted && !last.starts_with("---") {
            cells.push(last.to_owned());
        }
    }
    cells
}

fn names_in(cell: &str) -> Vec<&str> {
    cell.split('`').skip(1).step_by(2).collect()
}

#[test]
fn every_test_that_the_threat_model_names_exists() {
    let root = repository();
    let mut tests = BTreeSet::new();
    for directory in ["tests/tests", "tests/src", "gate/src", "gate/tests"] {
        tests_below(&root.join(directory), &mut tests);
    }
    assert!(tests.len() > 300 && tests.contains("every_test_that_the_threat_model_names_exists"), "{}", tests.len());
    let document = fs::read_to_string(root.join("docs/threat-model.md")).unwrap();
    let cells = cells(&document, "Shown by");
    assert!(cells.len() > 20, "{}", cells.len());
    for cell in &cells {
        let names = names_in(cell);
        assert!(!names.is_empty(), "`{cell}` names no test");
        for name in names {
            assert!(tests.contains(name), "docs/threat-model.md names the test `{name}`, which is not in the tree");
        }
    }
}

#[test]
fn a_name_that_is_only_a_word_or_a_plain_function_is_no_test() {
    let document =
        "| a | Shown by |\n|---|---|\n| x | `first`, `second` |\n\n| b | other |\n|---|---|\n| y | `third` |\n";
    let found = cells(document, "Shown by");
    assert_eq!(found, ["`first`, `second`"]);
    assert_eq!(names_in(&found[0]), ["first", "second"]);
    let mut tests = BTreeSet::new();
    tests_below(&repository().join("tests/tests"), &mut tests);
    assert!(!tests.contains("tests_below") && !tests.contains("cells"));
}
