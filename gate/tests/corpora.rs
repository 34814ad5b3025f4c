//! Everything that a fuzz target was given, or has found, once more.
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test, and the checks that it shares with the targets")]

#[path = "../../fuzz/checks.rs"]
mod checks;

fn replay(target: &str, check: fn(&[u8])) {
    let directory = format!("{}/../fuzz/corpus/{target}", env!("CARGO_MANIFEST_DIR"));
    let mut files = 0;
    for file in std::fs::read_dir(directory).unwrap() {
        let data = std::fs::read(file.unwrap().path()).unwrap();
        check(&data);
        // And what is next to it: cut anywhere, and with a bit turned in each place.
        for at in 0..data.len() {
            check(&data[..at]);
            let mut other = data.clone();
            other[at] ^= 1 << (at % 8);
            check(&other);
        }
        files += 1;
    }
    assert!(files >= 5, "{target}: {files}");
}

#[test]
fn client_hello() {
    replay("client_hello", checks::client_hello);
}

#[test]
fn host() {
    replay("host", checks::host);
}

#[test]
fn http_head() {
    replay("http_head", checks::http_head);
}
