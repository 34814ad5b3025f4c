//! What the kernel says that it can do, asked without doing it.
#![allow(unsafe_code)] // system calls that no crate of ours asks with.

use std::io;

/// The version of Landlock (landlock_create_ruleset(2), LANDLOCK_CREATE_RULESET_VERSION).
///
/// # Errors
/// ENOSYS where the kernel has none, EOPNOTSUPP where it is not switched on.
pub fn landlock_version() -> io::Result<i64> {
    const VERSION: libc::c_long = 1;
    // SAFETY: with this flag the kernel takes no structure.
    let version =
        unsafe { libc::syscall(libc::SYS_landlock_create_ruleset, std::ptr::null::<libc::c_void>(), 0_usize, VERSION) };
    if version < 0 { Err(io::Error::last_os_error()) } else { Ok(version) }
}

/// Whether filters of system calls are there and can refuse with an errno (seccomp(2), SECCOMP_GET_ACTION_AVAIL).
///
/// # Errors
/// What the kernel says: EINVAL and ENOSYS where there are none, EOPNOTSUPP where the action is not.
pub fn seccomp_refuses() -> io::Result<()> {
    let action: u32 = libc::SECCOMP_RET_ERRNO;
    // SAFETY: the kernel reads four bytes.
    let asked = unsafe { libc::syscall(libc::SYS_seccomp, libc::SECCOMP_GET_ACTION_AVAIL, 0, &raw const action) };
    if asked < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// Whether the kernel says that its clock is set by something (adjtimex(2), STA_UNSYNC).
pub fn clock_is_synchronised() -> bool {
    // SAFETY: plain data; without modes the call changes nothing and fills the structure.
    unsafe {
        let mut state: libc::timex = std::mem::zeroed();
        libc::adjtimex(&raw mut state) >= 0 && state.status & libc::STA_UNSYNC == 0
    }
}
