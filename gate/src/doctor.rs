//! What the gate needs of a machine, looked at one thing at a time, with what to do about each fault.
//!
//! Nothing here needs a running gate or a privilege: what cannot be looked at is reported as not known.

use std::path::PathBuf;

use serde::Serialize;

use crate::config::Config;

mod attach;
mod files;
mod inflate;
mod kernel;

/// One thing that was looked at.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Check {
    pub name: String,
    pub state: State,
    /// What was found.
    pub found: String,
    /// What to do about it; where there is nothing to be done, nothing.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub todo: Option<String>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum State {
    Ok,
    /// It could not be looked at.
    Unknown,
    /// The gate works, with less.
    Warning,
    /// The gate does not start, or does not hold.
    Fault,
}

impl Check {
    pub fn ok(name: impl Into<String>, found: impl Into<String>) -> Self {
        Self { name: name.into(), state: State::Ok, found: found.into(), todo: None }
    }

    pub fn unknown(name: impl Into<String>, found: impl Into<String>) -> Self {
        Self { state: State::Unknown, ..Self::ok(name, found) }
    }

    pub fn warning(name: impl Into<String>, found: impl Into<String>, todo: impl Into<String>) -> Self {
        Self { state: State::Warning, todo: Some(todo.into()), ..Self::ok(name, found) }
    }

    pub fn fault(name: impl Into<String>, found: impl Into<String>, todo: impl Into<String>) -> Self {
        Self { state: State::Fault, todo: Some(todo.into()), ..Self::ok(name, found) }
    }
}

/// Looks at everything. `attach` loads and attaches the kernel program in a cgroup of its own for a moment.
pub fn examine(config: &Config, attach: bool) -> Vec<Check> {
    let mut checks = kernel::checks();
    checks.extend(files::checks(config));
    if attach {
        checks.push(attach::time_to_attach(config));
    }
    checks
}

/// Where a v2 hierarchy is mounted, and whether it can be written to.
fn cgroup_mounts() -> Vec<(PathBuf, bool)> {
    let text = std::fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
    let mount = |line: &str| {
        let (mount, filesystem) = line.split_once(" - ")?;
        let mut fields = mount.split(' ').skip(4);
        let (point, options) = (fields.next()?, fields.next()?);
        let is_v2 = filesystem.split(' ').next() == Some("cgroup2");
        is_v2.then(|| (PathBuf::from(point), options.split(',').any(|option| option == "rw")))
    };
    text.lines().filter_map(mount).collect()
}
