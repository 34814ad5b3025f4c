//! Whether a check is made. It always is, in the object that a gate carries: there this folds away.

use egress_ebpf::guard::Guard;

#[cfg(not(feature = "test-guards"))]
#[inline(always)]
pub const fn on(_guard: Guard) -> bool {
    true
}

/// Written by the loader before the program is loaded; read-only from then on.
#[cfg(feature = "test-guards")]
#[unsafe(no_mangle)]
static GUARDS_OFF: aya_ebpf::Global<u64> = aya_ebpf::Global::new(0);

#[cfg(feature = "test-guards")]
#[inline(always)]
pub fn on(guard: Guard) -> bool {
    GUARDS_OFF.load() & guard.bit() == 0
}
