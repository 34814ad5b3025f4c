//! The checks that a test build can leave out, one at a time, so that a test can show what each of them is for.
//!
//! Only the numbers are here. The object that a gate carries has no switch: there every check is a part of the program.

/// A check of the kernel program: a bit of the word that a test build's loader writes.
#[derive(Clone, Copy, PartialEq, Eq)]
#[repr(u32)]
pub enum Guard {
    /// The whole hook; off, it changes and refuses nothing. The next three likewise.
    Connect4 = 0,
    Connect6 = 1,
    Sendmsg4 = 2,
    Sendmsg6 = 3,
    /// That a socket is TCP or UDP, over IPv4 or IPv6.
    SocketKind = 4,
    /// The whole hook on packets that leave.
    Egress = 5,
    /// The whole hook on packets that arrive.
    Ingress = 6,
    /// That datagrams to port 53 go to the resolver, and no others anywhere.
    Dns = 7,
    /// That a leaf has an entry when it makes or connects a socket; off, one without may use the proxy.
    Entry = 8,
    Heartbeat = 9,
    Deadline = 10,
    /// That the profile has the address that a carried connection was meant for.
    Reach = 11,
    /// That a socket was made in the leaf that uses it.
    ForeignSocket = 12,
    /// The bound of connections of one leaf.
    FlowLimit = 13,
}

impl Guard {
    /// Its bit.
    pub const fn bit(self) -> u64 {
        1 << self as u32
    }
}
