//! Files that nobody else may read or half-read.

use std::fs;
use std::io::{self, Write};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt};
use std::path::Path;

/// Creates `path` with mode 0600 and makes it durable; fails if anything, a symlink included, has that name already.
pub fn create_private(path: &Path, contents: &[u8]) -> io::Result<()> {
    let mut file = fs::OpenOptions::new().write(true).create_new(true).mode(0o600).open(path)?;
    file.write_all(contents)?;
    file.sync_all()?;
    if let Some(directory) = path.parent() {
        fs::File::open(directory)?.sync_all()?;
    }
    Ok(())
}

/// Makes `path` and what is missing above it, 0700, and refuses a directory that is a symlink, belongs to another uid,
/// or is open to others: whoever could swap it could swap what is in it.
///
/// # Errors
/// Name the path.
pub fn private_directory(path: &Path) -> io::Result<()> {
    make_private(path).map_err(|error| io::Error::new(error.kind(), format!("{}: {error}", path.display())))
}

fn make_private(path: &Path) -> io::Result<()> {
    match fs::symlink_metadata(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            if let Some(parent) = path.parent() {
                fs::DirBuilder::new().recursive(true).mode(0o700).create(parent)?;
            }
            match fs::DirBuilder::new().mode(0o700).create(path) {
                Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
                other => other?,
            }
        }
        Err(error) => return Err(error),
        Ok(_) => {}
    }
    let found = fs::symlink_metadata(path)?;
    let refuse = |why: &str| Err(io::Error::new(io::ErrorKind::PermissionDenied, why));
    if !found.is_dir() {
        return refuse("is not a directory (a symlink is not followed)");
    }
    if found.uid() != rustix::process::geteuid().as_raw() {
        return refuse("belongs to another user");
    }
    if found.mode() & 0o077 != 0 {
        return refuse("is open to others: chmod 700 it");
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_missing_above_a_private_directory_is_private_too() {
        let directory = tempfile::tempdir().expect("a temporary directory");
        let path = directory.path().join("a/b/c");
        private_directory(&path).expect("made");
        for made in [&path, path.parent().expect("b"), &directory.path().join("a")] {
            let mode = fs::metadata(made).expect("there").mode() & 0o777;
            assert_eq!(mode, 0o700, "{}", made.display());
        }
        private_directory(&path).expect("as it was left");
        fs::set_permissions(&path, std::os::unix::fs::PermissionsExt::from_mode(0o750)).expect("opened");
        assert!(private_directory(&path).is_err());
    }
}
