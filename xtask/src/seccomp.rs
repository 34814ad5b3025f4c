//! The seccomp profile of the gate's container, from the list in `deploy/seccomp/syscalls.txt`.

use std::fs;
use std::path::{Path, PathBuf};

use serde_json::{Value, json};

/// `CLONE_NEW…` of linux/sched.h: namespaces of every kind.
const CLONE_NAMESPACES: u64 = 0x7e02_0000;
const AF_VSOCK: u64 = 40;
/// Execution domains that a program may ask for (linux/personality.h): Linux, 32-bit Linux, each with UNAME26; and the
/// question what it is.
const PERSONALITIES: [u64; 5] = [0, 8, 0x2_0000, 0x2_0008, 0xffff_ffff];

fn directory() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../deploy/seccomp")
}

/// Writes the profile.
pub fn write() -> Result<String, String> {
    let (path, text) = made()?;
    fs::write(&path, text).map_err(|error| format!("{}: {error}", path.display()))?;
    Ok(format!("wrote {}", path.display()))
}

/// Says whether the profile is the one that the list makes.
pub fn check() -> Result<String, String> {
    let (path, text) = made()?;
    let found = fs::read_to_string(&path).map_err(|error| format!("{}: {error}", path.display()))?;
    if found == text {
        Ok("the seccomp profile is that of the list".to_owned())
    } else {
        Err(format!("{} is not what the list makes: cargo xtask seccomp", path.display()))
    }
}

fn made() -> Result<(PathBuf, String), String> {
    let list = directory().join("syscalls.txt");
    let text = fs::read_to_string(&list).map_err(|error| format!("{}: {error}", list.display()))?;
    let profile = profile(&text).map_err(|error| format!("{}: {error}", list.display()))?;
    let text = serde_json::to_string_pretty(&profile).map_err(|error| error.to_string())?;
    Ok((directory().join("latchgate.json"), text + "\n"))
}

/// The profile as the OCI runtime specification has it (`linux.seccomp` of config.json), which the kubelet, containerd,
/// CRI-O and Docker read alike.
fn profile(list: &str) -> Result<Value, String> {
    let (mut default, mut extra, mut section) = (Vec::new(), Vec::new(), "");
    for line in list.lines().map(str::trim).filter(|line| !line.is_empty() && !line.starts_with('#')) {
        match (section, line.split_once(" = ")) {
            (_, None) if line.starts_with('[') => section = line,
            ("[default]", None) => default.extend(line.split_whitespace()),
            ("[extra]", Some((name, reason))) if !reason.trim().is_empty() => extra.push((name, reason)),
            _ => return Err(format!("`{line}`: a name of [default], or `name = reason` of [extra]")),
        }
    }
    let mut names: Vec<&str> = default.iter().copied().chain(extra.iter().map(|(name, _)| *name)).collect();
    if let Some(bounded) = names.iter().find(|name| matches!(**name, "clone" | "socket" | "personality")) {
        return Err(format!("{bounded} is bounded by its arguments and cannot be listed"));
    }
    names.sort_unstable();
    if let Some(twice) = names.windows(2).find(|pair| pair[0] == pair[1]) {
        return Err(format!("{} is there twice", twice[0]));
    }
    let argument = |value: u64, other: u64, operator: &str| json!([{"index": 0, "value": value, "valueTwo": other, "op": operator}]);
    let allow = |names: &[&str]| json!({"names": names, "action": "SCMP_ACT_ALLOW"});
    let bounded =
        |name: &str, arguments: Value| json!({"names": [name], "action": "SCMP_ACT_ALLOW", "args": arguments});
    let mut calls = vec![
        allow(&default),
        bounded("clone", argument(CLONE_NAMESPACES, 0, "SCMP_CMP_MASKED_EQ")),
        bounded("socket", argument(AF_VSOCK, 0, "SCMP_CMP_NE")),
    ];
    calls.extend(PERSONALITIES.map(|value| bounded("personality", argument(value, 0, "SCMP_CMP_EQ"))));
    for (name, reason) in extra {
        let mut call = allow(&[name]);
        call["comment"] = json!(reason);
        calls.push(call);
    }
    Ok(json!({
        "defaultAction": "SCMP_ACT_ERRNO",
        // EPERM.
        "defaultErrnoRet": 1,
        // No 32-bit programs: the filter of a sandbox has none either.
        "architectures": ["SCMP_ARCH_X86_64", "SCMP_ARCH_AARCH64"],
        "syscalls": calls,
    }))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_extra_call_has_a_reason_and_none_is_there_twice() {
        let good = "[default]\nread write\n[extra]\nbpf = loads\n";
        let calls = profile(good).unwrap()["syscalls"].as_array().unwrap().clone();
        assert_eq!(calls[0]["names"], json!(["read", "write"]));
        assert_eq!(calls.last().unwrap()["comment"], "loads");
        for bad in [
            "[extra]\nbpf\n",
            "[extra]\nbpf = \n",
            "[default]\nread\n[extra]\nread = again\n",
            "read\n",
            "[default]\nclone\n",
            "[extra]\nsocket = all of them\n",
        ] {
            assert!(profile(bad).is_err(), "{bad:?}");
        }
    }

    #[test]
    fn the_profile_is_that_of_the_list() {
        check().unwrap();
    }
}
